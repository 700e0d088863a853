"""Screen hypotheses on a few elements in plain float64, at little cost. It proves nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected

#: Number of elements.
_SCREENED = 40
#: Several roundings to bfloat16 move a sum by less than this share of the sum of magnitudes.
_NEAR = 2.0**-6
#: An element passes within this many bounds of the expected value. The bound is scaled from the case's own.
_SLACK = 8.0


@dataclasses.dataclass(frozen=True, eq=False)
class Screen:
    """A few elements of an output, half of them from outside its bound, on which thousands of hypotheses can be tried.

    Attributes:
      output: the output.
    """

    output: Output

    @functools.cached_property
    def flat(self) -> np.ndarray:
        """Flat indices of the elements."""
        return np.random.default_rng(3).permutation(self.output.sample)[:_SCREENED]

    @functools.cached_property
    def y(self) -> np.ndarray:
        return self.output.y.ravel()[self.flat].astype(np.float64)

    @functools.cached_property
    def _scale(self) -> float:
        """Greatest bound over magnitude of the case itself, for as many products as there are taps."""
        exact, allowed = self.output.target.exact, self.output.expected.allowed
        with np.errstate(all="ignore"):
            ratio = allowed / exact.magnitude
        usable = np.isfinite(ratio) & (exact.magnitude > 0)
        counted = max(1, int(np.max(exact.products.count, initial=1)))
        terms = self.output.target.case.terms
        return float(ratio[usable].max(initial=0.0)) * (terms + 1) / counted if usable.any() else np.inf

    def expected(self, mistake: Mistake) -> Expected:
        """Return what the mistake gives, before a function of each element, to within some `_SLACK` bounds."""
        if mistake.case is self.output.target.case:
            whole = self.output.expected
            return (whole.rearranged(mistake.rearrange) if mistake.rearrange else whole).at(self.flat)
        return self._within(*sums(mistake.case, self._at(mistake)))

    def factor(self, mistake: Mistake) -> float | None:
        """Return the factor of the input that brings each element near, beside the mistake; None if none does."""
        at = self._at(mistake)
        bias = np.zeros(len(self.flat)) if mistake.case.bias is None else mistake.case.bias[at[-1]].astype(np.float64)
        products = sums(mistake.case, at)[0] - bias
        power = float(products @ products)
        factor = float((self.y - bias) @ products) / power if power else 0.0
        if not np.isfinite(factor) or abs(factor) in (0.0, 1.0):
            return None
        return factor if self._passes(*sums(mistake.case, at, lambda x: factor * x)) else None

    def reads(self, of: Callable[[np.ndarray], np.ndarray]) -> bool:
        """Return whether the case with `of` applied to its input comes near each element; the input is not copied."""
        case = self.output.target.case
        return self._passes(*sums(case, np.unravel_index(self.flat, self.output.y.shape), of))

    def far_from(self, case: Case) -> int:
        """Return how many elements are farther from the sums of a case than roundings of half precision explain."""
        total, size = sums(case, np.unravel_index(self.flat, self.output.y.shape))
        return int(np.count_nonzero(np.abs(self.y - total) > _NEAR * size))

    def _at(self, mistake: Mistake) -> tuple[np.ndarray, ...]:
        """Return the indices of the elements in the mistake's output before it is rearranged."""
        return np.unravel_index(mistake.source_of(self.flat, self.output.y.shape), self.output.y.shape)

    def _within(self, total: np.ndarray, size: np.ndarray) -> Expected:
        """Return sums with `_SLACK` bounds of their sizes."""
        tiny = 1e3 * self.output.target.case.terms * self.output.arithmetic.output.smallest_normal
        return Expected(total, _SLACK * self._scale * size + tiny)

    def passes(self, expected: Expected) -> bool:
        """Return whether each element but one is near what is expected."""
        return int(np.count_nonzero(np.abs(self.y - expected.reference) > expected.allowed)) <= 1

    def passes_after(self, mistake: Mistake) -> bool:
        """Return whether the mistake, with its function of each element, comes near each element."""
        assert mistake.after is not None
        return self.passes(mistake.after(self.expected(mistake), self.flat % self.output.y.shape[-1]))

    def _passes(self, total: np.ndarray, size: np.ndarray) -> bool:
        return self.passes(self._within(total, size))


def sums(
    case: Case, at: tuple[np.ndarray, ...], of: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(sum x w + b, sum |x w| + |b|)` in float64 at some outputs.

    `at` has one index array per axis of the output. `of` is a function to apply to x; the sizes are then no smaller
    than those of x and of 1.
    """
    g = case.geometry
    *leading, feature = at
    spatial = leading[len(g.batch) :]
    if 0 in g.spatial:
        total = np.zeros(feature.shape) if case.bias is None else case.bias[feature].astype(np.float64)
        return total, np.abs(total)

    def grid(index: np.ndarray, axis: int | None = None) -> np.ndarray:
        """Return one index per output, or one per output and tap of an axis, to broadcast over all taps."""
        return index.reshape(len(feature), *(index.shape[1] if a == axis else 1 for a in range(g.rank)))

    sources = [grid(source[out], axis) for axis, (source, out) in enumerate(zip(g.sources, spatial))]
    valid = np.logical_and.reduce(np.broadcast_arrays(*(source >= 0 for source in sources)))
    batch = [grid(index) for index in leading[: len(g.batch)]]
    x = case.x[(*batch, *(np.maximum(source, 0) for source in sources), grid(feature // g.multiplier))]
    w = np.moveaxis(case.kernel[..., 0, :], -1, 0)[feature]
    x, w = x.astype(np.float64), w.astype(np.float64)
    read, most = (x, np.abs(x)) if of is None else (of(x), np.maximum(np.abs(of(x)), np.abs(x) + 1))
    product, size = (np.where(valid, a, 0.0).reshape(len(feature), -1) for a in (read * w, most * np.abs(w)))
    bias = np.zeros(1) if case.bias is None else case.bias[feature].astype(np.float64)
    return product.sum(axis=1) + bias, size.sum(axis=1) + np.abs(bias)
