"""Whole models compared: clean twins pass, a planted mistake is named where it is."""

import collections
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from rich.console import Console

import jaxdw.models
from bridge import Verdict
from bridge.model import model_parity
from bridge.model.operation_verdicts import judge
from bridge.model.operations import Operation
from bridge.model.record import ModelReport
from bridge.report.model import growth_chart, model_html, print_model, summary, why
from jaxdw.models.blocks import ConvNormAct, relu6
from tests.references import pair


def noise(seed, size=32):
    return np.random.default_rng(seed).standard_normal((1, size, size, 3), np.float32)


def skip_unless_drawn(number, seed, full):
    """A sampled run takes one of three further networks: each compiles about a hundred operations."""
    if not full and number != seed % 3:
        pytest.skip("another network was drawn")


@pytest.fixture(scope="module")
def small(request):
    """One pair for the tests that plant nothing or undo it, and its images."""
    seed = request.config.option.seed
    return *pair("torchvision.mobilenet_v2", seed, 0.25), noise(seed)


@pytest.fixture(scope="module")
def clean(small):
    with jax.numpy_dtype_promotion("strict"):
        theirs, ours, manifest, images = small
        return model_parity(theirs, ours, images, manifest, name="a small V2")


class OwnCall(ConvNormAct):
    """A part that computes something more."""

    def __call__(self, x):
        return super().__call__(x) + 1


@pytest.fixture(scope="module")
def planted(small):
    """The parity of the pair with mistakes in eight places of the Flax model, one in a part with a call of its own."""
    theirs, ours, manifest, images = small
    wrong = nnx.clone(ours)
    kernel = wrong.blocks[2].depthwise.conv.kernel
    kernel[...] = kernel[...][::-1, ::-1]
    wrong.blocks[3].depthwise.norm.epsilon = 1e-3
    kernel = wrong.blocks[4].project.conv.kernel
    kernel[...] = kernel[...].at[:, :2].set(kernel[...][:, 1::-1])
    kernel = wrong.blocks[5].expand.conv.kernel
    kernel[...] = kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    wrong.blocks[6].project.activation = nnx.relu
    wrong.blocks[7].depthwise.activation = None
    wrong.blocks[9].depthwise.__class__ = OwnCall
    wrong.head.activation = nnx.relu
    with jax.numpy_dtype_promotion("strict"):
        return model_parity(theirs, wrong, images, manifest)


def test_every_operation_of_a_twin_is_rounding_or_stronger(clean):
    assert clean.verdict.passes and clean.verdict.exit_code == 0
    assert not clean.left and not clean.not_compared and clean.first_wrong is None
    kinds = collections.Counter(layer.kind for layer in clean.layers)
    assert kinds == {
        "convolution": 1,
        "depthwise": 17,
        "pointwise": 34,
        "batch norm": 52,
        "relu6": 35,
        "add": kinds["add"],
        "mean": 1,
        "linear": 1,
    }
    assert all(max(layer.isolated.own_bound_ratios) <= 1 for layer in clean.layers)
    assert "only rounding" in summary(clean)


def test_replays_explain_all_differing_elements_of_sums_and_normalizations(clean):
    for layer in clean.layers:
        if layer.kind in ("pointwise", "convolution", "linear", "mean", "batch norm"):
            assert layer.verdict.rank() <= Verdict.EXPLAINED.rank(), f"{layer.name}: {why(layer)}"
            assert layer.isolated.explained in (None, layer.isolated.different)
    assert clean.explained == clean.different > 0
    assert f"Replays explain {clean.explained:,} of {clean.different:,} differing elements (100%)" in summary(clean)


