"""A MobileNet of `jaxdw.models` as the list of its operations. Each can be run by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bridge.model.parameters import LayerParameters
from jaxdw import epilogue
from jaxdw.epilogue import hard_swish
from jaxdw.full_conv import ordered_conv
from jaxdw.matmul import ordered_matmul, ordered_mean
from jaxdw.models import Arithmetic, MobileNet, with_arithmetic
from jaxdw.models.blocks import BatchNorm, ConvNormAct, InvertedResidual, SqueezeExcite
from jaxdw.models.layers import Conv, GlobalAveragePool, Linear
from jaxdw.nnx import DepthwiseConv
from jaxdw.sum_order import SumOrder

#: The name of the input.
IMAGES = "images"

#: Names of functions whose own name is not that of PyTorch's operation.
_ACTIVATIONS: Mapping[Any, str] = {
    nnx.hard_swish: "hard swish",
    hard_swish: "hard swish",
    nnx.hard_sigmoid: "hard sigmoid",
    nnx.gelu: "gelu (tanh)",
    nnx.hard_tanh: "hardtanh",
}

#: The name of a lambda.
NAMELESS = "a function without a name"

#: The `__call__` of the modules whose operations are known.
_CALLS = {known: known.__call__ for known in (InvertedResidual, ConvNormAct, SqueezeExcite)}
_NETWORK = {name: getattr(MobileNet, name) for name in ("__call__", "features", "classify")}

#: Libraries whose functions' names say what they compute.
_LIBRARIES = {"jax", "jaxlib", "flax", "jaxdw"}


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """One operation.

    Attributes:
      name: its path in the model, for a layer the layer's.
      kind: "depthwise", "pointwise", "convolution", "linear", "batch norm", an activation's name, "mean", "add" or
        "multiply".
      inputs: the names of the steps whose results it takes, or `IMAGES`.
      run: the operation on arrays.
      layer: the layer that `run` calls, or None.
      is_activation: true where the model has an activation.
      is_opaque: true for a module whose operations are not known.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    run: Callable[..., jax.Array]
    layer: nnx.Module | None = None
    is_activation: bool = False
    is_opaque: bool = False

    def compiled(self, *inputs: Any) -> jax.Array:
        """Return the result, compiled by itself, so that no neighbour is fused with it."""
        if self.layer is not None:
            return run_module(self.layer, *inputs)
        return _run_function(self.run, *inputs)


