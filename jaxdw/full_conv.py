"""The full convolution whose every element is added in an order that you give: windows, and one matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from jaxdw import _arrays
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Padding
from jaxdw.matmul import ordered_matmul
from jaxdw.sum_order import SumOrder
from jaxdw.windows import unfold


def ordered_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    order: SumOrder | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Return the convolution `(*batch, *output_spatial, N)` of all input channels with each of N kernels.

    It makes the windows of x, which take `prod(kernel_size)` times the memory of the output's positions, and multiplies
    them by the kernel: see `jaxdw.ordered_matmul`. A padding of zeros is multiplied too.

    Args:
      x: `(*batch, *spatial, C)`, float32, float64, bfloat16 or float16; 1 to 3 spatial axes.
      kernel: `(*kernel_size, C, N)`, as of `flax.nnx.Conv`.
      bias: `(N,)` or None.
      strides, padding, kernel_dilation: as for `jaxdw.depthwise_conv`.
      order: how the products, and the bias, are added. Term k is number k of `kernel[..., n]`, flattened. None is one
        chain.
      epilogue: what happens to each sum, or None.

    Raises:
      ValueError, TypeError: as `jaxdw.ordered_matmul`.

    >>> import jax.numpy as jnp
    >>> ordered_conv(jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 2)), strides=2, padding=1)[0, ..., 0].tolist()
    [[12.0, 18.0], [18.0, 27.0]]
    """
    x, kernel = _arrays.as_array("x", x), _arrays.as_array("kernel", kernel)
    _arrays.check_floating(x=x, kernel=kernel)
    if not 3 <= kernel.ndim <= 5:
        raise ValueError(f"`kernel` has shape {kernel.shape}, expected (*kernel_size, C, N) with 1 to 3 spatial axes")
    *size, channels, features = kernel.shape
    if x.ndim <= len(size) or x.shape[-1] != channels:
        raise ValueError(
            f"`x` has shape {x.shape}, expected (*batch, *spatial, {channels}) with {len(size)} spatial axes, as "
            f"`kernel` has shape {kernel.shape}"
        )
    windows = unfold(x, size, strides=strides, padding=padding, kernel_dilation=kernel_dilation)
    outputs = windows.shape[: windows.ndim - kernel.ndim + 1]
    flat = windows.reshape(*outputs, math.prod(kernel.shape[:-1]))
    return ordered_matmul(
        flat, kernel.reshape(math.prod(kernel.shape[:-1]), features), bias, order=order, epilogue=epilogue
    )
