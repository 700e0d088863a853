"""The ports in examples/ports/ against the originals: clean ones pass, and the place of a planted mistake is named."""

import functools
import importlib

import jax
import pytest
import typer.testing
from flax import nnx

import bridge
from bridge import Verdict, cli
from bridge.libraries import import_library
from bridge.model import same_bits_parity
from bridge.report.model import summary, why
from tests.bridge.model.plants import chosen
from tests.bridge.model.plants_of_ports import OWN

for library in ("timm", "torchvision", "transformers"):
    try:
        import_library(library)
    except ImportError:
        pytest.skip(f"{library} is not installed: pip install 'jaxdw[models]'", allow_module_level=True)

RUNNER = typer.testing.CliRunner()

PORTS = sorted(OWN)
#: Mistakes per port.
COUNT = 40
#: The sample has the data of this seed; the run's own seed draws ports and mistakes.
DATA_SEED = 2


@pytest.fixture(autouse=True)
def customary():
    """The ranks and dtypes of users' code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def _made(name, seed):
    """Return a port's module, what its factory makes, and its plants."""
    port = importlib.import_module(f"examples.ports.{name}")
    made = port.mini(seed)
    return port, made, chosen(port, OWN[name](), made[1], [made[2]], COUNT)


def _is_drawn(name, seed, full):
    small = [each for each in PORTS if each != "resnet"]  # the orders of its wide sums take half a minute
    return full or name in (small[seed % len(small)], small[(seed // 8 + 4) % len(small)])


@pytest.mark.parametrize("name", PORTS)
def test_a_port_passes(name, seed, full):
    if not _is_drawn(name, seed, full):
        pytest.skip("other ports were drawn")
    _, (theirs, ours, inputs, manifest), _ = _made(name, seed if full else DATA_SEED)
    found = bridge.model_parity(theirs, ours, inputs, manifest)
    assert found.verdict.passes and not found.left and not found.not_compared, summary(found)


#: What has no defined bits in a port.
UNDEFINED = {
    "convnext": {"layer norm", "gelu"},
    "efficientnet": set(),
    "mamba": {"exp", "matrix product", "mean", "multiply", "multiply and then multiply", "rsqrt", "softplus"},
    "mixer": {"layer norm", "gelu"},
    "mobilenetv4": set(),
    "poolformer": {"average pool", "gelu", "group norm", "layer norm"},
    "regnet": set(),
    "resnet": {"convolution"},  # images of one pixel show no order
    "vit": {"attention", "gelu", "layer norm"},
}


@pytest.mark.parametrize("name", PORTS)
def test_a_port_has_the_bits_of_the_original(name, seed, full):
    """Or it is named what has not."""
    if not _is_drawn(name, seed, full):
        pytest.skip("other ports were drawn")
    _, (theirs, ours, inputs, manifest), _ = _made(name, seed if full else DATA_SEED)
    found = same_bits_parity(theirs, ours, inputs, manifest)
    assert found.verdict.passes and not found.left and not found.not_compared, summary(found)
    assert {layer.kind for layer in found.layers if layer.name in found.replaced} <= UNDEFINED[name]
    if not UNDEFINED[name]:
        assert found.verdict is Verdict.IDENTICAL and not found.logits.different


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("name", PORTS)
def test_a_planted_mistake_is_the_first_that_is_wrong_and_its_cause_is_named(name, number, seed, full, monkeypatch):
    if not _is_drawn(name, seed, full) or (not full and number % 20 != seed % 20):
        pytest.skip("other mistakes were drawn")
    _, (theirs, ours, inputs, manifest), plants = _made(name, seed if full else DATA_SEED)
    plant, model = plants[number], nnx.clone(ours)
    plant.change(model, monkeypatch)
    first = bridge.model_parity(theirs, model, inputs, manifest).first_wrong
    assert first is not None, f"{plant} passed"
    said = f"{plant}: {first.name} {first.verdict.name}: {why(first)}"
    assert first.name.startswith(plant.where) and first.verdict in plant.verdicts, said
    assert any(words in why(first) for words in plant.said), said


def test_the_command_takes_a_function_that_makes_both(tmp_path):
    result = RUNNER.invoke(cli.app, ["model", "examples.ports.vit:mini", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert '"verdict": "ROUNDING"' in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["examples.ports.vit:none"], "has no function 'none'"),
        (["no_such_package:mini"], "cannot be imported"),
        (["examples.ports.common:timm"], "expected (torch_module, jax_model, inputs)"),
        (["examples.ports.vit:mini", "--size", "96"], "expected no --size"),
    ],
)
def test_an_unusable_function_is_refused(words, said):
    result = RUNNER.invoke(cli.app, ["model", *words])
    assert result.exit_code != 0 and said in " ".join((result.output + str(result.exception)).split())
