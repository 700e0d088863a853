"""Correctly rounded sums of products.

The exact sum, rounded once, is the reference that every implementation is measured against. After Ziv (1991): sum in
float64 and bound the error of that sum by delta. If both ends of [s - delta, s + delta] round to the same number, it
is the correctly rounded one, since rounding is monotone. The few sums that this leaves undecided are computed again:

1. where every rounding error of the sum, computed by TwoSum and TwoProduct, is zero, the float64 sum is exact;
2. else as integers: the products over their common power of two, in Python's integers.

The first pass. With u = 2^-53, h the additions above a product, and S = sum |x w| + |b|:

- float32, bfloat16 and float16 operands: products are exact in float64, since 2p <= 53, with exponents far inside its
  range. A sum in any order has |s - exact| <= gamma_h S with gamma_h = h u / (1 - h u) (Higham 2002, section 4.2).
- float64 operands: Dot2 (Ogita, Rump & Oishi 2005, algorithm 5.3). x w = p + e and a + b = s + q exactly, by
  TwoProduct (Dekker 1971, Veltkamp 1968) and TwoSum (Knuth 1969), but for underflow, which costs at most 5 2^-1074 a
  product (same paper, section 2). c gathers the e and q. Each |e| <= u |p|, and the |q| of all additions of one level
  of the tree sum to at most u (1 + gamma_h) S, so what c gathers is at most (h + 1) u (1 + gamma_h) S in magnitude,
  with at most 2h + 1 additions on any path: |s + c - exact| <= gamma_{2h+1} (h + 1) u (1 + gamma_h) S + 5 n 2^-1074.

References. A. Ziv, Fast evaluation of elementary mathematical functions with correctly rounded last bit, ACM TOMS 17,
1991. T. Ogita, S. M. Rump, S. Oishi, Accurate sum and dot product, SIAM J. Sci. Comput. 26, 2005. N. J. Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from bridge.numerics.errorfree import two_product, two_sum
from bridge.numerics.formats import FLOAT64, Format, cast, format_of, round_integer
from bridge.numerics.products import Block, Products

_U = FLOAT64.unit_roundoff
_TINY = FLOAT64.smallest_subnormal
#: Undecided terms that are gathered at a time.
_GATHERED = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class ExactSum:
    """Sums of products, rounded once.

    Attributes:
      value: correctly rounded in the operands' dtype: to nearest, ties to even; an exact zero is +0; NaN, 0 inf and
        inf - inf under valid taps give NaN; overflow gives infinity.
      reference: float64, the sum to within `reference_error`. Where the dtype is float64, `value`.
      reference_error: float64, |reference - exact| at most. Infinite or NaN where the sum is not finite.
      magnitude: float64, S = sum |x w| + |b|, rounded up.
      products: what was added.
    """

    value: np.ndarray
    reference: np.ndarray
    reference_error: np.ndarray
    magnitude: np.ndarray
    products: Products


def exact_sum(products: Products) -> ExactSum:
    """Return each sum of `products`, correctly rounded in their dtype, in O(output) memory."""
    fmt = format_of(products.dtype)
    value = np.empty(products.shape, products.dtype)
    reference, error, magnitude = (np.empty(products.shape) for _ in range(3))
    may_skip = not np.isfinite(products.w).all()
    with np.errstate(all="ignore"):
        for block in products.blocks():
            if fmt is FLOAT64:
                rounded, s, delta, magnitude[block] = _dot2(products, block, may_skip)
                undecided = np.isnan(rounded)
            else:
                s, delta, magnitude[block] = _dot(products, block, may_skip)
                rounded, undecided = _ziv(s, delta, fmt)
            value[block], reference[block], error[block] = rounded, s, delta
            if undecided.any():
                _settle(products, block, np.nonzero(undecided), (value, reference, error))
        if fmt is FLOAT64:
            reference = value
            error = np.abs(value) * _U + _TINY
    return ExactSum(value, reference, error, magnitude, products)


def _dot(products: Products, block: Block, may_skip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(s, delta, S)`: the float64 sum of products that are exact in float64, its error and its magnitude."""
    s, magnitude = _start(products, block)
    product = np.empty_like(s)
    added, tallest = 1, 1
    for x, w, valid in products.terms(block):
        several = x.ndim > s.ndim
        p = np.multiply(x, w, out=None if several else product)
        if may_skip and not valid.all():
            np.copyto(p, 0.0, where=~valid)
        s += p.sum(axis=0) if several else p
        np.abs(p, out=p)
        magnitude += p.sum(axis=0) if several else p
        added, tallest = added + 1, max(tallest, len(p) if several else 1)
    s += 0.0  # -0, the bias alone, becomes +0
    height = added + tallest
    magnitude = rounded_up(magnitude, height)
    # gamma_h S < 1.001 h u S while h u < 1e-3; two more u S for the roundings of s - delta and s + delta
    return s, magnitude * (1.001 * (height + 2) * _U), magnitude


