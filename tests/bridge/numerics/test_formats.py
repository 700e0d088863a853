"""Formats and rounding, against exact rationals."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from bridge.numerics import TF32, cast, format_of, round_integer, round_to, truncate_to
from tests.bridge.numerics.rationals import FORMATS, rounded, truncated

ALL = (*FORMATS, TF32)


def numbers_near(fmt, rng, count=400):
    """float64 numbers at, and next to, the numbers and the midpoints of a format, from zero to past its largest."""
    exponent = rng.integers(fmt.min_exponent - fmt.precision - 2, fmt.max_exponent + 2, count)
    significand = rng.integers(0, 2 ** (fmt.precision + 2), count)
    with np.errstate(all="ignore"):
        x = np.ldexp(significand.astype(np.float64), exponent - fmt.precision - 1)
        x = np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, 0.0), [0.0, fmt.largest, fmt.smallest_normal]])
    x = x[np.isfinite(x)]
    return np.concatenate([x, -x])


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("ours, oracle", [(round_to, rounded), (truncate_to, truncated)], ids=["nearest", "truncated"])
def test_rounding_equals_that_of_rationals(fmt, ours, oracle, seed):
    x = numbers_near(fmt, np.random.default_rng(seed))
    expected = np.array([float(oracle(Fraction(v), fmt)) for v in x])
    if oracle is truncated:
        expected = np.clip(expected, -fmt.largest, fmt.largest)
    result = ours(x, fmt)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.signbit(result), np.signbit(x))


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("ours", [round_to, truncate_to])
def test_rounding_keeps_what_is_not_finite_and_the_sign_of_zero(fmt, ours):
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0])
    result = ours(x, fmt)
    np.testing.assert_array_equal(result, x)
    np.testing.assert_array_equal(np.signbit(result[3:]), [False, True])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_cast_rounds_once(fmt, seed):
    x = numbers_near(fmt, np.random.default_rng(seed))
    result = cast(x, fmt.dtype)
    assert result.dtype == fmt.dtype
    np.testing.assert_array_equal(result.astype(np.float64), round_to(x, fmt))


def test_a_cast_to_bfloat16_does_not_round_twice():
    just_above_a_tie = np.array([1 + 2.0**-8 + 2.0**-40])
    assert just_above_a_tie.astype(ml_dtypes.bfloat16) == 1  # through float32, onto the tie, to even
    assert cast(just_above_a_tie, ml_dtypes.bfloat16).astype(np.float64) == 1 + 2.0**-7


@pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
def test_an_integer_of_any_size_rounds_as_its_rational(fmt, seed):
    rng = np.random.default_rng(seed)
    for _ in range(500):
        bits = int(rng.integers(1, 200))
        m = int.from_bytes(rng.bytes(25), "little") >> (200 - bits) << int(rng.integers(0, 40))
        m *= int(rng.choice([-1, 1]))
        exponent = int(rng.integers(fmt.min_exponent - fmt.precision - 240, fmt.max_exponent + 2))
        assert round_integer(m, exponent, fmt) == rounded(Fraction(m) * Fraction(2) ** exponent, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_format_has_the_figures_of_its_dtype(fmt):
    info = ml_dtypes.finfo(fmt.dtype)
    assert format_of(fmt.dtype) is fmt
    assert fmt.largest == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.unit_roundoff == float(info.eps) / 2


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, "no dtype", ml_dtypes.float8_e5m2])
def test_a_dtype_that_is_no_format_is_refused(dtype):
    with pytest.raises(TypeError, match=r"`dtype` is .*, expected one of float64, float32, bfloat16, float16"):
        format_of(dtype)


@pytest.mark.parametrize("function", [lambda x: round_to(x, TF32), lambda x: truncate_to(x, TF32)])
def test_rounding_refuses_what_is_not_float64(function):
    with pytest.raises(TypeError, match="`x` has dtype float32, expected float64"):
        function(np.ones(2, np.float32))
