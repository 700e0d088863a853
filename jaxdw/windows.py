"""Windows: exact extraction, its adjoint, contraction with a kernel, and window-wise work in bounded memory."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.custom_derivatives import SymbolicZero

from jaxdw import _arrays
from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry, Padding, spatial_tuple
from jaxdw.sums.order import Term, accumulate, zero_like, zero_of_its_own

#: How `unfold` may extract windows.
UNFOLD_METHODS = ("slices", "patches")

#: Bytes of windows that `map_windows` aims to hold in one step when `rows_per_step` is None.
STEP_BYTES = 2 << 20


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
      method: "slices" is an exact copy of every bit: infinities, NaN and subnormals pass (of bfloat16 and float8, XLA
        on CPU may keep a NaN but not its payload). On CPU it gathers, which reads x where it lies, and which XLA
        fuses with what follows under `jax.jit`: with at most 15 taps, an elementwise function and `contract` become
        one loop that never holds the windows. Elsewhere it
        pads and slices.
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

    The order of the sum is that of method "taps": one multiply and add a tap, in raster order from +0, which XLA may
    round once (an FMA) or twice, and the bias last; float16 and bfloat16 are summed in float32.

    Args:
      windows: `(*batch, *output_spatial, *kernel_size, C)`.
      kernel: `(*kernel_size, 1, C*M)`.
      bias: `(C*M,)` or None.
      precision: checked, but there is nothing to relax: every product and sum is of full precision.
      preferred_element_type: as for `depthwise_conv`.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit; the message names them.

    >>> windows = unfold(jnp.arange(4.0)[:, None], (3,), padding="VALID")
    >>> contract(windows, jnp.array([1.0, 0.0, -1.0])[:, None, None])[:, 0]
    Array([-2., -2.], dtype=float32)
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
    _arrays.precision_pair(precision)
    return weighted_sum(windows, kernel, bias, result)


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
        raise ValueError(
            f"`windows` has shape {windows.shape}, expected {geometry.windows_shape} for `spatial` {spatial}: "
            "`spatial` is the spatial size of x, which `unfold` took the windows from, and not the size of its output"
        )
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
      rows_per_step: output rows a step; None takes as many as fit in 2 MiB of windows, at least one. Where a spatial
        size is symbolic, all rows are one step.

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
    if geometry.has_symbolic_axes or rows <= per_step or 0 in geometry.windows_shape:
        return _checked(fn, windows_of(x, geometry), geometry)
    padded = pad(x, geometry)
    axis = len(geometry.batch)

    def block(first_row: jax.Array | int, count: int) -> jax.Array:
        sources = lax.dynamic_slice_in_dim(_table(geometry, 0), first_row, count)

        def compute() -> Any:
            return _checked(fn, _rows_of_windows(x, padded, first_row, sources, geometry), geometry)

        return compute() if isinstance(first_row, int) else _apart(compute, first_row)

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
    if geometry.padding_mode == "zeros":
        config = [(low, high, spread - 1) for (low, high), spread in zip(geometry.padding, geometry.input_dilation)]
        config = [(0, 0, 0)] * len(geometry.batch) + config + [(0, 0, 0)]
        return x if all(c == (0, 0, 0) for c in config) else lax.pad(x, jnp.zeros((), x.dtype), config)
    for axis in range(geometry.rank):
        at = len(geometry.batch) + axis
        if export.is_symbolic_dim(geometry.spatial[axis]):
            x = jnp.take(x, _repeated(geometry, axis), axis=at, mode="clip")
        else:
            x = _chosen(x, geometry.padded_sources(axis), at)
    return x


def _repeated(geometry: Geometry, axis: int) -> jax.Array:
    """`Geometry.padded_sources` of periodic or reflected padding, computed where the program runs."""
    size = jnp.asarray(geometry.spatial[axis], np.int32)
    position = jnp.arange(geometry.padded_spatial[axis], dtype=np.int32) - geometry.padding[axis][0]
    if geometry.padding_mode == "circular":
        return position % size
    position = position % jnp.maximum(2 * size - 2, 1)  # one period: to the last input and back
    return jnp.minimum(position, 2 * size - 2 - position)


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
    if geometry.has_symbolic_axes:  # of these lax has no gradients
        room = geometry.with_room
        windows = _sliced_rows(pad(x, room), 0, room.output_spatial[0], room)
        return first_outputs(windows, geometry)
    if method == "slices":
        return _rows_of_windows(x, pad(x, geometry), 0, _table(geometry, 0), geometry)
    return one_hot_windows(x, geometry, lax.Precision.HIGHEST)


def first_outputs(array: jax.Array, geometry: Geometry) -> jax.Array:
    """The outputs of a geometry out of those of `geometry.with_room`: `(*batch, *output_spatial, ...)` of both."""
    batch = len(geometry.batch)
    limits = (*array.shape[:batch], *geometry.output_spatial, *array.shape[batch + geometry.rank :])
    return lax.slice(array, (0,) * array.ndim, limits)


@functools.partial(jax.jit, static_argnames="result")
def weighted_sum(windows: jax.Array, kernel: jax.Array, bias: jax.Array | None, result: np.dtype) -> jax.Array:
    """`contract` for checked arrays: a chain of multiply and add over the taps, which fuses with what made windows."""
    dtype = _arrays.accumulator(result)
    rank = kernel.ndim - 2
    leading, channels = windows.shape[: windows.ndim - rank - 1], windows.shape[-1]
    count = math.prod(kernel.shape[:rank])
    taps = windows.reshape(*leading, count, channels).astype(dtype)
    y = _weighted_sum(taps, kernel.reshape(count, channels, -1).astype(dtype))
    y = y.reshape(*leading, kernel.shape[-1])
    return (y if bias is None else y + jnp.broadcast_to(bias.astype(dtype), y.shape)).astype(result)


@jax.custom_jvp
def _weighted_sum(taps: jax.Array, weights: jax.Array) -> jax.Array:
    """taps `(*leading, T, C)` times weights `(T, C, M)`, summed over T: `(*leading, C, M)`."""
    values = [lax.index_in_dim(taps, t, axis=-2, keepdims=False) for t in range(len(weights))]
    outputs = []
    for m in range(weights.shape[-1]):
        terms = (Term(value, weights[t, :, m], 0) for t, value in enumerate(values))
        zero, own_zero = zero_like(weights[0, :, m]), zero_of_its_own(m, taps.dtype)
        outputs.append(accumulate(terms, zero, None, values[0].shape, "raster", own_zero))
    return jnp.stack(outputs, axis=-1)


def _weighted_sum_jvp(primals, tangents):
    """By one sum, whose transposes are a product and a sum: that of each slice would be a whole array of windows."""
    (taps, weights), (dtaps, dweights) = primals, tangents
    shape = (*taps.shape, weights.shape[-1])
    terms = [
        (values[..., None] * jnp.broadcast_to(factors, shape)).sum(axis=-3)
        for values, factors in ((dtaps, weights), (taps, dweights))
        if not isinstance(values, SymbolicZero) and not isinstance(factors, SymbolicZero)
    ]
    return _weighted_sum(taps, weights), functools.reduce(jnp.add, terms)


_weighted_sum.defjvp(_weighted_sum_jvp, symbolic_zeros=True)


def contract_windows(
    windows: jax.Array, kernel: jax.Array, bias: jax.Array | None, precision: PrecisionPair
) -> jax.Array:
    """What `contract` computes, for checked arrays of one dtype, by one einsum over the taps."""
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _rows_of_windows(
    x: jax.Array, padded: jax.Array, first_row: jax.Array | int, sources: jax.Array, geometry: Geometry
) -> jax.Array:
    """The windows of some output rows `(*batch, rows, *output_spatial[1:], *kernel_size, C)`.

    `padded` is `pad(x)`, and `sources` the rows of the first axis's `_table`.

    On CPU the windows are gathered from x, and padded is then computed by nobody but the derivative: the transpose of
    slices is padding and sums, while that of a gather is a scatter, which XLA runs on one core.
    """

    def gathered(x, padded, first_row, sources):
        return _gathered_rows(x, sources, geometry)

    def sliced(x, padded, first_row, sources):
        return _sliced_rows(padded, first_row, len(sources), geometry)

    operands = (x, padded, jnp.asarray(first_row, jnp.int32), sources)
    if not _can_be_gathered(x, geometry):
        return sliced(*operands)
    return lax.platform_dependent(*operands, cpu=gathered, default=sliced)


@_rows_of_windows.defjvp
def _rows_of_windows_jvp(geometry: Geometry, primals, tangents):
    _, _, first_row, sources = primals
    return _rows_of_windows(*primals, geometry), _sliced_rows(tangents[1], first_row, len(sources), geometry)


def _sliced_rows(padded: jax.Array, first_row: jax.Array | int, rows: int, geometry: Geometry) -> jax.Array:
    if rows < geometry.output_spatial[0]:
        height = (rows - 1) * geometry.strides[0] + geometry.spans[0]
        start = first_row * geometry.strides[0]
        padded = lax.dynamic_slice_in_dim(padded, start, height, padded.ndim - 1 - geometry.rank)
    slices = list(tap_slices(padded, geometry, (rows, *geometry.output_spatial[1:])))
    stacked = jnp.stack(slices, axis=-2)
    return stacked.reshape(*stacked.shape[:-2], *geometry.kernel_size, geometry.channels)


#: In place of an input position where there is none. The sum of three does not overflow, and a position does not lift
#: it to zero.
_NOWHERE = -(2**29)


def _can_be_gathered(x: jax.Array, geometry: Geometry) -> bool:
    axes = range(len(geometry.batch), x.ndim - 1)
    cut = jax.typeof(x).sharding.spec  # where the type says how x is distributed, a gather may not cross the pieces
    return 0 < math.prod(geometry.spatial) <= -_NOWHERE and all(cut[axis] is None for axis in axes if axis < len(cut))


def _table(geometry: Geometry, axis: int) -> jax.Array:
    """For one axis `(out, k)`, what (output position, tap) adds to the number of the input position it reads."""
    source = geometry.sources[axis]
    number = source * math.prod(geometry.spatial[axis + 1 :])
    return jnp.asarray(np.where(source < 0, _NOWHERE, number).astype(np.int32))


def _gathered_rows(x: jax.Array, sources: jax.Array, geometry: Geometry) -> jax.Array:
    batch, rank = len(geometry.batch), geometry.rank
    shape = (*geometry.batch, len(sources), *geometry.output_spatial[1:], *geometry.kernel_size)
    tables = [sources, *(_table(geometry, axis) for axis in range(1, rank))]
    index = functools.reduce(
        jnp.add,
        (lax.broadcast_in_dim(table, shape, (batch + axis, batch + rank + axis)) for axis, table in enumerate(tables)),
    )
    everywhere = all((source >= 0).all() for source in geometry.sources)
    flat = x.reshape(*geometry.batch, math.prod(geometry.spatial), geometry.channels)
    bits = _bits(x.dtype)
    if bits is not None:  # not even XLA's float normalisation touches an integer
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
        windows = _kept(windows, index >= 0, bits)
    return windows if bits is None else lax.bitcast_convert_type(windows, x.dtype)


def _bits(dtype: np.dtype) -> np.dtype | None:
    """The integers as wide as these floats; None for what is no float, or of a width that NumPy has not."""
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits not in (8, 16, 32, 64):
        return None
    return np.dtype(f"int{jnp.finfo(dtype).bits}")


def _kept(windows: jax.Array, exists: jax.Array, bits: np.dtype | None) -> jax.Array:
    """windows, or 0 where there is none. By a mask of bits where that can be: LLVM splits loops on a select."""
    axes = tuple(range(exists.ndim))
    if bits is None:
        return jnp.where(lax.broadcast_in_dim(exists, windows.shape, axes), windows, jnp.zeros((), windows.dtype))
    return windows & lax.broadcast_in_dim(-exists.astype(bits), windows.shape, axes)


def _chosen(x: jax.Array, source: np.ndarray, axis: int) -> jax.Array:
    """x at these positions of an axis, as slices side by side: `jnp.pad` makes a whole copy for each piece."""
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
        others = (*geometry.batch, *geometry.output_spatial[1:], *geometry.kernel_size, geometry.channels)
        row = math.prod(size for size in others if not export.is_symbolic_dim(size)) * itemsize
        return max(1, STEP_BYTES // max(1, row))
    if isinstance(rows_per_step, bool) or not isinstance(rows_per_step, int) or rows_per_step < 1:
        raise ValueError(f"`rows_per_step` is {rows_per_step!r}, expected a positive int or None")
    return rows_per_step


def _apart(compute: Callable[[], Any], first_row: jax.Array) -> Any:
    """compute(), for a step of `lax.map` on CPU.

    XLA:CPU fuses what a step computes last with writing it into the result of all steps, and runs that on one core. It
    does not fuse across a conditional, even one that goes one way; other backends see that it does, and drop it.
    """
    always = lax.platform_dependent(first_row, cpu=lambda row: row >= 0, default=lambda row: jnp.ones((), bool))
    shapes = jax.eval_shape(compute)
    return lax.cond(always, compute, lambda: jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes))


def _checked(fn: Callable[[jax.Array], Any], windows: jax.Array, geometry: Geometry) -> Any:
    result = fn(windows)
    leading = windows.shape[: len(geometry.batch) + geometry.rank]
    for shape in map(jnp.shape, jax.tree.leaves(result)):
        if shape[: len(leading)] != leading:
            raise ValueError(
                f"`fn` returned shape {shape} for windows {windows.shape}, expected it to begin with {leading}"
            )
    return result
