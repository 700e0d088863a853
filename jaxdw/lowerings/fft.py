"""The convolution and its kernel's gradient by fast Fourier transforms, for kernels of many taps.

The time does not depend on the number of taps. Every output depends on all inputs of its block: it has a normwise
error, and NaN or infinity spreads over the block. `bridge.numerics.fourier` derives the bound.

Where x is much longer than the kernel, it is cut into blocks that overlap (overlap-save), so that no two results are
added. A block is as long as its transform. The transform is circular: outputs that would wrap around are not used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw.geometry import Geometry
from jaxdw.padding import pad_repeated

#: Bytes of the spectra of x that are in memory at once, or those of one channel. Channels are transformed in as many
#: groups as that takes. On a CPU they stay in the caches.
SPECTRUM_BYTES, SPECTRUM_BYTES_ON_CPU = 1 << 29, 1 << 24

#: The shortest block. Transforms that are shorter are slower, element by element.
LEAST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How an axis is transformed.

    Attributes:
      length: of a transform; its prime factors are 2, 3 and 5.
      step: outputs of a block, before strides.
      count: of blocks.
    """

    length: int
    step: int
    count: int


def blocks_of(geometry: Geometry) -> tuple[Blocks, ...]:
    """Return the blocks of each spatial axis, of a geometry whose padding is zeros and whose sizes are known.

    A transform of n numbers takes about n (10 + log2 n) (XLA:CPU, n from 64 to 2^20).
    """
    return tuple(map(_blocks_of_axis, range(geometry.rank), [geometry] * geometry.rank))


