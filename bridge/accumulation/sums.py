"""Sums of products that are computed together: accumulation orders are revealed of them and replayed on them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from bridge.accumulation.tree import Leaf

#: The operands of a leaf, which broadcast to one shape: (x, w) of a product; of the bias (b, 1).
Operands = Callable[[Leaf | None], tuple[np.ndarray, np.ndarray]]

#: Changes an array without changing its shape or dtype.
Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class SumsOfProducts(abc.ABC):
    """One sum per output element, each of some of the same products, and of a bias where there is one.

    Attributes:
      data: what an implementation computes the sums from.
      layout: decides which products each element adds. A revealed order holds for one layout and dtype.
      dtype: of data and output.
      shape: of the output.
      weights: `(terms, ...)`: those of each term broadcast to the shape of the output.
      reads: which products each element adds: bool, broadcasts to `(*shape, terms)`.
      has_bias: whether each element adds a number that is no product.
      multiplies: whether implementations multiply; if not, x is 1 and the weights are the terms.
    """

    data: Any
    layout: Any
    dtype: np.dtype
    shape: tuple[int, ...]
    weights: np.ndarray
    reads: np.ndarray
    has_bias: bool = False
    multiplies: bool = True

    @property
    def terms(self) -> int:
        """The greatest number of products that one element adds."""
        return len(self.weights)

    @abc.abstractmethod
    def uniform(self, x: float, weights: np.ndarray) -> Self:
        """Return the sums with every x the same, and the same weights `(terms,)`, and bias last, for every element."""

    @abc.abstractmethod
    def changed(self, x: Change, w: Change) -> Self:
        """Return the sums with all x changed by one function, and the weights and the bias by another."""

    @abc.abstractmethod
    def operands(self, at: tuple) -> Operands:
        """Return the operands of the elements `at`: a slice per axis of the output, or an index array per axis."""

    @abc.abstractmethod
    def exact(self) -> np.ndarray:
        """Return the exact sums, rounded once."""

    def random(self, seed: int) -> Self:
        """Return the sums of normal random numbers: the same ones at every call, so that results can be repeated."""
        rng = np.random.default_rng(seed)

        def normal(array: np.ndarray) -> np.ndarray:
            return rng.standard_normal(array.shape).astype(self.dtype)

        return self.changed(normal if self.multiplies else np.ones_like, normal)

    def transform(self, output: Callable[[Self], np.ndarray]) -> str:
        """Return a phrase that names the transform by which `output` computes, if it does not add products."""
        return ""
