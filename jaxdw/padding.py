"""Padding and slicing that windows and lowerings share. No arithmetic: every element is a copy or a zero."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxdw.geometry import Geometry


def pad(x: jax.Array, geometry: Geometry) -> jax.Array:
    """Return x `(*batch, *padded_spatial, C)`, dilated and padded as the geometry says."""
    if geometry.padding_mode == "zeros":
        pairs = zip(geometry.padding, geometry.input_dilation)
        config = [(0, 0, 0)] * len(geometry.batch) + [(low, high, step - 1) for (low, high), step in pairs]
        return x if all(c == (0, 0, 0) for c in config) else lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
    for axis in range(geometry.rank):
        at = len(geometry.batch) + axis
        if export.is_symbolic_dim(geometry.spatial[axis]):
            x = jnp.take(x, _symbolic_sources(geometry, axis), axis=at, mode="clip")
        else:
            x = _take_runs(x, geometry.padded_sources(axis), at)
    return x


def transposed_pad(padded: jax.Array, geometry: Geometry) -> jax.Array:
    """Return the transpose of `pad` at an array of its result's shape: `(*batch, *spatial, C)`."""
    x = jax.typeof(padded).update(shape=geometry.x_shape)  # varies as `padded` does, inside a `shard_map`
    (result,) = jax.linear_transpose(lambda x: pad(x, geometry), x)(padded)
    return result


def padded_geometry(geometry: Geometry) -> Geometry:
    """Return the geometry on `pad(x, geometry)`."""
    return dataclasses.replace(
        geometry,
        spatial=geometry.padded_spatial,
        padding=((0, 0),) * geometry.rank,
        padding_mode="zeros",
        input_dilation=(1,) * geometry.rank,
    )


def pad_repeated(x: jax.Array, geometry: Geometry) -> tuple[jax.Array, Geometry]:
    """Return x with its periodic or reflected padding, and the geometry on it; padding with zeros stays undone."""
    return (x, geometry) if geometry.padding_mode == "zeros" else (pad(x, geometry), padded_geometry(geometry))


def pad_undilated(x: jax.Array, geometry: Geometry, from_axis: int = 0) -> tuple[jax.Array, Geometry]:
    """Return x padded with zeros so that no tap reads outside of it, and the geometry on it.

    That geometry keeps all of the input dilation. Spatial axes before `from_axis` stay as they are.
    """
    padded = undilated_geometry(geometry, from_axis)
    config = [(0, 0, 0)] * len(geometry.batch)
    for (low, _), (rest, _), size, padded_size, input_dilation in zip(
        geometry.padding, padded.padding, geometry.spatial, padded.spatial, geometry.input_dilation
    ):
        before = (low - rest) // input_dilation
        config.append((before, padded_size - size - before, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)]), padded


def undilated_geometry(geometry: Geometry, from_axis: int = 0) -> Geometry:
    """Return the geometry on the array that `pad_undilated` returns."""
    spatial, padding = list(geometry.spatial), list(geometry.padding)
    for number, (axis, span) in enumerate(zip(geometry.axes, geometry.spans)):
        if number >= from_axis:
            last = (axis.outputs - 1) * axis.stride + span - 1 - axis.low
            before = max(0, -(-axis.low // axis.input_dilation))
            after = max(0, last // axis.input_dilation - (axis.size - 1))
            spatial[number] = before + axis.size + after
            padding[number] = axis.low - before * axis.input_dilation, axis.high - after * axis.input_dilation
    return dataclasses.replace(geometry, spatial=tuple(spatial), padding=tuple(padding))


def tap_slices(padded: jax.Array, geometry: Geometry, output_spatial: Sequence[int]) -> Iterator[jax.Array]:
    """Yield, for each tap in raster order, the padded inputs under it: `(*batch, *output_spatial, C)`."""
    first = padded.ndim - 1 - geometry.rank
    for tap in itertools.product(*map(range, geometry.kernel_size)):
        start, limit, step = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
        for axis, (t, dilation, stride, out) in enumerate(
            zip(tap, geometry.kernel_dilation, geometry.strides, output_spatial), start=first
        ):
            start[axis], step[axis] = t * dilation, stride
            limit[axis] = t * dilation + (out - 1) * stride + 1
        yield lax.slice(padded, start, limit, step)


def first_outputs(array: jax.Array, geometry: Geometry) -> jax.Array:
    """Return the outputs of a geometry out of those of `geometry.with_room`: `(*batch, *output_spatial, ...)`."""
    batch = len(geometry.batch)
    limits = (*array.shape[:batch], *geometry.output_spatial, *array.shape[batch + geometry.rank :])
    return lax.slice(array, (0,) * array.ndim, limits)


def _symbolic_sources(geometry: Geometry, axis: int) -> jax.Array:
    """Compute `Geometry.padded_sources` of periodic or reflected padding where the program runs."""
    size = jnp.asarray(geometry.spatial[axis], np.int32)
    position = jnp.arange(geometry.padded_spatial[axis], dtype=np.int32) - geometry.padding[axis][0]
    if geometry.padding_mode == "circular":
        return position % size
    position = position % jnp.maximum(2 * size - 2, 1)  # one period: to the last input and back
    return jnp.minimum(position, 2 * size - 2 - position)


def _take_runs(x: jax.Array, source: np.ndarray, axis: int) -> jax.Array:
    """Return x at these positions of an axis, as concatenated slices: `jnp.pad` copies everything for each slice."""
    pieces, start = [], 0
    while start < len(source):
        steps = np.diff(source[start:])
        step = int(steps[0]) if len(steps) and steps[0] in (-1, 0, 1) else 1
        differ = np.flatnonzero(steps != step)
        end = start + (int(differ[0]) if len(differ) else len(steps)) + 1
        low, high = sorted((int(source[start]), int(source[end - 1])))
        piece = lax.slice_in_dim(x, low, high + 1, axis=axis)
        if step == 0:
            piece = jnp.broadcast_to(piece, (*x.shape[:axis], end - start, *x.shape[axis + 1 :]))
        pieces.append(lax.rev(piece, (axis,)) if step < 0 else piece)
        start = end
    return pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, axis)
