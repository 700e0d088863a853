"""Windows: exact extraction, its adjoint, contraction with a kernel, and window-wise work in bounded memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdw import _arrays
from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry, Padding, spatial_tuple

#: How `unfold` may extract windows.
UNFOLD_METHODS = ("slices", "patches")

#: Bytes of windows that `map_windows` aims to hold in one step when `rows_per_step` is None.
STEP_BYTES = 8 << 20


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
    """The window under the kernel at every output position.

    Args:
      x: `(*batch, *spatial, C)`, any dtype.
      kernel_size: 1 to 3 ints.
      strides, padding, kernel_dilation, input_dilation: as for `depthwise_conv`.
      method: "slices" pads and slices, an exact copy of every bit: infinities, NaN and subnormals pass (of bfloat16 and
        float8, XLA on CPU keeps a NaN but not its payload).
        "patches" calls `lax.conv_general_dilated_patches`, which multiplies by a one-hot kernel instead of copying:
        an infinity turns every other tap of its windows into NaN, a NaN fills its windows, subnormals are flushed on
        CPU, and TF32 (GPU) or bfloat16 (TPU) rounds the values unless precision is highest (asked for here).

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


def contract(
    windows: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Multiplies each window by the kernel and sums it: `unfold` then `contract` is a depthwise convolution.

    Args:
      windows: `(*batch, *output_spatial, *kernel_size, C)`.
      kernel: `(*kernel_size, 1, C*M)`.
      bias: `(C*M,)` or None.
      precision, preferred_element_type: as for `depthwise_conv`.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit; the message names them.
    """
    windows, kernel = _arrays.as_array("windows", windows), _arrays.as_array("kernel", kernel)
    bias = None if bias is None else _arrays.as_array("bias", bias)
    rank = kernel.ndim - 2
    if not 1 <= rank <= 3 or kernel.shape[-2] != 1:
        raise ValueError(f"`kernel` has shape {kernel.shape}, expected (*kernel_size, 1, features)")
    kernel_size, features = kernel.shape[:rank], kernel.shape[-1]
    if windows.ndim < 2 * rank + 1 or windows.shape[-rank - 1 : -1] != kernel_size:
        raise ValueError(
            f"`windows` has shape {windows.shape}, expected (*batch, *output_spatial, *{kernel_size}, channels) "
            f"for `kernel` of shape {kernel.shape}"
        )
    channels = windows.shape[-1]
    if channels == 0 or features % channels or features == 0:
        raise ValueError(f"`kernel` has {features} output channels, expected a multiple of the {channels} in `windows`")
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"`bias` has shape {bias.shape}, expected {(features,)}")
    (windows, kernel, bias), result = _arrays.promote(
        {"windows": windows, "kernel": kernel, "bias": bias}, preferred_element_type
    )
    windows, kernel, bias = _arrays.cast(_arrays.accumulator(result), windows, kernel, bias)
    return contract_windows(windows, kernel, bias, _arrays.precision_pair(precision)).astype(result)


def fold(
    windows: jax.Array,
    spatial: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
) -> jax.Array:
    """The exact adjoint of `unfold`: adds each window back to where it was taken from.

    Each input position receives its taps one by one in raster order, as `torch.nn.functional.fold` does in 2-D,
    and so has the same bits.

    Args:
      windows: `(*batch, *output_spatial, *kernel_size, C)`, what `unfold` gave for an x of these spatial sizes.
      spatial: the spatial sizes of x; their number tells windows' axes apart.
      strides, padding, kernel_dilation, input_dilation: as they were given to `unfold`.

    Returns:
      `(*batch, *spatial, C)`, of windows' dtype.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> x = jnp.ones((4, 1))
    >>> fold(unfold(x, (3,), padding="VALID"), (4,), padding="VALID")[:, 0]  # how many windows hold each
    Array([1., 2., 2., 1.], dtype=float32)
    """
    windows = _arrays.as_array("windows", windows)
    if windows.dtype == bool:
        raise TypeError("`windows` has dtype bool, expected one that can be added")
    spatial = spatial_tuple("spatial", spatial, smallest=0)
    rank = len(spatial)
    if windows.ndim < 2 * rank + 1:
        raise ValueError(
            f"`windows` has shape {windows.shape}, expected (*batch, *output_spatial, *kernel_size, channels) "
            f"for `spatial` {spatial}"
        )
    batch, kernel_size = windows.shape[: -2 * rank - 1], windows.shape[-rank - 1 : -1]
    geometry = Geometry.of_windows(
        (*batch, *spatial, windows.shape[-1]),
        kernel_size,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
    )
    if windows.shape != geometry.windows_shape:
        raise ValueError(f"`windows` has shape {windows.shape}, expected {geometry.windows_shape} for this geometry")
    return _fold(windows, geometry)


def map_windows(
    fn: Callable[[jax.Array], Any],
    x: jax.Array,
    kernel_size: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    rows_per_step: int | None = None,
) -> Any:
    """Applies `fn` to the windows of x without holding all of them: `fn(unfold(x, ...))`, block by block.

    Differentiable in both modes; the backward pass recomputes each block's windows, so that it too is bounded.

    Args:
      fn: takes windows `(*batch, rows, *output_spatial[1:], *kernel_size, C)` and returns
        `(*batch, rows, *output_spatial[1:], ...)`, or several such arrays in any pytree, as `lax.top_k` does;
        it must treat every row (first spatial axis) alike.
      x, kernel_size, strides, padding, kernel_dilation, input_dilation: as for `unfold`.
      rows_per_step: output rows a step; None takes as many as fit in 8 MiB of windows, at least one.

    Returns:
      `(*batch, *output_spatial, ...)`: what `fn(unfold(x, ...))` returns.

    Raises:
      ValueError, TypeError: an argument that does not fit, or a result of `fn` of another leading shape.

    >>> x = jnp.array([3.0, 1.0, 2.0, 5.0])[:, None]
    >>> map_windows(lambda w: w.max(axis=-2), x, (3,), padding="VALID")[:, 0]
    Array([3., 5.], dtype=float32)
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
    rows = geometry.output_spatial[0]
    per_step = _rows_per_step(rows_per_step, geometry, x.dtype.itemsize)
    if rows <= per_step or 0 in geometry.windows_shape:
        return _checked(fn, windows_of(x, geometry), geometry)
    padded = pad(x, geometry)
    axis = len(geometry.batch)

    def block(first_row: jax.Array | int, count: int) -> jax.Array:
        height = (count - 1) * geometry.strides[0] + geometry.spans[0]
        part = lax.dynamic_slice_in_dim(padded, first_row * geometry.strides[0], height, axis)
        windows = _stack(part, geometry, (count, *geometry.output_spatial[1:]))
        return _checked(fn, windows, geometry)

    # Without checkpoint the backward pass would keep every step's windows, which is what this function avoids.
    step = jax.checkpoint(lambda first_row: block(first_row, per_step))
    whole = rows // per_step
    blocks = lax.map(step, jnp.arange(whole) * per_step)
    result = jax.tree.map(lambda steps: lax.collapse(jnp.moveaxis(steps, 0, axis), axis, axis + 2), blocks)
    if rows % per_step:
        rest = jax.checkpoint(lambda: block(whole * per_step, rows % per_step))()
        result = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), result, rest)
    return result


