"""Output: one array to compare, and the bound that its declared arithmetic promises."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bridge._implementations import Implementation
from bridge.diagnosis.shape_hints import likely_cause
from bridge.diagnosis.target import Expected, Target
from bridge.numerics import Arithmetic

#: Elements on which a hypothesis is tried before it is tested on all.
_SAMPLE = 384
#: Least evidence for a hypothesis, in bits. A search tries some hundred mistakes, or some thousand pairs.
_BITS = 24.0


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """One array to compare.

    Attributes:
      name: its name in the report.
      y: the array.
      target: the quantity that it should hold.
      declared: the arithmetic that its implementation declares; None means the weakest conventional one.
      replayed: y recomputed in its revealed accumulation order; None if that was not tried.
      emulated: the implementation of y, if it emulates a platform.
      framework: "torch", "jax" or "numpy", for fixes in its layout and words; empty for channels last.
    """

    name: str
    y: np.ndarray
    target: Target
    declared: Arithmetic | None = None
    replayed: np.ndarray | None = None
    emulated: Implementation | None = None
    framework: str = ""

    def __post_init__(self) -> None:
        name, y, target = self.name, self.y, self.target
        if not isinstance(y, np.ndarray):
            raise TypeError(f"`{name}` is a {type(y).__name__}, expected a NumPy array")
        if y.shape != target.shape:
            hint = likely_cause(y.shape, target)
            raise ValueError(f"`{name}` has shape {y.shape}, expected {target.shape}{': ' + hint if hint else ''}")
        if y.dtype != target.case.dtype:
            raise TypeError(f"`{name}` has dtype {y.dtype}, expected {target.case.dtype}, the dtype of the case")

    @functools.cached_property
    def arithmetic(self) -> Arithmetic:
        """Arithmetic that y must keep to.

        The weakest allows any order in the dtype's customary accumulator, subnormals flushed or not, and the bias
        added before or after.
        """
        roundings = 2 if self.target.has_bias else 1
        weakest = Arithmetic.of(self.y.dtype, flushes_subnormals=True, output_roundings=roundings)
        return self.declared or weakest

    @property
    def bound(self) -> np.ndarray:
        """Greatest |y - exact| per element, float64."""
        return self.target.bound(self.arithmetic)

    @property
    def expected(self) -> Expected:
        exact = self.target.exact
        return Expected(exact.reference, self.bound + exact.reference_error)

    @functools.cached_property
    def outside(self) -> np.ndarray:
        """Elements of y that cannot be a conventional sum in the declared arithmetic, bool."""
        return (self.expected.ratio(self.y) > 1) & np.isfinite(self.y)

    @functools.cached_property
    def worst_ratio(self) -> float:
        """Greatest |y - exact| / bound."""
        return float(self.expected.ratio(self.y).max(initial=0.0, where=np.isfinite(self.y)))

    @functools.cached_property
    def sample(self) -> np.ndarray:
        """Flat indices of some elements; half of them lie outside the bound if there are enough. Repeatable."""
        rng = np.random.default_rng(0)
        outside = np.flatnonzero(self.outside)
        anywhere = np.flatnonzero(np.isfinite(self.y))
        chosen = [rng.choice(a, min(len(a), _SAMPLE // 2), replace=False) for a in (outside, anywhere)]
        return np.unique(np.concatenate(chosen))

    def unexplained_by(self, expected: Expected, flat: np.ndarray | None = None) -> np.ndarray:
        """Finite elements of y that are not as expected, bool; of the elements `flat` only, if given."""
        y, outside = (self.y, self.outside) if flat is None else (self.y.ravel()[flat], self.outside.ravel()[flat])
        return expected.unexplained(y, outside) & np.isfinite(y)

    def explained_by(self, expected: Expected, flat: np.ndarray | None = None) -> bool:
        """Return whether every element is as expected; of the elements `flat` only, if given."""
        return not self.unexplained_by(expected, flat).any()

    def is_proved_by(self, expected: Expected, explained: np.ndarray | None = None) -> bool:
        """Return whether the elements `explained` are too many, and hit too well, to be as expected by accident.

        The other hypothesis is that each of them is wrong for itself. Its error is then any number as large as the one
        that is seen, so it falls within what is expected with a probability of at most allowed / |error|. The elements
        outside the bound alone count: a hypothesis that changes nothing but the bound has no evidence.
        """
        counted = self.outside if explained is None else self.outside & explained
        error = np.abs(self.y[counted].astype(np.float64) - self.expected.reference[counted])
        with np.errstate(all="ignore"):
            bits = np.log2(error / expected.allowed[counted])
        return bool(np.maximum(np.nan_to_num(bits, posinf=np.inf), 0).sum() >= _BITS)
