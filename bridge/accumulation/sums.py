"""Plain sums and dot products: black boxes from vectors to a scalar, by the same machinery as convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bridge.accumulation._reveal import reveal_subject
from bridge.accumulation.order import AccumulationOrder
from bridge.accumulation.probe import Subject
from bridge.case import Case

#: Sets of random data that a scalar is held against: one alone may agree by chance.
_DRAWS = 8


def reveal_sum(function: Callable[[np.ndarray], Any], n: int, dtype: Any = np.float32) -> AccumulationOrder:
    """The order in which `function` adds the n numbers of a vector; leaves are their indices.

    Args:
      function: takes an array `(n,)` of `dtype`, returns a scalar of `dtype`.
      n: length of the vector.
      dtype: float32, float64, float16 or bfloat16.

    >>> import numpy as np
    >>> order = reveal_sum(np.add.reduce, 8)
    >>> order.trees
    (Tree('((0+1)+(2+3))+((4+5)+(6+7))'),)
    """

    def run(case: Case) -> np.ndarray:
        return _scalar(function(case.kernel[:, 0, 0]), case)

    return _reveal(function, run, n, dtype, products=False)


def reveal_dot(function: Callable[[np.ndarray, np.ndarray], Any], n: int, dtype: Any = np.float32) -> AccumulationOrder:
    """The order in which `function` adds the n products of two vectors.

    A matrix-vector or matrix product is a dot product of the row and the column that reach one of its elements.

    Args:
      function: takes two arrays `(n,)` of `dtype`, returns a scalar of `dtype`.
      n: length of the vectors.
      dtype: float32, float64, float16 or bfloat16.
    """

    def run(case: Case) -> np.ndarray:
        return _scalar(function(case.x[:, 0], case.kernel[:, 0, 0]), case)

    return _reveal(function, run, n, dtype, products=True)


def _scalar(value: Any, case: Case) -> np.ndarray:
    return np.asarray(value).reshape(case.geometry.output_shape)


def _reveal(
    function: Callable[..., Any], run: Callable[[Case], np.ndarray], n: int, dtype: Any, *, products: bool
) -> AccumulationOrder:
    """A sum of n terms is a convolution with n taps at its one output position."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"`n` is {n!r}, expected a positive int")
    run.__name__ = getattr(function, "__name__", "function")
    case = Case(np.ones((n, 1), dtype), np.ones((n, 1, 1), dtype), padding="VALID")
    return reveal_subject(Subject(run, case, products=products), _DRAWS)
