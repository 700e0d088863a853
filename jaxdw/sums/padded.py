"""The sum over the taps, and the kernel's gradient, from a padded copy of x: what any backend compiles well."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.sums.narrow import widened
from jaxdw.sums.order import Order, Term, accumulate, zero_like
from jaxdw.windows import first_outputs, pad, tap_slices


def sum_of_padded(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` in dtype `compute`."""
    if geometry.has_symbolic_axes and geometry.with_room != geometry:
        y = sum_of_padded(x, kernel, bias, geometry.with_room, order, compute)
        return first_outputs(y, geometry)
    multiplier = geometry.multiplier
    padded = widened(pad(x, geometry), compute)
    weights = kernel.astype(compute).reshape(geometry.taps, geometry.channels, multiplier)
    biases = None if bias is None else bias.astype(compute).reshape(geometry.channels, multiplier)
    shape = (*geometry.batch, *geometry.output_spatial, geometry.channels)

    def of(m: int) -> jax.Array:
        terms = (
            Term(value, lax.index_in_dim(weights[..., m], index, keepdims=False), index // geometry.kernel_size[-1])
            for index, value in enumerate(tap_slices(padded, geometry, geometry.output_spatial))
        )
        return accumulate(terms, zero_like(weights[0, :, m]), None if biases is None else biases[:, m], shape, order)

    outputs = [of(m) for m in range(multiplier)]
    return outputs[0] if multiplier == 1 else jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def pad_undilated(x: jax.Array, geometry: Geometry, from_axis: int = 0) -> tuple[jax.Array, Geometry]:
    """x padded with zeros so that no tap reads outside of it, and the geometry on it, which has all of the input
    dilation left; from one of the spatial axes on, the others being left as they are."""
    padded = pad_undilated_geometry(geometry, from_axis)
    config = [(0, 0, 0)] * len(geometry.batch)
    for (low, _), (rest, _), size, all_, spread in zip(
        geometry.padding, padded.padding, geometry.spatial, padded.spatial, geometry.input_dilation
    ):
        before = (low - rest) // spread
        config.append((before, all_ - size - before, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)]), padded


def pad_undilated_geometry(geometry: Geometry, from_axis: int = 0) -> Geometry:
    """The second of `pad_undilated`."""
    before, after, rest = [], [], []
    for axis, size, out, span, (low, high), stride, spread in zip(
        range(geometry.rank),
        geometry.spatial,
        geometry.output_spatial,
        geometry.spans,
        geometry.padding,
        geometry.strides,
        geometry.input_dilation,
    ):
        lead = tail = 0
        if axis >= from_axis:
            lead = max(0, -(-low // spread))
            tail = max(0, ((out - 1) * stride + span - 1 - low) // spread - (size - 1))
        before.append(lead)
        after.append(tail)
        rest.append((low - lead * spread, high - tail * spread))
    spatial = tuple(a + size + b for a, size, b in zip(before, geometry.spatial, after))
    return dataclasses.replace(geometry, spatial=spatial, padding=tuple(rest))


def pad_repeated(x: jax.Array, geometry: Geometry) -> tuple[jax.Array, Geometry]:
    """x with what padding repeats of it, and the geometry on it; as they are where the padding is zeros."""
    return (x, geometry) if geometry.padding_mode == "zeros" else (pad(x, geometry), of_padded(geometry))


def of_padded(geometry: Geometry) -> Geometry:
    """The geometry on `pad(x, geometry)`."""
    none = ((0, 0),) * geometry.rank
    ones = (1,) * geometry.rank
    return dataclasses.replace(
        geometry, spatial=geometry.padded_spatial, padding=none, padding_mode="zeros", input_dilation=ones
    )


def kernel_gradient_of_padded(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    """`(*kernel_size, 1, C*M)` in dtype `compute`: for each tap, the sum of what it read times dy.

    One reduction over all taps at once, first over batch and all spatial axes but the last, then over the last.
    """
    if geometry.has_symbolic_axes and geometry.with_room != geometry:
        (dy,) = jax.linear_transpose(
            functools.partial(first_outputs, geometry=geometry),
            jax.ShapeDtypeStruct(geometry.with_room.output_shape, dy.dtype),
        )(dy)
        return kernel_gradient_of_padded(x, dy, geometry.with_room, compute)
    images = math.prod(geometry.batch)
    outputs = (images, *geometry.output_spatial)
    rows = math.prod(outputs[:-1])
    padded = widened(pad(x, geometry), compute)
    gradient = widened(dy, compute).reshape(*outputs, geometry.channels, geometry.multiplier)
    products = [
        (value.reshape(*outputs, geometry.channels, 1) * gradient).reshape(rows, -1)
        for value in tap_slices(padded, geometry, geometry.output_spatial)
    ]
    zero = jnp.zeros((), compute)
    sums = lax.reduce(tuple(products), (zero,) * len(products), lambda a, b: tuple(i + j for i, j in zip(a, b)), (0,))
    whole = jnp.stack([row.reshape(outputs[-1], geometry.features).sum(axis=0) for row in sums])
    return whole.reshape(geometry.kernel_shape)
