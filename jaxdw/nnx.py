"""The depthwise convolutions as Flax NNX modules: plain, transposed, and causal along time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as _promote_dtype
from flax.typing import Initializer, PromoteDtypeFn
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
from jaxdw.geometry import Padding, spatial_tuple

_lecun_normal = nnx.initializers.lecun_normal()
_zeros = nnx.initializers.zeros_init()


class DepthwiseConv(nnx.Module):
    """Depthwise convolution: each input channel is convolved on its own with M kernels.

    A twin of `flax.nnx.Conv(C, C*M, kernel_size, feature_group_count=C)`: the same parameters by name, shape, order
    of random keys and dtype, so that each loads the other's state and one seed gives both the same parameters.

    Args:
      features: C, input channels; the output has `C * channel_multiplier`.
      kernel_size: a tuple of 1 to 3 ints.
      strides: int or one per spatial axis; None is 1.
      padding: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (1-D), an int, or one int or (low, high)
        pair per spatial axis. PyTorch's `padding=1` is the int 1; at stride 2 it is not "SAME".
      input_dilation, kernel_dilation: int or one per spatial axis; None is 1.
      channel_multiplier: M; output channel c*M + m reads input channel c.
      use_bias: add a bias `(C*M,)`.
      mask: array of the kernel's shape that multiplies the kernel, or None.
      dtype: dtype to compute in; None: that of inputs and parameters together.
      param_dtype: dtype of the parameters.
      precision: as for `lax.conv_general_dilated`; see `jaxdw.depthwise_conv`.
      kernel_init, bias_init: initializers, called with (key, shape, dtype).
      method: "auto", or a method of `jaxdw.depthwise_conv`. With a `window_fn`, "auto" is `jaxdw.windowed_conv`, and
        "patches" uses the windows of `lax.conv_general_dilated_patches`; the other methods never form windows and are
        an error.
      window_fn: a function of the windows `(*batch, *output_spatial, *kernel_size, C)` that returns an array of the
        same shape and dtype, applied before the contraction with the kernel. It may be a module with parameters,
        and with state; a function that changes state gets all windows at once.
      depthwise_conv: the function that convolves, with the arguments of `jaxdw.depthwise_conv`; a
        `jaxdw.sharding.Over` shards the convolution over a mesh.
      promote_dtype: function of a tuple (inputs, kernel, bias) and `dtype` that converts them to one dtype.
      preferred_element_type: dtype to accumulate and return in; None: the dtype of the arrays.
      rngs: gives one `params` key for the kernel and one for the bias.
      kernel_metadata, bias_metadata: metadata of the two `nnx.Param`s, such as `{"sharding_names": (...)}`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> from flax import nnx
    >>> layer = DepthwiseConv(8, (3, 3), strides=2, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer(jnp.ones((4, 32, 32, 8))).shape
    ((3, 3, 1, 8), (4, 16, 16, 8))

    Only the three largest values of each window:

    >>> def top3(windows):
    ...     flat = windows.reshape(*windows.shape[:-3], 9, 8)
    ...     return jnp.where(flat >= jnp.sort(flat, axis=-2)[..., -3:-2, :], flat, 0).reshape(windows.shape)
    >>> DepthwiseConv(8, (3, 3), window_fn=top3, rngs=nnx.Rngs(0))(jnp.ones((4, 32, 32, 8))).shape
    (4, 32, 32, 8)
    """

    def __init__(
        self,
        features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        channel_multiplier: int = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = _lecun_normal,
        bias_init: Initializer = _zeros,
        method: str = "auto",
        window_fn: Callable[[jax.Array], jax.Array] | None = None,
        depthwise_conv: Callable[..., jax.Array] = _depthwise_conv,
        promote_dtype: PromoteDtypeFn = _promote_dtype,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.features = features
        self.kernel_size = spatial_tuple("kernel_size", kernel_size)
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.channel_multiplier = channel_multiplier
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.method = method
        self.window_fn = window_fn
        self.depthwise_conv = depthwise_conv
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

        shape, bias_or_none = checked_kernel_shape(self), bias_init if use_bias else None
        self.kernel, self.bias = _parameters(
            shape, param_dtype, kernel_init, bias_or_none, rngs, kernel_metadata, bias_metadata
        )

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
        *,
        epilogue: Epilogue | None = None,
    ) -> jax.Array:
        """Convolve.

        Args:
          inputs: `(*batch, *spatial, C)`, any number of batch axes.
          out_sharding: sharding of the output, or None to leave it to JAX. Where all axes of the mesh are automatic it
            is a constraint on the compiler (`flax.nnx.Conv` refuses); otherwise the output is resharded to it.
          epilogue: what follows the convolution in the same pass, as for `jaxdw.depthwise_conv`.

        Returns:
          `(*batch, *output_spatial, C*M)`.
        """
        bias = None if self.bias is None else self.bias[...]
        promote = lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype)  # noqa: E731
        y = convolve(self, inputs, self.kernel[...], bias, promote, epilogue)
        return y if out_sharding is None else _placed(y, out_sharding)


class DepthwiseConvTranspose(nnx.Module):
    """Transposed depthwise convolution: PyTorch's `ConvTranspose1d`, `2d` or `3d` with `groups=C`.

    Args:
      features: C, input channels; the output has `C * channel_multiplier`.
      kernel_size: a tuple of 1 to 3 ints.
      strides: int or one per spatial axis; None is 1.
      padding: an int, or one int or (low, high) pair per spatial axis, which mean what they mean in PyTorch; or "SAME",
        "VALID" or "CIRCULAR", as in `flax.nnx.ConvTranspose`. See `jaxdw.depthwise_conv_transpose`.
      output_padding: int or one per spatial axis, smaller than the stride or the dilation.
      kernel_dilation: int or one per spatial axis; None is 1.
      channel_multiplier: M; output channel c*M + m reads input channel c.
      transpose_kernel: True: the kernel means what it means in PyTorch, and in Flax with `transpose_kernel=True`.
        False: it is flipped, as in Flax's default. `bridge.to_flax` converts weights for both.
      use_bias, mask, dtype, param_dtype, precision, kernel_init, bias_init, method, promote_dtype,
      preferred_element_type, rngs, kernel_metadata, bias_metadata: as for `DepthwiseConv`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> from flax import nnx
    >>> layer = DepthwiseConvTranspose(8, (3, 3), strides=2, padding=1, output_padding=1, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer(jnp.ones((4, 16, 16, 8))).shape
    ((3, 3, 1, 8), (4, 32, 32, 8))
    """

    def __init__(
        self,
        features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = 0,
        output_padding: int | Sequence[int] = 0,
        kernel_dilation: int | Sequence[int] | None = 1,
        channel_multiplier: int = 1,
        transpose_kernel: bool = True,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = _lecun_normal,
        bias_init: Initializer = _zeros,
        method: str = "auto",
        promote_dtype: PromoteDtypeFn = _promote_dtype,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.features = features
        self.kernel_size = spatial_tuple("kernel_size", kernel_size)
        self.strides = strides
        self.padding = padding
        self.output_padding = output_padding
        self.kernel_dilation = kernel_dilation
        self.channel_multiplier = channel_multiplier
        self.transpose_kernel = transpose_kernel
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.method = method
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        shape, bias_or_none = kernel_shape(self), bias_init if use_bias else None
        self.kernel, self.bias = _parameters(
            shape, param_dtype, kernel_init, bias_or_none, rngs, kernel_metadata, bias_metadata
        )

    def __call__(
        self,
        inputs: jax.Array,
        out_sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec | None = None,
        *,
        output_size: Sequence[int] | None = None,
        epilogue: Epilogue | None = None,
    ) -> jax.Array:
        """Convolve.

        Args:
          inputs: `(*batch, *spatial, C)`, any number of batch axes.
          out_sharding: as for `DepthwiseConv`.
          output_size: sizes of the spatial axes of the result, in place of `output_padding`, as PyTorch's layers take
            them; None leaves it to `output_padding`.
          epilogue: what follows the convolution in the same pass, as for `jaxdw.depthwise_conv`.

        Returns:
          `(*batch, *output_spatial, C*M)`.
        """
        bias = None if self.bias is None else self.bias[...]
        promote = lambda *arrays: self.promote_dtype(arrays, dtype=self.dtype)  # noqa: E731
        y = transpose(self, inputs, self.kernel[...], bias, promote, epilogue, output_size)
        return y if out_sharding is None else _placed(y, out_sharding)


class CausalConv1d(nnx.Module):
    """Causal depthwise convolution along time, with the state of a stream and packed sequences.

    It loads the weights of PyTorch's `Conv1d(C, C*M, K, groups=C)`, which Mamba and its kin have.

    Args:
      features: C, input channels; the output has `C * channel_multiplier`.
      kernel_size: K, an int or a tuple of one int.
      channel_multiplier: M; output channel c*M + m reads input channel c.
      activation: "silu" or None, of the output.
      use_bias, mask, dtype, param_dtype, kernel_init, bias_init, method, promote_dtype, rngs, kernel_metadata,
      bias_metadata: as for `DepthwiseConv`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> from flax import nnx
    >>> layer = CausalConv1d(8, 4, activation="silu", rngs=nnx.Rngs(0))
    >>> y, state = layer(jnp.ones((2, 100, 8)), return_state=True)
    >>> y1, state = layer.step(jnp.ones((2, 8)), state)
    >>> y.shape, y1.shape, state.shape
    ((2, 100, 8), (2, 8), (2, 3, 8))
    """

    def __init__(
        self,
        features: int,
        kernel_size: int | Sequence[int],
        *,
        channel_multiplier: int = 1,
        activation: str | None = None,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = _lecun_normal,
        bias_init: Initializer = _zeros,
        method: str = "auto",
        promote_dtype: PromoteDtypeFn = _promote_dtype,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        check_activation(activation)
        self.features = features
        self.kernel_size = checked_taps(kernel_size)
        self.channel_multiplier = channel_multiplier
        self.activation = activation
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.method = method
        self.promote_dtype = promote_dtype
        shape, bias_or_none = kernel_shape(self), bias_init if use_bias else None
        self.kernel, self.bias = _parameters(
            shape, param_dtype, kernel_init, bias_or_none, rngs, kernel_metadata, bias_metadata
        )

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
        return causal_conv(self, inputs, *self._kernel_and_bias, self._promote, state, segment_ids, return_state)

    def step(self, inputs: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return y `(*batch, C*M)` for the next inputs `(*batch, C)` of a stream, and the next state."""
        return causal_step(self, inputs, state, *self._kernel_and_bias, self._promote)

    def initial_state(self, batch: Sequence[int] = (), dtype: Any = None) -> jax.Array:
        """Return the state `(*batch, K-1, C)` at the start of a stream: zeros, in `dtype` or that of the parameters."""
        return jnp.zeros((*batch, self.kernel_size[0] - 1, self.features), dtype or self.dtype or self.param_dtype)

    @property
    def _kernel_and_bias(self) -> tuple[jax.Array, jax.Array | None]:
        return self.kernel[...], None if self.bias is None else self.bias[...]

    def _promote(self, *arrays: jax.Array | None) -> Sequence[jax.Array | None]:
        return self.promote_dtype(arrays, dtype=self.dtype)


def _parameters(
    shape: tuple[int, ...],
    dtype: Any,
    kernel_init: Initializer,
    bias_init: Initializer | None,
    rngs: nnx.Rngs,
    kernel_metadata: Mapping[str, Any],
    bias_metadata: Mapping[str, Any],
) -> tuple[nnx.Param[jax.Array], Any]:
    """Return the kernel and the bias; without an initializer the bias is None."""
    kernel = nnx.Param(kernel_init(rngs.params(), shape, dtype), **kernel_metadata)
    if bias_init is None:
        return kernel, nnx.data(None)  # a leaf of the tree, so that a bias can be set later
    return kernel, nnx.Param(bias_init(rngs.params(), shape[-1:], dtype), **bias_metadata)


def _placed(y: jax.Array, sharding: jax.sharding.NamedSharding | jax.sharding.PartitionSpec) -> jax.Array:
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else jax.sharding.get_abstract_mesh()
    place = lax.with_sharding_constraint if mesh.are_all_axes_auto else jax.sharding.reshard
    return place(y, sharding)
