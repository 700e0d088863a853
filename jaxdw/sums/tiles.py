"""The sum over the taps on TPU, where strides must not fall within a tile.

A TPU holds an array in tiles of 8 sublanes x 128 lanes of its two minor axes. A slice that strides over one of these
picks single rows or columns out of tiles: XLA then makes a padded copy of x, or reads it once a tap. Over the other axes
it picks whole tiles, for nothing. So where the taps stride, x is laid out with its batch in the sublanes and its channels
in the lanes. That is one copy of x at most, without padding; XLA's own convolutions prefer this layout too, and after one
of them there is nothing to copy.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from jaxdw.geometry import Geometry
from jaxdw.sums.order import Order, Term, accumulate, opaque_zero
from jaxdw.windows import dimension_numbers, pad, tap_slices

SUBLANES, LANES = 8, 128


def sum_on_tiles(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` in dtype `compute`."""
    flat = x.reshape(math.prod(geometry.batch), *geometry.spatial, geometry.channels)
    if bias is None and order == "raster" and _convolves(geometry):
        return _convolution(flat.astype(compute), kernel.astype(compute), geometry).reshape(geometry.output_shape)
    if max(geometry.strides) > 1:
        major = (*range(1, geometry.rank + 1), 0, geometry.rank + 1)
        flat = with_layout_constraint(flat, Layout(major_to_minor=major))
    padded = pad(flat.reshape(x.shape), geometry).astype(compute)
    padded = padded.reshape(flat.shape[0], *padded.shape[len(geometry.batch) :])
    # Weights keep the rank of x: without it XLA copies a large kernel into a row a tap, and reads each twice.
    weights = kernel.astype(compute).reshape(*geometry.kernel_size, geometry.channels, geometry.multiplier)
    biases = None if bias is None else bias.astype(compute).reshape(geometry.channels, geometry.multiplier)
    shape = (flat.shape[0], *geometry.output_spatial, geometry.channels)

    def weight(tap: tuple[int, ...], m: int) -> jax.Array:
        row = lax.slice(weights, (*tap, 0, m), (*(t + 1 for t in tap), geometry.channels, m + 1))
        return row.reshape(*(1 for _ in range(geometry.rank + 1)), geometry.channels)

    def of(m: int) -> jax.Array:
        taps = list(itertools.product(*map(range, geometry.kernel_size)))
        zero = jnp.broadcast_to(opaque_zero(weight(taps[0], m)), shape)
        terms = (
            Term(value, weight(tap, m), index // geometry.kernel_size[-1])
            for index, (tap, value) in enumerate(zip(taps, tap_slices(padded, geometry, geometry.output_spatial)))
        )
        return accumulate(terms, zero if biases is None else jnp.broadcast_to(biases[:, m], shape), zero, order)

    outputs = [of(m) for m in range(geometry.multiplier)]
    y = outputs[0] if len(outputs) == 1 else jnp.stack(outputs, axis=-1)
    return y.reshape(geometry.output_shape)


def _convolves(geometry: Geometry) -> bool:
    """Whether XLA's own convolution is the same sum in one pass less.

    Where the last spatial axis fills tiles no worse than the batch does, XLA lays x out so, and the copy would be a pass
    of its own. XLA's depthwise convolution brings the batch into the sublanes while it reads. At the highest precision
    it is the chain of this file: products in raster order, each rounded and then added; seen in what libtpu 0.0.42 makes
    for v5e, v5p and v6e, which have no FMA.
    """
    batch, width, channels = math.prod(geometry.batch), geometry.spatial[-1], geometry.channels
    return (
        geometry.rank == 2
        and geometry.multiplier == 1
        and geometry.padding_mode == "zeros"
        and max(geometry.kernel_dilation + geometry.input_dilation) == 1
        and geometry.strides[-1] > 1
        and batch >= SUBLANES
        and _waste(width, SUBLANES) <= _waste(batch, SUBLANES)
        and _waste(channels, LANES) <= _waste(width, LANES)
    )


def _waste(size: int, tile: int) -> float:
    """What an axis takes up in tiles, over its size."""
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
