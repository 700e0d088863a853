"""A network in PyTorch and, in PyTorch's orders, in JAX: the same bits, and each planted mistake is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer.testing
from flax import nnx

from bridge import Verdict, cli
from bridge.accumulation import Tree
from bridge.model import model_parity, same_bits_parity
from bridge.model.record import ModelReport
from bridge.report.model import model_html, remarks, summary, why
from jaxdw import native
from tests.references import pair

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())


def noise(seed, batch=2, size=32):
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3), np.float32)


@pytest.fixture(scope="module")
def small(request):
    return pair("torchvision.mobilenet_v2", request.config.option.seed, 0.35)


def check(found):
    """Every result has PyTorch's bits, or is named and explained; then the logits have them too."""
    for layer in found.layers:
        assert layer.verdict.rank() <= Verdict.EXPLAINED.rank(), f"{layer.name}: {why(layer)}"
    assert list(found.replaced) == [each.name for each in found.layers if each.verdict is not Verdict.IDENTICAL]
    if not found.replaced:
        assert found.verdict is Verdict.IDENTICAL and found.logits.different == found.different == 0
    assert not found.left and not found.not_compared and found.verdict.exit_code == 0


LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(scope="module")
def clean(small, request):
    """The result for the layout that the seed draws."""
    theirs, ours, manifest = small
    seed = request.config.option.seed
    with jax.numpy_dtype_promotion("strict"):
        return same_bits_parity(theirs, ours, noise(seed), manifest, layout=LAYOUTS[seed % 2], name="a small V2")


def test_every_result_has_pytorchs_bits(clean, seed):
    check(clean)
    assert clean.layout == LAYOUTS[seed % 2] and len(clean.layers) == 151
    sums = {layer.name for layer in clean.layers if layer.kind in ("pointwise", "convolution", "linear", "mean")}
    assert {layer.name for layer in clean.layers if layer.orders} == sums


def test_the_other_layout_has_pytorchs_bits_too(small, seed, full):
    if not full:
        pytest.skip("the other layout was drawn")
    theirs, ours, manifest = small
    check(same_bits_parity(theirs, ours, noise(seed), manifest, layout=LAYOUTS[1 - seed % 2]))


@pytest.mark.parametrize(
    ("number", "name", "width", "layout"),
    [
        (0, "torchvision.mobilenet_v3_small", 0.5, "channels_last"),
        (1, "transformers.mobilenet_v1", 0.35, "contiguous"),
        (2, "timm.mobilenet_v3_large", 1.0, "channels_last"),
    ],
)
def test_other_networks_have_pytorchs_bits(number, name, width, layout, seed, full):
    if not full and number != seed % 3:
        pytest.skip("another network was drawn")
    theirs, ours, manifest = pair(name, seed, width)
    check(same_bits_parity(theirs, ours, noise(seed, 1), manifest, layout=layout))


def plant(model):
    """Plant five mistakes in a copy of a V2 of width 0.35: each is too small to see, or does not show in inference."""
    wrong = nnx.clone(model)
    kernel = wrong.blocks[3].expand.conv.kernel
    value = kernel[...][2, 5]
    kernel[...] = kernel[...].at[2, 5].set(jnp.nextafter(value, jnp.inf))
    wrong.blocks[5].depthwise.norm.epsilon += 1e-9
    first, second = wrong.blocks[8].project.conv.kernel, wrong.blocks[9].project.conv.kernel
    first[...], second[...] = second[...], first[...]
    wrong.blocks[10].expand.activation = nnx.relu
    wrong.blocks[12].project.norm.momentum = 1 - wrong.blocks[12].project.norm.momentum
    return wrong


PLANTED = {
    "blocks.3.expand.conv": (
        Verdict.BUG,
        "weight has other bits in 1 of 384 elements, by at most 1 ULP; the first is (5, 2",
    ),
    "blocks.5.depthwise.norm": (Verdict.CONVENTION, "epsilon is 1.0001e-05 in JAX"),
    "blocks.8.project.conv": (Verdict.BUG, ""),
    "blocks.9.project.conv": (Verdict.BUG, ""),
    "blocks.10.expand.relu": (Verdict.CONVENTION, "JAX computes relu where PyTorch computes relu6"),
    "blocks.12.project.norm": (
        Verdict.CONVENTION,
        "in training JAX gives new statistics the weight 0.9, PyTorch 0.1; ",
    ),
}


@pytest.mark.parametrize("compare", [same_bits_parity, model_parity])
def test_planted_mistakes_are_found_and_the_first_is_named(compare, small, seed):
    theirs, ours, manifest = small
    with jax.numpy_dtype_promotion("strict"):
        found = compare(theirs, plant(ours), noise(seed), manifest)
    wrong = {layer.name: layer for layer in found.layers if layer.is_wrong}
    assert list(wrong) == list(PLANTED)
    for name, (verdict, said) in PLANTED.items():
        assert wrong[name].verdict is verdict and said in why(wrong[name]), why(wrong[name])
    assert found.first_wrong.name == "blocks.3.expand.conv" and found.verdict.exit_code == 1
    if compare is same_bits_parity:  # every other result has PyTorch's bits, since the program went on from PyTorch's
        others = [layer for layer in found.layers if layer.name not in PLANTED]
        assert all(layer.verdict.rank() <= Verdict.EXPLAINED.rank() for layer in others)


def test_the_report_has_orders_layout_and_shares(clean):
    record = ModelReport.of(clean)
    read = ModelReport.model_validate_json(record.to_json())
    assert read == record and json.loads(record.to_json())["schema"] == "jaxdw.model/4"
    assert read.same_bits and read.layout == clean.layout and read.replaced == list(clean.replaced)
    assert all(key in read.environment for key in ("torch", "jax", "processor"))
    head = next(layer for layer in read.layers if layer.name == "head.conv")
    assert all(len(Tree.parse(text).leaves) == 112 for text in head.trees["PyTorch"])
    assert f"{clean.logits.different} of 14 logits have other bits" in summary(clean)
    assert head.orders["PyTorch"] in model_html(clean, command="jaxdw model")
    assert len(remarks(clean)) == len(clean.replaced)


def test_the_command_takes_layout_and_batch(tmp_path, seed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["model", "torchvision.mobilenet_v2", "--size", "32", "--width", "0.25", "--random-seed", str(seed)]
    words += ["--same-bits", "--layout", "channels_last", "--batch", "2", "--json", str(tmp_path / "out.json")]
    result = typer.testing.CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    report = ModelReport.model_validate_json((tmp_path / "out.json").read_text())
    assert report.images == (2, 32, 32, 3) and report.layout == "channels_last" and report.same_bits
    assert [path.name[:7] for path in (tmp_path / "cache" / "jaxdw").iterdir()] == ["orders-"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layout", "nhwc"], "`layout` is 'nhwc', expected one of contiguous, channels_last"),
        (["--same-bits", "--gradients"], "`same_bits` compares inference alone, expected no --gradients"),
        (["--batch", "2", "--image", "a.npy"], "`batch` is 2, expected none with --image"),
    ],
)
def test_unusable_options_are_refused(options, said):
    result = typer.testing.CliRunner().invoke(cli.app, ["model", "mobilenet_v2", "--size", "32", *options])
    assert isinstance(result.exception, ValueError) and said in str(result.exception)
