"""Bounds of single operations: float32 in any customary form stays within them, what is wrong by little does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import Verdict
from bridge.model.operation_bounds import expected, matrix_sum, windows
from bridge.model.operation_verdicts import judge
from bridge.model.operations import Operation
from bridge.numerics import BFLOAT16, TF32, round_to

F32 = np.float32


def operation(kind, *operands, output=None, parameters=None, **settings):
    return Operation(kind, "", operands, operands[0] if output is None else output, parameters or {}, settings)


def draw(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(F32)


def normalization(seed, scale):
    rng = np.random.default_rng(seed)
    channels = 5
    parameters = {
        "weight": draw(rng.integers(2**32), channels),
        "bias": draw(rng.integers(2**32), channels),
        "running_mean": draw(rng.integers(2**32), channels, scale=scale),
        "running_var": rng.uniform(0, 2, channels).astype(F32),
    }
    return operation("batch norm", draw(seed, 3, 4, 4, channels, scale=scale), parameters=parameters, eps=1e-5)


def forms(op):
    """y in the forms that frameworks compute."""
    x, p = op.operands[0], op.parameters
    a = p["weight"] / np.sqrt(p["running_var"] + F32(1e-5))
    b = p["weight"] * (F32(1) / np.sqrt(p["running_var"] + F32(1e-5)))
    yield (x - p["running_mean"]) * a + p["bias"]
    yield x * b + (p["bias"] - p["running_mean"] * b)
    yield (x - p["running_mean"]) / np.sqrt(p["running_var"] + F32(1e-5)) * p["weight"] + p["bias"]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4]))
def test_every_form_of_normalization_is_within_its_bound(seed, scale):
    op = normalization(seed, scale)
    for y in forms(op):
        assert y.dtype == F32 and (expected(op).ratio(y) <= 1).all()


@given(st.integers(0, 2**32 - 1))
def test_another_epsilon_is_outside(seed):
    op = normalization(seed, 1.0)
    other = operation("batch norm", *op.operands, parameters=op.parameters, eps=1e-3)
    assert (expected(op).ratio(expected(other).reference.astype(F32)) > 1).any()


def relu6(x):
    return np.minimum(np.maximum(x, F32(0)), F32(6))


ACTIVATIONS = {
    "relu": [lambda x: np.maximum(x, F32(0))],
    "relu6": [relu6],
    "hard sigmoid": [lambda x: relu6(x + F32(3)) / F32(6), lambda x: relu6(x + F32(3)) * (F32(1) / F32(6))],
    "hard swish": [
        lambda x: x * (relu6(x + F32(3)) / F32(6)),
        lambda x: x * relu6(x + F32(3)) / F32(6),
        lambda x: x * (F32(1) / F32(6)) * relu6(x + F32(3)),
    ],
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**60), max_value=2.0**60), min_size=1))
def test_every_form_of_an_activation_is_within_its_bound(kind, values):
    x = np.array(values, F32)
    for form in ACTIVATIONS[kind]:
        assert (expected(operation(kind, x)).ratio(form(x)) <= 1).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_a_mean_in_any_order_is_within_its_bound(seed, side, halved):
    x = draw(seed, 2, side, side, 3)
    chain = np.cumsum(x.reshape(2, -1, 3), axis=1, dtype=F32)[:, -1]
    mean = chain * (F32(1) / F32(side * side)) if halved else chain / F32(side * side)
    op = operation("mean", x, output=mean)
    assert (expected(op).ratio(mean) <= 1).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2]), st.sampled_from([0, 1]), st.sampled_from([1, 2]))
def test_a_convolution_is_a_matrix_product_of_windows(seed, stride, padding, dilation):
    x, weight = draw(seed, 2, 8, 7, 3), draw(seed + 1, 4, 3, 3, 3)
    seen = windows(x, (3, 3), (stride, stride), (padding, padding), (dilation, dilation))
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for i, j in np.ndindex(seen.shape[1:3]):
        for m, n in np.ndindex(3, 3):
            assert (seen[:, i, j, m, n] == padded[:, i * stride + m * dilation, j * stride + n * dilation]).all()
    y = np.zeros((*seen.shape[:3], 4), F32)
    for m, n in np.ndindex(3, 3):
        for c in range(3):
            y += seen[:, :, :, m, n, c, None] * weight[:, c, m, n]
    settings = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2, "groups": 1}
    op = operation("convolution", x, output=y, parameters={"weight": weight}, **settings)
    assert (expected(op).ratio(y) <= 1).all()
    y[0, 0, 0, 0] += np.abs(y).max()
    assert (expected(op).ratio(y) > 1).sum() == 1


def test_overflow_promises_nothing():
    big = np.full((1, 1, 1, 2), 3e38, F32)
    assert np.isinf(expected(operation("add", big, big)).allowed).all()


def test_subnormal_operands_of_a_product_may_be_flushed():
    x, weight = np.full((1, 4), 1e-40, F32), np.ones((2, 4), F32)
    op = operation("linear", x, output=np.zeros((1, 2), F32), parameters={"weight": weight})
    assert matrix_sum(op).reference[0, 0] > 0
    assert (expected(op).ratio(np.zeros((1, 2), F32)) <= 1).all()


@pytest.mark.parametrize("fmt", [TF32, BFLOAT16])
def test_rounded_operands_of_a_product_are_lower_precision(fmt):
    x, weight = draw(0, 64, 32), draw(1, 8, 32)
    op = operation("linear", x, output=x @ weight.T, parameters={"weight": weight})
    low_x, low_weight = (round_to(a.astype(np.float64), fmt).astype(F32) for a in (x, weight))
    found = judge(op, low_x @ low_weight.T)
    assert found.verdict is Verdict.PRECISION and found.name == f"{fmt.name} inputs" and found.cause.startswith("JAX ")


def test_a_nan_on_one_side_is_nonfinite():
    x, weight = draw(0, 4, 3), draw(1, 2, 3)
    y = x @ weight.T
    wrong = y.copy()
    wrong[1, 1] = np.nan
    found = judge(operation("linear", x, output=y, parameters={"weight": weight}), wrong)
    assert found.verdict is Verdict.NONFINITE and found.where == (1, 1)


def test_another_shape_is_a_bug_that_says_both():
    x, weight = draw(0, 4, 3), draw(1, 2, 3)
    found = judge(operation("linear", x, output=x @ weight.T, parameters={"weight": weight}), x)
    assert found.verdict is Verdict.BUG and found.cause == "JAX gives the shape (4, 3), PyTorch (4, 2)"
