"""The kernel's gradient on XLA:CPU: sums along rows, unrolled in one fused loop, then a small reduction.

XLA's own gradient is a dense convolution over C x C channels, and one reduction per tap reads everything once per tap.
Here one loop computes, for every image, group of rows and tap, the sum along those rows of input times gradient. What
remains to reduce is smaller than the output. Products with padding are left out, as in `cpu_fused`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.lowerings import generic
from jaxdw.lowerings.bfloat16_bits import stored, widened
from jaxdw.lowerings.cpu_loops import kernel_gradient_in_loop
from jaxdw.padding import pad, padded_geometry

#: Most products unrolled in one loop, and in all loops together; beyond, compile time grows faster than the products.
MOST_PRODUCTS = 600
MOST_PRODUCTS_IN_ALL = 1200

#: With more taps a loop goes over the outputs.
MOST_UNROLLED_TAPS = 24

#: Least number of products in a sum, so that little remains to reduce.
LEAST_TERMS = 14


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` in dtype `compute`: for each tap, the sum of what it read times dy."""
    x, dy = stored(x), stored(dy)
    if geometry.taps > MOST_UNROLLED_TAPS and not geometry.is_symbolic:
        return kernel_gradient_in_loop(x, dy, geometry, compute)
    if geometry.rank > 2 or max(geometry.input_dilation) > 1 or geometry.has_symbolic_axes:
        return generic.kernel_gradient(x, dy, geometry, compute)
    plane = _plane(geometry)
    if not (plane.sources[1] >= 0).all(axis=1).any():  # else every sum gathers columns of its own, ten times x in all
        return generic.kernel_gradient(x, dy, geometry, compute)
    sections = _sections(plane)
    if not _affordable(plane, sections):
        sections = [_Section(0, plane.output_spatial[0], plane.spatial[0], padded=True)]
    if not _affordable(plane, sections):
        return generic.kernel_gradient(x, dy, geometry, compute)
    per_channel = (geometry.channels, geometry.multiplier) if geometry.multiplier > 1 else (geometry.channels,)
    x, dy = x.reshape(plane.x_shape), dy.reshape(*plane.batch, *plane.output_spatial, *per_channel)
    total = functools.reduce(jnp.add, (_of_section(x, dy, plane, section, compute) for section in sections))
    return total.reshape(geometry.kernel_shape)


def _plane(geometry: Geometry) -> Geometry:
    """Return the same geometry with one batch axis and two spatial axes."""
    plane = dataclasses.replace(geometry, batch=(math.prod(geometry.batch),))
    if geometry.rank == 2:
        return plane
    return dataclasses.replace(
        plane,
        spatial=(1, *geometry.spatial),
        kernel_size=(1, *geometry.kernel_size),
        strides=(1, *geometry.strides),
        kernel_dilation=(1, *geometry.kernel_dilation),
        input_dilation=(1, 1),
        padding=((0, 0), *geometry.padding),
    )


class _Section(NamedTuple):
    """Output rows first to end. Their input is padded before, a copy of few rows, or read from x itself."""

    first: int
    end: int
    together: int  # rows in one sum
    padded: bool


def _sections(geometry: Geometry) -> list[_Section]:
    """Return all rows in one sum if they are few; else the rows that read no padding above or below, and the others."""
    height = geometry.output_spatial[0]
    if geometry.padding_mode != "zeros":
        return [_Section(0, height, _together(geometry, height), padded=True)]
    if _together(geometry, height) == height:
        return [_Section(0, height, height, padded=False)]
    inside = np.flatnonzero((geometry.sources[0] >= 0).all(axis=1))
    first, end = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (height, height)
    ranges = [(0, first, True), (first, end, False), (end, height, True)]
    return [_Section(a, b, _together(geometry, b - a), padded) for a, b, padded in ranges if b > a]


def _together(geometry: Geometry, rows: int) -> int:
    """Return the fewest rows that divide their number and make a sum long enough.

    A sum has at least half as many terms as there are taps: what remains to reduce has taps / terms of the size of dy.
    """
    width = geometry.output_spatial[1]
    enough = max(LEAST_TERMS, geometry.taps // 2)
    divisors = [n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * width <= 8 * LEAST_TERMS)]
    return next((n for n in divisors if n * width >= enough), divisors[-1])


def _affordable(geometry: Geometry, sections: list[_Section]) -> bool:
    products = [section.together * geometry.output_spatial[1] * geometry.kernel_size[0] for section in sections]
    return max(products) <= MOST_PRODUCTS and sum(products) <= MOST_PRODUCTS_IN_ALL


