"""The depthwise layers of live models: what is captured, and what verdict it gets."""

import copy
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge._census.capture import capture
from bridge._census.census import LayerDiagnosis, diagnose
from bridge.case import DTYPES
from bridge.diagnosis import Verdict
from bridge.numerics import exact
from bridge.weights import read_safetensors, write_safetensors
from tests.bridge.census import models
from tests.bridge.census.models import depthwise


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


#: name -> (module, input shape, the geometry's padding, and its mode)
LAYERS = {
    "1-D": (lambda: depthwise(dims=1, padding=2), (2, 4, 9), ((2, 2),), "zeros"),
    "3-D": (lambda: depthwise(dims=3, padding=(1, 0, 1)), (1, 4, 5, 4, 3), ((1, 1), (0, 0), (1, 1)), "zeros"),
    "no batch": (lambda: depthwise(padding=1), (4, 7, 6), ((1, 1), (1, 1)), "zeros"),
    "no bias": (lambda: depthwise(bias=False), (2, 4, 7, 6), ((0, 0), (0, 0)), "zeros"),
    "multiplier": (lambda: depthwise(multiplier=2, padding=1), (2, 4, 7, 6), ((1, 1), (1, 1)), "zeros"),
    "dilation": (lambda: depthwise(dilation=(2, 1), padding=2), (2, 4, 9, 8), ((2, 2), (2, 2)), "zeros"),
    "stride 4": (lambda: depthwise(kernel=4, stride=4), (1, 4, 16, 12), ((0, 0), (0, 0)), "zeros"),
    "1x5": (lambda: depthwise(kernel=(1, 5), padding=(0, 2)), (1, 4, 6, 9), ((0, 0), (2, 2)), "zeros"),
    "same": (lambda: depthwise(kernel=5, padding="same", dilation=2), (1, 4, 9, 9), ((4, 4), (4, 4)), "zeros"),
    "valid": (lambda: depthwise(padding="valid"), (1, 4, 9, 9), ((0, 0), (0, 0)), "zeros"),
    "dynamic same": (lambda: models.DynamicSame(4, 4, 3, 2, groups=4), (1, 4, 8, 7), ((0, 1), (1, 1)), "zeros"),
    "reflect": (
        lambda: depthwise(padding=1, padding_mode="reflect"),
        (1, 4, 6, 5),
        ((1, 1), (1, 1)),
        "reflect",
    ),
    "circular, dilated": (
        lambda: depthwise(padding=2, dilation=2, padding_mode="circular"),
        (1, 4, 6, 5),
        ((2, 2), (2, 2)),
        "circular",
    ),
    "functional": (models.Functional, (1, 4, 6, 5), ((1, 1), (1, 1)), "zeros"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_captured_as_it_ran_and_passes(name, seed, tmp_path):
    make, shape, padding, mode = LAYERS[name]
    torch.manual_seed(seed)
    module, x = make(), drawn(seed, *shape)
    (call,) = capture(module, x, tmp_path).calls
    case, y = call.load()
    with torch.no_grad():
        expected = module(x).reshape(-1, *y.shape[-1:], *y.shape[1:-1]).movedim(1, -1)
    assert np.array_equal(y, expected.numpy())
    assert (case.geometry.padding, case.geometry.padding_mode) == (padding, mode)
    assert case.x.size == x.numel() and call.note == ""
    found = diagnose(call)
    assert found.verdict.passes and found.own.verdict is Verdict.IDENTICAL
    assert bridge.compare(y, exact(case).value, case).verdict.passes


def test_even_same_padding_is_captured_by_its_name(seed, tmp_path):
    with pytest.warns(UserWarning, match="padding='same'"):
        (call,) = capture(depthwise(kernel=4, padding="same"), drawn(seed, 1, 4, 8, 8), tmp_path).calls
    assert call.padding == "SAME" and call.load()[0].geometry.padding == ((1, 2), (1, 2))
    assert diagnose(call).verdict.passes


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_padding_without_a_name_is_captured_after_it_and_said(mode, seed, tmp_path):
    module = depthwise(padding=(2, 1), padding_mode=mode)
    (call,) = capture(module, drawn(seed, 1, 4, 6, 5), tmp_path).calls
    assert call.load()[0].geometry.x_shape == (1, 10, 7, 4)
    assert call.note == f"padding_mode={mode!r} has no name here: the input was captured after its padding"
    assert diagnose(call).verdict.passes


@pytest.mark.parametrize("kernel", [3, 7])
def test_pytorch_is_run_in_the_layout_that_the_model_ran_in(kernel, seed):
    module = depthwise(16, kernel=kernel, padding=kernel // 2)
    for x, name in (
        (drawn(seed, 1, 16, 9, 9), "torch.conv2d"),
        (drawn(seed, 1, 9, 9, 16).permute(0, 3, 1, 2), "torch.conv2d[layout=channels_last]"),
        (drawn(seed, 1, 9, 9, 20)[..., 2:18].permute(0, 3, 1, 2), "torch.conv2d[layout=channels_last]"),
    ):
        (found,) = bridge.census(module, x)
        assert found.names == [name, "jax.grouped", "jax.taps"] and found.own.b == name
        assert found.verdict.passes and found.own.verdict is Verdict.IDENTICAL


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype, seed):
    working = getattr(torch, dtype)
    (found,) = bridge.census(depthwise(padding=1).to(working), drawn(seed, 1, 4, 6, 6, dtype=working))
    assert found.case.dtype == DTYPES[dtype] and found.verdict.passes


def test_each_layer_of_a_model_is_diagnosed_by_name_in_order(seed):
    found = list(bridge.census(models.small(), drawn(seed, 2, 3, 16, 16)))
    assert [(each.layer, each.kind) for each in found] == [("1", "Conv2d"), ("3", "Conv2d")]
    assert all(isinstance(each, LayerDiagnosis) and each.verdict.passes for each in found)
    assert found[0].names == ["torch.conv2d", "jax.grouped", "jax.taps"]
    assert found[1].case.geometry.multiplier == 2 and found[1].case.name == "3"


def test_a_layer_that_runs_twice_is_answered_once_for_the_same_data(seed):
    first, second = bridge.census(models.Twice(), drawn(seed, 1, 4, 6, 6))
    assert (first.layer, first.also) == ("layer", ["layer (call 2)"])
    assert (second.layer, second.also) == ("layer (call 3)", [])


def test_arguments_by_place_and_by_name_and_in_numpy(seed):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x, *, scale):
            return self.layer(x) * scale

    x = drawn(seed, 1, 4, 6, 6)
    (by_name,) = bridge.census(Adds(), {"x": x, "scale": 2.0})
    assert np.array_equal(by_name.case.x, x.movedim(1, -1).numpy())
    (by_place,) = bridge.census(depthwise(), (x.numpy(),))
    assert np.array_equal(by_place.case.x, by_name.case.x)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "form",
    [
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.ones(1, 4, 6, 6), check_trace=False),
        lambda module: torch.export.export(module, (torch.ones(1, 4, 6, 6),)).module(),
    ],
    ids=["scripted", "traced", "exported"],
)
def test_a_program_made_from_a_model_is_captured_too(form, seed):
    module = nn.Sequential(nn.ReLU(), depthwise())
    (found,) = bridge.census(form(module), drawn(seed, 1, 4, 6, 6))
    assert found.layer == "1" and found.verdict.passes and found.own.verdict is Verdict.IDENTICAL