def _ziv(s: np.ndarray, delta: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return s rounded to `fmt`, and where delta leaves open to which number the exact sum rounds."""
    low, high = cast(s - delta, fmt.dtype), cast(s + delta, fmt.dtype)
    # around zero, the sign of a result that underflows is open too
    undecided = (low != high) | ((np.abs(s) <= delta) & (delta > 0))
    finite = np.isfinite(s)
    if not finite.all():  # never an overflow of s itself: only operands that are infinite or NaN
        undecided &= finite
        high = np.where(finite, high, cast(s, fmt.dtype))
    return high, undecided


def _dot2(products: Products, block: Block, may_skip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return `(value, s, error, S)` of float64 sums by Dot2; value is NaN where it is not decided."""
    s, magnitude = _start(products, block)
    c = np.zeros_like(s)
    added, tallest, count = 1, 1, 1
    for x, w, valid in products.terms(block):
        p, e = two_product(x, w)
        if may_skip and not valid.all():
            p, e = np.where(valid, p, 0.0), np.where(valid, e, 0.0)
        several = p.ndim > s.ndim
        size = np.abs(p)
        magnitude += size.sum(axis=0) if several else size
        if several:
            p, e = _tree_two_sum(p, e)
        s, q = two_sum(s, p)
        c += e + q
        rows = len(x) if several else 1
        added, tallest, count = added + 1, max(tallest, rows), count + rows
    magnitude = rounded_up(magnitude, added + tallest, count)
    height = added + tallest.bit_length()
    error = magnitude * (1.01 * (2 * height + 1) * (height + 1) * _U**2) + 6 * count * _TINY
    value, low = two_sum(s, c)
    # one more rounding in each of low - error and low + error
    slack = error + np.abs(low) * _U * 2 + _TINY
    decided = value + (low - slack) == value + (low + slack)
    return np.where(decided, value + low, np.nan), value, error, magnitude


def _start(products: Products, block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and its magnitude before the first product: the bias, or zero."""
    bias = products.bias_block(block)
    if bias is None:
        shape = tuple(rows.stop - rows.start for rows in block)
        return np.zeros(shape), np.zeros(shape)
    return bias, np.abs(bias)


def rounded_up(magnitude: np.ndarray, height: int, underflows: int = 0) -> np.ndarray:
    """Return at least the sum that float64 computed as `magnitude`, of non-negative numbers with relative errors u."""
    magnitude *= 1 + (height + 3) * 2 * _U
    magnitude += underflows * _TINY  # each product may have lost half of it
    return magnitude


def _tree_two_sum(p: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of p over its first axis, halved again and again, and the sum of all errors and of e."""
    while len(p) > 1:
        half = len(p) // 2
        s, q = two_sum(p[:half], p[half : 2 * half])
        e = np.concatenate([e[:half] + e[half : 2 * half] + q, e[2 * half :]])
        p = np.concatenate([s, p[2 * half :]])
    return p[0], e[0]


def _settle(
    products: Products, block: Block, undecided: tuple[np.ndarray, ...], results: tuple[np.ndarray, ...]
) -> None:
    """Write the exactly decided value, reference and error of the undecided elements of a block."""
    fmt = format_of(products.dtype)
    value, reference, error = (array[block] for array in results)
    leaves = int(products.count.max()) + 1
    step = max(1, _GATHERED // leaves)
    for start in range(0, len(undecided[0]), step):
        at = tuple(index[start : start + step] for index in undecided)
        x, w = _gathered(products, block, at)
        narrow, wide = _exactly(x, w, fmt)
        value[at], reference[at] = cast(narrow, fmt.dtype), wide
        error[at] = np.abs(wide) * _U + _TINY


def _gathered(products: Products, block: Block, at: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the operands x, w `(terms, elements)` of some elements of a block; the bias is a product with 1."""
    shape = tuple(rows.stop - rows.start for rows in block)
    chosen: tuple[Any, ...] = (slice(None), *at)

    def columns() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.zeros((0, len(at[0]))), np.zeros((0, len(at[0])))
        for term in products.terms(block):
            several = np.broadcast_shapes(*(a.shape for a in term))[: -len(shape)] or (1,)
            x, w, valid = (np.broadcast_to(a, (*several, *shape))[chosen] for a in term)
            yield np.where(valid, x, 0.0), np.where(valid, w, 0.0)
        bias = products.bias_block(block)
        if bias is not None:
            yield bias[at][None], np.ones((1, len(at[0])))

    xs, ws = zip(*columns())
    return np.concatenate(xs), np.concatenate(ws)


def _exactly(x: np.ndarray, w: np.ndarray, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return sum(x w) over the first axis, rounded once to `fmt`, and rounded once to float64: both float64."""
    finite = (np.isfinite(x) & np.isfinite(w)).all(axis=0)
    # infinities, NaN and the signs of their partners decide such a sum; finite products must not overflow in it
    x, w = (np.where(finite | ~np.isfinite(a), a, np.sign(a)) for a in (x, w))
    s, residue = _sum_with_residue(x, w)
    wide = s + 0.0
    narrow = cast(wide, fmt.dtype).astype(np.float64)
    for k in np.flatnonzero(finite & ~(residue == 0)):
        total, exponent = _integer_sum(x[:, k], w[:, k])
        narrow[k] = round_integer(total, exponent, fmt)
        wide[k] = round_integer(total, exponent, FLOAT64)
    return narrow, wide


def _sum_with_residue(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 sum of products, and the sum of the sizes of its errors: zero where it is exact."""
    p, e = two_product(x, w)
    # TwoProduct is exact where no part of it underflows
    exact_product = (np.abs(p) >= 2.0**-960) | (x == 0) | (w == 0)
    residue = np.where(exact_product, np.abs(e), np.inf).sum(axis=0)
    s = np.zeros(x.shape[1:])
    for row in p:
        s, q = two_sum(s, row)
        residue += np.abs(q)
    return s, residue


def _integer_sum(x: np.ndarray, w: np.ndarray) -> tuple[int, int]:
    """Return `(total, exponent)` with sum(x w) = total 2^exponent, for finite vectors."""
    product = _significand(x).astype(object) * _significand(w).astype(object)
    exponent = np.frexp(x)[1].astype(np.int64) + np.frexp(w)[1] - 2 * FLOAT64.precision
    exponent = np.where((x != 0) & (w != 0), exponent, exponent.max())
    lowest = int(exponent.min())
    return int((product << (exponent - lowest).astype(object)).sum()), lowest


def _significand(x: np.ndarray) -> np.ndarray:
    """Return x as an integer times 2^(frexp exponent - 53)."""
    return np.ldexp(np.frexp(x)[0], FLOAT64.precision).astype(np.int64)
