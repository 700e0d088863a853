"""Additions, products and fused multiply-adds in NumPy, rounded as an accumulator of a given format rounds them.

A fused multiply-add rounds x w + c once. With operands of at most 26 bits, x w is exact in float64 and x w + c is one
float64 addition away; rounding that again to the accumulator could round twice. Rounding to odd prevents it (Boldo &
Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans.
Computers 57, 2008): an inexact intermediate result of at least p + 2 bits whose last bit is made odd rounds to p bits
as the exact value does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from bridge.numerics import FLOAT32, FLOAT64, Format, round_to, truncate_to
from bridge.numerics.errorfree import two_product, two_sum

#: Beyond these, TwoProduct or its operands may leave the range of float64.
_SMALL, _LARGE = 2.0**-900, 2.0**900


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Arithmetic that keeps every result in one format.

    Numbers are held in float32 where that is the format, and in float64 elsewhere; `dtype` says which.

    Attributes:
      format: of every result.
      toward_zero: whether results are truncated rather than rounded to nearest.
      flushes: whether a subnormal result becomes zero.
    """

    format: Format
    toward_zero: bool = False
    flushes: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self._native and self.format is FLOAT32 else np.float64)

    @property
    def _native(self) -> bool:
        return self.format in (FLOAT32, FLOAT64) and not self.toward_zero

    def hold(self, x: np.ndarray) -> np.ndarray:
        """Return x, rounded."""
        return x.astype(self.dtype) if self._native else self._rounded(x.astype(np.float64))

    def product(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Return x w, rounded."""
        if self._native:
            return self._flushed(np.multiply(x, w, dtype=self.dtype))
        return self._rounded(_rounded_to_odd(*two_product(x.astype(np.float64), w.astype(np.float64))))

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a + b, rounded."""
        return self._flushed(a + b) if self._native else self._rounded(_rounded_to_odd(*two_sum(a, b)))

    def fma(self, x: np.ndarray, w: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Return x w + c, rounded once."""
        x, w = x.astype(np.float64), w.astype(np.float64)
        if self.format is FLOAT64:
            return self._flushed(_fma64(*np.broadcast_arrays(x, w, c)))
        return self._rounded(_rounded_to_odd(*two_sum(x * w, c.astype(np.float64))))

    def aligned_sum(self, operands: Sequence[np.ndarray]) -> np.ndarray:
        """Return a multi-way sum as matrix units compute it (Fasi et al., 2021).

        Every operand is shifted to the exponent of the largest, its bits below the accumulator's last one are dropped,
        and the rest is added and rounded.

        Fasi, Higham, Mikaitis & Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7 (2021).
        """
        stack = np.stack(np.broadcast_arrays(*operands)).astype(np.float64)
        _, exponent = np.frexp(np.abs(stack).max(axis=0))
        quantum = exponent - self.format.precision
        return self._rounded(np.ldexp(np.trunc(np.ldexp(stack, -quantum)).sum(axis=0), quantum))

    def _rounded(self, exact_or_odd: np.ndarray) -> np.ndarray:
        if self.dtype == np.float32:
            return self._flushed(exact_or_odd.astype(np.float32))
        return self._flushed((truncate_to if self.toward_zero else round_to)(exact_or_odd, self.format))

    def _flushed(self, y: np.ndarray) -> np.ndarray:
        return flush(y, self.format) if self.flushes else y


def flush(y: np.ndarray, fmt: Format) -> np.ndarray:
    """Return y with zero for each number that is subnormal in `fmt`; the sign is kept."""
    return np.where(np.abs(y) < fmt.smallest_normal, np.copysign(y.dtype.type(0), y), y)


def _rounded_to_odd(s: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return s + error, whose nearest float64 is s, rounded to odd: exact, or the neighbour whose last bit is 1."""
    bits = s.view(np.int64)
    # An infinite or NaN s has a NaN error, which compares false and leaves s alone.
    outward = (error > 0) == (s > 0)
    step = np.where(outward, 1, -1) * (((error > 0) | (error < 0)) & (bits & 1 == 0))
    return (bits + step).view(np.float64)


def _fma64(x: np.ndarray, w: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return x w + c in float64, rounded once: algorithm Fma of Boldo & Melquiond (2008), figure 4.

    x w = p + e by TwoProduct; c + e = t + u by TwoSum; p + t = v + z by TwoSum; the result is fl(v + odd(z + u)).
    Near the ends of the range of float64 its operations are not exact: those elements are summed as fractions.
    """
    p, e = two_product(x, w)
    t, u = two_sum(c, e)
    v, z = two_sum(p, t)
    y = v + _rounded_to_odd(*two_sum(z, u))
    plain = x * w + c
    sizes = np.abs(np.stack([x, w, p, c]))
    unsafe = ((sizes < _SMALL) & (sizes > 0)).any(axis=0) | (sizes > _LARGE).any(axis=0) | (p == 0)
    finite = np.isfinite(x) & np.isfinite(w) & np.isfinite(c)
    y = np.where(finite, y, plain)
    for index in zip(*np.nonzero(unsafe & finite & (x != 0) & (w != 0))):
        y[index] = _exact_fma(x[index], w[index], c[index])
    # A zero product adds nothing, and leaves the sign of a sum of zeros to the addition.
    return np.where(finite & ((x == 0) | (w == 0)), plain, y)


def _exact_fma(x: float, w: float, c: float) -> float:
    exact = Fraction(float(x)) * Fraction(float(w)) + Fraction(float(c))
    if exact == 0:
        return float(x) * float(w) + float(c)
    try:
        rounded = float(exact)
    except OverflowError:
        rounded = np.inf
    return float(np.copysign(rounded, 1.0 if exact > 0 else -1.0))
