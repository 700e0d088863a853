"""The methods "grouped" and "patches": lax's own convolution, and lax's own windows with one einsum over the taps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import export, lax

from jaxdw._arrays import PrecisionPair, accumulator
from jaxdw.call import Call
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.padding import pad, padded_geometry


def grouped(call: Call) -> jax.Array:
    """Convolve with `lax.conv_general_dilated`; the backend chooses the library or the loop."""
    call = call.cast(accumulator(call.result))
    return lax_grouped(*call.arrays, call.geometry, call.precision).astype(call.result)


def lax_grouped(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, precision: PrecisionPair
) -> jax.Array:
    """Convolve in the arrays' own dtype, narrow ones too, as `flax.nnx.Conv` does."""
    flat, geometry = _flat_batch(x, geometry)
    y = lax.conv_general_dilated(
        flat,
        kernel,
        geometry.strides,
        geometry.padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=dimension_numbers(geometry.rank),
        feature_group_count=geometry.channels,
        precision=precision,
    ).reshape(geometry.output_shape)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def patches(call: Call) -> jax.Array:
    """Extract windows and contract them at the same precision.

    Extraction is itself a convolution with a one-hot kernel. `jaxdw.unfold` says what that does to infinities, NaN and
    subnormals, and, on GPU and TPU, to the input's low bits at default precision.
    """
    (x, kernel, bias), geometry = call.cast(accumulator(call.result)).arrays, call.geometry
    precision = call.precision
    windows = one_hot_windows(x, geometry, None if precision is None else precision[0])
    leading = (*geometry.batch, *geometry.output_spatial)
    taps = windows.reshape(*leading, geometry.taps, geometry.channels)
    weights = kernel.reshape(geometry.taps, geometry.channels, -1)
    y = jnp.einsum("...tc,tcm->...cm", taps, weights, precision=precision).reshape(geometry.output_shape)
    return (y if bias is None else y + jnp.broadcast_to(bias, y.shape)).astype(call.result)


def one_hot_windows(x: jax.Array, geometry: Geometry, precision: lax.Precision | None) -> jax.Array:
    """Return windows by `lax.conv_general_dilated_patches`, which multiplies x at this precision."""
    flat, geometry = _flat_batch(x, geometry)
    windows = lax.conv_general_dilated_patches(
        flat,
        geometry.kernel_size,
        geometry.strides,
        geometry.padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=dimension_numbers(geometry.rank),
        precision=precision,
    )
    # lax orders the last axis as (C, *kernel_size)
    windows = windows.reshape(*windows.shape[:-1], geometry.channels, geometry.taps)
    return jnp.swapaxes(windows, -1, -2).reshape(geometry.windows_shape)


def dimension_numbers(rank: int) -> tuple[str, str, str]:
    """Return lax's names for channels last."""
    axes = "DHW"[-rank:]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def _flat_batch(x: jax.Array, geometry: Geometry) -> tuple[jax.Array, Geometry]:
    """Return x with one batch axis, and the geometry on it with the padding and the dilation that are left for lax.

    Periodic and reflected padding is done here. So is padding beyond the kernel, and negative padding: there jaxlib 0.8
    to 0.10 has wrong convolutions on CPUs, or wrong gradients (openxla/xla#48713), or ends the process.
    """
    pairs = zip(geometry.padding, geometry.spans)
    usual = all(export.is_symbolic_dim(amount) or 0 <= amount < span for pair, span in pairs for amount in pair)
    if geometry.padding_mode != "zeros" or not usual:
        x, geometry = pad(x, geometry), padded_geometry(geometry)
    if not usual:
        (x,) = in_memory(x)  # XLA would put the padding back into the convolution
    return x.reshape(math.prod(geometry.batch), *x.shape[len(geometry.batch) :]), geometry