def on_other_numbers(step: ModelStep, received: jax.Array) -> Callable[..., np.ndarray]:
    """Return the compiled step as a function of other numbers, which `bridge.model.operations.Operation.run` takes.

    An x that PyTorch padded beforehand must be the same number everywhere: what is too much of it is cut off.
    Of a normalization it takes none, and returns the factor of x: its result for x = 1, a mean of 0 and no bias.

    Args:
      step: one with a layer of `kernel` and `bias`, a normalization, or one without a layer.
      received: an operand that it takes, for the shape.
    """
    if step.layer is None:
        return lambda x: np.asarray(step.compiled(x.reshape(received.shape)))
    layer: Any = nnx.clone(step.layer)

    def factor() -> np.ndarray:
        layer.mean[...], layer.bias[...] = jnp.zeros_like(layer.mean[...]), jnp.zeros_like(layer.bias[...])
        y = np.asarray(run_module(layer, np.ones_like(received)))
        return y.reshape(-1, y.shape[-1])[0]

    def run(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        kernel = weight.transpose(*range(2, weight.ndim), 1, 0)
        layer.kernel[...] = jnp.asarray(kernel.reshape(layer.kernel[...].shape))
        if bias is not None:
            layer.bias[...] = jnp.asarray(bias)
        if x.ndim == received.ndim and x.size > received.size:
            x = x[tuple(map(slice, received.shape))]
        return np.asarray(run_module(layer, x.reshape(received.shape)))

    return factor if isinstance(layer, nnx.BatchNorm) else run


def parameters_of(layer: nnx.Module | None) -> LayerParameters:
    """Return the parameters of a layer in PyTorch's names and layout; none of anything else."""
    arrays: dict[str, np.ndarray] = {}
    if isinstance(layer, nnx.BatchNorm):
        names = {"weight": layer.scale, "bias": layer.bias, "running_mean": layer.mean, "running_var": layer.var}
        arrays = {name: np.asarray(value[...]) for name, value in names.items() if value is not None}
        return LayerParameters(arrays, layer.epsilon, 1 - layer.momentum)
    if isinstance(layer, (nnx.Linear, nnx.Conv, DepthwiseConv)):
        kernel = np.asarray(layer.kernel[...])
        arrays["weight"] = np.moveaxis(kernel, (-1, -2), (0, 1))
        if layer.bias is not None:
            arrays["bias"] = np.asarray(layer.bias[...])
    return LayerParameters(arrays)


#: The orders of a sum by channel: each up to a channel, ascending, the last up to their number.
ByChannel = Sequence[tuple[int, SumOrder]]


class OneProgram:
    """A whole network in PyTorch's arithmetic, as one compiled program that returns the result of every step.

    Args:
      model: in eval mode.
      orders: of the sums of its steps, by name; a step without one is computed as XLA does.
    """

    def __init__(self, model: MobileNet, orders: Mapping[str, ByChannel]) -> None:
        view = nnx.clone(model, variables=False)
        for path, module in nnx.iter_modules(view):
            if isinstance(module, (Linear, Conv, GlobalAveragePool)):
                known = orders.get(".".join(map(str, path)), ())
                module.order = known[0][1] if len(known) == 1 else None
            elif isinstance(module, BatchNorm):
                module.is_defined = True
        graph, self._state = nnx.split(view)

        def run(state: Any, images: jax.Array, received: Any, replaced: Any) -> dict[str, jax.Array]:
            values = {IMAGES: images}
            for step in steps(nnx.merge(graph, state)):
                operands = [values[name] for name in step.inputs]
                if step.name in received:
                    other = zip(replaced[step.name], received[step.name], operands)
                    operands = [jnp.where(is_replaced, theirs, ours) for is_replaced, theirs, ours in other]
                values[step.name] = _in_orders(step, orders.get(step.name, ()))(*operands)
            return values

        self._run = jax.jit(run)

    def shapes(self, images: np.ndarray) -> dict[str, tuple[int, ...]]:
        """Return the shape of the result of each step by name, and of the images."""
        found = jax.eval_shape(self._run, self._state, images, {}, {})
        return {name: value.shape for name, value in found.items()}

    def __call__(
        self,
        images: np.ndarray,
        received: Mapping[str, Sequence[np.ndarray]],
        replaced: Mapping[str, Sequence[bool]],
    ) -> dict[str, np.ndarray]:
        """Return the result of each step by name, and the images.

        Args:
          images: `(N, H, W, C)`.
          received: PyTorch's operands of a step, in the shapes of JAX's.
          replaced: which of them the step takes, instead of the results of the steps before it.
        """
        values = self._run(self._state, images, dict(received), {name: list(flags) for name, flags in replaced.items()})
        return {name: np.asarray(value) for name, value in values.items()}


def _in_orders(step: ModelStep, orders: ByChannel) -> Callable[..., jax.Array]:
    """Return a step whose layer has its order, with PyTorch's roundings, and with several orders where it has them."""
    if step.is_activation:
        return _IN_PYTORCH.get(step.run, step.run)
    if len(orders) < 2:
        return step.run
    starts = (0, *(end for end, _ in orders))

    def by_channel(x: jax.Array) -> jax.Array:
        parts = []
        for start, (end, order) in zip(starts, orders):
            if step.kind == "mean":
                pixels = x[..., start:end].reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], end - start)
                parts.append(ordered_mean(pixels, order))
                continue
            layer: Any = step.layer
            kernel, bias = layer.kernel[..., start:end], None if layer.bias is None else layer.bias[start:end]
            if isinstance(layer, Linear):
                parts.append(ordered_matmul(x, kernel, bias, order=order))
            else:
                settings = {"strides": layer.strides, "padding": layer.padding}
                dilation = layer.kernel_dilation
                parts.append(ordered_conv(x, kernel, bias, kernel_dilation=dilation, order=order, **settings))
        return jnp.concatenate(parts, -1)

    return by_channel


