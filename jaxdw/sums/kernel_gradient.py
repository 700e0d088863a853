"""The kernel's gradient on XLA:CPU: sums along rows, unrolled in one fused loop, then a small reduction.

XLA's own gradient is a dense convolution over C x C channels, and a reduction for each tap reads everything once a
tap. Here one loop makes, for every image, group of rows and tap, the sum along those rows of input times gradient; what
is left to reduce is smaller than the output. Where a tap reads padding its products are left out, as in `boxes`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.sums.padded import kernel_gradient_of_padded
from jaxdw.windows import pad

#: Products unrolled in one program at most: compiling them takes about a millisecond each.
MOST_PRODUCTS = 1200

#: Products a sum should have at least, so that what is left to reduce is small.
LEAST_TERMS = 14


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    """`(*kernel_size, 1, C*M)` in dtype `compute`: for each tap, the sum of what it read times dy."""
    plane = _plane(geometry)
    if plane is not None:
        if _products(plane) > MOST_PRODUCTS:
            x, plane = pad(x.reshape(plane.x_shape), plane), _of_padded(plane)
        if _products(plane) <= MOST_PRODUCTS:
            return _in_rows(x, dy, plane, compute).reshape(geometry.kernel_shape)
    return kernel_gradient_of_padded(x, dy, geometry, compute)


def _plane(geometry: Geometry) -> Geometry | None:
    """The same with one batch axis and two spatial axes; None where this file has nothing to offer."""
    if geometry.rank > 2 or max(geometry.input_dilation) > 1:
        return None
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


def _of_padded(geometry: Geometry) -> Geometry:
    none = ((0, 0),) * geometry.rank
    return dataclasses.replace(geometry, spatial=geometry.padded_spatial, padding=none, padding_mode="zeros")


def _rows_together(geometry: Geometry) -> int:
    """Output rows in one sum: the fewest that divide the height and make the sum long enough."""
    height, width = geometry.output_spatial
    enough = max(LEAST_TERMS, geometry.taps)
    divisors = [rows for rows in range(1, height + 1) if height % rows == 0 and (rows == 1 or rows * width <= 112)]
    return next((rows for rows in divisors if rows * width >= enough), divisors[-1])


def _groups(geometry: Geometry) -> list[range]:
    """Groups of rows, in runs in which the same taps read padding."""
    together = _rows_together(geometry)
    valid = (geometry.sources[0] >= 0).reshape(-1, together * geometry.kernel_size[0])
    starts = [0, *(np.flatnonzero((valid[1:] != valid[:-1]).any(axis=1)) + 1).tolist(), len(valid)]
    affine = geometry.padding_mode == "zeros" or all(pair == (0, 0) for pair in geometry.padding)
    if not affine:  # the positions of periodic or reflected rows are regular one at a time
        starts = list(range(len(valid) + 1))
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _products(geometry: Geometry) -> int:
    per_group = _rows_together(geometry) * geometry.output_spatial[1] * geometry.kernel_size[0]
    return len(_groups(geometry)) * per_group


def _in_rows(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    per_channel = (geometry.channels, geometry.multiplier) if geometry.multiplier > 1 else (geometry.channels,)
    x = x.reshape(geometry.x_shape)
    dy = dy.reshape(*geometry.batch, *geometry.output_spatial, *per_channel)
    total = None
    for groups in _groups(geometry):
        sums = [_row_sums(x, dy, geometry, groups, tap, compute) for tap in range(geometry.kernel_size[0])]
        stacked = jnp.stack(sums, axis=2)  # (images, groups, kernel height, kernel width, C[, M])
        part = stacked.reshape(-1, geometry.taps * geometry.features).sum(axis=0)
        total = part if total is None else total + part
    return total


def _row_sums(x: jax.Array, dy: jax.Array, geometry: Geometry, groups: range, tap: int, compute: np.dtype) -> jax.Array:
    """For one row of the kernel, `(images, groups, kernel width, C[, M])`: sums over each group of output rows."""
    (images,), together, trailing = geometry.batch, _rows_together(geometry), dy.shape[3:]
    width, channels = geometry.spatial[1], geometry.channels
    total = None
    for row in range(together):
        rows = geometry.sources[0][np.array(groups) * together + row, tap]
        if rows[0] < 0:
            continue
        row_step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        first, last = groups[0] * together + row, groups[-1] * together + row + 1
        for column, reads in enumerate(geometry.sources[1]):
            if (reads < 0).all():
                continue
            gradient = lax.slice(
                dy,
                (0, first, column, *(0 for _ in trailing)),
                (images, last, column + 1, *trailing),
                (1, together, 1, *(1 for _ in trailing)),
            ).astype(compute)
            steps = np.diff(reads)
            exists = None
            if (reads >= 0).all() and (len(steps) == 0 or (steps[0] > 0 and (steps == steps[0]).all())):
                limits = (images, bottom, int(reads[-1]) + 1, channels)
                step = int(steps[0]) if len(steps) else 1
                value = lax.slice(x, (0, top, int(reads[0]), 0), limits, (1, row_step, step, 1))
            else:
                line = lax.slice(x, (0, top, 0, 0), (images, bottom, width, channels), (1, row_step, 1, 1))
                value = _columns(line, np.maximum(reads, 0))
                exists = jnp.asarray((reads >= 0).reshape(1, 1, -1, *(1 for _ in trailing)))
            value = value.astype(compute)
            product = (value[..., None] if geometry.multiplier > 1 else value) * gradient
            if exists is not None:
                product = jnp.where(exists, product, jnp.zeros((), compute))
            total = product if total is None else total + product
    return jnp.zeros((images, len(groups), geometry.kernel_size[1], *trailing), compute) if total is None else total


def _columns(line: jax.Array, index: np.ndarray) -> jax.Array:
    """line `(images, rows, width, C)` at the columns of `index`: one gather for one use, as `boxes` explains."""
    images, rows, _, channels = line.shape
    numbers = lax.GatherDimensionNumbers(offset_dims=(0, 1, 3), collapsed_slice_dims=(2,), start_index_map=(2,))
    return lax.gather(
        line,
        jnp.asarray(index, np.int32)[:, None],
        numbers,
        (images, rows, 1, channels),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
