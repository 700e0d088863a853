"""Rounding and adding in exact rationals: the oracle of the numerics tests, in the words of IEEE 754 and no other."""

import math
from fractions import Fraction

import numpy as np

from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

FORMATS = (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)


def rounded(value, fmt, to_integer=round):
    """The number of `fmt` nearest to a rational, ties to even (Python's `round`); infinite where it overflows."""
    if value == 0:
        return Fraction(0)
    quantum = Fraction(2) ** (max(exponent(value), fmt.min_exponent) - fmt.precision + 1)
    result = to_integer(value / quantum) * quantum
    if abs(result) >= Fraction(2) ** (fmt.max_exponent + 1):
        return math.inf if value > 0 else -math.inf
    return result


def infinite(value):
    """True where `rounded` overflowed; finite numbers are rationals, too large for `math.isinf`."""
    return isinstance(value, float)


def truncated(value, fmt):
    return rounded(value, fmt, math.trunc)


def exponent(value):
    """floor(log2 |value|)."""
    size = abs(value)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    return e if size >= Fraction(2) ** e else e - 1


def operands(rng, fmt, shape, kind):
    """Two arrays of the format's dtype whose sums of products over the first axis are hard in the way `kind` says."""
    normal, low, high = rng.standard_normal, fmt.min_exponent, fmt.max_exponent
    with np.errstate(all="ignore"):
        if kind == "integers":
            x, w = rng.integers(-8, 9, shape), rng.integers(-8, 9, shape)
        elif kind == "wide":
            x, w = (np.ldexp(normal(shape), rng.integers(low // 2, high // 2, shape)) for _ in range(2))
        elif kind == "subnormal":
            e = low - fmt.precision + rng.integers(0, 4, shape)
            x, w = np.ldexp(normal(shape), e + fmt.precision // 2 + 2), np.ldexp(normal(shape), rng.integers(-9, 2))
        elif kind == "underflow":
            x, w = (np.ldexp(normal(shape), low // 2 + rng.integers(-fmt.precision, 3, shape)) for _ in range(2))
        elif kind == "overflow":
            x, w = (np.ldexp(normal(shape), high // 2 + rng.integers(-1, 2, shape)) for _ in range(2))
        elif kind == "zeros":
            x, w = normal(shape) * rng.integers(0, 2, shape), normal(shape) * rng.integers(-1, 2, shape)
        else:
            x, w = normal(shape), normal(shape)
    x, w = np.asarray(x, np.float64).astype(fmt.dtype), np.asarray(w, np.float64).astype(fmt.dtype)
    half = shape[0] // 2
    if kind == "cancellation":  # all but the last products cancel, or nearly
        x[half : 2 * half], w[half : 2 * half] = -x[:half], w[:half]
        w[-1] *= fmt.dtype.type(2.0 ** -min(fmt.precision, 12))
    if kind == "ties" and shape[0] > 1:  # 1 + an odd multiple of half the last place + perhaps something below it
        x[:], w[:] = 0, 0
        x[0], w[0] = 1, 1
        odd = 2 * rng.integers(-4, 4, shape[1:]) + 1
        x[1], w[1] = odd.astype(fmt.dtype), fmt.dtype.type(fmt.unit_roundoff)
        if shape[0] > 2:
            below = np.maximum(fmt.smallest_subnormal, 2.0**-60) * rng.integers(-1, 2, shape[1:])
            x[2], w[2] = below.astype(fmt.dtype), fmt.dtype.type(1)
    return x, w


KINDS = ("normal", "integers", "wide", "subnormal", "underflow", "overflow", "zeros", "cancellation", "ties")
