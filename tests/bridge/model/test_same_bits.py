"""A network in PyTorch and, in PyTorch's orders, in JAX: the same bits, and each planted mistake is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import typer.testing
from flax import nnx

from bridge import Verdict, cli
from bridge.accumulation import Tree
from bridge.model import model_parity, same_bits_parity
from bridge.model.record import ModelReport
from bridge.report.model import model_html, remarks, summary, why
from jaxdw import native
from jaxdw.models import MobileNet
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


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "width", "layout"),
    [
        ("torchvision.mobilenet_v3_small", 0.5, "channels_last"),
        ("transformers.mobilenet_v1", 0.35, "contiguous"),
        ("timm.mobilenet_v3_large", 1.0, "channels_last"),
    ],
)
def test_other_networks_have_pytorchs_bits(name, width, layout, seed):
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


def test_planted_mistakes_are_found_and_the_first_is_named(small, seed, full):
    theirs, ours, manifest = small
    both = [same_bits_parity, model_parity]
    for compare in both if full else [both[seed % 2]]:
        with jax.numpy_dtype_promotion("strict"):
            found = compare(theirs, plant(ours), noise(seed), manifest)
        assert_that_all_are_named(found, compare is same_bits_parity)


def assert_that_all_are_named(found, has_pytorchs_bits):
    wrong = {layer.name: layer for layer in found.layers if layer.is_wrong}
    assert list(wrong) == list(PLANTED)
    for name, (verdict, said) in PLANTED.items():
        assert wrong[name].verdict is verdict and said in why(wrong[name]), why(wrong[name])
    assert found.first_wrong.name == "blocks.3.expand.conv" and found.verdict.exit_code == 1
    if has_pytorchs_bits:  # every other result, since the program went on from PyTorch's
        others = [layer for layer in found.layers if layer.name not in PLANTED]
        assert all(layer.verdict.rank() <= Verdict.EXPLAINED.rank() for layer in others)


class Mixed(torch.nn.Module):
    """Convolutions of one group, of four and of one channel each, a gate, and a block without defined bits."""

    def __init__(self, has_block):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.grouped = torch.nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.depthwise = torch.nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.reduce, self.expand = torch.nn.Conv2d(24, 6, 1), torch.nn.Conv2d(6, 24, 1)
        self.block = torch.nn.LayerNorm(24) if has_block else None
        self.head = torch.nn.Linear(24, 5)

    def forward(self, x):
        silu = torch.nn.functional.silu
        y = self.grouped(silu(self.norm(self.stem(x))))
        z = silu(self.depthwise(y))
        gate = torch.sigmoid(self.expand(silu(self.reduce(z.mean((2, 3), keepdim=True)))))
        y = y + z * gate
        if self.block is not None:
            y = torch.nn.functional.gelu(self.block(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(y.mean((2, 3)))


def mixed(p, x):
    """The port of `Mixed`, a function of its parameters by name."""

    def conv(name, x, stride=1, padding=0, groups=1):
        dims, pads = ("NHWC", "OIHW", "NHWC"), [(padding, padding)] * 2
        made = jax.lax.conv_general_dilated(
            x, p[f"{name}.weight"], (stride, stride), pads, dimension_numbers=dims, feature_group_count=groups
        )
        return made + p[f"{name}.bias"]

    x = conv("stem", x, 2, 1)
    x = (x - p["norm.running_mean"]) * jax.lax.rsqrt(p["norm.running_var"] + 1e-5) * p["norm.weight"] + p["norm.bias"]
    y = conv("grouped", jax.nn.silu(x), 1, 1, 4)
    z = jax.nn.silu(conv("depthwise", y, 1, 3, 24))
    gate = jax.nn.sigmoid(conv("expand", jax.nn.silu(conv("reduce", z.mean((1, 2), keepdims=True)))))
    y = y + z * gate
    if "block.weight" in p:
        centred = y - y.mean(-1, keepdims=True)
        y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["block.weight"] + p["block.bias"]
        y = jax.nn.gelu(y, approximate=False)
    return y.mean((1, 2)) @ p["head.weight"].T + p["head.bias"]


def mixed_pair(seed, has_block=False):
    """`Mixed` with random weights, and its port with them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Mixed(has_block).eval()
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 2) if name.endswith("var") else tensor.normal_()
    numbers = {name: jnp.asarray(tensor.numpy()) for name, tensor in module.state_dict().items() if tensor.ndim}
    return module, (mixed, numbers)


