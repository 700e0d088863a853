"""The sums of products that define a convolution and its gradients, handed out block by block and term by term.

The windows of a convolution hold every input once a tap; they are never built here. A sum is walked in blocks of its
output that fit a core's cache, and in a block one tap at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bridge.case import Case

Block = tuple[slice, ...]

#: Elements of a block: three float64 blocks stay within the 2 MiB of level-2 cache that a core has.
_BLOCK = 1 << 16


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
    """What is added: element by element, the sum over terms of x w, and the bias where there is one.

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
    limit: int = _BLOCK

    @classmethod
    def of(
        cls,
        terms: Sequence[tuple[np.ndarray, np.ndarray, Any]],
        shape: Sequence[int],
        bias: np.ndarray | None = None,
    ) -> Products:
        """From arrays: each term's `(x, w, valid)` broadcast to `shape`; all x and w, and the bias, have one dtype.

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
        """Slices that cut the output into blocks of at most about `limit` elements."""
        return _blocks(self.shape, self.limit)

    def bias_block(self, block: Block) -> np.ndarray | None:
        """The bias in float64, broadcast to a block's shape."""
        return None if self.bias is None else np.broadcast_to(self.bias, self.shape)[block].astype(np.float64)


def output_products(case: Case) -> Products:
    """The products of the convolution itself, of shape `(*batch, *output_spatial, C*M)`."""
    g = case.geometry
    x = _with_zero_plane(np.repeat(case.x, g.multiplier, axis=-1), len(g.batch), g.rank)
    kernel = case.kernel.astype(np.float64)

    def terms(block: Block) -> Iterator[Term]:
        spatial, feature = block[-g.rank - 1 : -1], block[-1]
        sources = [source[rows] for source, rows in zip(g.sources, spatial)]
        inputs = x[_whole_space(block, g.rank)]
        for tap in np.ndindex(g.kernel_size):
            taken, valid = _gather(inputs, [source[:, t] for source, t in zip(sources, tap)])
            yield Term(taken, _along_rows(kernel[tap][0, feature], taken.shape), valid[..., None])

    count = _outer([(source >= 0).sum(axis=1) for source in g.sources])[..., None]
    return Products(g.output_shape, case.dtype, case.x, case.kernel, count, case.bias, terms)


def input_gradient_products(case: Case, dy: np.ndarray) -> Products:
    """The products of dx, the gradient by the input: dy w over all (output, tap) that read an input. Shape of x."""
    g = case.geometry
    dy = _checked_dy(case, dy)
    outputs = _with_zero_plane(case.split_channels(dy), len(g.batch), g.rank)
    kernel = case.kernel.astype(np.float64).reshape(*g.kernel_size, g.channels, g.multiplier)
    readers = [_readers(source, size) for source, size in zip(g.sources, g.spatial)]

    def terms(block: Block) -> Iterator[Term]:
        spatial, channel = block[-g.rank - 1 : -1], block[-1]
        gradients = outputs[_whole_space(block, g.rank)]
        for choice in itertools.product(*readers):
            tap = tuple(t for t, _ in choice)
            index = [reader[rows] for (_, reader), rows in zip(choice, spatial)]
            for m in range(g.multiplier):
                taken, valid = _gather(gradients[..., m], index)
                yield Term(taken, _along_rows(kernel[tap][channel, m], taken.shape), valid[..., None])

    per_axis = [sum((reader >= 0 for _, reader in axis), np.zeros(n, int)) for axis, n in zip(readers, g.spatial)]
    count = _outer(per_axis)[..., None] * g.multiplier
    return Products(g.x_shape, case.dtype, dy, case.kernel, count, None, terms)