def _of_section(x: jax.Array, dy: jax.Array, geometry: Geometry, section: _Section, compute: np.dtype) -> jax.Array:
    """Return `(taps * C*M,)`: the gradient from the output rows of one section."""
    first, end, together, padded = section
    own = _rows_of(geometry, first, end)
    if own.spatial[0] == 0:
        return jnp.zeros(geometry.taps * geometry.features, compute)
    top = 0 if own is geometry else max(0, first * geometry.strides[0] - geometry.padding[0][0])
    if padded:
        x = pad(lax.slice_in_dim(x, top, top + own.spatial[0], axis=1), own)
        own, top = padded_geometry(own), 0
    sums = [_row_sums(x, dy, own, (top, first), tap, together, compute) for tap in range(own.kernel_size[0])]
    stacked = jnp.stack(sums, axis=2)  # (images, groups of rows, kernel height, kernel width, C[, M])
    return stacked.reshape(-1, geometry.taps * geometry.features).sum(axis=0)


def _rows_of(geometry: Geometry, first: int, end: int) -> Geometry:
    """Return the geometry of output rows first to end, on the input rows that they read."""
    if (first, end) == (0, geometry.output_spatial[0]):
        return geometry
    (low, _), *other = geometry.padding
    start = first * geometry.strides[0] - low
    stop = (end - 1) * geometry.strides[0] + geometry.spans[0] - low
    top, bottom = max(0, start), max(0, start, min(geometry.spatial[0], stop))
    return dataclasses.replace(
        geometry, spatial=(bottom - top, geometry.spatial[1]), padding=((top - start, stop - bottom), *other)
    )


def _row_sums(
    x: jax.Array,
    dy: jax.Array,
    geometry: Geometry,
    origin: tuple[int, int],
    tap: int,
    together: int,
    compute: np.dtype,
) -> jax.Array:
    """Return, for one row of the kernel, sums over each group of output rows: `(images, groups, kernel width, C[, M])`.

    `origin` is the place of the geometry's first input row in x and of its first output row in dy. Slices are taken
    from x and dy themselves: XLA would copy a strided slice of a slice.
    """
    (images,), trailing = geometry.batch, dy.shape[3:]
    groups = geometry.output_spatial[0] // together
    width, channels = geometry.spatial[1], geometry.channels
    total = jnp.zeros((images, groups, geometry.kernel_size[1], *trailing), compute)
    for row in range(together):
        rows = geometry.sources[0][row::together, tap]
        if rows[0] < 0:
            continue
        row_step = together * geometry.strides[0]
        top, bottom = origin[0] + int(rows[0]), origin[0] + int(rows[-1]) + 1
        for column, reads in enumerate(geometry.sources[1]):
            if (reads < 0).all():
                continue
            gradient = lax.slice(
                dy,
                (0, origin[1] + row, column, *(0 for _ in trailing)),
                (images, origin[1] + geometry.output_spatial[0], column + 1, *trailing),
                (1, together, 1, *(1 for _ in trailing)),
            )
            exists = None
            if (reads >= 0).all():
                limits = (images, bottom, int(reads[-1]) + 1, channels)
                strides = (1, row_step, geometry.kernel_dilation[1], 1)
                value = lax.slice(x, (0, top, int(reads[0]), 0), limits, strides)
            else:
                line = lax.slice(x, (0, top, 0, 0), (images, bottom, width, channels), (1, row_step, 1, 1))
                value = _columns(line, np.maximum(reads, 0))
                exists = jnp.asarray((reads >= 0).reshape(1, 1, -1, *(1 for _ in trailing)))
            value, gradient = widened(value, compute), widened(gradient, compute)
            product = (value[..., None] if geometry.multiplier > 1 else value) * gradient
            if exists is not None:
                product = jnp.where(exists, product, jnp.zeros((), compute))
            total = total + product
    return total


def _columns(line: jax.Array, index: np.ndarray) -> jax.Array:
    """Return line `(images, rows, width, C)` at the columns of `index`: one gather per use, as `cpu_fused` explains."""
    images, rows, _, channels = line.shape
    numbers = lax.GatherDimensionNumbers(offset_dims=(0, 1, 3), collapsed_slice_dims=(2,), start_index_map=(2,))
    return lax.gather(
        line,
        jnp.asarray(index, np.int32)[:, None],
        numbers,
        (images, rows, 1, channels),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