def pad(x: jax.Array, geometry: Geometry) -> jax.Array:
    """x `(*batch, *padded_spatial, C)`, dilated and padded as the geometry says: a copy, no arithmetic."""
    if geometry.padding_mode != "zeros":
        mode = "wrap" if geometry.padding_mode == "circular" else "reflect"
        dilated = _zero_pad(x, geometry, ((0, 0),) * geometry.rank)
        return jnp.pad(dilated, (((0, 0),) * len(geometry.batch)) + geometry.padding + ((0, 0),), mode=mode)
    return _zero_pad(x, geometry, geometry.padding)


def tap_slices(padded: jax.Array, geometry: Geometry, output_spatial: Sequence[int]) -> Iterator[jax.Array]:
    """For each tap in raster order, the padded inputs under it: `(*batch, *output_spatial, C)`."""
    first = padded.ndim - 1 - geometry.rank
    for tap in itertools.product(*map(range, geometry.kernel_size)):
        start = [0] * padded.ndim
        limit = list(padded.shape)
        step = [1] * padded.ndim
        for axis, (t, dilation, stride, out) in enumerate(
            zip(tap, geometry.kernel_dilation, geometry.strides, output_spatial), start=first
        ):
            start[axis] = t * dilation
            limit[axis] = t * dilation + (out - 1) * stride + 1
            step[axis] = stride
        yield lax.slice(padded, start, limit, step)


@functools.partial(jax.jit, static_argnames=("geometry", "method"))
def windows_of(x: jax.Array, geometry: Geometry, method: str = "slices") -> jax.Array:
    """`unfold` for a checked geometry."""
    if 0 in geometry.windows_shape:
        return jnp.zeros(geometry.windows_shape, x.dtype)
    if method == "slices":
        return _stack(pad(x, geometry), geometry, geometry.output_spatial)
    return one_hot_windows(x, geometry, lax.Precision.HIGHEST)


