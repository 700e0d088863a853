"""The JAX model of a comparison as equations: NNX, Linen, a function and its parameters, a callable tree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bridge.model.jaxprs import Program, paths_as_scopes, read


def program_of(model: Any, inputs: Sequence[np.ndarray]) -> Program:
    """Return the equations of a model in eval mode.

    Args:
      model: an `nnx.Module`; a pair of a Linen module and its variables, or of a function and its parameters (any
        nested containers of arrays), called as `function(parameters, *inputs)`; or a callable pytree, as Equinox's.
      inputs: arrays in JAX's layout.

    Raises:
      TypeError: anything else.
    """
    if "flax.nnx" in sys.modules:
        from flax import nnx

        if isinstance(model, nnx.Module):
            return _of_nnx(model, inputs)
    if isinstance(model, tuple) and len(model) == 2:
        first, second = model
        if hasattr(first, "apply") and isinstance(second, Mapping):
            return _of_tree(lambda variables, *given: first.apply(variables, *given), second, inputs, linen=True)
        if callable(first):
            return _of_tree(first, second, inputs)
    if callable(model) and any(map(_is_array, jax.tree.leaves(model))):
        return _of_tree(lambda tree, *given: tree(*given), model, inputs)
    raise TypeError(
        f"`model` is a {type(model).__name__}, expected an nnx.Module, (linen_module, variables), "
        "(function, parameters), or a callable tree of arrays"
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _of_nnx(model: Any, inputs: Sequence[np.ndarray]) -> Program:
    from flax import nnx

    graph, state = nnx.split(nnx.view(model, use_running_average=True, deterministic=True, raise_if_not_found=False))
    flat = dict(nnx.to_flat_state(state))
    names = {".".join(map(str, path)): path for path, v in flat.items() if not isinstance(v, nnx.RngState)}
    parameters = {name: flat[path].get_value() for name, path in names.items()}

    def function(values: Mapping[str, Any], *given: Any) -> Any:
        own = {path: flat[path].replace(values[name]) for name, path in names.items()}
        merged = nnx.merge(graph, nnx.from_flat_state(list((flat | own).items())))
        modules = {id(part): ".".join(map(str, path)) for path, part in nnx.iter_modules(merged)}
        kinds = [kind for _, part in nnx.iter_modules(merged) for kind in type(part).__mro__]
        with paths_as_scopes(modules, kinds):
            return merged(*given)

    return read(function, parameters, inputs)


def _of_tree(function: Callable[..., Any], tree: Any, inputs: Sequence[np.ndarray], linen: bool = False) -> Program:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = {}
    for number, (path, leaf) in enumerate(leaves):
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if _is_array(leaf):
            names[".".join(parts[1:] if linen and len(parts) > 1 else parts)] = number

    def call(values: Mapping[str, Any], *given: Any) -> Any:
        own = [leaf for _, leaf in leaves]
        for name, number in names.items():
            own[number] = values[name]
        return function(jax.tree_util.tree_unflatten(structure, own), *given)

    return read(call, {name: leaves[number][1] for name, number in names.items()}, inputs)
