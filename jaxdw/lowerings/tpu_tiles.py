"""The sum over the taps on TPU, where strides must not fall within a tile.

A TPU holds an array in tiles of 8 sublanes x 128 lanes of its two minor axes. A slice that strides over one of these
picks single rows or columns out of tiles: XLA then copies x, padded, and reads it once a tap. Over the other axes a
slice picks whole tiles, for nothing. So where the taps stride, x is laid out with its batch in the sublanes and its
channels in the lanes. That is one copy of x at most, without padding; XLA's own convolutions like this layout too, and
after one of them there is nothing to copy. Where few channels would waste the lanes, the taps do not stride along the
last axis: the sum is made for every place, and the result is strided.
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
    """y `(*batch, *output_spatial, C*M)` in dtype `compute`."""
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
    """As `conv`, of one batch axis."""
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
        """Of x's rank: of a lower one XLA makes an array a tap from a 9x9 kernel, more bytes than the sum itself."""
        of_tap = lax.slice(weights, (*tap, 0, m), (*(t + 1 for t in tap), channels, m + 1))
        return of_tap.reshape(*(1 for _ in range(rank + 1)), channels)

    def of(m: int) -> jax.Array:
        terms = (
            Term(value, weight(tap, m), index // geometry.kernel_size[-1])
            for index, (tap, value) in enumerate(zip(taps, tap_slices(padded, geometry, geometry.output_spatial)))
        )
        start = None if biases is None else biases[:, m]
        return accumulate(terms, zero_like(weight(taps[0], m)), start, shape, order)

    outputs = [of(m) for m in range(multiplier)]
    return outputs[0] if multiplier == 1 else jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def _strided_afterwards(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """As `_sum`, made for every place of the last axis, which stays in the lanes until then."""
    every = dataclasses.replace(geometry, strides=(*geometry.strides[:-1], 1))
    y = _sum(x, kernel, bias, every, order, compute)
    rank = geometry.rank
    y = with_layout_constraint(y, Layout(major_to_minor=(*range(rank), rank + 1, rank)))
    return lax.slice_in_dim(y, 0, None, geometry.strides[-1], axis=rank)


def _is_convolution(geometry: Geometry) -> bool:
    """Whether XLA's own convolution is the same sum with one pass over x less.

    Where the last spatial axis fills sublanes no worse than the batch does, XLA has it there, and the copy would be a
    pass of its own; XLA's depthwise convolution brings the batch into the sublanes as it reads. At the highest
    precision it is the chain of this file: products in raster order, each rounded and then added, nothing narrower than
    float32. So it is in the programs that libtpu 0.0.42 makes for v5e, v5p and v6e, instruction by instruction.
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
    """Whether fewer bytes move with the channels in the lanes.

    Where few channels would waste the lanes, XLA has the last spatial axis there. Left so, x is read, written padded
    and read once a tap; otherwise it is read, and a copy of another size is written and read.
    """
    larger = _waste(geometry.channels, LANES) / _waste(geometry.spatial[-1], LANES)
    return 1 + 2 * larger <= 2 + geometry.taps


def _waste(size: int, tile: int) -> float:
    """What an axis takes up in whole tiles, over its size."""
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
