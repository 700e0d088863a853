"""The depthwise convolutions as Flax Linen modules: plain, transposed, and causal along time."""

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

from jaxdw._layer import (
    causal_conv,
    causal_step,
    check_activation,
    checked_kernel_shape,
    checked_taps,
    convolve,
    kernel_shape,
    transpose,
)
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


class DepthwiseConvTranspose(nn.Module):
    """Transposed depthwise convolution: PyTorch's `ConvTranspose1d`, `2d` or `3d` with `groups=C`.

    Attributes: those of `jaxdw.nnx.DepthwiseConvTranspose`, which describes them, but with Linen's initializers and
    `promote_dtype`, as for `DepthwiseConv`.

    Raises (when called):
      ValueError, TypeError: a field or an input that does not fit; the message names it.

    >>> layer = DepthwiseConvTranspose(8, (3, 3), strides=2, padding=1, output_padding=1)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((4, 16, 16, 8)))[0].shape
    (4, 32, 32, 8)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Padding = 0
    output_padding: int | Sequence[int] = 0
    kernel_dilation: int | Sequence[int] | None = 1
    channel_multiplier: int = 1
    transpose_kernel: bool = True
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

    @nn.compact
    def __call__(
        self, inputs: jax.Array, *, output_size: Sequence[int] | None = None, epilogue: Epilogue | None = None
    ) -> jax.Array:
        """Convolve `inputs` `(*batch, *spatial, C)` to `(*batch, *output_spatial, C*M)`.

        `output_size` and `epilogue` are as for `jaxdw.nnx.DepthwiseConvTranspose`.
        """
        shape = kernel_shape(self)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype) if self.use_bias else None
        promote = functools.partial(self.promote_dtype, dtype=self.dtype)
        return transpose(self, inputs, kernel, bias, promote, epilogue, output_size)


class CausalConv1d(nn.Module):
    """Causal depthwise convolution along time, with the state of a stream and packed sequences.

    Attributes: those of `jaxdw.nnx.CausalConv1d`, which describes them, but with Linen's initializers and
    `promote_dtype`, as for `DepthwiseConv`.

    Raises (when called):
      ValueError, TypeError: a field or an input that does not fit; the message names it.

    >>> layer = CausalConv1d(8, 4, activation="silu")
    >>> x = jnp.ones((2, 100, 8))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> y, state = layer.apply(variables, x, return_state=True)
    >>> y1, state = layer.apply(variables, x[:, 0], state, method="step")
    >>> y.shape, y1.shape, state.shape
    ((2, 100, 8), (2, 8), (2, 3, 8))
    """

    features: int
    kernel_size: int | Sequence[int]
    channel_multiplier: int = 1
    activation: str | None = None
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Callable[..., Sequence[jax.Array | None]] = _promote_dtype
    method: str = "auto"

    def setup(self) -> None:
        check_activation(self.activation)
        shape = kernel_shape(self, checked_taps(self.kernel_size))
        self.kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        self.bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype) if self.use_bias else None

    def __call__(
        self,
        inputs: jax.Array,
        *,
        state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        return_state: bool = False,
    ) -> Any:
        """Convolve `inputs` `(*batch, T, C)` to `(*batch, T, C*M)`; with `return_state` return `(y, state)`.

        The arguments are those of `jaxdw.causal_conv1d`.
        """
        return causal_conv(self, inputs, self.kernel, self.bias, self._promote, state, segment_ids, return_state)

    def step(self, inputs: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return y `(*batch, C*M)` for the next inputs `(*batch, C)` of a stream, and the next state."""
        return causal_step(self, inputs, state, self.kernel, self.bias, self._promote)

    def initial_state(self, batch: Sequence[int] = (), dtype: Any = None) -> jax.Array:
        """Return the state `(*batch, K-1, C)` at the start of a stream: zeros, in `dtype` or that of the parameters."""
        (taps,) = checked_taps(self.kernel_size)
        return jnp.zeros((*batch, taps - 1, self.features), dtype or self.dtype or self.param_dtype)

    def _promote(self, *arrays: jax.Array | None) -> Sequence[jax.Array | None]:
        return self.promote_dtype(*arrays, dtype=self.dtype)
