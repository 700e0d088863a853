"""Plain sums and dot products of vectors, revealed as the sums of a convolution are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bridge.accumulation._reveal import reveal_subject
from bridge.accumulation.order import AccumulationOrder
from bridge.accumulation.probe import Subject
from bridge.accumulation.sums import Change, Operands, SumsOfProducts
from bridge.numerics import Products, exact_sum

#: Sets of random data that a scalar is compared on: one alone may agree by chance.
_DRAWS = 8


class DotProduct(SumsOfProducts):
    """The sum of the products of two vectors: `data` is `(x, w)`, both `(n,)`, and the output is `(1,)`."""

    @classmethod
    def of(cls, x: np.ndarray, w: np.ndarray, *, multiplies: bool = True) -> DotProduct:
        """Return the sum of x w, or of w alone where implementations do not multiply: x is 1 then.

        >>> x, w = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
        >>> DotProduct.of(x, w).exact()
        array([3.], dtype=float32)
        """
        return cls((x, w), len(w), w.dtype, (1,), w[:, None], np.ones((1, len(w)), bool), multiplies=multiplies)

    def uniform(self, x: float, weights: np.ndarray) -> DotProduct:
        return self.changed(lambda old: np.full_like(old, x), lambda old: weights.astype(old.dtype))

    def changed(self, x: Change, w: Change) -> DotProduct:
        return self.of(x(self.data[0]), w(self.data[1]), multiplies=self.multiplies)

    def operands(self, at: tuple) -> Operands:
        return lambda leaf: tuple(vector[leaf, None] for vector in self.data)

    def exact(self) -> np.ndarray:
        return exact_sum(Products.of([(x, w, True) for x, w in zip(*self.data)], self.shape)).value


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
    return _reveal(function, lambda data: function(data[1]), n, dtype, multiplies=False)


def reveal_dot(function: Callable[[np.ndarray, np.ndarray], Any], n: int, dtype: Any = np.float32) -> AccumulationOrder:
    """Reveal the order in which `function` adds the n products of two vectors; `replay` it on a `DotProduct`.

    A matrix-vector or matrix product is a dot product of the row and the column that reach one of its elements.

    Args:
      function: takes two arrays `(n,)` of `dtype`, returns a scalar of `dtype`.
      n: length of the vectors.
      dtype: float32, float64, float16 or bfloat16.
    """
    return _reveal(function, lambda data: function(*data), n, dtype, multiplies=True)


def _reveal(
    function: Callable[..., Any], call: Callable[..., Any], n: int, dtype: Any, *, multiplies: bool
) -> AccumulationOrder:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"`n` is {n!r}, expected a positive int")

    def run(data: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return np.asarray(call(data)).reshape(1)

    run.__name__ = getattr(function, "__name__", "function")
    ones = np.ones(n, dtype)
    return reveal_subject(Subject(run, DotProduct.of(ones, ones, multiplies=multiplies)), _DRAWS)
