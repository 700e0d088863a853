"""The arithmetic of a whole network: the order of every sum, and every rounding."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

from jaxdw.models.blocks import NAMES, BatchNorm, ConvNormAct, SqueezeExcite, activation_name
from jaxdw.models.layers import Conv, GlobalAveragePool, LayerOrder, Linear
from jaxdw.nnx import DepthwiseConv
from jaxdw.sum_order import SumOrder

Model = TypeVar("Model", bound=nnx.Module)

#: Methods of the depthwise convolution that the compiled kernels run.
_METHODS = ("auto", "taps")


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The orders of all sums of a network but those of its depthwise convolutions, which are chains in raster order.

    Attributes:
      orders: the order of each layer, by its path: "stem.conv", "blocks.3.expand.conv", "blocks.3.project.conv",
        "blocks.4.squeeze_excite.mean", "blocks.4.squeeze_excite.reduce", "blocks.4.squeeze_excite.expand",
        "head.conv", "mean", "hidden", "classifier". Terms of a convolution are numbered as those of
        `jaxdw.ordered_conv`. Terms of a mean are the pixels of an image in raster order; their sum is divided by their
        number.
    """

    orders: Mapping[str, SumOrder]

    def __post_init__(self) -> None:
        if not isinstance(self.orders, Mapping):
            raise TypeError(f"`orders` is a {type(self.orders).__name__}, expected a mapping from paths to SumOrder")
        for path, order in self.orders.items():
            if not isinstance(order, SumOrder):
                raise TypeError(f"`orders[{path!r}]` is a {type(order).__name__}, expected a `jaxdw.SumOrder`")
        object.__setattr__(self, "orders", types.MappingProxyType(dict(self.orders)))

    def __hash__(self) -> int:
        return hash(frozenset(self.orders.items()))


def with_arithmetic(model: Model, arithmetic: str | Arithmetic | None) -> Model:
    """Return a view of a model with its parameters, in another arithmetic.

    The view has variables of the model: what changes one, changes the other.

    Args:
      model: of `jaxdw.models`.
      arithmetic: "jaxdw" adds in one chain everywhere; an `Arithmetic` gives the order of each layer; None leaves the
        orders to XLA.

    Raises:
      ValueError, TypeError: layers without an order, orders without a layer, or with another number of terms; layers
        whose arithmetic is not defined. The message names them.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a model of `jaxdw.models`")
    view = nnx.clone(model, variables=False)
    set_arithmetic(view, arithmetic)
    return view


def set_arithmetic(model: nnx.Module, arithmetic: str | Arithmetic | None) -> None:
    """Set the arithmetic of a model in place; as `with_arithmetic`."""
    if arithmetic is not None and arithmetic != "jaxdw" and not isinstance(arithmetic, Arithmetic):
        raise ValueError(f"`arithmetic` is {arithmetic!r}, expected 'jaxdw', a `jaxdw.models.Arithmetic` or None")
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    if arithmetic is not None:
        _check_layers(modules)
    adding = {path: module for path, module in modules.items() if isinstance(module, (Linear, Conv, GlobalAveragePool))}
    orders: Mapping[str, LayerOrder] = dict.fromkeys(adding, None if arithmetic is None else "chain")
    if isinstance(arithmetic, Arithmetic):
        orders = arithmetic.orders
        _check_orders(adding, arithmetic.orders)
    for path, module in adding.items():
        module.order = orders[path]
    for module in modules.values():
        if isinstance(module, BatchNorm):
            module.is_defined = arithmetic is not None
    if hasattr(model, "conventions"):
        model.conventions = dataclasses.replace(model.conventions, arithmetic=arithmetic)


def _check_layers(modules: Mapping[str, nnx.Module]) -> None:
    known = (Linear, Conv, GlobalAveragePool, BatchNorm, ConvNormAct, SqueezeExcite, DepthwiseConv)
    for path, module in modules.items():
        if isinstance(module, (nnx.Linear, nnx.Conv, nnx.BatchNorm)) and not isinstance(module, known):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise TypeError(
                f"`model` has a {kind} at {path!r}, whose arithmetic is not defined; expected jaxdw's layers"
            )
        if isinstance(module, DepthwiseConv) and (module.method not in _METHODS or module.window_fn is not None):
            raise ValueError(
                f"`method` is {module.method!r} at {path!r}, expected one of {', '.join(_METHODS)}, without a "
                "`window_fn`: only they have a defined arithmetic"
            )
        functions: dict[str, Any] = {}
        if isinstance(module, (ConvNormAct, SqueezeExcite)):
            functions["activation"] = module.activation
        if isinstance(module, SqueezeExcite):
            functions["gate"] = module.gate
        if hasattr(module, "architecture"):
            functions["architecture.activation"] = module.architecture.activation
        for name, function in functions.items():
            if function is not None and activation_name(function) is None:
                raise ValueError(
                    f"`{path}.{name}` is {function!r}, whose roundings are not defined; expected the functions of "
                    f"`jaxdw.epilogue`: {', '.join(NAMES)}"
                )


def _check_orders(layers: Mapping[str, nnx.Module], orders: Mapping[str, SumOrder]) -> None:
    missing, unknown = [path for path in layers if path not in orders], [path for path in orders if path not in layers]
    if missing:
        raise ValueError(f"`arithmetic.orders` has no order for {', '.join(missing)}; expected one for every layer")
    if unknown:
        raise ValueError(f"`arithmetic.orders` has {', '.join(unknown)}, which are no layers of the model")
    for path, layer in layers.items():
        if isinstance(layer, (Linear, Conv)):
            terms = math.prod(layer.kernel.shape[:-1])
            if orders[path].terms != terms:
                raise ValueError(f"`arithmetic.orders[{path!r}]` has {orders[path].terms} terms, expected {terms}")
            if orders[path].has_bias and layer.bias is None:
                raise ValueError(f"`arithmetic.orders[{path!r}]` has a bias, and the layer has none")
        elif orders[path].has_bias:
            raise ValueError(f"`arithmetic.orders[{path!r}]` has a bias, and a mean has none")
