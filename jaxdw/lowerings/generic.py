"""The sum over the taps, and the kernel's gradient, from a padded copy of x: every backend compiles them well."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.lowerings.bfloat16_bits import widened
from jaxdw.lowerings.cpu_loops import AffineIndex, chain_in_loop
from jaxdw.lowerings.ordered_sum import Order, Term, accumulate, zero_like
from jaxdw.padding import first_outputs, pad, tap_slices

#: With more taps and symbolic sizes a loop goes over the taps: the program does not grow with the kernel.
MOST_UNROLLED_TAPS = 64


def conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` in dtype `compute`."""
    if geometry.has_symbolic_axes and geometry.with_room != geometry:
        y = conv(x, kernel, bias, geometry.with_room, order, compute)
        return first_outputs(y, geometry)
    multiplier = geometry.multiplier
    padded = widened(pad(x, geometry), compute)
    weights = kernel.astype(compute).reshape(geometry.taps, geometry.channels, multiplier)
    biases = None if bias is None else bias.astype(compute).reshape(geometry.channels, multiplier)
    if geometry.has_symbolic_axes and geometry.taps > MOST_UNROLLED_TAPS:
        return _conv_in_loop(padded, weights, biases, geometry, order)
    shape = (*geometry.batch, *geometry.output_spatial, geometry.channels)

    def output(m: int) -> jax.Array:
        terms = (
            Term(value, lax.index_in_dim(weights[..., m], index, keepdims=False), index // geometry.kernel_size[-1])
            for index, value in enumerate(tap_slices(padded, geometry, geometry.output_spatial))
        )
        return accumulate(terms, zero_like(weights[0, :, m]), None if biases is None else biases[:, m], shape, order)

    outputs = [output(m) for m in range(multiplier)]
    return outputs[0] if multiplier == 1 else jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def _conv_in_loop(
    padded: jax.Array, weights: jax.Array, biases: jax.Array | None, geometry: Geometry, order: Order
) -> jax.Array:
    """Return the convolution of padded inputs, with a copy of them for each output of a channel."""
    images, features = math.prod(geometry.batch), geometry.features
    x = jnp.repeat(padded, geometry.multiplier, axis=-1) if geometry.multiplier > 1 else padded
    x = x.reshape(images, *geometry.padded_spatial, features)
    weights = weights.reshape(*geometry.kernel_size, features)
    start = zero_like(weights[(0,) * geometry.rank]) if biases is None else biases.reshape(features)
    start = jnp.broadcast_to(start, (images, *geometry.output_spatial, features))
    indices = [AffineIndex(0, *steps) for steps in zip(geometry.kernel_dilation, geometry.strides)]
    return chain_in_loop(x, weights, start, indices, order).reshape(geometry.output_shape)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` in dtype `compute`: for each tap, the sum of what it read times dy.

    One reduction over all taps at once adds over batch and all spatial axes but the last, and then over the last.
    """
    if geometry.has_symbolic_axes and geometry.with_room != geometry:
        (dy,) = jax.linear_transpose(
            functools.partial(first_outputs, geometry=geometry),
            jax.ShapeDtypeStruct(geometry.with_room.output_shape, dy.dtype),
        )(dy)
        return kernel_gradient(x, dy, geometry.with_room, compute)
    images = math.prod(geometry.batch)
    outputs = (images, *geometry.output_spatial)
    rows = math.prod(outputs[:-1])
    padded = widened(pad(x, geometry), compute)
    gradient = widened(dy, compute).reshape(*outputs, geometry.channels, geometry.multiplier)
    if geometry.is_symbolic and geometry.taps > MOST_UNROLLED_TAPS:
        return _kernel_gradient_by_taps(padded.reshape(images, *geometry.padded_spatial, -1), gradient, geometry)
    products = [
        (value.reshape(*outputs, geometry.channels, 1) * gradient).reshape(rows, -1)
        for value in tap_slices(padded, geometry, geometry.output_spatial)
    ]
    zero = jnp.zeros((), compute)
    sums = lax.reduce(tuple(products), (zero,) * len(products), lambda a, b: tuple(i + j for i, j in zip(a, b)), (0,))
    whole = jnp.stack([row.reshape(outputs[-1], geometry.features).sum(axis=0) for row in sums])
    return whole.reshape(geometry.kernel_shape)


def _kernel_gradient_by_taps(padded: jax.Array, gradient: jax.Array, geometry: Geometry) -> jax.Array:
    """Return the gradient by the kernel, one tap after the other.

    Args:
      padded: `(images, *padded_spatial, C)`.
      gradient: dy as `(images, *output_spatial, C, M)`.
      geometry: that of the convolution.
    """
    read = [(n - 1) * step + 1 for n, step in zip(geometry.output_spatial, geometry.strides)]
    sizes = (padded.shape[0], *read, geometry.channels)

    def of_tap(number: jax.Array) -> jax.Array:
        tap = jnp.unravel_index(number, geometry.kernel_size)
        corner = [t * step for t, step in zip(tap, geometry.kernel_dilation)]
        block = lax.dynamic_slice(padded, (0, *corner, 0), sizes)
        value = lax.slice(block, (0,) * block.ndim, sizes, (1, *geometry.strides, 1))
        return (value[..., None] * gradient).sum(tuple(range(geometry.rank + 1)))

    return lax.map(of_tap, jnp.arange(geometry.taps)).reshape(geometry.kernel_shape)
