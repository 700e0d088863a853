"""A MobileNet of `jaxdw.models` as the list of its operations. Each can be run by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxdw.epilogue import hard_swish
from jaxdw.models import MobileNet
from jaxdw.models.blocks import ConvNormAct, InvertedResidual, SqueezeExcite
from jaxdw.nnx import DepthwiseConv

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


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


def _gate(x: jax.Array, gate: jax.Array) -> jax.Array:
    return x * gate[..., None, None, :]
