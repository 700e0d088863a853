"""Test on small integers with the same geometry, where every conventional sum is exact, so that nothing is tolerated.

Let every |x|, |w| and |b| be a positive integer, at most X, with n X^2 + X <= 2^p, where p is the least precision of
the accumulator and of the output, and X < 2^8. Then each operand is exact in every format down to bfloat16, each
product and each partial sum is an integer of at most 2^p, and so exact. All orders, fused or not, give one result.

The test finds what a bound on random numbers may hide:

1. a wrong tap of a small weight, a wrong channel, padding, stride or bias;
2. a scaled tap, unless x w times its error is below half a unit of the sum's last place;
3. an accumulator or output with fewer than p bits.

It cannot find rounded inputs, which are exact here (the bound finds those), nor algorithms that are exact on integers
too.
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
from bridge.numerics import Arithmetic, exact


class Runnable(Protocol):
    """`bridge.Implementation`, or anything else with a name that runs a case."""

    @property
    def name(self) -> str: ...

    def run(self, case: Case) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class IntegerTest:
    """The comparison of an implementation's result on small integers with the exact one."""

    implementation: str
    comparison: Comparison

    @property
    def passed(self) -> bool:
        """True if every element is right."""
        return not self.comparison.different

    @property
    def verdict(self) -> Verdict:
        """IDENTICAL, or what is wrong; a difference within the bound is a BUG, since there is nothing to round."""
        if self.passed:
            return Verdict.IDENTICAL
        return Verdict.BUG if self.comparison.verdict.passes else self.comparison.verdict


def largest_integer(arithmetic: Arithmetic, terms: int) -> int:
    """Return the greatest X below 2^8 with n X^2 + X <= 2^p for n terms; 0 if there is none."""
    p = _precision(arithmetic)
    return min(255, (math.isqrt(1 + 4 * terms * 2**p) - 1) // (2 * terms))


def _precision(arithmetic: Arithmetic) -> int:
    return min(arithmetic.accumulator.precision, arithmetic.output.precision, arithmetic.product.precision)


def integer_case(case: Case, arithmetic: Arithmetic | None = None, seed: int = 0, terms: int = 0) -> Case:
    """Return the case with integers other than zero for its data, so small that every sum in the arithmetic is exact.

    If even sums of ones would not be exact (more than 2^p taps), the taps beyond 2^p - 1 are zero.

    Args:
      terms: the number of terms of a sum, if it is more than the number of taps.
    """
    arithmetic = arithmetic or Arithmetic.of(case.dtype)
    g = case.geometry
    n = min(g.taps, 2 ** _precision(arithmetic) - 1)
    largest = largest_integer(arithmetic, max(n, terms))
    rng = np.random.default_rng(seed)

    def integers(shape: tuple[int, ...]) -> np.ndarray:
        sign = rng.integers(0, 2, shape, np.int16) * 2 - 1
        return (sign * rng.integers(1, largest + 1, shape, np.int16)).astype(case.dtype)

    kernel = integers(g.kernel_shape)
    kernel.reshape(g.taps, g.features)[n:] = 0
    bias = None if case.bias is None else integers(case.bias.shape)
    return case.replace(x=integers(g.x_shape), kernel=kernel, bias=bias)


def integer_test(
    implementation: Runnable, case: Case, arithmetic: Arithmetic | None = None, *, seed: int = 0
) -> IntegerTest:
    """Run an implementation on integers; any value but the exact one fails. Zeros of either sign are equal.

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
