"""The adjoint of window extraction."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxdw import _arrays
from jaxdw.geometry import Geometry, Padding, spatial_tuple
from jaxdw.padding import transposed_pad


def fold(
    windows: jax.Array,
    spatial: Sequence[int],
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
) -> jax.Array:
    """Apply the exact adjoint of `unfold`: add each window to the positions that it was taken from.

    Each input position receives its taps in raster order, as in 2-D from `torch.nn.functional.fold`, with the same
    bits.

    Args:
      windows: `(*batch, *output_spatial, *kernel_size, C)`, as `unfold` returns for an x of these spatial sizes.
      spatial: the spatial sizes of x; their number says which axes of windows are which.
      strides, padding, kernel_dilation, input_dilation: the arguments of `unfold`.

    Returns:
      `(*batch, *spatial, C)`, of windows' dtype.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> from jaxdw import unfold
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
    return transposed_pad(total, geometry)
