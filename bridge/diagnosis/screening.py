"""Screening: whether a hypothesis can be right, from a few elements in plain float64. It proves nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.case import Case
from bridge.diagnosis.mistakes import Mistake
from bridge.diagnosis.pointwise import scaled
from bridge.diagnosis.target import Expected

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side

#: Elements that are looked at.
_SCREENED = 40
#: Bounds from the expected value within which an element passes. The bound is scaled from the case's own.
_SLACK = 8.0


@dataclasses.dataclass(frozen=True, eq=False)
class Screen:
    """A few elements of a side, half of them from outside its bound, on which thousands of hypotheses can be tried.

    Attributes:
      side: whose output it is.
      flat: the indices of the elements.
    """

    side: Side
    flat: np.ndarray

    @classmethod
    def of(cls, side: Side) -> Screen:
        rng = np.random.default_rng(3)
        return cls(side, rng.permutation(side.sample)[:_SCREENED])

    @functools.cached_property
    def y(self) -> np.ndarray:
        return self.side.y.ravel()[self.flat].astype(np.float64)

    @functools.cached_property
    def _scale(self) -> float:
        """The greatest bound over magnitude of the case itself, for as many products as there are taps."""
        exact, allowed = self.side.target.exact, self.side.expected.allowed
        with np.errstate(all="ignore"):
            ratio = allowed / exact.magnitude
        usable = np.isfinite(ratio) & (exact.magnitude > 0)
        counted = max(1, int(np.max(exact.products.count, initial=1)))
        return (
            float(ratio[usable].max(initial=0.0)) * (exact_terms(self.side) + 1) / counted if usable.any() else np.inf
        )

    def expected(self, mistake: Mistake) -> Expected:
        """What the mistake must give there, before a function of each element, to within `_SLACK` bounds or so."""
        if mistake.case is self.side.target.case:
            whole = self.side.expected
            return (whole.rearranged(mistake.rearrange) if mistake.rearrange else whole).at(self.flat)
        source = self.flat
        if mistake.rearrange is not None:
            source = mistake.rearrange(self._indices).ravel()[self.flat]
        total, size = sums(mistake.case, np.unravel_index(source, self.side.y.shape))
        return Expected(total, _SLACK * self._scale * size + self._tiny)

    def scaled(self, mistake: Mistake) -> Iterator[Mistake]:
        """The mistake with its input scaled too, where that brings each element near."""
        channel = self.flat % self.side.y.shape[-1]
        bias = mistake.case.bias
        if mistake.rearrange is not None and bias is not None:
            channel = np.unravel_index(mistake.rearrange(self._indices).ravel()[self.flat], self.side.y.shape)[-1]
        added = np.zeros(len(self.flat)) if bias is None else bias[channel].astype(np.float64)
        for both in scaled(mistake, self.side, self.y, self.expected(mistake).reference, added):
            if self.passes(self.expected(both)):
                yield both

    @functools.cached_property
    def _indices(self) -> np.ndarray:
        return np.arange(self.side.y.size).reshape(self.side.y.shape)

    @property
    def _tiny(self) -> float:
        return 1e3 * exact_terms(self.side) * self.side.arithmetic.output.smallest_normal

    def passes(self, expected: Expected) -> bool:
        """Whether each element is near what is expected, but for one."""
        return np.count_nonzero(np.abs(self.y - expected.reference) > expected.allowed) <= 1


def exact_terms(side: Side) -> int:
    """Products and bias of one output."""
    return side.target.case.terms


def sums(case: Case, at: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`(sum x w + b, sum |x w| + |b|)` in float64 at some outputs: `at` has one index array an axis of the output."""
    g = case.geometry
    *leading, feature = at
    spatial = leading[len(g.batch) :]
    if 0 in g.spatial:
        total = np.zeros(feature.shape) if case.bias is None else case.bias[feature].astype(np.float64)
        return total, np.abs(total)

    def grid(index: np.ndarray, axis: int | None = None) -> np.ndarray:
        """One index an output, or one an output and tap of an axis, to broadcast over all taps."""
        return index.reshape(len(feature), *(index.shape[1] if a == axis else 1 for a in range(g.rank)))

    sources = [grid(source[out], axis) for axis, (source, out) in enumerate(zip(g.sources, spatial))]
    valid = np.logical_and.reduce(np.broadcast_arrays(*(source >= 0 for source in sources)))
    batch = [grid(index) for index in leading[: len(g.batch)]]
    x = case.x[(*batch, *(np.maximum(source, 0) for source in sources), grid(feature // g.multiplier))]
    w = np.moveaxis(case.kernel[..., 0, :], -1, 0)[feature]
    product = np.where(valid, x.astype(np.float64) * w.astype(np.float64), 0.0).reshape(len(feature), -1)
    bias = np.zeros(1) if case.bias is None else case.bias[feature].astype(np.float64)
    return product.sum(axis=1) + bias, np.abs(product).sum(axis=1) + np.abs(bias)
