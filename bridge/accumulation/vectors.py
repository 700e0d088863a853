"""Plain sums and dot products of vectors, revealed as the sums of a convolution are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bridge.accumulation._reveal import reveal_subject
from bridge.accumulation.order import AccumulationOrder
from bridge.accumulation.probe import Subject
from bridge.accumulation.sums import Change, Operands, SumsOfProducts
from bridge.accumulation.tree import Leaf
from bridge.numerics import Products, exact_sum

#: Sets of random data that a scalar is compared on: one alone may agree by chance.
_DRAWS = 8


class DotProduct(SumsOfProducts):
    """The sum of the products of two vectors: `data` is `(x, w)`, both `(n,)`, and the output is `(1,)`.

    >>> x, w = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
    >>> DotProduct((x, w)).exact()
    array([3.], dtype=float32)
    """

    data: tuple[np.ndarray, np.ndarray]

    @property
    def layout(self) -> int:
        return self.terms

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> np.dtype:
        return self.data[-1].dtype

    @property
    def terms(self) -> int:
        return len(self.data[-1])

    @property
    def weights(self) -> np.ndarray:
        return self.data[1][:, None]

    def reads(self) -> np.ndarray:
        return np.ones((1, self.terms), bool)

    def uniform(self, x: float, weights: np.ndarray) -> DotProduct:
        return type(self)((np.full(self.terms, x).astype(self.dtype), weights.astype(self.dtype)))

    def random(self, seed: int) -> DotProduct:
        rng = np.random.default_rng(seed)
        x, w = (rng.standard_normal(self.terms).astype(self.dtype) for _ in range(2))
        return type(self)((x if self.multiplies else np.ones_like(x), w))

    def changed(self, x: Change, w: Change) -> DotProduct:
        return type(self)((x(self.data[0]), w(self.data[1])))

    def operands(self, at: tuple) -> Operands:
        def operands(leaf: Leaf | None) -> tuple[np.ndarray, np.ndarray]:
            assert isinstance(leaf, int)
            first, second = (vector[leaf : leaf + 1] for vector in self.data)
            return first, second

        return operands

    def exact(self) -> np.ndarray:
        terms = [(x, w, True) for x, w in zip(*(vector[:, None] for vector in self.data))]
        return exact_sum(Products.of(terms, self.shape)).value


class PlainSum(DotProduct):
    """The sum of the numbers w of a vector: `data` is `(ones, w)`."""

    @property
    def multiplies(self) -> bool:
        return False


def reveal_sum(function: Callable[[np.ndarray], Any], n: int, dtype: Any = np.float32) -> AccumulationOrder:
    """Reveal the order in which `function` adds the n numbers of a vector; leaves are their indices.

    Args:
      function: takes an array `(n,)` of `dtype`, returns a scalar of `dtype`.
      n: length of the vector.
      dtype: float32, float64, float16 or bfloat16.

    >>> order = reveal_sum(np.add.reduce, 8)
    >>> order.trees
    (Tree('((0+1)+(2+3))+((4+5)+(6+7))'),)
    """
    return _reveal(PlainSum, function, lambda data: function(data[1]), n, dtype)


def reveal_dot(function: Callable[[np.ndarray, np.ndarray], Any], n: int, dtype: Any = np.float32) -> AccumulationOrder:
    """Reveal the order in which `function` adds the n products of two vectors; `replay` it on a `DotProduct`.

    A matrix-vector or matrix product is a dot product of the row and the column that reach one of its elements.

    Args:
      function: takes two arrays `(n,)` of `dtype`, returns a scalar of `dtype`.
      n: length of the vectors.
      dtype: float32, float64, float16 or bfloat16.
    """
    return _reveal(DotProduct, function, lambda data: function(*data), n, dtype)


def _reveal(
    kind: type[DotProduct], function: Callable[..., Any], call: Callable[..., Any], n: int, dtype: Any
) -> AccumulationOrder:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"`n` is {n!r}, expected a positive int")

    def run(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return np.asarray(call(data)).reshape(1)

    run.__name__ = getattr(function, "__name__", "function")
    ones = np.ones(n, dtype)
    return reveal_subject(Subject(run, kind((ones, ones))), _DRAWS)
