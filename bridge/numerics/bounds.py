"""Rigorous bounds on |computed - exact| for a declared arithmetic, any order of summation, any fusing.

**The sum.** Let n products x_i w_i, and perhaps a bias b, be the m leaves of a binary tree of additions with unit
roundoff u. A leaf is a rounded product, or an unrounded one that a fused multiply-add takes up, or b. With
T = sum |leaf|,

    |computed - sum of leaves| <= (m - 1) u T                                                                   (1)

for every tree and every m, with no condition such as m u < 1. For floating-point leaves this is Rump (2012), and
Jeannerod and Rump (2013) for any order. Their induction carries over to unrounded leaves. Let a node add subtrees of
m1 and m2 leaves, sizes T1 and T2, errors D1 <= (m1 - 1) u T1 and D2 <= (m2 - 1) u T2, and itself err by d. Rounding to
nearest gives |d| <= u |sum of the operands|; where one operand is a float it is a candidate, so |d| <= |the other|.

- T1 <= u T2 and the second operand is a float: |d| <= T1 + D1, and 2 D1 + T1 + D2 <= (m1 + m2 - 1) u (T1 + T2).
- T2 <= u T1 and the first operand is a float: likewise.
- Else |d| <= u (T1 + T2 + D1 + D2), where u D1 <= (m1 - 1) u T2 (since u T1 < T2, or m1 = 1 and D1 = 0 for an
  unrounded leaf) and u D2 <= (m2 - 1) u T1 likewise: D1 + D2 + |d| <= (m1 + m2 - 1) u (T1 + T2).

Adding a zero, or skipping it, rounds nothing: padding that is multiplied, and a start from 0, are covered.

**The products.** A rounded product is p (1 + e) with |e| <= u_p, so T <= (1 + u_p) P with P = sum |x_i w_i| + |b|. A
product of inputs of at most p/2 bits is exact in p bits: u_p = 0. With U the underflow, and
g = (1 + u_p)(1 + (m - 1) u) - 1,

    |computed - sum x_i w_i - b| <= g P + (1 + g) U                                                             (2)

*Gradual* underflow: an addition that underflows is exact (Hauser 1996), and a product, rounded or fused, loses at most
eta, half the smallest subnormal. What it loses counts as part of the leaf: U = n eta. *Flushed*: each result, and each
operand, below the smallest normal number lambda may become zero. Such a loss is one more leaf, of size lambda at most,
whose addition rounds nothing and so leaves the induction standing. n products, m - 1 additions: U = (n + m - 1) lambda.

**The inputs.** Where x is rounded to xh before the products, |xh - x| <= u_x |x| + t(x). u_x is the unit roundoff of
the input format, twice that where it truncates, 0 where it holds every input. t(x) is the absolute loss below its
normal numbers: half the smallest subnormal (all of it where it truncates), at most |x|; |x| where flushed; infinite
where x overflows. With S = sum |x_i w_i| + |b| and Q = sum (|x_i| t(w_i) + |w_i| t(x_i) + t(x_i) t(w_i)) + t(b),

    |sum xh_i wh_i - sum x_i w_i| <= ((1 + u_x)^2 - 1) S + (1 + u_x) Q
                                P <= (1 + u_x)^2 S + (1 + u_x) Q                                                (3)

*Split inputs* (three and six passes of bfloat16, 3xTF32; Henry, Tang & Heinecke 2019): x becomes r parts, each the
rounding of what those before it leave, and the r (r + 1) / 2 products x_i w_j with i + j <= r + 1 are kept. Since
|x_i| <= u_x^(i-1) (1 + u_x) |x| + t(x) and |x - sum x_i| <= u_x^r |x| + t(x), with t(x) now also for x whose last part
is subnormal, (3) becomes, with n r (r + 1) / 2 products,

    error <= ((1 + u_x^r)^2 - 1 + (1 + u_x)^2 sum_dropped u_x^(i+j-2)) S + (1 + u_x) (1 + dropped) Q
        P <= (1 + u_x)^2 (sum_kept u_x^(i+j-2)) S + (1 + u_x) kept Q

**Normwise errors.** The error of a sum by Fourier transforms does not follow the terms of its element alone:
`bridge.numerics.fourier` bounds it. Such a bound takes the place of g P + (1 + g) U in (2). A bias costs one addition
more, u (P + E).

**The output.** With E the bound so far, rounding v to the output format adds at most u_out |v| + eta_out, + lambda_out
where flushed, and |v| <= |y| + E. An implementation that rounds the sum, adds the bias and rounds again first rounds a
v with |v| <= |y| + |b| + E.

**Overflow.** No partial result exceeds (1 + g)(P + U) in magnitude, and no output |y| + E. Where one of these is above
the largest number of its format nothing is promised: the bound is infinite, as it is where an operand is not finite.

**Evaluation.** Coefficients that do not depend on m are rationals, rounded up once. What remains is fewer than 64
float64 operations on numbers that are not negative. Each may come out smaller by a factor 1 - 2^-53, or by 2^-1075
where it underflows, which later factors, (1 + g) <= 2 (1 + m u), (1 + u_out) and small integers, enlarge. Hence
(1 + 2^-46) bound + 2^-1066 (1 + m u) is not below the exact value of the formulas.

References. N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002. S. M. Rump, Error
estimation of floating-point summation and dot product, BIT 52, 2012. C.-P. Jeannerod, S. M. Rump, Improved error
bounds for inner products in floating-point arithmetic, SIAM J. Matrix Anal. Appl. 34, 2013. J. R. Hauser, Handling
floating-point exceptions in numeric programs, ACM TOPLAS 18, 1996. G. Henry, P. T. P. Tang, A. Heinecke, Leveraging
the bfloat16 artificial intelligence datatype for higher-precision computations, ARITH 2019.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np

from bridge.numerics._exact import ExactSum, rounded_up
from bridge.numerics.formats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Format, format_of

_TINY = FLOAT64.smallest_subnormal


@dataclasses.dataclass(frozen=True, eq=False)
class Normwise:
    """A bound on the errors of the sums without bias, of the shape of the output: float64."""

    errors: np.ndarray

    def of(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the bound for sums of this shape; the greatest of all for some elements of the output alone."""
        return self.errors if self.errors.shape == shape else np.full(shape, self.errors.max(initial=0.0))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that an implementation declares. Order of summation and fusing are left open.

    Attributes:
      product: format in which an unfused product is rounded.
      accumulator: format of the additions.
      output: format of the result; rounded to once more where it does not hold every accumulator.
      input: format to which x, w and bias are rounded before the products; None leaves them as they are.
      input_truncated: the rounding of inputs is towards zero, not to nearest.
      passes: products for each product: 1, or 3 or 6 where inputs are split into two or three parts of `input`.
      output_roundings: 2 where the sum is rounded to `output`, and again after the bias is added.
      flushes_subnormals: any subnormal operand or result may be taken for zero. Half precision in a wider accumulator
        is excepted: its subnormals are normal numbers there, and the conversions (VCVTPH2PS, VCVTPS2PH) keep them.
      normwise: bounds the errors of the sums, in place of what follows from their terms; None for a conventional sum.

    >>> Arithmetic.of("bfloat16").accumulator.name
    'float32'
    """

    product: Format
    accumulator: Format
    output: Format
    input: Format | None = None
    input_truncated: bool = False
    passes: int = 1
    output_roundings: int = 1
    flushes_subnormals: bool = False
    normwise: Normwise | None = None

    def __post_init__(self) -> None:
        if self.passes not in (1, 3, 6):
            raise ValueError(f"`passes` is {self.passes!r}, expected 1, 3 or 6")
        if self.passes > 1 and self.input is None:
            raise ValueError(f"`input` is None with `passes` {self.passes}, expected the format of the parts")
        if self.output_roundings not in (1, 2):
            raise ValueError(f"`output_roundings` is {self.output_roundings!r}, expected 1 or 2")

    @classmethod
    def of(cls, dtype: Any, **changes: Any) -> Arithmetic:
        """Return the conventional arithmetic of a dtype: its own, but float32 sums for bfloat16 and float16."""
        output = format_of(dtype)
        inner = FLOAT32 if output in (BFLOAT16, FLOAT16) else output
        return dataclasses.replace(cls(inner, inner, output), **changes)

    @property
    def parts(self) -> int:
        """r, the number of parts of an input."""
        return {1: 1, 3: 2, 6: 3}[self.passes]

    def flush_threshold(self, fmt: Format) -> float:
        """Return the number of `fmt` below which numbers may become zero."""
        kept = not self.flushes_subnormals or (fmt == FLOAT16 and self.accumulator != FLOAT16)
        return 0.0 if kept else fmt.smallest_normal


def error_bound(arithmetic: Arithmetic, total: ExactSum) -> np.ndarray:
    """Return a bound of |computed - exact| for each element: float64, infinite where nothing is promised.

    Compare with `total.reference`, and allow for `total.reference_error`.

    >>> from bridge import Case
    >>> from bridge.numerics import exact
    >>> ones = np.ones((1, 4, 1), np.float32)
    >>> total = exact(Case(ones, ones[0, :, None] / 2, padding="VALID"))
    >>> round(error_bound(Arithmetic.of("float32"), total).item() / (4 * 2.0**-24 * 2), 6)  # n u S
    1.0
    """
    products, given = total.products, format_of(total.products.dtype)
    n = products.count * float(arithmetic.passes)
    m = n + (products.bias is not None)
    u, u_p = arithmetic.accumulator.unit_roundoff, _product_roundoff(arithmetic, given)
    with np.errstate(all="ignore"):
        S = total.magnitude
        g = u_p + np.maximum(m - 1, 0) * u * (1 + u_p)
        U = _underflow(arithmetic, n, m)
        error_of_S, error_of_Q, size_of_S, size_of_Q = _input_coefficients(arithmetic, given)
        P, E = S * size_of_S, S * error_of_S
        if (Q := _absolute_losses(arithmetic, total)) is not None:
            P += Q * size_of_Q
            E += Q * error_of_Q
        if arithmetic.normwise is not None:
            E += arithmetic.normwise.of(products.shape)
            E += (P + E) * u if products.bias is not None else 0.0
        else:
            E += P * g
            E += (1 + g) * U
        P += U
        P *= 1 + g
        largest = min(arithmetic.product.largest, arithmetic.accumulator.largest)
        promised = largest >= P
        _round_output(arithmetic, total, E)
        promised &= np.abs(total.reference) + total.reference_error + E <= arithmetic.output.largest
        E *= 1 + 2.0**-46
        E += 256 * _TINY * (1 + m * u)
        E[~promised] = np.inf
    return E


def difference_bound(bound_a: np.ndarray, bound_b: np.ndarray) -> np.ndarray:
    """Return a bound of |a - b| for two results within their bounds of one exact sum: their sum, rounded up."""
    return np.nextafter(np.add(bound_a, bound_b), np.inf)


def _product_roundoff(arithmetic: Arithmetic, given: Format) -> float:
    """Return u_p: 0 where twice the inputs' bits fit."""
    bits = given.precision if arithmetic.input is None else min(given.precision, arithmetic.input.precision)
    return 0.0 if 2 * bits <= arithmetic.product.precision else arithmetic.product.unit_roundoff


