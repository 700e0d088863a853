"""Window-wise work in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

from jaxdw import _arrays
from jaxdw.geometry import Geometry, Padding, spatial_tuple
from jaxdw.padding import pad
from jaxdw.windows.extraction import rows_of_windows, source_table, windows_of

#: Bytes of windows in one step of `map_windows` if `rows_per_step` is None.
STEP_BYTES = 2 << 20


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
    """Compute `fn(unfold(x, ...))` block by block, so that memory never holds all windows.

    Differentiable in both modes. The backward pass recomputes each block's windows, so its memory is bounded too.

    Args:
      fn: takes windows `(*batch, rows, *output_spatial[1:], *kernel_size, C)` and returns
        `(*batch, rows, *output_spatial[1:], ...)`, or several such arrays in any pytree, as `lax.top_k` does;
        it must treat every row (first spatial axis) in the same way.
      x, kernel_size, strides, padding, kernel_dilation, input_dilation: as for `unfold`.
      rows_per_step: output rows per step; None is as many as fit in 2 MiB of windows, at least one. If a spatial size
        is symbolic, all rows are one step.

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
        sources = lax.dynamic_slice_in_dim(source_table(geometry, 0), first_row, count)

        def compute() -> Any:
            return _checked(fn, rows_of_windows(x, padded, first_row, sources, geometry), geometry)

        return compute() if isinstance(first_row, int) else _not_fused(compute, first_row)

    # Without checkpoint the backward pass would keep the windows of all steps.
    step = jax.checkpoint(lambda first_row: block(first_row, per_step))
    whole = rows // per_step
    blocks = lax.map(step, jnp.arange(whole) * per_step)
    result = jax.tree.map(lambda steps: lax.collapse(jnp.moveaxis(steps, 0, axis), axis, axis + 2), blocks)
    if rows % per_step:
        rest = jax.checkpoint(lambda: block(whole * per_step, rows % per_step))()
        result = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), result, rest)
    return result


def _rows_per_step(rows_per_step: int | None, geometry: Geometry, itemsize: int) -> int:
    if rows_per_step is None:
        others = (*geometry.batch, *geometry.output_spatial[1:], *geometry.kernel_size, geometry.channels)
        row = math.prod(size for size in others if not export.is_symbolic_dim(size)) * itemsize
        return max(1, STEP_BYTES // max(1, row))
    if isinstance(rows_per_step, bool) or not isinstance(rows_per_step, int) or rows_per_step < 1:
        raise ValueError(f"`rows_per_step` is {rows_per_step!r}, expected a positive int or None")
    return rows_per_step


def _not_fused(compute: Callable[[], Any], first_row: jax.Array) -> Any:
    """Compute a step of `lax.map` on CPU, not fused with the write of its result.

    XLA:CPU fuses the last operation of a step with the write into the result of all steps, and runs that on one core.
    It does not fuse across a conditional, even one with only one possible branch. Other backends remove this one.
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
