"""Target: the quantity that outputs should hold - a case's output or one of its gradients - and its exact value."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bridge.case import Case
from bridge.numerics import (
    Arithmetic,
    ExactSum,
    Products,
    bias_gradient_products,
    error_bound,
    exact_sum,
    input_gradient_products,
    kernel_gradient_products,
    output_products,
)

#: The quantities that can be compared, and the operands that enter their products.
OPERANDS = {"y": ("x", "kernel", "bias"), "dx": ("dy", "kernel"), "dkernel": ("x", "dy"), "dbias": ("dy",)}

#: Names of the operands in sentences.
WORDS = {"x": "the input", "kernel": "the kernel", "bias": "the bias", "dy": "the gradient"}

_GRADIENTS: dict[str, Callable[[Case, np.ndarray], Products]] = {
    "dx": input_gradient_products,
    "dkernel": kernel_gradient_products,
    "dbias": bias_gradient_products,
}

#: Products above which a gradient takes too long to recompute for every hypothesis.
_AFFORDABLE = 1 << 25


class Expected(NamedTuple):
    """The values that a computation must give, and how far it may be from them.

    Attributes:
      reference: float64, the exact sums.
      allowed: float64, the bound of a result, plus the error of the reference itself.
    """

    reference: np.ndarray
    allowed: np.ndarray

    @classmethod
    def of(cls, total: ExactSum, arithmetic: Arithmetic) -> Expected:
        return cls(total.reference, error_bound(arithmetic, total) + total.reference_error)

    def at(self, flat: np.ndarray) -> Expected:
        return Expected(self.reference.ravel()[flat], self.allowed.ravel()[flat])

    def rearranged(self, how: Callable[[np.ndarray], np.ndarray]) -> Expected:
        return Expected(how(self.reference), how(self.allowed))

    def ratio(self, y: np.ndarray) -> np.ndarray:
        """Return |y - reference| / allowed; 0 where nothing is promised or nothing differs."""
        distance = y.astype(np.float64)
        with np.errstate(all="ignore"):
            distance -= self.reference
            np.abs(distance, out=distance)
            counts = (distance > 0) & np.isfinite(self.allowed)
            np.divide(distance, self.allowed, out=distance, where=counts)
        distance[~counts] = 0.0
        return distance

    def unexplained(self, y: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """Return where y is beyond what is allowed; where it was `outside` another bound, this one must be finite."""
        return (self.ratio(y) > 1) | (outside & ~np.isfinite(self.allowed))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A quantity of a case.

    Attributes:
      case: input, kernel, bias and geometry.
      quantity: "y", the output, or a gradient of sum(dy y): "dx", "dkernel" or "dbias".
      dy: the gradient by the output, for a gradient.
      given: the exact quantity, if it is already known.
    """

    case: Case
    quantity: str = "y"
    dy: np.ndarray | None = None
    given: ExactSum | None = None

    def __post_init__(self) -> None:
        if self.quantity not in OPERANDS:
            raise ValueError(f"`quantity` is {self.quantity!r}, expected one of {', '.join(OPERANDS)}")
        is_y, has_dy = self.quantity == "y", self.dy is not None
        if is_y == has_dy:
            expected = "expected None for the output" if is_y else "expected the gradient by the output"
            raise ValueError(f"`dy` is {'given' if has_dy else 'None'} with `quantity` {self.quantity!r}: {expected}")

    @functools.cached_property
    def exact(self) -> ExactSum:
        """The quantity, correctly rounded, with its magnitude."""
        return self.given or exact_sum(products(self.case, self.quantity, self.dy))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.exact.value.shape

    @property
    def has_bias(self) -> bool:
        """True if a bias enters the quantity."""
        return self.quantity == "y" and self.case.bias is not None

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the operands that are multiplied."""
        return tuple(name for name in OPERANDS[self.quantity] if name != "bias")

    @property
    def decides(self) -> bool:
        """False if every term is zero; then every conventional computation gives zeros, right or wrong."""
        has_products = all(self.operand(name).any() for name in self.factors)
        return bool(self.exact.value.size) and (has_products or (self.has_bias and bool(self.operand("bias").any())))

    @property
    def affordable(self) -> bool:
        """True if hypotheses can be tested: an output on a sample, a gradient only as a whole."""
        return (
            self.quantity == "y" or self.case.geometry.taps * math.prod(self.case.geometry.output_shape) < _AFFORDABLE
        )

    def operand(self, name: str) -> np.ndarray:
        """Return x, kernel, bias or dy."""
        array = self.dy if name == "dy" else getattr(self.case, name)
        assert array is not None, name
        return array

    def expected(self, arithmetic: Arithmetic, case: Case, flat: np.ndarray | None = None) -> Expected:
        """Return the same quantity of another case in some arithmetic; at the elements `flat` only, if given."""
        if self.quantity == "y":
            return Expected.of(exact_output(case, flat), arithmetic)
        whole = Expected.of(exact_sum(products(case, self.quantity, self.dy)), arithmetic)
        return whole if flat is None else whole.at(flat)

    @functools.cached_property
    def _bounds(self) -> dict[Arithmetic, np.ndarray]:
        return {}

    def bound(self, arithmetic: Arithmetic) -> np.ndarray:
        """Return `error_bound` of the exact sum, computed once per arithmetic."""
        if arithmetic not in self._bounds:
            self._bounds[arithmetic] = error_bound(arithmetic, self.exact)
        return self._bounds[arithmetic]


def products(case: Case, quantity: str, dy: np.ndarray | None) -> Products:
    """Return the products that add up to the quantity."""
    return output_products(case) if dy is None else _GRADIENTS[quantity](case, dy)


def exact_output(case: Case, flat: np.ndarray | None = None) -> ExactSum:
    """Return the exact output of a case; at the elements `flat` only, if given."""
    if flat is None:
        return exact_sum(output_products(case))
    at = np.unravel_index(flat, case.geometry.output_shape)
    bias = None if case.bias is None else case.bias[at[-1]]
    return exact_sum(Products.of(sampled_terms(case, at), flat.shape, bias))


def sampled_terms(case: Case, at: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return `(x, w, valid)` of each tap under some outputs, each of one dimension; x means nothing where not valid.

    `at` has one index array per axis of the output.
    """
    g = case.geometry
    *leading, feature = at
    batch, spatial = tuple(leading[: len(g.batch)]), leading[len(g.batch) :]
    terms = []
    for tap in np.ndindex(g.kernel_size):
        index = [source[out, t] for source, out, t in zip(g.sources, spatial, tap)]
        valid = np.logical_and.reduce([i >= 0 for i in index])
        here = (*batch, *(np.maximum(i, 0) for i in index), feature // g.multiplier)
        x = case.x[here] if 0 not in g.spatial else np.zeros(valid.shape, case.dtype)
        terms.append((x, case.kernel[(*tap, 0, feature)], valid))
    return terms
