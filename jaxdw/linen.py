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
from jaxdw.geometry import Padding


class DepthwiseConv(nn.Module):
    """Depthwise convolution: each input channel is convolved on its own with M kernels.

    A twin of `flax.linen.Conv(C*M, kernel_size, feature_group_count=C)`: the same parameters by name, shape, random
    key and dtype, so that each loads the other's `params` and one key gives both the same. Inside another module,
    `name="Conv_0"` keeps the scope of the layer it stands in for.

    Attributes:
      features: C, input channels; the output has `C * channel_multiplier`.
      kernel_size: a tuple of 1 to 3 ints.
      strides: int or one per spatial axis; None is 1.
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (1-D), an int, or one int or (low, high)
        pair per spatial axis. PyTorch's `padding=1` is the int 1; at stride 2 it is not "SAME".
      input_dilation, kernel_dilation: int or one per spatial axis; None is 1.
      channel_multiplier: M; output channel c*M + m reads input channel c.
      use_bias: whether to add a bias `(C*M,)`.
      mask: array of the kernel's shape that multiplies the kernel, or None.
      dtype: dtype to compute in; None: that of inputs and parameters together.
      param_dtype: dtype of the parameters.
      precision: as for `lax.conv_general_dilated`; see `jaxdw.depthwise_conv`.
      kernel_init, bias_init: initializers, called with (key, shape, dtype); `nn.with_partitioning` passes through.
      promote_dtype: function of (inputs, kernel, bias) and `dtype` that brings them to one dtype.
      preferred_element_type: dtype to accumulate and return in; None: the dtype of the arrays.
      method: "auto", or a method of `jaxdw.depthwise_conv`. With a `window_fn`: "auto" takes exact windows by slices,
        "patches" those of `lax.conv_general_dilated_patches`; the other methods never form windows and are refused.
      window_fn: a function of the windows `(*batch, *output_spatial, *kernel_size, C)` that returns an array of the
        same shape and dtype, applied before the contraction with the kernel. It may be a module with variables;
        it is called once, on all windows, where `jaxdw.windowed_conv` in a module of your own need not hold them.
      depthwise_conv: the function that convolves, with the arguments of `jaxdw.depthwise_conv`; a
        `jaxdw.sharding.Over` shards the convolution over a mesh.

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
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolve `inputs` `(*batch, *spatial, C)` to `(*batch, *output_spatial, C*M)`."""
        shape = checked_kernel_shape(self)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype) if self.use_bias else None
        return convolve(self, inputs, kernel, bias, functools.partial(self.promote_dtype, dtype=self.dtype))