def kernel_gradient_products(case: Case, dy: np.ndarray) -> Products:
    """The products of dkernel: x dy over the batch and all outputs whose tap reads the input. Shape of the kernel."""
    g = case.geometry
    dy = _checked_dy(case, dy)
    x = _with_zero_plane(np.repeat(case.x, g.multiplier, axis=-1), len(g.batch), g.rank)
    gradients = dy.astype(np.float64)
    positions = (*g.batch, *g.output_spatial)

    def terms(block: Block) -> Iterator[Term]:
        *taps, _, feature = block  # a block is one tap: `limit` is one element a feature
        several = (-1, *(1,) * (g.rank + 1))
        for chunk in _blocks(positions, max(1, _BLOCK // g.features)):
            spatial = chunk[len(g.batch) :]
            index = [source[rows, tap.start] for source, rows, tap in zip(g.sources, spatial, taps)]
            taken, valid = _gather(x[_whole_space((*chunk, feature), g.rank)], index)
            valid = np.broadcast_to(valid[..., None], (*taken.shape[:-1], 1))
            yield Term(
                taken.reshape(*several, taken.shape[-1]),
                gradients[(*chunk, feature)].reshape(*several, taken.shape[-1]),
                valid.reshape(*several, 1),
            )

    count = _outer([(source >= 0).sum(axis=0) for source in g.sources])[..., None, None] * math.prod(g.batch)
    return Products(g.kernel_shape, case.dtype, case.x, dy, count, None, terms, limit=g.features)


def bias_gradient_products(case: Case, dy: np.ndarray) -> Products:
    """The terms of dbias: dy times one, over the batch and all outputs. Shape `(C*M,)`."""
    g = case.geometry
    dy = _checked_dy(case, dy)
    rows = dy.astype(np.float64).reshape(-1, g.features)
    chunk = max(1, _BLOCK // g.features)

    def terms(block: Block) -> Iterator[Term]:
        for start in range(0, len(rows), chunk):
            yield Term(rows[start : start + chunk, block[0]], np.ones(1), np.ones(1, bool))

    one = np.ones(1, case.dtype)
    return Products((g.features,), case.dtype, dy, one, np.full(1, len(rows)), None, terms, limit=g.features)


def _checked_dy(case: Case, dy: np.ndarray) -> np.ndarray:
    expected = case.geometry.output_shape
    if not isinstance(dy, np.ndarray) or dy.dtype != case.dtype:
        raise TypeError(f"`dy` is {getattr(dy, 'dtype', type(dy).__name__)}, expected a NumPy array of {case.dtype}")
    if dy.shape != expected:
        raise ValueError(f"`dy` has shape {dy.shape}, expected {expected}: the shape of the output")
    return dy


def _blocks(shape: Sequence[int], limit: int) -> Iterator[Block]:
    steps = [max(1, n) for n in shape]
    for axis in range(len(shape)):
        rest = math.prod(steps[axis + 1 :])
        steps[axis] = min(steps[axis], max(1, limit // rest))
    ranges = [[slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, steps)]
    return itertools.product(*ranges)


def _whole_space(block: Block, rank: int) -> Block:
    """The block's batch and channels, at every position."""
    return (*block[: -rank - 1], *(slice(None),) * rank, block[-1])


def _with_zero_plane(x: np.ndarray, first: int, rank: int) -> np.ndarray:
    """x in float64 with a plane of zeros after each spatial axis: index -1, which means padding, then reads a zero."""
    extended = np.zeros([n + (first <= axis < first + rank) for axis, n in enumerate(x.shape)])
    extended[tuple(slice(n) for n in x.shape)] = x
    return extended


def _gather(x: np.ndarray, indices: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """x `(*batch, *spatial, C)` at the indices of each spatial axis, and which of them are not padding."""
    first = x.ndim - 1 - len(indices)
    for axis, index in enumerate(indices, first):
        x = np.take(x, index, axis)
    return x, _outer([index >= 0 for index in indices])


def _outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The product of one vector an axis, shape (len(v) for v in vectors)."""
    return functools.reduce(np.multiply.outer, vectors)


def _along_rows(w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """w `(C,)` repeated along the last spatial axis: NumPy's inner loop then runs over a row and not over C."""
    return np.ascontiguousarray(np.broadcast_to(w, shape[-2:]))


def _readers(source: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """`(tap, output)` pairs, where output `(size,)` says which output reads each input under that tap, -1 for none.

    Periodic and reflecting padding let several outputs read one input under the same tap: one pair for each.
    """
    pairs = []
    for tap, column in enumerate(source.T):
        output = np.flatnonzero(column >= 0)
        while output.size:
            inputs, first = np.unique(column[output], return_index=True)
            reader = np.full(size, -1)
            reader[inputs] = output[first]
            pairs.append((tap, reader))
            output = np.delete(output, first)
    return pairs