def _underflow(arithmetic: Arithmetic, n: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Return U of (2)."""
    formats = (arithmetic.product, arithmetic.accumulator)
    smallest = max(arithmetic.flush_threshold(fmt) for fmt in formats)
    if smallest:
        return (n + np.maximum(m - 1, 0)) * smallest
    return n * _up(max(Fraction(fmt.smallest_subnormal) / 2 for fmt in formats))


def _input_roundoff(arithmetic: Arithmetic, given: Format) -> Fraction:
    """Return u_x."""
    if arithmetic.input is None or arithmetic.input.precision >= given.precision:
        return Fraction(0)
    return Fraction(arithmetic.input.unit_roundoff) * (2 if arithmetic.input_truncated else 1)


def _input_coefficients(arithmetic: Arithmetic, given: Format) -> tuple[float, float, float, float]:
    """Return the coefficients in (3) of S and of Q in the error, and in P, rounded up."""
    u, r = _input_roundoff(arithmetic, given), arithmetic.parts
    pairs = list(itertools.product(range(1, r + 1), repeat=2))
    kept = [u ** (i + j - 2) for i, j in pairs if i + j <= r + 1]
    dropped = [u ** (i + j - 2) for i, j in pairs if i + j > r + 1]
    error_of_S = (1 + u**r) ** 2 - 1 + (1 + u) ** 2 * sum(dropped)
    return (
        _up(error_of_S),
        _up((1 + u) * (1 + len(dropped))),
        _up((1 + u) ** 2 * sum(kept)),
        _up((1 + u) * len(kept)),
    )


def _absolute_loss(a: np.ndarray, arithmetic: Arithmetic, given: Format) -> np.ndarray:
    """Return t(a), for operands a (float64, in the format `given`)."""
    fmt, r = arithmetic.input or given, arithmetic.parts
    size = np.abs(a)
    flushed = arithmetic.flush_threshold(fmt)
    rounded = 0.0 if fmt.holds(given) else fmt.smallest_subnormal * (1.0 if arithmetic.input_truncated else 0.5)
    if r == 1:
        loss = np.where(size < fmt.smallest_normal, np.minimum(size, max(rounded, flushed)), 0.0)
    else:
        # the last part is about u_x^(r-1) of x; each part may lose as much
        last_is_subnormal = size < 4 * fmt.smallest_normal / float(_input_roundoff(arithmetic, given) or 1) ** (r - 1)
        loss = np.where(last_is_subnormal & (size > 0), (r + 1) * max(rounded, flushed), 0.0)
    return np.where(size <= fmt.largest, loss, np.inf)


def _absolute_losses(arithmetic: Arithmetic, total: ExactSum) -> np.ndarray | None:
    """Return Q of (3), or None where it is zero everywhere."""
    products = total.products
    given = format_of(products.dtype)

    def loss(a: np.ndarray) -> np.ndarray:
        return _absolute_loss(np.asarray(a).astype(np.float64), arithmetic, given)

    if not any(loss(a).any() for a in (products.x, products.w, products.bias) if a is not None):
        return None
    Q = np.zeros(products.shape)
    for block in products.blocks():
        q = Q[block]
        if (bias := products.bias_block(block)) is not None:
            q += loss(bias)
        height = 1
        for x, w, valid in products.terms(block):
            t_x, t_w = loss(x), loss(w)
            lost = np.where(valid, np.abs(x) * t_w + np.abs(w) * t_x + t_x * t_w, 0.0)
            several = lost.ndim > q.ndim
            q += lost.sum(axis=0) if several else lost
            height += len(lost) if several else 1
        Q[block] = rounded_up(q, height + 4, underflows=4 * height)
    return Q


def _round_output(arithmetic: Arithmetic, total: ExactSum, E: np.ndarray) -> None:
    """Add the rounding of the output to E."""
    output = arithmetic.output
    if output.holds(arithmetic.accumulator):
        return
    u, eta = output.unit_roundoff, output.smallest_subnormal / 2 + arithmetic.flush_threshold(output)
    y = np.abs(total.reference) + total.reference_error
    if arithmetic.output_roundings == 2 and total.products.bias is not None:
        E += (y + np.abs(total.products.bias.astype(np.float64)) + E) * u + eta
    E += (y + E) * u + eta


def _up(value: Fraction) -> float:
    """Return the least float64 not below `value`."""
    nearest = float(value)
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)
