"""Emulated arithmetic against rational numbers."""

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from bridge.accumulation.arithmetic import Accumulator
from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32
from tests.bridge.accumulation.planted import rounded

FORMATS = [FLOAT64, FLOAT32, TF32, BFLOAT16, FLOAT16]


def numbers(rng, fmt, count):
    """Of all sizes, half of them near each other so that sums cancel, with ties and subnormal numbers among them."""
    p = fmt.precision
    wide = rng.integers(fmt.min_exponent // 2, fmt.max_exponent // 2, count)
    exponent = np.where(rng.random(count) < 0.5, rng.integers(-3, 3, count), wide)
    significand = rng.integers(2 ** (p - 1), 2**p, count).astype(np.float64)
    few = 2.0 ** rng.integers(1, p, count)
    significand = np.where(rng.random(count) < 0.5, np.round(significand / few) * few, significand)
    return np.ldexp(significand, exponent - p + 1) * rng.choice([-1, 1], count)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(st.integers(0, 2**32 - 1))
@example(0)
def test_a_fused_multiply_add_rounds_once(fmt, seed):
    rng = np.random.default_rng(seed)
    accumulator = Accumulator(fmt)
    x, w, c = (numbers(rng, fmt, 64) for _ in range(3))
    near = -np.array([rounded(Fraction(a) * Fraction(b), fmt) for a, b in zip(x, w)])
    c = np.where((rng.random(64) < 0.5) & np.isfinite(near), near, c)
    with np.errstate(over="ignore"):
        y = accumulator.fma(x, w, c.astype(accumulator.dtype))
    expected = [rounded(Fraction(a) * Fraction(b) + Fraction(d), fmt) for a, b, d in zip(x, w, c)]
    assert y.astype(np.float64).tolist() == expected


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(st.integers(0, 2**32 - 1))
def test_products_and_additions_round_once(fmt, seed):
    rng = np.random.default_rng(seed)
    accumulator = Accumulator(fmt)
    a, b = (numbers(rng, fmt, 64).astype(accumulator.dtype) for _ in range(2))
    sums, products = accumulator.add(a, b), accumulator.product(a, b)
    assert sums.tolist() == [rounded(Fraction(float(x)) + Fraction(float(y)), fmt) for x, y in zip(a, b)]
    assert products.tolist() == [rounded(Fraction(float(x)) * Fraction(float(y)), fmt) for x, y in zip(a, b)]


@pytest.mark.parametrize(
    ("x", "w", "c"),
    [
        (2.0**-600, 2.0**-500, 2.0**-1074),
        (2.0**-600, -(2.0**-475), 2.0**-1074),
        (2.0**600, 2.0**500, -(2.0**1000)),
        (1 + 2.0**-52, 2.0**-1074, 2.0**-1022),
        (2.0**1000, 2.0**23, -(2.0**1022)),
        (1 + 2.0**-52, 1 - 2.0**-52, -1.0),
        (2.0**-538, 2.0**-538, 1.0),
    ],
)
def test_a_float64_fused_multiply_add_is_right_at_the_ends_of_the_range(x, w, c):
    with np.errstate(all="ignore"):
        (y,) = Accumulator(FLOAT64).fma(np.array([x]), np.array([w]), np.array([c]))
    assert y == rounded(Fraction(x) * Fraction(w) + Fraction(c), FLOAT64)


@pytest.mark.parametrize("fmt", [FLOAT64, FLOAT32], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(
    ("x", "w", "c"), [(np.inf, 0, 1), (np.inf, 1, -np.inf), (np.inf, 1, 1), (0, -1, -0.0), (0, -1, 0)]
)
def test_a_fused_multiply_add_treats_infinities_and_zeros_as_ieee_754_does(fmt, x, w, c):
    accumulator = Accumulator(fmt)
    with np.errstate(all="ignore"):
        y = accumulator.fma(*(np.array([value], accumulator.dtype) for value in (x, w, c)))
        expected = np.array([x], float) * np.array([w], float) + np.array([c], float)
    assert np.array_equal(y.astype(np.float64), expected, equal_nan=True)
    assert np.isnan(y) or np.signbit(y) == np.signbit(expected)


def test_flushing_keeps_the_sign_and_the_smallest_normal_number():
    tiny = np.float32(2.0**-126)
    y = Accumulator(FLOAT32, flushes=True).product(np.array([tiny, -tiny, tiny]), np.array([1, 0.5, 0.5], np.float32))
    assert y.tolist() == [tiny, 0.0, 0.0]
    assert np.signbit(y).tolist() == [False, True, False]