def test_a_function_without_a_bound_has_its_distance_to_the_nearest_number():
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 8)).astype(np.float32)
    y = (x / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    silu = Operation("silu", "", (x,), y, {}, {})
    assert judge(silu, y).verdict is Verdict.IDENTICAL
    said = "no bound is known for silu; JAX is within 1 ULP and PyTorch is within 0 ULP of the correctly rounded result"
    assert judge(silu, np.nextafter(y, np.float32(np.inf))) == said


def test_relu6_is_exact_and_growth_starts_at_the_first_difference(clean):
    assert {layer.verdict for layer in clean.layers if layer.kind == "relu6"} == {Verdict.IDENTICAL}
    first = clean.layers[0]
    assert first.amplification is None and (first.growth == 0) == (first.verdict is Verdict.IDENTICAL)


@pytest.mark.parametrize(
    ("layer", "verdict", "said"),
    [
        ("blocks.2.depthwise.conv", Verdict.CONVENTION, "flip"),
        ("blocks.3.depthwise.norm", Verdict.CONVENTION, "epsilon is 0.001 in JAX, and 1e-05 in PyTorch"),
        ("blocks.4.project.conv", Verdict.CONVENTION, "0 is PyTorch's 1, 1 is PyTorch's 0"),
        ("blocks.5.expand.conv", Verdict.BUG, "features.6.conv.0.0.weight, rounded to bfloat16"),
        ("blocks.6.project.relu", Verdict.CONVENTION, "JAX computes relu where PyTorch computes nothing; "),
        ("blocks.7.depthwise.relu6", Verdict.CONVENTION, "JAX computes nothing where PyTorch computes relu6; "),
        ("blocks.9.depthwise.add", Verdict.CONVENTION, "JAX computes add where PyTorch computes nothing; "),
        ("head.relu", Verdict.CONVENTION, "JAX computes relu where PyTorch computes relu6; all elements agree"),
    ],
)
def test_a_planted_mistake_is_found_where_it_is(planted, layer, verdict, said):
    found = next(each for each in planted.layers if each.name == layer)
    assert found.verdict is verdict
    assert said in why(found)


def test_nothing_else_is_wrong_and_the_first_is_named(planted):
    wrong = [layer.name for layer in planted.layers if layer.isolated and not layer.verdict.passes]
    assert wrong == [
        "blocks.2.depthwise.conv",
        "blocks.3.depthwise.norm",
        "blocks.4.project.conv",
        "blocks.5.expand.conv",
        "blocks.6.project.relu",
        "blocks.7.depthwise.relu6",
        "blocks.9.depthwise.add",
        "head.relu",
    ]
    assert planted.first_wrong.name == wrong[0] and planted.first_wrong.torch == "features.3.conv.1.0"
    assert f"first that is wrong is {wrong[0]} (features.3.conv.1.0 in PyTorch)" in summary(planted)
    assert "only rounding" not in summary(planted)
    assert planted.verdict is Verdict.BUG and planted.verdict.exit_code == 1


def test_every_operation_is_compared_also_after_wrong_ones(planted):
    assert not planted.not_compared and not planted.left
    assert [layer.name for layer in planted.layers[-3:]] == ["head.relu", "mean", "classifier"]


class Composed(torch.nn.Module):
    """An activation of several operations."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def lower_relu(x):
    """ReLU to the bit on every image here."""
    return jnp.clip(x, 0, 1000)


#: Of torchvision's V3 small: where in either model what is put, and what the row of which operation says of it.
ACTIVATIONS = [
    ("ours.stem.activation", nnx.swish, "stem.silu", "JAX computes silu where PyTorch computes hard swish"),
    ("ours.blocks.0.squeeze_excite.gate", nnx.sigmoid, "excite.sigmoid", "sigmoid where PyTorch computes hard sigmoid"),
    ("ours.blocks.1.expand.activation", relu6, "expand.relu6", "JAX computes relu6 where PyTorch computes relu"),
    (
        "ours.blocks.2.depthwise.activation",
        lower_relu,
        "depthwise.min",
        "JAX computes clip to [0, 1000] where PyTorch computes relu; all elements agree",
    ),
    ("ours.blocks.3.squeeze_excite.activation", nnx.gelu, "gelu_(tanh)", "JAX computes gelu (tanh) where PyTorch"),
    ("ours.blocks.3.depthwise.activation", lambda x: x, "depthwise.hard_swish", "JAX computes nothing where PyTorch"),
    ("ours.blocks.3.project.activation", lambda x: x, "", ""),  # computes nothing, as PyTorch
    ("theirs.features.5.block.0.2", torch.nn.SiLU(), "expand.hard_swish", "hard swish where PyTorch computes silu"),
    ("theirs.features.6.block.1.2", torch.nn.Identity(), "depthwise.hard_swish", "where PyTorch computes nothing"),
    ("theirs.features.7.block.2.scale_activation", torch.nn.Sigmoid(), "hard_sigmoid", "PyTorch computes sigmoid"),
    ("theirs.features.8.block.0.2", Composed(lambda x: x * x.sigmoid()), "expand.hard_swish", "PyTorch computes silu"),
    ("theirs.features.8.block.1.2", Composed(lambda x: x * torch.nn.ReLU6()(x + 3) / 6), "", ""),  # hard swish
    (
        "theirs.features.9.block.0.2",
        torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()),
        "hard_swish",
        "and then tanh",
    ),
    ("ours.blocks.9.residual", False, "blocks.9.project.add", "JAX computes nothing where PyTorch computes add"),
    (
        "theirs.features.11.use_res_connect",
        False,
        "blocks.10.project.add",
        "JAX computes add where PyTorch computes nothing",
    ),
    (
        "theirs.features.1.block.1.avgpool",
        torch.nn.AdaptiveMaxPool2d(1),
        "excite.mean",
        "JAX computes mean where PyTorch computes adaptive_max",
    ),
    ("theirs.classifier.1", torch.nn.Hardtanh(0, 6), "hidden.hard_swish", "hard swish where PyTorch computes relu6"),
]


def put(root, path, value):
    """Sets an attribute or an item by its dotted path."""
    *parts, last = path.split(".")
    for part in parts:
        root = root[int(part)] if part.isdecimal() else getattr(root, part)
    if last.isdecimal():
        root[int(last)] = value
    else:
        setattr(root, last, value)


def test_wrong_missing_and_added_activations_are_all_named_and_hide_nothing():
    """The seed is one of a network without a block that is all zeros, which would not tell two functions apart."""
    seed = 3
    theirs, ours, manifest = pair("torchvision.mobilenet_v3_small", seed, 0.35)
    for path, value, _, _ in ACTIVATIONS:
        side, _, place = path.partition(".")
        put({"ours": ours, "theirs": theirs}[side], place, value)
    found = model_parity(theirs, ours, noise(seed), manifest)
    assert not found.not_compared and not found.left
    wrong = [layer for layer in found.layers if layer.is_wrong]
    planted = [(layer, said) for _, _, layer, said in ACTIVATIONS if layer]
    assert len(wrong) == len(planted)
    for layer, said in planted:
        assert any(each.name.endswith(layer) and said in each.cause for each in wrong), (layer, said)
    assert found.first_wrong.name == "stem.silu" and found.first_wrong.torch == "features.0.2"
    assert found.verdict.exit_code == 1


def test_wrong_activations_of_v1_are_named(seed, full):
    """timm's activations are parts of its normalizations."""
    skip_unless_drawn(2, seed, full)
    theirs, ours, manifest = pair("timm.mobilenet_v1", seed)
    ours.blocks[3].project.activation = nnx.relu
    ours.blocks[5].depthwise.activation = None
    found = model_parity(theirs, ours, noise(seed), manifest)
    wrong = [layer.name for layer in found.layers if not layer.verdict.passes]
    assert wrong == ["blocks.3.project.relu", "blocks.5.depthwise.relu6"] and not found.left
    assert found.first_wrong.torch == "blocks.2.0.bn2.act"


def test_what_a_subclass_computes_more_is_named(small):
    class Own(jaxdw.models.MobileNet):
        def features(self, x):
            return super().features(x) * 2

    theirs, ours, manifest, images = small
    wrong = nnx.clone(ours)
    wrong.__class__ = Own
    first = model_parity(theirs, wrong, images, manifest).first_wrong
    assert first.name == "head.multiply" and first.cause == "JAX computes multiply where PyTorch computes nothing"


def test_an_operation_that_was_not_compared_never_passes(clean):
    found = dataclasses.replace(clean, left=["sigmoid in the model itself"])
    assert found.verdict is Verdict.INCONCLUSIVE and found.verdict.exit_code == 4
    assert "only rounding" not in summary(found)


def test_a_model_that_cannot_run_says_where_and_what_was_wrong_before(small):
    theirs, ours, manifest, images = small
    wrong = nnx.clone(ours)
    wrong.blocks[2].depthwise.conv.strides = 2  # its result no longer fits the residual
    with pytest.raises(
        ValueError, match=r"`model` fails in blocks.2.project .*; wrong before it: blocks.2.depthwise.conv: stride is 2"
    ):
        model_parity(theirs, wrong, images, manifest)


@pytest.mark.parametrize("number", range(2))
def test_other_networks_pass(number, seed, full):
    """V3 has gates and hard swish, transformers' V2 has TensorFlow's padding."""
    skip_unless_drawn(number, seed, full)
    name, width = (("torchvision.mobilenet_v3_small", 0.35), ("transformers.mobilenet_v2", 0.25))[number]
    theirs, ours, manifest = pair(name, seed, width)
    found = model_parity(theirs, ours, noise(seed), manifest)
    assert found.verdict.passes, summary(found)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((1, 32, 32, 3)), r"`inputs` has a float64 \(1, 32, 32, 3\), expected .* float32"),
        (np.zeros((1, 32, 32, 4), np.float32), "the forward of MobileNetV2 .* failed in features.0.0"),
    ],
)
def test_unusable_images_are_refused(small, images, said):
    theirs, ours, manifest, _ = small
    with pytest.raises(ValueError, match=said):
        model_parity(theirs, ours, images, manifest)


def test_the_report_fits_80_columns_and_has_a_row_for_each_operation(clean):
    console = Console(width=80, record=True, file=io.StringIO())
    print_model(clean, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[-1:] != [] and line.lstrip().startswith("blocks.3.") for line in lines) >= 8


def test_the_json_can_be_read_back(clean):
    text = ModelReport.of(clean).to_json()
    assert json.loads(text)["schema"] == "jaxdw.model/4"
    read = ModelReport.model_validate_json(text)
    assert [layer.name for layer in read.layers] == [layer.name for layer in clean.layers]
    assert read.verdict is clean.verdict and read.first_wrong is None


def test_the_page_needs_nothing_else_and_draws_growth(clean):
    page = model_html(clean, command="jaxdw model mobilenet_v2")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert page.count('<th scope="row">blocks.') == sum(layer.name.startswith("blocks.") for layer in clean.layers)
    chart = growth_chart(clean.layers)
    marks = page.count('<path class="layer') - len(chart.verdicts)
    assert marks == len(chart.dots) == sum(bool(layer.growth) for layer in clean.layers)
