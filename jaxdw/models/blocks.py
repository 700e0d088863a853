"""The parts of a MobileNet: convolution, normalization, activation; squeeze-and-excite; inverted residual."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdw._arrays import accumulator
from jaxdw.epilogue import Epilogue, hard_sigmoid, hard_swish, relu, relu6
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.models import dense
from jaxdw.models.layers import Conv, GlobalAveragePool, Linear
from jaxdw.nnx import DepthwiseConv
from jaxdw.norm import batch_norm
from jaxdw.training import add, axpby, fork

Activation = Callable[[jax.Array], jax.Array]

#: The activations that the epilogue of a convolution has, by its name.
_NAMES = {nnx.relu: "relu", relu: "relu", relu6: "relu6", hard_swish: "hard_swish"}

#: Those that a normalization has in training.
_FUNCTIONS: dict[str, Activation] = {"relu": relu, "relu6": relu6}

#: The gates that an epilogue has, by its name. Both have the same values but for rounding.
_GATES = {nnx.hard_sigmoid: "hard_sigmoid", hard_sigmoid: "hard_sigmoid"}

#: The names of all of them.
NAMES = tuple(dict.fromkeys((*_NAMES.values(), *_GATES.values())))


def activation_name(function: Activation) -> str | None:
    """Return the name of an activation or a gate among those of `jaxdw.Epilogue`, or None."""
    return _NAMES.get(function) or _GATES.get(function)


@dataclasses.dataclass(frozen=True)
class Conventions:
    """The choices of an original for all of its layers, and how to compute them.

    Attributes:
      padding: "SYMMETRIC" pads (k - 1) / 2 * dilation at both ends, as PyTorch models do; "SAME" is TensorFlow's.
        At stride 2 they are not the same.
      bn_epsilon: added to the variance.
      bn_momentum: weight of the old running statistics, 1 minus PyTorch's `momentum`.
      dropout: fraction of the classifier's inputs that training drops.
      dilation_starts: "here" or "next", for a block whose stride becomes dilation to keep the output stride. "here"
        dilates this block too (torchvision's V3); "next" only the blocks after it (timm, transformers, TF-slim).
      method: of `jaxdw.depthwise_conv`.
      dtype: dtype to compute in; None: that of inputs and parameters together.
      param_dtype: dtype of the parameters.
      precision: of convolutions and matrix products, as for `lax.dot_general`.
      arithmetic: "jaxdw", a `jaxdw.models.Arithmetic`, or None, which leaves the orders of sums to XLA.
    """

    padding: Literal["SYMMETRIC", "SAME"]
    bn_epsilon: float
    bn_momentum: float
    dropout: float = 0.0
    dilation_starts: Literal["here", "next"] = "next"
    method: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: lax.PrecisionLike = None
    arithmetic: Any = None

    def __post_init__(self) -> None:
        for name, choices in {"padding": ("SYMMETRIC", "SAME"), "dilation_starts": ("here", "next")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Block:
    """One row of a MobileNet's table.

    Attributes:
      in_channels, expanded, out_channels: the first 1x1 convolution widens to `expanded` channels; it is absent if
        `expanded` is `in_channels`.
      kernel: taps of the depthwise convolution along each axis.
      stride, dilation: of the depthwise convolution.
      squeeze: channels between the two layers of the squeeze-and-excite, or None where there is none.
      activation: after every convolution but the last.
      last_activation: after the last 1x1 convolution; None leaves the bottleneck linear (V2, V3).
      residual: add the input to the output, if they have the same shape.
    """

    in_channels: int
    expanded: int
    out_channels: int
    activation: Activation
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    squeeze: int | None = None
    last_activation: Activation | None = None
    residual: bool = True


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with the running variance of PyTorch and TensorFlow.

    All three normalize a batch of n values per channel by its biased variance v. For the running variance flax averages
    v itself, PyTorch and TensorFlow the unbiased v n / (n - 1). The variance is the mean square of the distances from
    the mean: flax's default, E[x^2] - E[x]^2, loses the digits by which the mean exceeds the deviation.
    """

    def __init__(self, features: int, conventions: Conventions, *, rngs: nnx.Rngs):
        super().__init__(
            features,
            momentum=conventions.bn_momentum,
            epsilon=conventions.bn_epsilon,
            use_fast_variance=False,
            dtype=conventions.dtype,
            param_dtype=conventions.param_dtype,
            rngs=rngs,
        )
        self.is_defined = False  # whether every rounding is that of `Epilogue.batch_norm`

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, activation: str | None = None
    ) -> jax.Array:
        """Normalize x `(*batch, *spatial, C)`; in training also update the statistics.

        In training it is `jaxdw.batch_norm`, with its activation.

        Raises:
          ValueError: one value per channel in training, which has no variance.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average and self.is_defined:
            dtype = jnp.result_type(x) if self.dtype is None else jnp.dtype(self.dtype)
            return self.epilogue(activation).apply(x.astype(accumulator(dtype)), x.ndim - 2, dtype)
        if use_running_average:
            y = super().__call__(x, use_running_average=True)
            return y if activation is None else _FUNCTIONS[activation](y)
        n = math.prod(x.shape[:-1])
        if n < 2:
            raise ValueError(
                f"`x` has shape {x.shape}, expected more than one value per channel in training: "
                "use a larger batch or image, or `model.eval()`"
            )
        assert self.mean is not None and self.scale is not None and self.bias is not None
        scale, bias = self.scale[...], self.bias[...]
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else jnp.dtype(self.dtype)
        x = x.astype(dtype) if self.dtype is None else x
        wide = accumulator(x.dtype)
        y, mean, var = batch_norm(x, scale.astype(wide), bias.astype(wide), epsilon=self.epsilon, activation=activation)
        new = 1 - self.momentum
        for kept, statistic, weight in ((self.mean, mean, new), (self.var, var, new * n / (n - 1))):
            old = lax.stop_gradient(kept[...])
            kept[...] = axpby(weight, lax.stop_gradient(statistic).astype(old.dtype), self.momentum, old)
        return y.astype(dtype)

    def epilogue(self, activation: str | None, residual: jax.Array | None = None) -> Epilogue:
        """Return the normalization by running statistics, residual and activation, as what follows a convolution."""
        assert self.mean is not None and self.scale is not None and self.bias is not None
        statistics = (self.mean[...], self.var[...], self.scale[...], self.bias[...])
        return Epilogue.batch_norm(*statistics, epsilon=self.epsilon, residual=residual, activation=activation)


class ConvNormAct(nnx.Module):
    """Convolution without bias, batch normalization, activation.

    Attributes:
      conv: `DepthwiseConv`, kernel (k, k, 1, C); for a 1x1 convolution a `Linear`, kernel (in, out), since XLA:CPU
        multiplies matrices 1.1 to 2.3 times as fast as it convolves with a 1x1 kernel; else a `Conv`.
      norm: `BatchNorm`.
      activation: a function, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conventions: Conventions,
        *,
        kernel: int = 1,
        stride: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        activation: Activation | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "use_bias": False,
            "dtype": conventions.dtype,
            "param_dtype": conventions.param_dtype,
            "precision": conventions.precision,
            "rngs": rngs,
        }
        if kernel > 1:
            symmetric = (kernel - 1) // 2 * dilation
            options["padding"] = symmetric if conventions.padding == "SYMMETRIC" else "SAME"
            options |= {"kernel_size": (kernel, kernel), "strides": stride, "kernel_dilation": dilation}
        self.conv: DepthwiseConv | Linear | Conv
        if depthwise:
            # one group's fan out is one group's fan in: k * k
            he = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
            self.conv = DepthwiseConv(in_channels, kernel_init=he, method=conventions.method, **options)
        else:
            he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
            if kernel == 1:
                self.conv = Linear(in_channels, out_channels, kernel_init=he, dot_general=dense.dot_general, **options)
            else:
                options["conv_general_dilated"] = dense.conv_general_dilated
                self.conv = Conv(in_channels, out_channels, kernel_init=he, **options)
        self.norm = BatchNorm(out_channels, conventions, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """Map `(*batch, H, W, in)` to `(*batch, H / stride, W / stride, out)`; the activation follows a residual."""
        activation = self.activation
        if self.is_one_pass:
            named = None if activation is None else _NAMES.get(activation)
            x = self.conv(x, epilogue=self.norm.epilogue(named, residual))
            return x if activation is None or named else activation(x)
        named = None if activation is None else _NAMES.get(activation)
        if not self.norm.use_running_average:
            if self.norm.is_defined and activation is not None and named not in _FUNCTIONS:
                raise ValueError(
                    f"`arithmetic` has {activation!r} in inference alone, in training {' and '.join(_FUNCTIONS)}: "
                    "use `model.eval()`, or `arithmetic=None`"
                )
            if residual is None and named in _FUNCTIONS:
                return self.norm(self.conv(x), activation=named)
        x = self.norm(self.conv(x))
        x = x if residual is None else add(residual, x) if self.norm.is_defined else residual + x
        return x if activation is None else activation(x)

    @property
    def is_one_pass(self) -> bool:
        """Whether the convolution has the normalization as its epilogue: a depthwise one, or with an order."""
        takes_epilogue = isinstance(self.conv, DepthwiseConv) or self.conv.order is not None
        return takes_epilogue and self.norm.use_running_average


class SqueezeExcite(nnx.Module):
    """Scale each channel by a gate in [0, 1] computed from all channels' means (Hu et al., 2018).

    Attributes:
      mean: `GlobalAveragePool`.
      reduce, expand: the two `Linear` of the gate, with bias.
      activation, gate: the functions after each, ReLU and hard sigmoid.
    """

    def __init__(self, channels: int, squeeze: int, conventions: Conventions, *, rngs: nnx.Rngs):
        self.mean = GlobalAveragePool()
        self.reduce = linear(channels, squeeze, conventions, rngs=rngs)
        self.expand = linear(squeeze, channels, conventions, rngs=rngs)
        self.activation: Activation = nnx.relu
        self.gate: Activation = nnx.hard_sigmoid

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(*batch, H, W, C)` to the same shape."""
        gate = activated(self.expand, activated(self.reduce, self.mean(x), self.activation), self.gate)
        if self.expand.order is not None:  # a product that no neighbour is fused with
            x, gate = in_memory(x, gate)
            return in_memory(x * gate[..., None, None, :])[0]
        return x * gate[..., None, None, :]


class InvertedResidual(nnx.Module):
    """The block of V2 (Sandler et al., 2018) and V3; without `expand` that of V1 (Howard et al., 2017).

    Attributes:
      expand: 1x1 `ConvNormAct`, or None.
      depthwise: `ConvNormAct` around a `DepthwiseConv`.
      squeeze_excite: `SqueezeExcite`, or None.
      project: 1x1 `ConvNormAct`.

    >>> conventions = Conventions("SYMMETRIC", bn_epsilon=1e-5, bn_momentum=0.9)
    >>> block = Block(16, 96, 24, relu6, stride=2)
    >>> layer = nnx.eval_shape(lambda: InvertedResidual(block, conventions, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda layer, x: layer(x), layer, jnp.ones((8, 56, 56, 16))).shape
    (8, 28, 28, 24)
    """

    def __init__(self, block: Block, conventions: Conventions, *, rngs: nnx.Rngs):
        self.expand = (
            ConvNormAct(block.in_channels, block.expanded, conventions, activation=block.activation, rngs=rngs)
            if block.expanded != block.in_channels
            else None
        )
        self.depthwise = ConvNormAct(
            block.expanded,
            block.expanded,
            conventions,
            kernel=block.kernel,
            stride=block.stride,
            dilation=block.dilation,
            depthwise=True,
            activation=block.activation,
            rngs=rngs,
        )
        self.squeeze_excite = (
            None if block.squeeze is None else SqueezeExcite(block.expanded, block.squeeze, conventions, rngs=rngs)
        )
        self.project = ConvNormAct(
            block.expanded, block.out_channels, conventions, activation=block.last_activation, rngs=rngs
        )
        self.residual = block.residual and block.stride == 1 and block.in_channels == block.out_channels

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(*batch, H, W, in)` to `(*batch, H / stride, W / stride, out)`."""
        norm = self.project.norm
        if self.squeeze_excite is not None and norm.is_defined and not norm.use_running_average:
            raise ValueError(
                "`arithmetic` has squeeze-and-excite in inference alone: use `model.eval()`, or `arithmetic=None`"
            )
        if self.residual and norm.is_defined:
            x, y = fork(x)
        else:
            y = x
        y = y if self.expand is None else self.expand(y)
        y = self.depthwise(y)
        y = y if self.squeeze_excite is None else self.squeeze_excite(y)
        if self.residual and self.project.activation is None:
            return self.project(y, residual=x)
        y = self.project(y)
        return x + y if self.residual else y


def linear(in_features: int, out_features: int, conventions: Conventions, *, rngs: nnx.Rngs) -> Linear:
    """Return a fully connected layer, initialized as in torchvision."""
    return Linear(
        in_features,
        out_features,
        kernel_init=nnx.initializers.normal(0.01),
        dtype=conventions.dtype,
        param_dtype=conventions.param_dtype,
        precision=conventions.precision,
        rngs=rngs,
    )


def activated(layer: Linear, x: jax.Array, activation: Activation) -> jax.Array:
    """Return the activation of a layer's result, in the same pass where the layer has an order."""
    if layer.order is None:
        return activation(layer(x))
    return layer(x, epilogue=Epilogue(activation=activation_name(activation)))
