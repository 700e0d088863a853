"""Sums of products that are computed together: what an order of addition is revealed of, and replayed on."""

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
    """

    data: Any

    @property
    @abc.abstractmethod
    def layout(self) -> Any:
        """What decides which products each element adds. A revealed order holds for one layout."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The dtype of data and output."""

    @property
    @abc.abstractmethod
    def terms(self) -> int:
        """The greatest number of products that one element adds."""

    @property
    def has_bias(self) -> bool:
        """Whether each element adds a number that is no product."""
        return False

    @property
    def multiplies(self) -> bool:
        """Whether implementations multiply; if not, x is 1 and the weights are the terms."""
        return True

    @property
    @abc.abstractmethod
    def weights(self) -> np.ndarray:
        """The weights, term by term: each broadcasts to the shape of the output."""

    @abc.abstractmethod
    def reads(self) -> np.ndarray:
        """Return which products each element adds: bool, broadcasts to `(*shape, terms)`."""

    @abc.abstractmethod
    def uniform(self, x: float, weights: np.ndarray) -> Self:
        """Return the sums with every x the same, and the same weights `(terms,)`, and bias last, for every element."""

    @abc.abstractmethod
    def random(self, seed: int) -> Self:
        """Return the sums of normal random numbers: the same ones at every call, so that results can be repeated."""

    @abc.abstractmethod
    def changed(self, x: Change, w: Change) -> Self:
        """Return the sums with all x changed by one function, and the weights and the bias by another."""

    @abc.abstractmethod
    def operands(self, at: tuple) -> Operands:
        """Return the operands of the elements `at`: a slice per axis of the output, or an index array per axis."""

    @abc.abstractmethod
    def exact(self) -> np.ndarray:
        """Return the exact sums, rounded once."""

    def transform(self, output: Callable[[Self], np.ndarray]) -> str:
        """Return a phrase that names the transform by which `output` computes, if it does not add products."""
        return ""