def test_the_model_is_left_as_it_was(seed):
    module = nn.Sequential(depthwise(), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), depthwise()).eval())
    before = copy.deepcopy(module.state_dict())
    list(bridge.census(module, drawn(seed, 2, 4, 9, 9)))
    assert [each.training for each in module.modules()] == [True, True, True, False, False, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())


def test_only_one_layer_is_held_and_nothing_stays_on_disk(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    layers = bridge.census(models.small(), drawn(seed, 1, 3, 16, 16))
    assert not list(tmp_path.iterdir())
    assert next(layers).layer == "1"
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["1.safetensors"]
    layers.close()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compared_is_said(seed, tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = depthwise(), depthwise()
            self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=(0, 1), groups=4)
            self.unused_up = nn.ConvTranspose1d(4, 4, 3, groups=4)

        def forward(self, x):
            return self.up(self.used(x))

    found = capture(Half(), drawn(seed, 1, 4, 6, 6), tmp_path)
    assert [(call.layer, call.input_dilation) for call in found.calls] == [("used", None), ("up", (2, 2))]
    assert (found.idle, found.passed_over, found.convolutions) == (["unused", "unused_up"], [], 2)


def test_an_error_that_the_model_catches_mixes_no_names_up(seed):
    (found,) = bridge.census(models.Swallows(), drawn(seed, 1, 4, 6, 6))
    assert (found.layer, found.kind) == ("works", "Conv2d")


@pytest.mark.parametrize(
    "module, inputs, error, message",
    [
        (models.dense(), (1, 3, 8, 8), ValueError, "with no depthwise convolution among the 1 that ran"),
        (
            models.broken(),
            (1, 3, 8, 8),
            ValueError,
            r"of Sequential on tensors of shape \(1, 3, 8, 8\) failed in 1\.1",
        ),
        (models.small(), (1, 4, 8, 8), ValueError, "failed in 0: RuntimeError"),
        (models.number(), (1, 3, 8, 8), TypeError, "`module` is a int, expected a torch.nn.Module"),
    ],
    ids=["no depthwise layer", "broken within", "wrong input", "no module"],
)
def test_what_cannot_be_done_is_refused(module, inputs, error, message, seed):
    with pytest.raises(error, match=message):
        list(bridge.census(module, drawn(seed, *inputs)))


def planted(tmp_path, seed, change):
    """A call whose own output is not what its data give."""
    (call,) = capture(depthwise(padding=1), drawn(seed, 1, 4, 6, 6), tmp_path).calls
    arrays = read_safetensors(call.path)
    write_safetensors(call.path, arrays | {"y": change(arrays["y"])})
    return diagnose(call)


@pytest.mark.parametrize(
    "change, verdict",
    [
        (lambda y: y, Verdict.IDENTICAL),
        (lambda y: np.nextafter(y, np.inf), Verdict.ROUNDING),
        (lambda y: y + (np.arange(y.size) == 5).reshape(y.shape).astype(y.dtype), Verdict.BUG),
        (lambda y: np.where(y == y.max(), np.nan, y).astype(y.dtype), Verdict.NONFINITE),
    ],
    ids=["as it was", "one ulp", "one element", "NaN"],
)
def test_the_models_own_output_counts(change, verdict, seed, tmp_path):
    found = planted(tmp_path, seed, change)
    assert found.own.verdict is verdict
    assert found.verdict is max(verdict, found.verdict, key=Verdict.rank)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=4),
        nn.ConvTranspose2d(4, 8, (2, 3), (1, 2), groups=4, bias=False),
        nn.ConvTranspose1d(4, 4, 4, 2, 1, groups=4),
    ],
)
def test_transposed_layers_are_compared(layer, seed):
    x = drawn(seed, 2, 4, *(6, 5)[: len(layer.kernel_size)])
    (found,) = bridge.census(layer, x)
    assert found.own.verdict == "IDENTICAL" and found.verdict.passes
    assert found.names == ["torch.conv_transpose2d", "jax.grouped", "jax.transpose"]


@pytest.mark.parametrize("padded", [True, False])
def test_causal_layers_are_compared(padded, seed):
    """The two usual ways: padding at both ends of which one is cut, and padding in front."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, padding=0 if padded else 2, groups=4)

        def forward(self, x):
            return self.conv(nn.functional.pad(x, (2, 0))) if padded else self.conv(x)[..., : x.shape[-1]]

    (found,) = bridge.census(Causal(), drawn(seed, 2, 4, 9))
    assert (found.layer, found.kind, found.verdict.passes, found.own.verdict) == ("conv", "Conv1d", True, "IDENTICAL")
