"""Extraction of windows, exact in every bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw import _arrays
from jaxdw.geometry import Geometry, Padding, spatial_tuple
from jaxdw.lowerings.lax_convolutions import one_hot_windows
from jaxdw.padding import first_outputs, pad, tap_slices

#: The choices of `unfold`.
UNFOLD_METHODS = ("slices", "patches")


def unfold(
    x: jax.Array,
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    method: str = "slices",
) -> jax.Array:
    """Return the window under the kernel at every output position.

    Args:
      x: `(*batch, *spatial, C)`, any dtype.
      kernel_size: 1 to 3 ints.
      strides, padding, kernel_dilation, input_dilation: as for `depthwise_conv`.
      method: "slices" copies every bit: infinities, NaN and subnormals too (of bfloat16 and float8, XLA on CPU may
        change the payload of a NaN). On CPU it gathers from x itself, and under `jax.jit` XLA fuses that with the next
        operations: with at most 15 taps, an elementwise function and `contract` become one loop without the windows in
        memory. Elsewhere it pads and slices.
        "patches" calls `lax.conv_general_dilated_patches`, which multiplies by a one-hot kernel instead of copying:
        an infinity turns every other tap of its windows into NaN, a NaN fills its windows, subnormals are flushed on
        CPU, and TF32 (GPU) or bfloat16 (TPU) rounds the values unless precision is highest (it is here).

    Returns:
      `(*batch, *output_spatial, *kernel_size, C)`, of x's dtype.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> unfold(jnp.arange(4.0)[:, None], (3,), padding="VALID")[..., 0]
    Array([[0., 1., 2.],
           [1., 2., 3.]], dtype=float32)
    """
    x = _arrays.as_array("x", x)
    geometry = Geometry.of_windows(
        x.shape,
        spatial_tuple("kernel_size", kernel_size),
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
    )
    _arrays.check_choice("method", method, UNFOLD_METHODS)
    if method == "patches":
        _arrays.check_floating(x=x)
    return windows_of(x, geometry, method)


@functools.partial(jax.jit, static_argnames=("geometry", "method"))
def windows_of(x: jax.Array, geometry: Geometry, method: str = "slices") -> jax.Array:
    """Compute `unfold` for a checked geometry."""
    if 0 in geometry.windows_shape:
        return jnp.zeros(geometry.windows_shape, x.dtype)
    if geometry.has_symbolic_axes:  # of these lax has no gradients
        room = geometry.with_room
        windows = _slice_rows(pad(x, room), 0, room.output_spatial[0], room)
        return first_outputs(windows, geometry)
    if method == "slices":
        return rows_of_windows(x, pad(x, geometry), 0, source_table(geometry, 0), geometry)
    return one_hot_windows(x, geometry, lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def rows_of_windows(
    x: jax.Array, padded: jax.Array, first_row: jax.Array | int, sources: jax.Array, geometry: Geometry
) -> jax.Array:
    """Return the windows of some output rows: `(*batch, rows, *output_spatial[1:], *kernel_size, C)`.

    `padded` is `pad(x)`, and `sources` has these rows of the first axis's `source_table`.

    On CPU the windows are gathered from x, and only the derivative uses `padded`. The transpose of slices is padding
    and sums. The transpose of a gather is a scatter, which XLA runs on one core.
    """

    def gathered(x, padded, first_row, sources):
        return _gather_rows(x, sources, geometry)

    def sliced(x, padded, first_row, sources):
        return _slice_rows(padded, first_row, len(sources), geometry)

    operands = (x, padded, jnp.asarray(first_row, jnp.int32), sources)
    if not _can_be_gathered(x, geometry):
        return sliced(*operands)
    return lax.platform_dependent(*operands, cpu=gathered, default=sliced)


@rows_of_windows.defjvp
def rows_of_windows_jvp(geometry: Geometry, primals, tangents):
    _, _, first_row, sources = primals
    return rows_of_windows(*primals, geometry), _slice_rows(tangents[1], first_row, len(sources), geometry)


def _slice_rows(padded: jax.Array, first_row: jax.Array | int, rows: int, geometry: Geometry) -> jax.Array:
    if rows < geometry.output_spatial[0]:
        height = (rows - 1) * geometry.strides[0] + geometry.spans[0]
        start = first_row * geometry.strides[0]
        padded = lax.dynamic_slice_in_dim(padded, start, height, padded.ndim - 1 - geometry.rank)
    slices = list(tap_slices(padded, geometry, (rows, *geometry.output_spatial[1:])))
    stacked = jnp.stack(slices, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *geometry.kernel_size, geometry.channels)


#: Stands for an input position that does not exist. The sum of three does not overflow, and the sum with positions is
#: negative.
_NOWHERE = -(2**29)


def _can_be_gathered(x: jax.Array, geometry: Geometry) -> bool:
    axes = range(len(geometry.batch), x.ndim - 1)
    spec = jax.typeof(x).sharding.spec  # a gather may not cross the shards that the type knows
    return 0 < math.prod(geometry.spatial) <= -_NOWHERE and all(spec[axis] is None for axis in axes if axis < len(spec))


def source_table(geometry: Geometry, axis: int) -> jax.Array:
    """Return, for one axis, the part of the flat input position that (output position, tap) adds: `(out, k)`."""
    source = geometry.sources[axis]
    number = source * math.prod(geometry.spatial[axis + 1 :])
    return jnp.asarray(np.where(source < 0, _NOWHERE, number).astype(np.int32))


def _gather_rows(x: jax.Array, sources: jax.Array, geometry: Geometry) -> jax.Array:
    batch, rank = len(geometry.batch), geometry.rank
    shape = (*geometry.batch, len(sources), *geometry.output_spatial[1:], *geometry.kernel_size)
    tables = [sources, *(source_table(geometry, axis) for axis in range(1, rank))]
    index = functools.reduce(
        jnp.add,
        (lax.broadcast_in_dim(table, shape, (batch + axis, batch + rank + axis)) for axis, table in enumerate(tables)),
    )
    everywhere = all((source >= 0).all() for source in geometry.sources)
    flat = x.reshape(*geometry.batch, math.prod(geometry.spatial), geometry.channels)
    bits = _bits(x.dtype)
    if bits is not None:  # XLA's float normalisation changes no integer
        flat = lax.bitcast_convert_type(flat, bits)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(len(shape),),
        collapsed_slice_dims=(batch,),
        start_index_map=(batch,),
        operand_batching_dims=tuple(range(batch)),
        start_indices_batching_dims=tuple(range(batch)),
    )
    windows = lax.gather(
        flat,
        jnp.maximum(index, 0)[..., None],
        numbers,
        (*(1,) * (batch + 1), geometry.channels),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    if not everywhere:
        windows = _masked(windows, index >= 0, bits)
    return windows if bits is None else lax.bitcast_convert_type(windows, x.dtype)


def _bits(dtype: np.dtype) -> np.dtype | None:
    """Return the integers as wide as these floats; None for other dtypes, and for widths that NumPy does not have."""
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits not in (8, 16, 32, 64):
        return None
    return np.dtype(f"int{jnp.finfo(dtype).bits}")


def _masked(windows: jax.Array, exists: jax.Array, bits: np.dtype | None) -> jax.Array:
    """Return windows, or 0 where none exists, by a mask of bits if possible: LLVM splits loops on a select."""
    axes = tuple(range(exists.ndim))
    if bits is None:
        return jnp.where(lax.broadcast_in_dim(exists, windows.shape, axes), windows, jnp.zeros((), windows.dtype))
    return windows & lax.broadcast_in_dim(-exists.astype(bits), windows.shape, axes)
