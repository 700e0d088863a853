"""Floating-point formats, and rounding a float64 into one of them exactly once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """A binary floating-point format with gradual underflow, as IEEE 754 (2019) section 3.3 describes one.

    Its finite values are m 2^(e - p + 1) with integers |m| < 2^p and emin <= e <= emax.

    Attributes:
      name: what reports call it.
      precision: p, bits of the significand with the hidden one.
      min_exponent: emin; the smallest normal number is 2^emin.
      max_exponent: emax; the largest number is (2 - 2^(1-p)) 2^emax.
      dtype: the NumPy dtype that holds it, None where there is none (TF32 lives in float32 registers).

    >>> FLOAT32.unit_roundoff == 2.0**-24, FLOAT16.largest, BFLOAT16.smallest_normal == 2.0**-126
    (True, 65504.0, True)
    """

    name: str
    precision: int
    min_exponent: int
    max_exponent: int
    dtype: np.dtype | None = None

    @property
    def unit_roundoff(self) -> float:
        """u = 2^-p: the greatest relative error of one rounding to nearest."""
        return 2.0**-self.precision

    @property
    def smallest_subnormal(self) -> float:
        return math.ldexp(1.0, self.min_exponent - self.precision + 1)

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.min_exponent)

    @property
    def largest(self) -> float:
        return math.ldexp(2.0 - 2.0 ** (1 - self.precision), self.max_exponent)

    def holds(self, other: Format) -> bool:
        """Return whether every number of the other format is one of this: float32 holds float16, bfloat16 does not."""
        return (
            self.precision >= other.precision
            and self.smallest_subnormal <= other.smallest_subnormal
            and self.largest >= other.largest
        )


FLOAT64 = Format("float64", 53, -1022, 1023, np.dtype(np.float64))
FLOAT32 = Format("float32", 24, -126, 127, np.dtype(np.float32))
TF32 = Format("tf32", 11, -126, 127)
BFLOAT16 = Format("bfloat16", 8, -126, 127, np.dtype(ml_dtypes.bfloat16))
FLOAT16 = Format("float16", 11, -14, 15, np.dtype(np.float16))

_BY_DTYPE = {fmt.dtype: fmt for fmt in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)}


def format_of(dtype: Any) -> Format:
    """Return the format of a NumPy dtype, or of anything `np.dtype` takes.

    Raises:
      TypeError: a dtype that is none of float64, float32, bfloat16 and float16.

    >>> format_of("float32").precision
    24
    """
    try:
        return _BY_DTYPE[np.dtype(dtype)]
    except (KeyError, TypeError):
        names = ", ".join(map(str, _BY_DTYPE))
        raise TypeError(f"`dtype` is {dtype!r}, expected one of {names}") from None


def round_to(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Return x rounded into `fmt` once: to nearest, ties to even, underflow gradual, overflow to infinity.

    Args:
      x: float64, any shape.
      fmt: the format.

    Returns:
      float64 of x's shape, whose values are in `fmt`. NaN, infinities and the sign of zero are kept.

    >>> round_to(np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, 1e-45, 3.4e38, -0.0]), BFLOAT16).tolist()
    [1.0, 1.0078125, 0.0, inf, -0.0]
    """
    x = _float64(x)
    if fmt is FLOAT64:
        return x.copy()
    with np.errstate(all="ignore"):
        rounded = _to_multiple_of_quantum(x, fmt, np.rint)
        return np.where(np.abs(rounded) > fmt.largest, np.copysign(np.inf, x), rounded)


def truncate_to(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Return x rounded into `fmt` towards zero, as hardware that drops low bits does; finite x never overflows."""
    x = _float64(x)
    if fmt is FLOAT64:
        return x.copy()
    with np.errstate(all="ignore"):
        truncated = _to_multiple_of_quantum(x, fmt, np.trunc)
        overflows = np.isfinite(x) & (np.abs(truncated) > fmt.largest)
        return np.where(overflows, np.copysign(fmt.largest, x), truncated)


def cast(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return float64 x rounded once into `dtype`, without warnings.

    NumPy's own conversions round once, but for bfloat16: ml_dtypes goes through float32 and rounds twice.
    """
    x = _float64(x)
    fmt = format_of(dtype)
    with np.errstate(all="ignore"):
        return (round_to(x, fmt) if fmt is BFLOAT16 else x).astype(fmt.dtype)


def round_integer(m: int, exponent: int, fmt: Format) -> float:
    """Return the number m 2^exponent, of any size, rounded once into `fmt` (to nearest, ties to even). Zero gives +0.

    >>> round_integer(2**24 + 1, 0, FLOAT32), round_integer(-1, 128, FLOAT32)
    (16777216.0, -inf)
    """
    if m == 0:
        return 0.0
    magnitude = abs(m)
    leading = exponent + magnitude.bit_length() - 1
    quantum = max(leading, fmt.min_exponent) - fmt.precision + 1
    drop = quantum - exponent
    if drop <= 0:
        significand = magnitude << -drop
    else:
        significand, rest = magnitude >> drop, magnitude & ((1 << drop) - 1)
        half = 1 << (drop - 1)
        significand += rest > half or (rest == half and significand & 1)
    overflows = leading > fmt.max_exponent or significand.bit_length() + quantum > fmt.max_exponent + 1
    rounded = math.inf if overflows else math.ldexp(significand, quantum)
    return -rounded if m < 0 else rounded


def _float64(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.dtype != np.float64:
        raise TypeError(f"`x` has dtype {x.dtype}, expected float64")
    return x


def _to_multiple_of_quantum(x: np.ndarray, fmt: Format, to_integer: np.ufunc) -> np.ndarray:
    """x = i 2^q with `to_integer` applied to i, where 2^q is the spacing of `fmt` at x. Both scalings are exact."""
    _, exponent = np.frexp(x)  # 2^(exponent-1) <= |x| < 2^exponent
    q = np.maximum(exponent - 1, fmt.min_exponent) - fmt.precision + 1
    return np.ldexp(to_integer(np.ldexp(x, -q)), q)