def _blocks_of_axis(number: int, geometry: Geometry) -> Blocks:
    axis, span = geometry.axes[number], geometry.spans[number]
    read = (axis.outputs - 1) * axis.stride + span  # positions, from -low on
    inputs = (axis.size - 1) * axis.input_dilation + 1
    first, end = max(0, -axis.low), min(inputs, read - axis.low)
    before, after = max(0, axis.low), max(0, read - axis.low - inputs)
    # Zeros at both ends may be the same: nothing else may wrap around.
    least = max(end - first + max(before, after), span, read - span + 1)
    whole = _good_length(least)
    choices = [Blocks(whole, whole, 1)]
    length = max(LEAST_BLOCK, 1 << (2 * span - 1).bit_length())
    while 2 * length <= whole:
        step = length - span + 1
        choices.append(Blocks(length, step, -(-(read - span + 1) // step)))
        length *= 2
    return min(choices, key=lambda each: each.count * each.length * (10 + math.log2(each.length)))


def _good_length(least: int) -> int:
    """Return the least even number not below `least` whose prime factors are 2, 3 and 5.

    >>> _good_length(71), _good_length(1)
    (72, 2)
    """
    good = 2 * (1 << (least - 1).bit_length())
    five = 1
    while five < good:
        three = five
        while three < good:
            rest = -(-least // three)
            good = min(good, three * (1 << max(1, (rest - 1).bit_length())))
            three *= 3
        five *= 5
    return good


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    order: None,
    compute: np.dtype,
    dtype: np.dtype,
    flipped: bool = False,
    spectrum_bytes: int = SPECTRUM_BYTES,
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)`. With `flipped` the kernel is read backwards."""
    del order  # the sum has none
    x, geometry = pad_repeated(x, geometry)
    blocks = blocks_of(geometry)
    if flipped:
        kernel = lax.rev(kernel, tuple(range(geometry.rank)))
    weights = jnp.moveaxis(kernel.astype(compute).reshape(*geometry.kernel_size, 1, geometry.channels, -1), -2, 0)
    weights = jnp.moveaxis(weights, (-2, -1), (1, 2))  # (C, 1, M, *kernel_size)

    def of_channels(x: jax.Array, weights: jax.Array) -> jax.Array:
        product = _spectrum_of_x(x, geometry, blocks) * jnp.conj(_spectrum_of_kernel(weights, geometry, blocks))
        return _outputs(_inverse(product, blocks), geometry, blocks)

    groups = _groups(geometry, blocks, spectrum_bytes)
    y = _by_groups(of_channels, groups, _channels_first(x, geometry, 1, compute), weights)
    y = jnp.moveaxis(y, (0, 2), (-2, -1)).reshape(geometry.output_shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(compute), y.shape)
    return y.astype(dtype)


def kernel_gradient(
    x: jax.Array,
    dy: jax.Array,
    geometry: Geometry,
    compute: np.dtype,
    dtype: np.dtype,
    spectrum_bytes: int = SPECTRUM_BYTES,
) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)`: for each tap, the sum over all outputs of what it read times dy."""
    x, geometry = pad_repeated(x, geometry)
    blocks = blocks_of(geometry)

    def of_channels(x: jax.Array, dy: jax.Array) -> jax.Array:
        spectra = jnp.conj(_spectrum_of_gradient(dy, geometry, blocks)) * _spectrum_of_x(x, geometry, blocks)
        sums = _inverse(spectra.sum((1, 3)), blocks)  # (C, M, *length)
        return lax.slice(sums, (0,) * sums.ndim, (*sums.shape[:2], *geometry.spans), (1, 1, *geometry.kernel_dilation))

    channels = (_channels_first(x, geometry, 1, compute), _channels_first(dy, geometry, geometry.multiplier, compute))
    gradient = _by_groups(of_channels, _groups(geometry, blocks, spectrum_bytes), *channels)
    return jnp.moveaxis(gradient, (0, 1), (-2, -1)).reshape(geometry.kernel_shape).astype(dtype)


def _channels_first(array: jax.Array, geometry: Geometry, multiplier: int, compute: np.dtype) -> jax.Array:
    """Return `(C, batch, M, *spatial)` in dtype `compute` of an array `(*batch, *spatial, C*M)`."""
    spatial = array.shape[len(geometry.batch) : -1]
    array = array.astype(compute).reshape(-1, *spatial, geometry.channels, multiplier)
    return jnp.moveaxis(array, (-2, -1), (0, 2))


def _groups(geometry: Geometry, blocks: Sequence[Blocks], spectrum_bytes: int) -> int:
    """Return the number of equal groups of channels."""
    of_channel = 16 * math.prod(geometry.batch) * math.prod(each.length * each.count for each in blocks)
    at_once = max(1, spectrum_bytes // (of_channel * geometry.multiplier))
    least = -(-geometry.channels // at_once)
    return next(groups for groups in range(least, geometry.channels + 1) if geometry.channels % groups == 0)


def _by_groups(function: Callable[..., jax.Array], groups: int, *arrays: jax.Array) -> jax.Array:
    """Return the function of arrays whose first axis is the channels, computed for one group of them at a time."""
    if groups == 1:
        return function(*arrays)
    split = (array.reshape(groups, -1, *array.shape[1:]) for array in arrays)
    result = lax.map(lambda each: function(*each), tuple(split))
    return result.reshape(-1, *result.shape[2:])


def _spectrum_of_x(x: jax.Array, geometry: Geometry, blocks: Sequence[Blocks]) -> jax.Array:
    """Return the spectra `(C, batch, 1, blocks, *frequencies)` of x `(C, batch, 1, *spatial)`."""
    config = [(0, 0, 0)] * 3
    for axis, each in zip(geometry.axes, blocks):
        inputs = (axis.size - 1) * axis.input_dilation + 1
        size = each.length if each.count == 1 else (each.count + 1) * each.step
        config.append((axis.low, size - axis.low - inputs, axis.input_dilation - 1))
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    for number, each in enumerate(blocks):
        at = 3 + 2 * number
        if each.count == 1:
            x = lax.expand_dims(x, (at,))
            continue
        x = x.reshape(*x.shape[:at], each.count + 1, each.step, *x.shape[at + 1 :])
        own = lax.slice_in_dim(x, 0, each.count, axis=at)
        following = lax.slice_in_dim(x, 1, each.count + 1, axis=at)
        following = lax.slice_in_dim(following, 0, each.length - each.step, axis=at + 1)
        x = lax.concatenate([own, following], at + 1)
    return _transformed(x, blocks)


def _spectrum_of_kernel(weights: jax.Array, geometry: Geometry, blocks: Sequence[Blocks]) -> jax.Array:
    """Return the spectra `(C, 1, M, 1, *frequencies)` of weights `(C, 1, M, *kernel_size)`."""
    sizes = zip(blocks, geometry.spans, geometry.kernel_dilation)
    config = [(0, 0, 0)] * 3 + [(0, each.length - span, dilation - 1) for each, span, dilation in sizes]
    weights = lax.pad(weights, jnp.zeros((), weights.dtype), config)
    return _transformed(lax.expand_dims(weights, tuple(3 + 2 * axis for axis in range(geometry.rank))), blocks)


def _spectrum_of_gradient(dy: jax.Array, geometry: Geometry, blocks: Sequence[Blocks]) -> jax.Array:
    """Return the spectra `(C, batch, M, blocks, *frequencies)` of dy `(C, batch, M, *output_spatial)`."""
    config = [(0, 0, 0)] * 3
    for axis, each in zip(geometry.axes, blocks):
        size = each.length if each.count == 1 else each.count * each.step
        config.append((0, size - ((axis.outputs - 1) * axis.stride + 1), axis.stride - 1))
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), config)
    config = [(0, 0, 0)] * 3
    for number, each in enumerate(blocks):
        at = 3 + 2 * number
        step = each.length if each.count == 1 else each.step
        dy = dy.reshape(*dy.shape[:at], each.count, step, *dy.shape[at + 1 :])
        config += [(0, 0, 0), (0, each.length - step, 0)]
    return _transformed(lax.pad(dy, jnp.zeros((), dy.dtype), config), blocks)


def _transformed(array: jax.Array, blocks: Sequence[Blocks]) -> jax.Array:
    """Return the spectra `(..., blocks, *frequencies)` of `(C, batch, M, count, length, count, length ...)`."""
    rank = len(blocks)
    counts, lengths = (tuple(range(3 + first, 3 + 2 * rank, 2)) for first in (0, 1))
    array = array.transpose(0, 1, 2, *counts, *lengths)
    array = array.reshape(*array.shape[:3], -1, *array.shape[3 + rank :])
    return _fft(array, lax.FftType.RFFT, blocks)


def _inverse(spectra: jax.Array, blocks: Sequence[Blocks]) -> jax.Array:
    """Return the real arrays `(..., *length)` of spectra `(..., *frequencies)`."""
    return _fft(spectra, lax.FftType.IRFFT, blocks)


def _fft(array: jax.Array, kind: lax.FftType, blocks: Sequence[Blocks]) -> jax.Array:
    """Transform the last axes. The others become one: XLA:CPU may exchange them in the memory of a partitioned program.

    Then it would refuse to transform the array.
    """
    rank = len(blocks)
    flat = lax.fft(array.reshape(-1, *array.shape[-rank:]), kind, tuple(each.length for each in blocks))
    return flat.reshape(*array.shape[:-rank], *flat.shape[1:])


def _outputs(values: jax.Array, geometry: Geometry, blocks: Sequence[Blocks]) -> jax.Array:
    """Return `(C, batch, M, *output_spatial)` of values `(C, batch, M, blocks, *length)`."""
    rank = geometry.rank
    steps = tuple(each.step for each in blocks)
    values = lax.slice(values, (0,) * values.ndim, (*values.shape[:4], *steps))
    values = values.reshape(*values.shape[:3], *(each.count for each in blocks), *steps)
    order = (axis for number in range(rank) for axis in (3 + number, 3 + rank + number))
    values = values.transpose(0, 1, 2, *order)
    values = values.reshape(*values.shape[:3], *(each.count * each.step for each in blocks))
    limits = ((axis.outputs - 1) * axis.stride + 1 for axis in geometry.axes)
    return lax.slice(values, (0,) * values.ndim, (*values.shape[:3], *limits), (1, 1, 1, *geometry.strides))
