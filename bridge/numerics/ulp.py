"""Distance in units in the last place: how many numbers of a format lie between two of them."""

from __future__ import annotations

import numpy as np

from bridge.numerics.formats import format_of

_INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}
_SIGN_OFF = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}


def ordered(a: np.ndarray) -> np.ndarray:
    """Return the rank of each number in its format: int64, monotone, neighbours differ by 1, -0 and +0 are 0.

    IEEE 754 orders the bit patterns of numbers of one sign as their magnitudes, so the rank is the pattern without
    its sign, negated where the sign is set. Infinities come after the largest numbers, NaN after the infinities.

    Args:
      a: float16, bfloat16, float32 or float64.

    >>> ordered(np.array([-0.0, 0.0, 1e-45, -1e-45], np.float32)).tolist()
    [0, 0, 1, -1]
    """
    a = np.asarray(a)
    format_of(a.dtype)  # refuses other dtypes
    width = a.dtype.itemsize
    bits = a.view(_INTEGERS[width]).astype(np.int64)
    magnitude = bits & _SIGN_OFF[width]
    return np.where(bits < 0, -magnitude, magnitude)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the steps from a to b through their format: uint64 of the broadcast shape.

    Correct across zero and at any distance. Two NaN have distance 0; a NaN and a number have 2^64 - 1.

    Raises:
      TypeError: a and b differ in dtype, or have one that is no floating-point format of this package.

    >>> ulp_distance(np.float32(1.0), np.nextafter(np.float32(1.0), np.float32(2.0)))
    array(1, dtype=uint64)
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype:
        raise TypeError(f"`a` has dtype {a.dtype} and `b` has dtype {b.dtype}, expected one dtype")
    i, j = ordered(a), ordered(b)
    # The greatest distance needs 64 bits: it is the wrapped difference, read as unsigned.
    distance = np.asarray(np.maximum(i, j)).view(np.uint64) - np.asarray(np.minimum(i, j)).view(np.uint64)
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of a signalling NaN
        nan_a, nan_b = np.isnan(a), np.isnan(b)
    distance = np.where(nan_a | nan_b, np.iinfo(np.uint64).max, distance)
    return np.where(nan_a & nan_b, np.uint64(0), distance)


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where two arrays of one dtype hold the same bits; two NaN are the same, +0 and -0 are not."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaN of bfloat16
        nan = np.isnan(a) & np.isnan(b)
    return (np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)).reshape(a.shape) | nan