def contract_windows(
    windows: jax.Array, kernel: jax.Array, bias: jax.Array | None, precision: PrecisionPair
) -> jax.Array:
    """`contract` for checked arrays of one dtype: one einsum over the taps."""
    rank = kernel.ndim - 2
    channels = windows.shape[-1]
    leading = windows.shape[: windows.ndim - rank - 1]
    taps = windows.reshape(*leading, math.prod(kernel.shape[:rank]), channels)
    weights = kernel.reshape(taps.shape[-2], channels, -1)
    y = jnp.einsum("...tc,tcm->...cm", taps, weights, precision=precision).reshape(*leading, kernel.shape[-1])
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def one_hot_windows(x: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    """Windows by `lax.conv_general_dilated_patches`; precision is what x is multiplied at."""
    flat, padding = flat_batch(x, geometry)
    patches = lax.conv_general_dilated_patches(
        flat,
        geometry.kernel_size,
        geometry.strides,
        padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=dimension_numbers(geometry.rank),
        precision=precision,
    )
    # lax orders the patch axis as (C, *kernel_size)
    patches = patches.reshape(*patches.shape[:-1], geometry.channels, geometry.taps)
    return jnp.swapaxes(patches, -1, -2).reshape(geometry.windows_shape)


def flat_batch(x: jax.Array, geometry: Geometry) -> tuple[jax.Array, tuple[tuple[int, int], ...]]:
    """x with one batch axis and the zero padding left for lax to add: periodic and reflected padding is added here."""
    padding = geometry.padding
    if geometry.padding_mode != "zeros":
        x, padding = pad(x, geometry), ((0, 0),) * geometry.rank
    return x.reshape(math.prod(geometry.batch), *x.shape[len(geometry.batch) :]), padding


def dimension_numbers(rank: int) -> tuple[str, str, str]:
    """Channels last, for lax."""
    axes = "DHW"[-rank:]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def _stack(padded: jax.Array, geometry: Geometry, output_spatial: Sequence[int]) -> jax.Array:
    slices = list(tap_slices(padded, geometry, output_spatial))
    stacked = jnp.stack(slices, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *geometry.kernel_size, geometry.channels)


def _zero_pad(x: jax.Array, geometry: Geometry, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    config = [(0, 0, 0)] * len(geometry.batch)
    config += [(low, high, spread - 1) for (low, high), spread in zip(padding, geometry.input_dilation)]
    config += [(0, 0, 0)]
    return x if all(c == (0, 0, 0) for c in config) else lax.pad(x, jnp.zeros((), x.dtype), config)


@functools.partial(jax.jit, static_argnames="geometry")
def _fold(windows: jax.Array, geometry: Geometry) -> jax.Array:
    padded_shape = (*geometry.batch, *geometry.padded_spatial, geometry.channels)
    # A constant zero start would be folded away, and with it the +0 that a sum of only -0 must be.
    total = jnp.broadcast_to(lax.optimization_barrier(jnp.zeros((), windows.dtype)), padded_shape)
    if 0 not in geometry.windows_shape:
        batch = len(geometry.batch)
        flat = windows.reshape(*geometry.batch, *geometry.output_spatial, geometry.taps, geometry.channels)
        for index, tap in enumerate(itertools.product(*map(range, geometry.kernel_size))):
            config = [(0, 0, 0)] * batch
            for t, dilation, stride, out, size in zip(
                tap, geometry.kernel_dilation, geometry.strides, geometry.output_spatial, geometry.padded_spatial
            ):
                covered = t * dilation + (out - 1) * stride + 1
                config.append((t * dilation, size - covered, stride - 1))
            total = total + lax.pad(flat[..., index, :], jnp.zeros((), windows.dtype), [*config, (0, 0, 0)])
    if 0 in total.shape or 0 in geometry.x_shape:
        return jnp.zeros(geometry.x_shape, windows.dtype)
    x = jax.ShapeDtypeStruct(geometry.x_shape, windows.dtype)
    (result,) = jax.linear_transpose(lambda x: pad(x, geometry), x)(total)
    return result


def _rows_per_step(rows_per_step: int | None, geometry: Geometry, itemsize: int) -> int:
    if rows_per_step is None:
        row = math.prod(geometry.windows_shape) // max(1, geometry.output_spatial[0]) * itemsize
        return max(1, STEP_BYTES // max(1, row))
    if isinstance(rows_per_step, bool) or not isinstance(rows_per_step, int) or rows_per_step < 1:
        raise ValueError(f"`rows_per_step` is {rows_per_step!r}, expected a positive int or None")
    return rows_per_step


def _checked(fn: Callable[[jax.Array], Any], windows: jax.Array, geometry: Geometry) -> Any:
    result = fn(windows)
    leading = windows.shape[: len(geometry.batch) + geometry.rank]
    for shape in map(jnp.shape, jax.tree.leaves(result)):
        if shape[: len(leading)] != leading:
            raise ValueError(
                f"`fn` returned shape {shape} for windows {windows.shape}, expected it to begin with {leading}"
            )
    return result
