"""The JAX model of a comparison as a function of its parameters: NNX, Linen, Haiku, a function, a callable tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bridge.model.jaxprs import arrays_in, key_name, paths_as_scopes


class JaxModel(NamedTuple):
    """A model as a function.

    Attributes:
      function: takes the parameters by path, then the inputs by position and by keyword.
      parameters: by path.
      settings: of each module by path, what a result may not show: the "momentum" of a batch normalization, which is
        the weight of the new statistics.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, float]] = {}


def jax_model(model: Any, training: bool = False) -> JaxModel:
    """Return a model as a function: an `nnx.Module` in eval mode or in training mode, any other as it is.

    Args:
      model: an `nnx.Module`; a pair of a Linen module and its variables, of what `haiku.transform` returns and its
        parameters, or of a function and its parameters (any nested containers of arrays), called as
        `function(parameters, *inputs)`; or a callable pytree, as Equinox's.

    Raises:
      TypeError: anything else.
    """
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(model, nnx.Module):
            return _of_nnx(model, training)
    if isinstance(model, tuple) and len(model) == 2:
        first, second = model
        if hasattr(first, "apply") and isinstance(second, Mapping):
            return _of_apply(first, second)
        if callable(first):
            return _of_tree(first, second)
    if callable(model) and any(map(_is_array, jax.tree.leaves(model))):
        return _of_tree(lambda tree, *args, **kwargs: tree(*args, **kwargs), model)
    raise TypeError(
        f"`model` is a {type(model).__name__}, expected an nnx.Module, (linen_module, variables), "
        "(function, parameters), or a callable tree of arrays"
    )


def with_gradients(made: JaxModel, results: Sequence[int], incoming: int, paths: Sequence[str]) -> JaxModel:
    """Return the function of incoming gradients and the inputs that gives results, then gradients of parameters.

    Args:
      made: the model.
      results: which of its results; those in floating point have an incoming gradient each, of which there are
        `incoming`.
      paths: of the parameters.
    """

    def function(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> list[Any]:
        def forward(own: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
            every = [value for _, value in arrays_in(made.function({**values, **own}, *args[incoming:], **kwargs))]
            chosen = [jnp.asarray(every[i]) for i in results]
            return [y for y in chosen if jnp.issubdtype(y.dtype, jnp.floating)], chosen

        _, back, chosen = jax.vjp(forward, {path: values[path] for path in paths}, has_aux=True)
        (gradients,) = back(list(args[:incoming]))
        return [*chosen, *(gradients[path] for path in paths)]

    return JaxModel(function, made.parameters, made.settings)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _of_apply(first: Any, variables: Mapping[str, Any]) -> JaxModel:
    """Return a Linen module, or what Haiku made: `transform` takes a random key, `without_apply_rng` takes none."""
    if type(first).__module__.startswith("haiku") and "without_apply_rng" not in first.apply.__qualname__:
        return _of_tree(lambda tree, *args, **kwargs: first.apply(tree, None, *args, **kwargs), variables)
    is_linen = "flax.linen" in sys.modules and isinstance(first, sys.modules["flax.linen"].Module)
    return _of_tree(lambda tree, *args, **kwargs: first.apply(tree, *args, **kwargs), variables, linen=is_linen)


def _of_nnx(model: Any, training: bool) -> JaxModel:
    from flax import nnx

    is_fixed = not training
    view = nnx.view(model, use_running_average=is_fixed, deterministic=is_fixed, raise_if_not_found=False)
    graph, state = nnx.split(view)
    flat = dict(nnx.to_flat_state(state))
    names = {".".join(map(str, path)): path for path, v in flat.items() if not isinstance(v, nnx.RngState)}
    parameters = {name: flat[path].get_value() for name, path in names.items()}

    def function(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = {path: flat[path].replace(values[name]) for name, path in names.items()}
        merged = nnx.merge(graph, nnx.from_flat_state(list((flat | own).items())))
        modules = {id(part): ".".join(map(str, path)) for path, part in nnx.iter_modules(merged)}
        kinds = [kind for _, part in nnx.iter_modules(merged) for kind in type(part).__mro__]
        with paths_as_scopes(modules, kinds):
            return merged(*args, **kwargs)

    settings = {
        ".".join(map(str, path)): {"momentum": 1 - float(part.momentum)}
        for path, part in nnx.iter_modules(view)
        if isinstance(part, nnx.BatchNorm)
    }
    return JaxModel(function, parameters, settings)


def _of_tree(function: Callable[..., Any], tree: Any, linen: bool = False) -> JaxModel:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = {}
    for number, (path, leaf) in enumerate(leaves):
        parts = [key_name(key) for key in path]
        if _is_array(leaf):
            names[".".join(parts[1:] if linen and len(parts) > 1 else parts)] = number

    def call(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        own = [leaf for _, leaf in leaves]
        for name, number in names.items():
            own[number] = values[name]
        return function(jax.tree_util.tree_unflatten(structure, own), *args, **kwargs)

    return JaxModel(call, {name: leaves[number][1] for name, number in names.items()})
