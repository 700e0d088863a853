"""The two sums over many products as loops: the program does not grow with the kernel.

Hundreds of unrolled products take seconds to compile, and thousands take minutes. Here the body of a loop has a few
dozen of them, and the sums are kept in memory. A chain of fused multiply-adds continues from there with the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.lowerings.bfloat16_bits import widened
from jaxdw.lowerings.ordered_sum import Order, zero_of_its_own
from jaxdw.padding import pad

#: Least number of products in the body of a loop; it has less than twice as many.
UNROLLED = 24

#: XLA:CPU copies a slice that at least this many places read. It computes a slice with fewer readers in each of them,
#: from an offset that only the loop knows. LLVM does not vectorise that, and the loop takes ten times as long.
LEAST_READERS = 16


class AffineIndex(NamedTuple):
    """The inputs along one axis: output o reads, under tap t, position first + t * step + o * stride."""

    first: int
    step: int
    stride: int


def chain_in_loop(
    x: jax.Array, weights: jax.Array, start: jax.Array, indices: Sequence[AffineIndex], order: Order
) -> jax.Array:
    """Return start `(images, *outputs, C)` plus the sum over the taps in this order; start is +0 unless it is "raster".

    The products are of x `(images, *spatial, C)` and weights `(*kernel_size, C)`.
    """
    rank, channels = x.ndim - 2, x.shape[-1]
    kernel_size, outputs = weights.shape[:rank], start.shape[1:-1]
    zero = jnp.broadcast_to(zero_of_its_own(0, start.dtype), start.shape)

    def of_block(taps: Sequence[jax.Array | int], counts: Sequence[int], total: jax.Array, order: Order) -> jax.Array:
        """Return total plus the products of a block of taps, `counts` of them along each axis, from `taps` on."""
        corner = [index.first + tap * index.step for index, tap in zip(indices, taps)]
        sizes = [(n - 1) * i.stride + (count - 1) * i.step + 1 for i, n, count in zip(indices, outputs, counts)]
        block = lax.dynamic_slice(x, (0, *corner, 0), (x.shape[0], *sizes, channels))
        own = lax.dynamic_slice(weights, (*taps, 0), (*counts, channels))
        row = total if order == "raster" else zero
        for tap in np.ndindex(*counts):
            begin = [t * index.step for t, index in zip(tap, indices)]
            end = [b + (n - 1) * index.stride + 1 for b, n, index in zip(begin, outputs, indices)]
            strides = (1, *(index.stride for index in indices), 1)
            value = lax.slice(block, (0, *begin, 0), (x.shape[0], *end, channels), strides)
            row = row + widened(value, total.dtype) * jnp.broadcast_to(own[tap], total.shape)
            if order == "rows" and tap[-1] == counts[-1] - 1:
                total, row = total + row, zero
        return row if order == "raster" else total

    if order == "raster":
        return _over(kernel_size, functools.partial(of_block, order="raster"), start)
    total = jnp.full_like(start, -0.0)  # adding to -0 changes no number, not even a zero
    if len(_pieces(kernel_size[-1], UNROLLED)) == 1:
        return _over(kernel_size, functools.partial(of_block, order="rows"), total)

    def of_row(number: jax.Array, total: jax.Array) -> jax.Array:
        row, ones = _unravelled(number, kernel_size[:-1]), (1,) * (rank - 1)
        return total + _over_axis(
            kernel_size[-1], UNROLLED, lambda t, n, sum_: of_block((*row, t), (*ones, n), sum_, "raster"), zero
        )

    return lax.fori_loop(0, math.prod(kernel_size[:-1]), of_row, total)


def kernel_gradient_in_loop(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` in dtype `compute`: for each tap, the sum of what it read times dy.

    A step adds to the sums of all taps the products of a block of outputs.
    """
    features, images = geometry.features, math.prod(geometry.batch)
    padded = pad(x, geometry).reshape(images, *geometry.padded_spatial, geometry.channels)
    if geometry.multiplier > 1:
        padded = jnp.repeat(padded, geometry.multiplier, axis=-1)
    gradient = dy.reshape(images, *geometry.output_spatial, features)
    spans, strides = geometry.spans, geometry.strides

    def of_block(place: Sequence[jax.Array | int], counts: Sequence[int], total: jax.Array) -> jax.Array:
        image, *outputs = place
        corner = [output * stride for output, stride in zip(outputs, strides)]
        sizes = [span + (count - 1) * stride for span, count, stride in zip(spans, counts[1:], strides)]
        block = lax.dynamic_slice(padded, (image, *corner, 0), (counts[0], *sizes, features))
        own = lax.dynamic_slice(gradient, (*place, 0), (*counts, features))
        products = []
        for output in np.ndindex(*counts):
            begin = [o * stride for o, stride in zip(output, (1, *strides))]
            end = [b + span for b, span in zip(begin, (1, *spans))]
            value = lax.slice(block, (*begin, 0), (*end, features), (1, *geometry.kernel_dilation, 1))[0]
            products.append(widened(value, compute) * jnp.broadcast_to(widened(own[output], compute), total.shape))
        return total + functools.reduce(jnp.add, products)

    start = jnp.zeros((*geometry.kernel_size, features), compute)
    return _over((images, *geometry.output_spatial), of_block, start).reshape(geometry.kernel_shape)


def _over(
    sizes: Sequence[int],
    of_block: Callable[[Sequence[jax.Array | int], Sequence[int], jax.Array], jax.Array],
    total: jax.Array,
) -> jax.Array:
    """Apply of_block(first, counts, total) to each block of an array of these sizes, in raster order.

    A block is a part of a row, or a part of a plane where rows are short.
    """
    *outer, size = sizes
    behind: tuple[int, ...] = ()
    least = UNROLLED
    if size < LEAST_READERS and outer:
        behind, least = (size,), -(-UNROLLED // size)
        *outer, size = outer
    ones, zeros = (1,) * len(outer), (0,) * len(behind)

    def along(number: jax.Array, total: jax.Array) -> jax.Array:
        place = _unravelled(number, outer)
        return _over_axis(
            size, least, lambda first, n, total: of_block((*place, first, *zeros), (*ones, n, *behind), total), total
        )

    return lax.fori_loop(0, math.prod(outer), along, total)


def _over_axis(
    size: int, least: int, of_piece: Callable[[jax.Array | int, int, jax.Array], jax.Array], total: jax.Array
) -> jax.Array:
    """Apply of_piece(first, count, total) to each piece of an axis, in order."""
    count, *others = _pieces(size, least)
    equal = 1 + others.count(count)
    total = lax.fori_loop(0, equal, lambda i, total: of_piece(i * count, count, total), total)
    rest = size - equal * count
    return of_piece(equal * count, rest, total) if rest else total


def _pieces(size: int, least: int) -> list[int]:
    """Return parts of a size: equal but for the last, and from `least` to less than twice that, if it is as large."""
    number = max(1, size // least)
    count = size // number
    return [count] * (number - 1) + [size - (number - 1) * count]


def _unravelled(number: jax.Array, shape: Sequence[int]) -> tuple[jax.Array, ...]:
    """Return the index of element `number`, in raster order, of an array of this shape."""
    return jnp.unravel_index(number, tuple(shape)) if shape else ()
