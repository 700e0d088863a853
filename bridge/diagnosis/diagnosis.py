"""Diagnosis: the comparisons of every pair of implementations on one case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.accumulation import AccumulationOrder
from bridge.case import Case
from bridge.diagnosis.comparison import Comparison
from bridge.diagnosis.integers import IntegerTest
from bridge.diagnosis.remedy import Remedy
from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """The comparisons of every pair of implementations on one case.

    Attributes:
      case: what was computed.
      outputs: each implementation's output, by name, in the order they were asked for.
      comparisons: one per pair, in the same order.
      integer_tests: one per implementation, against the exact result on small integers; it finds what is too small
        for the bound.
      orders: each implementation's revealed accumulation order, but for the exact result, which has none; empty if
        none was asked for.
      calls: how each function of the user was called, by name.
      remedies: how to have the bits of the first implementation and keep the windows, where others differ by rounding.
      quantity, dy: the quantity of the outputs: "y", or "dx", the gradient of sum(dy y) by the input.
    """

    case: Case
    outputs: Mapping[str, np.ndarray]
    comparisons: Sequence[Comparison]
    integer_tests: Sequence[IntegerTest] = ()
    orders: Sequence[AccumulationOrder] = ()
    quantity: str = "y"
    dy: np.ndarray | None = None
    calls: Mapping[str, str] = dataclasses.field(default_factory=dict)
    remedies: Sequence[Remedy] = ()

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of any pair; if all pass, that of an integer test that failed."""
        verdict = max((c.verdict for c in self.comparisons), key=Verdict.rank, default=Verdict.IDENTICAL)
        hidden = [t.verdict for t in self.integer_tests] if verdict.passes else []
        return max([verdict, *hidden], key=Verdict.rank)

    @property
    def names(self) -> list[str]:
        return list(self.outputs)

    def between(self, a: str, b: str) -> Comparison:
        """Return the comparison of two implementations, in either order."""
        for comparison in self.comparisons:
            if {comparison.a, comparison.b} == {a, b}:
                return comparison
        raise ValueError(f"`a` and `b` are {a!r} and {b!r}, expected two of {', '.join(self.names)}")

    def identical_to(self, name: str) -> list[str]:
        """Return the other implementations with the same bits as this one."""
        others = (other for other in self.outputs if other != name)
        return [other for other in others if self.between(name, other).verdict is Verdict.IDENTICAL]
