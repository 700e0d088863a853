"""The sum over the taps on TPU, where strides must not fall within a tile.

A TPU holds an array in tiles of 8 sublanes x 128 lanes of its two minor axes. A slice that strides over one of these
takes single rows or columns out of tiles: XLA then copies x, padded, and reads it once per tap. Over the other axes a
slice takes whole tiles, at no cost. Therefore, where the taps stride, the layout of x has its batch in the sublanes and
its channels in the lanes. That is at most one copy of x, without padding. XLA's own convolutions choose this layout
too, and after one of them there is nothing to copy. Where few channels would waste the lanes, the taps do not stride
along the last axis: the sum is computed for every position, and the result is strided.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxdw.geometry import Geometry
from jaxdw.lowerings import generic
from jaxdw.lowerings.lax_convolutions import dimension_numbers
from jaxdw.lowerings.ordered_sum import Order, Term, accumulate, zero_like
from jaxdw.padding import pad, tap_slices

SUBLANES, LANES = 8, 128


def conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` in dtype `compute`."""
    if geometry.is_symbolic:
        return generic.conv(x, kernel, bias, geometry, order, compute)
    flat = dataclasses.replace(geometry, batch=(math.prod(geometry.batch),))
    x = x.reshape(flat.x_shape)
    if bias is None and order == "raster" and _is_convolution(flat):
        y = _convolution(x.astype(compute), kernel.astype(compute), flat)
    else:
        y = _sum(x, kernel, bias, flat, order, compute)
    return y.reshape(geometry.output_shape)


def _sum(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Compute `conv` for one batch axis."""
    rank, channels, multiplier = geometry.rank, geometry.channels, geometry.multiplier
    if max(geometry.strides) > 1 and _copy_is_cheaper(geometry):
        x = with_layout_constraint(x, Layout(major_to_minor=(*range(1, rank + 1), 0, rank + 1)))
    elif geometry.strides[-1] > 1:
        return _strided_afterwards(x, kernel, bias, geometry, order, compute)
    padded = pad(x, geometry).astype(compute)
    weights = kernel.astype(compute).reshape(*geometry.kernel_size, channels, multiplier)
    biases = None if bias is None else bias.astype(compute).reshape(channels, multiplier)
    taps = list(itertools.product(*map(range, geometry.kernel_size)))
    shape = (*geometry.batch, *geometry.output_spatial, channels)

    def weight(tap: tuple[int, ...], m: int) -> jax.Array:
        """Return a weight of x's rank: of a lower rank XLA makes one array per tap, more bytes than the sum itself."""
        of_tap = lax.slice(weights, (*tap, 0, m), (*(t + 1 for t in tap), channels, m + 1))
        return of_tap.reshape(*(1 for _ in range(rank + 1)), channels)

    def output(m: int) -> jax.Array:
        terms = (
            Term(value, weight(tap, m), index // geometry.kernel_size[-1])
            for index, (tap, value) in enumerate(zip(taps, tap_slices(padded, geometry, geometry.output_spatial)))
        )
        start = None if biases is None else biases[:, m]
        return accumulate(terms, zero_like(weight(taps[0], m)), start, shape, order)

    outputs = [output(m) for m in range(multiplier)]
    return outputs[0] if multiplier == 1 else jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def _strided_afterwards(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Compute `_sum` for every position of the last axis, which stays in the lanes until then."""
    every = dataclasses.replace(geometry, strides=(*geometry.strides[:-1], 1))
    y = _sum(x, kernel, bias, every, order, compute)
    rank = geometry.rank
    y = with_layout_constraint(y, Layout(major_to_minor=(*range(rank), rank + 1, rank)))
    return lax.slice_in_dim(y, 0, None, geometry.strides[-1], axis=rank)


def _is_convolution(geometry: Geometry) -> bool:
    """Return True if XLA's own convolution is the same sum with one pass less over x.

    Where the last spatial axis fills sublanes no worse than the batch does, XLA puts it there, and the copy would be a
    pass of its own. XLA's depthwise convolution moves the batch into the sublanes as it reads. At the highest precision
    it is the chain of this file: products in raster order, each rounded and then added, nothing narrower than float32.
    The programs of libtpu 0.0.42 for v5e, v5p and v6e show that, instruction by instruction.
    """
    (images,), width = geometry.batch, geometry.spatial[-1]
    return (
        geometry.rank == 2
        and geometry.multiplier == 1
        and geometry.padding_mode == "zeros"
        and max(geometry.kernel_dilation + geometry.input_dilation) == 1
        and geometry.strides[-1] > 1
        and images >= SUBLANES
        and _waste(width, SUBLANES) <= _waste(images, SUBLANES)
        and _copy_is_cheaper(geometry)
    )


def _copy_is_cheaper(geometry: Geometry) -> bool:
    """Return True if fewer bytes move with the channels in the lanes.

    Where few channels would waste the lanes, XLA puts the last spatial axis there. In that layout x is read, written
    padded, and read once per tap. In the other it is read, and a copy of another size is written and read.
    """
    larger = _waste(geometry.channels, LANES) / _waste(geometry.spatial[-1], LANES)
    return 1 + 2 * larger <= 2 + geometry.taps


def _waste(size: int, tile: int) -> float:
    """Return the size of an axis in whole tiles over its size."""
    return -(-size // tile) * tile / size


def _convolution(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.padding,
        dimension_numbers=dimension_numbers(geometry.rank),
        feature_group_count=geometry.channels,
        precision=lax.Precision.HIGHEST,
    )
