"""Contraction of windows with a kernel."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxdw import _arrays
from jaxdw.lowerings.ordered_sum import Term, accumulate, zero_like, zero_of_its_own


def contract(
    windows: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Multiply each window by the kernel and add: `unfold` then `contract` is a depthwise convolution.

    The order of the sum is that of method "taps": one multiply and add per tap, in raster order from +0, which XLA may
    round once (a fused multiply-add) or twice, and the bias last. float16 and bfloat16 are added in float32.

    Args:
      windows: `(*batch, *output_spatial, *kernel_size, C)`.
      kernel: `(*kernel_size, 1, C*M)`.
      bias: `(C*M,)` or None.
      precision: checked, but without effect: every product and sum has full precision.
      preferred_element_type: as for `depthwise_conv`.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit; the message names them.

    >>> from jaxdw import unfold
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
    arrays = {"windows": windows, "kernel": kernel, "bias": bias}
    common, result = _arrays.common_and_result_dtype(arrays, preferred_element_type)
    _arrays.precision_pair(precision)
    bias = None if bias is None else bias.astype(common)
    return weighted_sum(windows.astype(common), kernel.astype(common), bias, result)


@functools.partial(jax.jit, static_argnames="result")
def weighted_sum(windows: jax.Array, kernel: jax.Array, bias: jax.Array | None, result: np.dtype) -> jax.Array:
    """Compute `contract` for checked arrays, by a chain that XLA fuses with the operations that compute windows."""
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
    """Return taps `(*leading, T, C)` times weights `(T, C, M)`, added over T: `(*leading, C, M)`."""
    values = [lax.index_in_dim(taps, t, axis=-2, keepdims=False) for t in range(len(weights))]
    outputs = []
    for m in range(weights.shape[-1]):
        terms = (Term(value, weights[t, :, m], 0) for t, value in enumerate(values))
        zero, own_zero = zero_like(weights[0, :, m]), zero_of_its_own(m, taps.dtype)
        outputs.append(accumulate(terms, zero, None, values[0].shape, "raster", own_zero))
    return jnp.stack(outputs, axis=-1)


def _weighted_sum_jvp(primals, tangents):
    """Return one sum: its transposes are a product and a sum, where that of a slice is as large as the windows."""
    (taps, weights), (dtaps, dweights) = primals, tangents
    shape = (*taps.shape, weights.shape[-1])
    terms = [
        (values[..., None] * jnp.broadcast_to(factors, shape)).sum(axis=-3)
        for values, factors in ((dtaps, weights), (taps, dweights))
        if not isinstance(values, SymbolicZero) and not isinstance(factors, SymbolicZero)
    ]
    return _weighted_sum(taps, weights), functools.reduce(jnp.add, terms)


_weighted_sum.defjvp(_weighted_sum_jvp, symbolic_zeros=True)
