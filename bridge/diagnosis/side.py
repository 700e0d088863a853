"""Side: one output, the bound that its declared arithmetic promises, and where it breaks that promise."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bridge.diagnosis.emulation import on_platform
from bridge.diagnosis.explain import explain
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.mistakes import Mistake
from bridge.diagnosis.one_sided import one_sided
from bridge.diagnosis.shapes import likely_cause
from bridge.diagnosis.target import Expected, Target
from bridge.implementations import Implementation
from bridge.numerics import Arithmetic

#: Elements on which a hypothesis is tried before it is tested on all.
_SAMPLE = 384


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One array that is to be compared.

    Attributes:
      name: what the report calls it.
      y: the output.
      target: what it was to compute.
      arithmetic: what its implementation declares to compute in.
      replayed: y recomputed in its revealed order of addition; None if that was not tried.
      emulated: what made y, where it emulates a platform.
    """

    name: str
    y: np.ndarray
    target: Target
    arithmetic: Arithmetic
    replayed: np.ndarray | None = None
    emulated: Implementation | None = None

    @classmethod
    def of(
        cls,
        name: str,
        y: np.ndarray,
        target: Target,
        arithmetic: Arithmetic | None = None,
        replayed: np.ndarray | None = None,
        emulated: Implementation | None = None,
    ) -> Side:
        """A side whose array is checked against the target; no arithmetic means the weakest conventional one."""
        if not isinstance(y, np.ndarray):
            raise TypeError(f"`{name}` is a {type(y).__name__}, expected a NumPy array")
        if y.shape != target.shape:
            hint = likely_cause(y.shape, target)
            raise ValueError(f"`{name}` has shape {y.shape}, expected {target.shape}{': ' + hint if hint else ''}")
        if y.dtype != target.case.dtype:
            raise TypeError(f"`{name}` has dtype {y.dtype}, expected {target.case.dtype}, the dtype of the case")
        return cls(name, y, target, arithmetic or weakest(target), replayed, emulated)

    @property
    def bound(self) -> np.ndarray:
        """float64, |y - exact| at most, per element."""
        return self.target.bound(self.arithmetic)

    @property
    def expected(self) -> Expected:
        exact = self.target.exact
        return Expected(exact.reference, self.bound + exact.reference_error)

    @functools.cached_property
    def outside(self) -> np.ndarray:
        """Where y is proved not to be a conventional sum in the declared arithmetic."""
        return (self.expected.ratio(self.y) > 1) & np.isfinite(self.y)

    @functools.cached_property
    def worst_ratio(self) -> float:
        """The greatest |y - exact| / bound."""
        return float(self.expected.ratio(self.y).max(initial=0.0, where=np.isfinite(self.y)))

    @functools.cached_property
    def sample(self) -> np.ndarray:
        """Flat indices of some elements, half of them from outside the bound where there are as many. Repeatable."""
        rng = np.random.default_rng(0)
        outside = np.flatnonzero(self.outside)
        anywhere = np.flatnonzero(np.isfinite(self.y))
        chosen = [rng.choice(a, min(len(a), _SAMPLE // 2), replace=False) for a in (outside, anywhere)]
        return np.unique(np.concatenate(chosen))

    def unexplained_by(self, expected: Expected, flat: np.ndarray | None = None) -> np.ndarray:
        """Where y is finite and not as expected; `flat` names the elements where they are a sample."""
        y, outside = (self.y, self.outside) if flat is None else (self.y.ravel()[flat], self.outside.ravel()[flat])
        return expected.unexplained(y, outside) & np.isfinite(y)

    def explained_by(self, expected: Expected, flat: np.ndarray | None = None) -> bool:
        """Whether every element is as expected; `flat` names them where they are a sample."""
        return not self.unexplained_by(expected, flat).any()

    @functools.cached_property
    def nearly(self) -> list[tuple[Mistake, np.ndarray]]:
        """The mistakes that explain all but a few elements, and where these are; filled by who tries them."""
        return []

    @functools.cached_property
    def one_sided(self) -> str:
        """How its errors lie to one side of the exact result, in words; empty where their signs may be random."""
        return one_sided(self)

    @functools.cached_property
    def finding(self) -> Finding | None:
        """Why it is outside its bound; None if it is not."""
        if not self.outside.any():
            return None
        found = explain(self)
        return found if self.emulated is None else on_platform(self, self.emulated, found)


def weakest(target: Target) -> Arithmetic:
    """Any order in the dtype's customary accumulator, subnormals flushed or not, the bias added before or after."""
    twice = target.quantity == "y" and target.case.bias is not None
    return Arithmetic.of(target.case.dtype, flushes_subnormals=True, output_roundings=2 if twice else 1)
