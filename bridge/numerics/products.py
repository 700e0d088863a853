"""Sums of products, handed out block by block and term by term.

A sum is walked in blocks of its output that fit a core's cache, and in a block one term at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Block = tuple[slice, ...]

#: Elements of a block: three float64 blocks stay within the 2 MiB of level-2 cache that a core has.
BLOCK = 1 << 16


class Term(NamedTuple):
    """One product for each element of a block, or several along a leading axis.

    Attributes:
      x: float64, broadcasts to the block's shape, or to (several, *block's shape); 0 where not valid.
      w: float64, broadcasts likewise.
      valid: bool, broadcasts likewise; False where there is no product at all, whatever w is.
    """

    x: np.ndarray
    w: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Products:
    """Sums of products: for each element the sum over terms of x w, and the bias where there is one.

    Attributes:
      shape: of the output.
      dtype: of the operands, and of the correctly rounded result.
      x, w: the whole arrays that the terms take their operands from.
      count: int64, broadcasts to `shape`: products of each element (padding is none).
      bias: broadcasts to `shape`, or None.
      terms: the terms of a block of the output; called again for every pass.
      limit: elements of a block at most.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    x: np.ndarray
    w: np.ndarray
    count: np.ndarray
    bias: np.ndarray | None
    terms: Callable[[Block], Iterator[Term]]
    limit: int = BLOCK

    @classmethod
    def of(
        cls,
        terms: Sequence[tuple[np.ndarray, np.ndarray, Any]],
        shape: Sequence[int],
        bias: np.ndarray | None = None,
    ) -> Products:
        """Return the sums of terms `(x, w, valid)`, which broadcast to `shape`; all arrays have one dtype.

        >>> ones = np.ones((2, 3), np.float32)
        >>> Products.of([(ones, ones[:, :1], True), (ones, ones, ones > 1)], (2, 3)).count
        array([[1, 1, 1],
               [1, 1, 1]])
        """
        shape = tuple(shape)
        arrays = [(x, w, np.asarray(valid)) for x, w, valid in terms]
        given = {a.dtype for x, w, _ in arrays for a in (x, w)} | (set() if bias is None else {bias.dtype})
        if len(given) != 1:
            raise TypeError(f"`terms` and `bias` have dtypes {sorted(map(str, given))}, expected one dtype for all")

        def block_terms(block: Block) -> Iterator[Term]:
            for x, w, valid in arrays:
                x, w, valid = (np.broadcast_to(a, shape)[block] for a in (x, w, valid))
                yield Term(np.where(valid, x.astype(np.float64), 0.0), w.astype(np.float64), valid)

        empty = np.zeros(0, next(iter(given)))
        return cls(
            shape,
            empty.dtype,
            np.concatenate([empty, *(np.ravel(x) for x, _, _ in arrays)]),
            np.concatenate([empty, *(np.ravel(w) for _, w, _ in arrays)]),
            sum((np.broadcast_to(valid, shape).astype(np.int64) for _, _, valid in arrays), np.zeros(shape, np.int64)),
            bias,
            block_terms,
        )

    def blocks(self) -> Iterator[Block]:
        """Yield slices that cut the output into blocks of at most about `limit` elements."""
        return blocks(self.shape, self.limit)

    def bias_block(self, block: Block) -> np.ndarray | None:
        """Return the bias in float64, broadcast to a block's shape."""
        return None if self.bias is None else np.broadcast_to(self.bias, self.shape)[block].astype(np.float64)


def blocks(shape: Sequence[int], limit: int) -> Iterator[Block]:
    """Yield slices that cut a shape into blocks of at most about `limit` elements."""
    steps = [max(1, n) for n in shape]
    for axis in range(len(shape)):
        rest = math.prod(steps[axis + 1 :])
        steps[axis] = min(steps[axis], max(1, limit // rest))
    ranges = [[slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, steps)]
    return itertools.product(*ranges)
