"""The sums of products that define a depthwise convolution and its gradients, and their correctly rounded values.

The windows of a convolution hold every input once per tap. They are never built here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bridge.numerics._exact import ExactSum, exact_sum
from bridge.numerics.products import BLOCK, Block, Products, Term, blocks

if TYPE_CHECKING:  # it imports JAX, and this package needs NumPy alone
    from bridge.case import Case


def exact(case: Case) -> ExactSum:
    """Return the convolution, correctly rounded: arrays of shape `(*batch, *output_spatial, C*M)`.

    >>> from bridge import Case
    >>> x = np.array([[[2.0**24], [1.0], [-(2.0**24)]]], np.float32)
    >>> exact(Case(x, np.ones((3, 1, 1), np.float32), padding="VALID")).value.item()
    1.0
    """
    return exact_sum(output_products(case))


def exact_input_gradient(case: Case, dy: np.ndarray) -> ExactSum:
    """Return the gradient of sum(dy y) by the input, correctly rounded: arrays of x's shape."""
    return exact_sum(input_gradient_products(case, dy))


def exact_kernel_gradient(case: Case, dy: np.ndarray) -> ExactSum:
    """Return the gradient of sum(dy y) by the kernel, correctly rounded: arrays of the kernel's shape."""
    return exact_sum(kernel_gradient_products(case, dy))


def exact_bias_gradient(case: Case, dy: np.ndarray) -> ExactSum:
    """Return the gradient of sum(dy y) by the bias, correctly rounded: arrays of shape `(C*M,)`."""
    return exact_sum(bias_gradient_products(case, dy))


def output_products(case: Case) -> Products:
    """Return the products of the convolution itself, of shape `(*batch, *output_spatial, C*M)`."""
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
    """Return the products of dx, of x's shape: dy w over all (output, tap) that read an input."""
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
    """Return the products of dkernel, of its shape: x dy over the batch and all outputs whose tap reads the input."""
    g = case.geometry
    dy = _checked_dy(case, dy)
    x = _with_zero_plane(np.repeat(case.x, g.multiplier, axis=-1), len(g.batch), g.rank)
    gradients = dy.astype(np.float64)
    positions = (*g.batch, *g.output_spatial)

    def terms(block: Block) -> Iterator[Term]:
        *taps, _, feature = block  # a block is one tap: `limit` is one element a feature
        several = (-1, *(1,) * (g.rank + 1))
        for chunk in blocks(positions, max(1, BLOCK // g.features)):
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
    """Return the terms of dbias, of shape `(C*M,)`: dy times one, over the batch and all outputs."""
    g = case.geometry
    dy = _checked_dy(case, dy)
    rows = dy.astype(np.float64).reshape(-1, g.features)
    chunk = max(1, BLOCK // g.features)

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


def _whole_space(block: Block, rank: int) -> Block:
    """Return the block's batch and channels, at every position."""
    return (*block[: -rank - 1], *(slice(None),) * rank, block[-1])


def _with_zero_plane(x: np.ndarray, first: int, rank: int) -> np.ndarray:
    """Return float64 x with a plane of zeros after each spatial axis: index -1, the padding, then reads a zero."""
    extended = np.zeros([n + (first <= axis < first + rank) for axis, n in enumerate(x.shape)])
    extended[tuple(slice(n) for n in x.shape)] = x
    return extended


def _gather(x: np.ndarray, indices: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return x `(*batch, *spatial, C)` at the indices of each spatial axis, and which of them are not padding."""
    first = x.ndim - 1 - len(indices)
    for axis, index in enumerate(indices, first):
        x = np.take(x, index, axis)
    return x, _outer([index >= 0 for index in indices])


def _outer(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the product of one vector per axis, of shape (len(v) for v in vectors)."""
    return functools.reduce(np.multiply.outer, vectors)


def _along_rows(w: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return w `(C,)` repeated along the last spatial axis: NumPy's inner loop then runs over a row, not over C."""
    return np.ascontiguousarray(np.broadcast_to(w, shape[-2:]))


def _readers(source: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Return `(tap, output)` pairs: output `(size,)` reads each input under that tap, -1 for none.

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