@pytest.fixture
def customary():
    """The ranks and dtypes of users' code."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [15, 32])
def test_any_port_has_pytorchs_bits(size, layout, seed, full, customary):
    """Sizes of which some elements fill no vector, and groups, and a bias that PyTorch adds last in one layout."""
    if not full and (size, layout) != ((15, 32)[seed % 2], LAYOUTS[seed // 2 % 2]):
        pytest.skip("another case was drawn")
    found = same_bits_parity(*mixed_pair(seed), noise(seed, 2, size), layout=layout)
    check(found)
    assert found.verdict is Verdict.IDENTICAL and len(found.layers) >= 14


def test_what_has_no_defined_bits_is_named_and_all_else_has_them(seed, customary):
    found = same_bits_parity(*mixed_pair(seed, True), noise(seed, 1, 15))
    assert found.verdict in (Verdict.ROUNDING, Verdict.IDENTICAL) and not found.left and not found.not_compared
    kinds = {layer.name: layer.kind for layer in found.layers}
    assert {kinds[name] for name in found.replaced} <= {"layer norm", "gelu"}
    said = "neither an order nor the roundings of PyTorch's layer norm are defined; the program went on from PyTorch's"
    assert any(said in line for line in remarks(found)) == ("layer norm" in {kinds[name] for name in found.replaced})


def test_a_mistake_in_any_port_is_named(seed, customary):
    module, (function, p) = mixed_pair(seed)
    kernel = p["grouped.weight"]
    p["grouped.weight"] = kernel.at[3, 1, 0, 2].set(jnp.nextafter(kernel[3, 1, 0, 2], jnp.inf))
    found = same_bits_parity(module, (function, p), noise(seed, 1, 15))
    wrong = [layer for layer in found.layers if layer.is_wrong]
    assert [layer.name for layer in wrong] == ["grouped"] and wrong[0].verdict is Verdict.BUG
    assert "the exact results differ" in why(wrong[0])
    others = [layer for layer in found.layers if layer.name != "grouped"]
    assert all(layer.verdict.rank() <= Verdict.EXPLAINED.rank() for layer in others)


def test_the_model_of_its_user_has_the_arithmetic_too(small, seed, monkeypatch):
    """A model that ignores the orders, which it was given, has other logits; that is a BUG."""
    theirs, ours, manifest = small
    given = []
    monkeypatch.setattr(MobileNet, "with_arithmetic", lambda self, arithmetic: given.append(arithmetic) or self)
    found = same_bits_parity(theirs, ours, noise(seed), manifest, layout=LAYOUTS[seed % 2])
    sums = {
        layer.name
        for layer in found.layers
        if layer.kind in ("pointwise", "convolution", "linear", "mean")
        and not layer.orders["PyTorch"].startswith("channels ")  # several orders, which no layer takes
    }
    if not found.replaced:
        assert set(given[0].orders) == sums and found.logits.different and found.verdict is Verdict.BUG


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


def test_the_command_takes_layout_and_batch(tmp_path, seed, monkeypatch, clean, full):
    def compare(module, model, images, manifest, *, layout, known, name, track):
        assert images.shape == (2, 32, 32, 3) and layout == "channels_last" and "torchvision.mobilenet_v2" in name
        return clean

    if not full:
        monkeypatch.setattr("bridge.model.same_bits_parity", compare)
    words = ["model", "torchvision.mobilenet_v2", "--size", "32", "--width", "0.25", "--random-seed", str(seed)]
    words += ["--same-bits", "--layout", "channels_last", "--batch", "2", "--json", str(tmp_path / "out.json")]
    result = typer.testing.CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    report = ModelReport.model_validate_json((tmp_path / "out.json").read_text())
    assert report.images == (2, 32, 32, 3) and report.same_bits and (not full or report.layout == "channels_last")


def test_orders_that_the_command_reveals_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = typer.testing.CliRunner().invoke(cli.app, ["model", "examples.ports.mixer:mini", "--same-bits"])
    assert result.exit_code == 0, result.output
    assert [path.name[:7] for path in (tmp_path / "jaxdw").iterdir()] == ["orders-"]


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
