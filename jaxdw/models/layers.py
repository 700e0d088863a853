"""The layers of the models that add products, and means: with an order where one is set, else as XLA adds."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
from flax import nnx

from jaxdw.epilogue import Epilogue
from jaxdw.full_conv import ordered_conv
from jaxdw.matmul import ordered_matmul, ordered_mean
from jaxdw.sum_order import SumOrder

#: An order of a layer: a program, "chain" for one chain of any length, or None for XLA's order.
LayerOrder = SumOrder | Literal["chain"] | None


def _program(order: LayerOrder) -> SumOrder | None:
    return None if order == "chain" else order


def _operands(layer: nnx.Linear | nnx.Conv, inputs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return inputs, kernel and bias in the dtype to compute in."""
    bias = None if layer.bias is None else layer.bias[...]
    return layer.promote_dtype((inputs, layer.kernel[...], bias), dtype=layer.dtype)


class Linear(nnx.Linear):
    """`flax.nnx.Linear` with an attribute `order`, None at first. With an order it takes an epilogue."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.order: LayerOrder = None

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, epilogue: Epilogue | None = None) -> jax.Array:
        """Map `(*batch, in)` to `(*batch, out)`."""
        if self.order is None:
            assert epilogue is None
            return super().__call__(inputs, out_sharding)
        x, kernel, bias = _operands(self, inputs)
        return ordered_matmul(x, kernel, bias, order=_program(self.order), epilogue=epilogue)


class Conv(nnx.Conv):
    """`flax.nnx.Conv` of one group with an attribute `order`, None at first. With an order it takes an epilogue."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.order: LayerOrder = None

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, epilogue: Epilogue | None = None) -> jax.Array:
        """Map `(*batch, *spatial, in)` to `(*batch, *output_spatial, out)`."""
        if self.order is None:
            assert epilogue is None
            return super().__call__(inputs, out_sharding)
        x, kernel, bias = _operands(self, inputs)
        return ordered_conv(
            x,
            kernel,
            bias,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            order=_program(self.order),
            epilogue=epilogue,
        )


class GlobalAveragePool(nnx.Module):
    """The mean over the pixels of an image: by their sum in an order and one division, or as XLA computes it."""

    def __init__(self) -> None:
        self.order: LayerOrder = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Average `(*batch, H, W, C)` to `(*batch, C)`."""
        if self.order is None:
            return x.mean((-3, -2))
        *batch, height, width, channels = x.shape
        return ordered_mean(x.reshape(*batch, math.prod((height, width)), channels), _program(self.order))
