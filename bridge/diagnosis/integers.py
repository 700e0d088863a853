"""The zero-tolerance test: small integers on the same geometry, where every conventional sum is exact.

Let every |x|, |w| and |b| be a positive integer, at most X, with n X^2 + X <= 2^p, where p is the least precision of
the accumulator and of the output, and X < 2^8. Then each operand is exact in every format down to bfloat16, each
product and each partial sum is an integer of at most 2^p, and so exact: all orders, fused or not, give one result, and
there is nothing to tolerate.

It catches what a bound on random numbers may hide: a wrong tap of a small weight, a wrong channel, padding, stride or
bias; a scaled tap, unless x w times its error is below half a unit of the sum's last place; an accumulator or output
with fewer than p bits. It cannot see rounded inputs, which are exact here (the bound sees those), nor algorithms that
are exact on integers too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np

from bridge.case import Case
from bridge.diagnosis._compare import compare
from bridge.diagnosis.comparison import Comparison
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import Arithmetic, exact, same_bits


class Runs(Protocol):
    """What can be tested: `bridge.Implementation`, or anything with a name that runs a case."""

    @property
    def name(self) -> str: ...

    def run(self, case: Case) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class IntegerTest:
    """Attributes: the implementation's name, and the comparison of its integers with the exact ones."""

    implementation: str
    comparison: Comparison

    @property
    def passed(self) -> bool:
        """Whether every element is right."""
        return not self.comparison.different

    @property
    def verdict(self) -> Verdict:
        """IDENTICAL, or what is wrong; a difference within the bound is a BUG, since there is nothing to round."""
        if self.passed:
            return Verdict.IDENTICAL
        return Verdict.BUG if self.comparison.verdict.passes else self.comparison.verdict


def integer_case(case: Case, arithmetic: Arithmetic | None = None, seed: int = 0) -> Case:
    """The case with integers for its data, so small that every sum is exact in the arithmetic; none of them is zero.

    Where even sums of ones would not be exact (more than 2^p taps), the taps beyond are zero.
    """
    arithmetic = arithmetic or Arithmetic.of(case.dtype)
    p = min(arithmetic.accumulator.precision, arithmetic.output.precision, arithmetic.product.precision)
    g = case.geometry
    n = min(g.taps, 2**p - 1)
    largest = min(255, (math.isqrt(1 + 4 * n * 2**p) - 1) // (2 * n))  # the greatest X with n X^2 + X <= 2^p
    rng = np.random.default_rng(seed)

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        sign = rng.integers(0, 2, shape, np.int16) * 2 - 1
        return (sign * rng.integers(1, largest + 1, shape, np.int16)).astype(case.dtype)

    kernel = integers(g.kernel_shape)
    kernel.reshape(g.taps, g.features)[n:] = 0
    bias = None if case.bias is None else integers(case.bias.shape)
    return case.replace(x=integers(g.x_shape), kernel=kernel, bias=bias)


def integer_test(
    implementation: Runs, case: Case, arithmetic: Arithmetic | None = None, *, seed: int = 0
) -> IntegerTest:
    """Run integers on the case's geometry; any value but the exact one fails. Zeros of either sign are equal.

    Raises:
      ValueError, TypeError: the implementation returns another shape or dtype.
    """
    small = integer_case(case, arithmetic, seed)
    reference = exact(small)
    y = implementation.run(small)
    comparison = compare(
        y + y.dtype.type(0), reference.value, small, names=(implementation.name, "exact integers"), reference=reference
    )
    return IntegerTest(implementation.name, comparison)


def integers_agree(a: Runs, b: Runs, case: Case, *, seed: int = 0) -> bool:
    """Whether two implementations have the same values on integers. Zeros of either sign are equal."""
    small = integer_case(case, seed=seed)
    left, right = (each.run(small) for each in (a, b))
    return left.shape == right.shape and bool(same_bits(left + left.dtype.type(0), right + right.dtype.type(0)).all())