def logits_in_order(model: MobileNet, orders: Mapping[str, ByChannel], images: np.ndarray) -> np.ndarray | None:
    """Return the logits of a model in this arithmetic, as its user runs it; None where `Arithmetic` has not all of it.

    That is where a layer has several orders, or none, or a function has no defined roundings.
    """
    try:
        arithmetic = Arithmetic({name: known[0][1] for name, known in orders.items() if len(known) == 1})
        return np.asarray(run_module(with_arithmetic(model, arithmetic), images))
    except ValueError:
        return None


@nnx.jit
def run_module(module: Any, x: Any) -> jax.Array:
    """Run a module as one compiled program."""
    return module(x)


@functools.partial(jax.jit, static_argnums=0)
def _run_function(function: Callable[..., jax.Array], *inputs: Any) -> jax.Array:
    return function(*inputs)


def in_eval_mode(model: MobileNet) -> MobileNet:
    """Return a view of a model that uses its running statistics and drops nothing out."""
    return nnx.view(model, use_running_average=True, deterministic=True)


def steps(model: MobileNet) -> Sequence[ModelStep]:
    """Return the operations of a model in eval mode, in order; the last one gives its output.

    Raises:
      TypeError: a subclass of MobileNet that computes something else.

    >>> from jaxdw.models import mobilenet_v2
    >>> model = nnx.eval_shape(lambda: mobilenet_v2(10, rngs=nnx.Rngs(0)))
    >>> [(step.name, step.kind) for step in steps(model)][3:5]
    [('blocks.0.depthwise.conv', 'depthwise'), ('blocks.0.depthwise.norm', 'batch norm')]
    """
    if own := [name for name, known in _NETWORK.items() if getattr(type(model), name) is not known]:
        raise TypeError(
            f"`model` is a {type(model).__name__} with `{'`, `'.join(own)}` of its own, expected those of "
            "`jaxdw.models.MobileNet`: the operations of others are not known"
        )
    found = _Steps()
    found.network(model)
    return found


def walk(every: Sequence[ModelStep], images: Any, *, compiled: bool = True) -> dict[str, jax.Array]:
    """Return the result of every step by name, each fed by those before it."""
    values = {IMAGES: images}
    for step in every:
        run = step.compiled if compiled else step.run
        values[step.name] = run(*(values[name] for name in step.inputs))
    return values


