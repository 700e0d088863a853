"""The depthwise convolution as a Flax Linen module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype as _promote_dtype
from flax.typing import Initializer
from jax import lax

from jaxdw._layer import checked_kernel_shape, convolve
from jaxdw.conv import depthwise_conv as _depthwise_conv
from jaxdw.epilogue import Epilogue
from jaxdw.geometry import Padding


class DepthwiseConv(nn.Module):
    """Depthwise convolution: each input channel is convolved on its own with M kernels.

    A twin of `flax.linen.Conv(C*M, kernel_size, feature_group_count=C)`: the same parameters by name, shape, random
    key and dtype, so that each loads the other's `params` and one key gives both the same. Inside another module,
    `name="Conv_0"` keeps the scope of the layer it stands in for.

    Attributes: those of `jaxdw.nnx.DepthwiseConv`, which describes them. These differ:
      kernel_init, bias_init: initializers, called with (key, shape, dtype); `nn.with_partitioning` passes through.
      promote_dtype: function of (inputs, kernel, bias) and `dtype` that converts them to one dtype.
      window_fn: a function of the windows `(*batch, *output_spatial, *kernel_size, C)` that returns an array of the
        same shape and dtype, applied before the contraction with the kernel. It may be a module with variables. It is
        called once, on all windows; `jaxdw.windowed_conv` in a module of your own need not hold them. With it `method`
        is "auto", exact windows by slices, or "patches".

    Raises (when called):
      ValueError, TypeError: a field or an input that does not fit; the message names it.

    >>> layer = DepthwiseConv(8, (3, 3), strides=2)
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((4, 32, 32, 8)))
    >>> y.shape, jax.tree.map(jnp.shape, variables)
    ((4, 16, 16, 8), {'params': {'bias': (8,), 'kernel': (3, 3, 1, 8)}})
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    channel_multiplier: int = 1
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Sequence[jax.Array | None]] = _promote_dtype
    preferred_element_type: Any = None
    method: str = "auto"
    window_fn: Callable[[jax.Array], jax.Array] | None = None
    depthwise_conv: Callable[..., jax.Array] = _depthwise_conv

    @nn.compact
    def __call__(self, inputs: jax.Array, *, epilogue: Epilogue | None = None) -> jax.Array:
        """Convolve `inputs` `(*batch, *spatial, C)` to `(*batch, *output_spatial, C*M)`.

        `epilogue` is what follows the convolution in the same pass, as for `jaxdw.depthwise_conv`.
        """
        shape = checked_kernel_shape(self)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype) if self.use_bias else None
        return convolve(self, inputs, kernel, bias, functools.partial(self.promote_dtype, dtype=self.dtype), epilogue)
