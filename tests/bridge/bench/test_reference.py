"""The references that every way is held to, against the plain loop; and planted mistakes, which must be found."""

import numpy as np
import pytest

from bridge.bench import reference
from bridge.bench.reference import Check, exactly, within
from bridge.bench.suites import DepthwiseLayer
from tests import oracle

LAYERS = [DepthwiseLayer.parse(text) for text in ("5x6x3:3:1", "7x7x4:3:2", "6x5x2:5:2", "3x3x2:7:1", "13x12x1:11:3")]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_reference_is_the_plain_loop(layer, seed):
    a = reference.integers(np.random.default_rng(seed), layer, 2, "x")
    expected = oracle.depthwise(a["x"], a["w"], strides=layer.stride, padding=layer.padding).y
    assert (reference.convolve(a["x"], a["w"], layer) == expected).all()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("fine", ["x", "dy"])
def test_the_gradients_are_the_adjoints_of_the_convolution(layer, fine, seed):
    rng = np.random.default_rng(seed)
    a = {name: array.astype(np.float64) for name, array in reference.integers(rng, layer, 2, fine).items()}
    dx, dw = reference.gradients(a["x"], a["w"], a["dy"], layer)
    other = reference.integers(rng, layer, 2, fine)  # whole numbers: equality is exact
    assert (dx * other["x"]).sum() == (a["dy"] * reference.convolve(other["x"], a["w"], layer)).sum()
    assert (dw * other["w"]).sum() == (a["dy"] * reference.convolve(a["x"], other["w"], layer)).sum()


@pytest.mark.parametrize("text", ["112x112x4:3:1", "56x56x2:7:1", "28x28x2:31:1"])
@pytest.mark.parametrize("fine", ["x", "dy"])
def test_sums_of_the_whole_numbers_are_exact_in_float32_in_any_order(text, fine, seed):
    layer = DepthwiseLayer.parse(text)
    a = {k: np.abs(v) for k, v in reference.integers(np.random.default_rng(seed), layer, 8, fine).items()}
    wide = {name: array.astype(np.float64) for name, array in a.items()}
    y, (dx, dw) = reference.convolve(wide["x"], wide["w"], layer), reference.gradients(**wide, layer=layer)
    assert max(y.max(), dx.max(), dw.max()) < 2**24  # sums of magnitudes bound every partial sum
    squares = reference.squarable(np.random.default_rng(seed), layer, 8)
    assert reference.convolve(squares["x"].astype(np.float64) ** 2, np.abs(squares["w"]), layer).max() < 2**24


@pytest.mark.parametrize("fine, name", [("x", "y"), ("x", "dw"), ("dy", "dx"), ("dy", "dw")])
def test_rounded_inputs_change_the_whole_numbers(fine, name, seed):
    """TF32 keeps 11 bits, one fewer than the fine operand has."""
    layer = DepthwiseLayer.parse("14x14x4:3:1")
    a = reference.integers(np.random.default_rng(seed), layer, 4, fine)
    rounded = {**a, fine: np.round(a[fine] / 2) * 2}
    results = []
    for arrays in (a, rounded):
        dx, dw = reference.gradients(arrays["x"], arrays["w"], arrays["dy"], layer)
        results.append({"y": reference.convolve(arrays["x"], arrays["w"], layer), "dx": dx, "dw": dw}[name])
    assert exactly({name: results[0]})({name: results[1]})


def test_a_block_in_float32_is_within_its_bound_and_another_epsilon_is_not(seed):
    layer, rng = DepthwiseLayer.parse("9x9x8:3:2"), np.random.default_rng(seed)
    a = {"x": rng.standard_normal((2, 9, 9, 8), np.float32), "w": rng.standard_normal((3, 3, 1, 8), np.float32)}
    a |= {name: rng.uniform(-1, 1, 8).astype(np.float32) for name in ("scale", "bias", "mean")}
    a["var"] = rng.uniform(0.5, 2, 8).astype(np.float32)
    expected, bound = reference.block(a, layer, 1e-5)
    scale = a["scale"] / np.sqrt(a["var"] + np.float32(1e-5))
    y = np.clip((reference.convolve(a["x"], a["w"], layer) - a["mean"]) * scale + a["bias"], 0, 6)
    check = Check(a, within({"y": expected}, {"y": bound}))
    assert y.dtype == np.float32 and check.misfit({"y": y}) == ""
    assert check.misfit({"y": reference.block(a, layer, 1e-3)[0]})


def test_a_misfit_says_where_and_what():
    expected = {"y": np.arange(6.0).reshape(2, 3)}
    misfit = exactly(expected)
    assert misfit({"y": np.arange(6.0).reshape(2, 3)}) == ""
    assert misfit({"y": np.where(expected["y"] == 4, 5, expected["y"])}) == (
        "y is wrong in 1 of 6 elements: 5.0 at (1, 1), expected 4.0 exactly"
    )
    assert "nan at (0, 2), expected 2.0" in misfit({"y": np.where(expected["y"] == 2, np.nan, expected["y"])})
    assert misfit({"y": np.zeros((3, 2))}) == "y has shape (3, 2), expected (2, 3)"
    assert misfit({"z": np.zeros((2, 3))}) == "it gives z, expected y"