class _Steps(list[ModelStep]):
    """The steps so far. Each method adds the steps of one module, and returns the name of the last."""

    def add(self, name: str, kind: str, inputs: tuple[str, ...], run: Callable[..., jax.Array], **fields: Any) -> str:
        self.append(ModelStep(name, kind, inputs, run, **fields))
        return name

    def network(self, model: MobileNet) -> None:
        last = self.unit("stem", model.stem, IMAGES)
        for i, block in enumerate(model.blocks):
            last = self.block(f"blocks.{i}", block, last)
        if model.head is not None:
            last = self.unit("head", model.head, last)
        last = self.add("mean", "mean", (last,), model.mean)
        if model.hidden is not None:
            last = self.layer("hidden", model.hidden, last)
            last = self.activation("hidden", model.architecture.activation, last)
        if model.classifier is not None:
            self.layer("classifier", model.classifier, last)

    def block(self, path: str, block: InvertedResidual, given: str) -> str:
        if _has_own_call(block, InvertedResidual):
            return self.opaque(path, block, given)
        last = given
        if block.expand is not None:
            last = self.unit(f"{path}.expand", block.expand, last)
        last = self.unit(f"{path}.depthwise", block.depthwise, last)
        if block.squeeze_excite is not None:
            last = self.squeeze_excite(f"{path}.squeeze_excite", block.squeeze_excite, last)
        last = self.unit(f"{path}.project", block.project, last)
        return self.add(f"{path}.add", "add", (given, last), _add) if block.residual else last

    def unit(self, path: str, unit: ConvNormAct, given: str) -> str:
        if _has_own_call(unit, ConvNormAct):
            return self.opaque(path, unit, given)
        last = self.layer(f"{path}.conv", unit.conv, given)
        last = self.layer(f"{path}.norm", unit.norm, last)
        return last if unit.activation is None else self.activation(path, unit.activation, last)

    def squeeze_excite(self, path: str, module: SqueezeExcite, given: str) -> str:
        if _has_own_call(module, SqueezeExcite):
            return self.opaque(path, module, given)
        last = self.add(f"{path}.mean", "mean", (given,), module.mean)
        last = self.layer(f"{path}.reduce", module.reduce, last)
        last = self.activation(f"{path}.reduce", module.activation, last)
        last = self.layer(f"{path}.expand", module.expand, last)
        last = self.activation(f"{path}.expand", module.gate, last)
        return self.add(f"{path}.multiply", "multiply", (given, last), _gate)

    def layer(self, path: str, layer: Any, given: str) -> str:
        return self.add(path, _kind(path, layer), (given,), layer, layer=layer)

    def activation(self, path: str, function: Callable[[jax.Array], jax.Array], given: str) -> str:
        kind = activation_name(function)
        name = "activation" if kind == NAMELESS else kind.removeprefix("own ").replace(" ", "_")
        return self.add(f"{path}.{name}", kind, (given,), function, is_activation=True)

    def opaque(self, path: str, module: nnx.Module, given: str) -> str:
        return self.add(path, type(module).__name__, (given,), module, layer=module, is_opaque=True)


def _kind(path: str, layer: Any) -> str:
    if isinstance(layer, DepthwiseConv):
        return "depthwise"
    if isinstance(layer, nnx.BatchNorm):
        return "batch norm"
    if isinstance(layer, nnx.Linear):
        return "pointwise" if path.endswith(".conv") else "linear"
    return "convolution"


def _has_own_call(module: nnx.Module, known: type[nnx.Module]) -> bool:
    return type(module).__call__ is not _CALLS[known]


def activation_name(function: Callable[[jax.Array], jax.Array]) -> str:
    """Return the name of an activation, which is that of PyTorch's operation where there is one.

    A function of no known library may have any name, so its name begins with "own".

    >>> import functools
    >>> [activation_name(f) for f in (nnx.swish, nnx.gelu, functools.partial(nnx.gelu, approximate=False), lambda x: x)]
    ['silu', 'gelu (tanh)', 'gelu', 'a function without a name']
    """
    if isinstance(function, functools.partial):
        exact = function.func is nnx.gelu and function.keywords == {"approximate": False} and not function.args
        return "gelu" if exact else f"own {activation_name(function.func)}"
    if function in _ACTIVATIONS:
        return _ACTIVATIONS[function]
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        return NAMELESS
    library = (getattr(function, "__module__", None) or "").partition(".")[0]
    return name if library in _LIBRARIES else f"own {name}"


#: The same functions with PyTorch's roundings.
_IN_PYTORCH: Mapping[Any, Callable[[jax.Array], jax.Array]] = {
    nnx.relu: epilogue.relu,
    nnx.hard_swish: epilogue.hard_swish,
    nnx.hard_sigmoid: epilogue.hard_sigmoid,
}


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


def _gate(x: jax.Array, gate: jax.Array) -> jax.Array:
    return x * gate[..., None, None, :]
