"""Turn Flax's trees of parameters into flat mappings by dotted path, and back: NNX modules and states, Linen variables.

This is the one file here that imports Flax. A plain dictionary needs none of it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bridge.weights.layouts import KINDS, depthwise_transpose_kind


@dataclasses.dataclass(frozen=True)
class FlaxLayer:
    """A Flax layer.

    Attributes:
      kind: among `bridge.weights.KINDS`.
      module: has the settings.
      own: the last part of its path in PyTorch where that is another one; empty for the module around it.
    """

    kind: str
    module: Any
    own: str | None = None

    def torch_path(self, path: str) -> str:
        """Return the path in PyTorch of the layer that has this path in Flax."""
        return path if self.own is None else ".".join(filter(None, (path.rpartition(".")[0], self.own)))


@dataclasses.dataclass(frozen=True)
class ParameterTree:
    """A tree of parameters, flat.

    Attributes:
      leaves: parameters and statistics by path, anything with `shape` and `dtype`. Linen's collections ("params",
        "batch_stats") are no part of a path.
      layers: NNX modules of a known kind by path; empty for a bare tree.
      others: the types of Flax's own layers of an unknown kind by path: LinearGeneral.
      bare: the paths of parameters that are in no layer, in the user's own modules; empty for a bare tree.
      in_sequence: for paths below an `nnx.Sequential` those of PyTorch, which have no `layers` in them.
      is_module: True for an NNX module, False for a bare tree.
      build: makes a tree of the same kind and structure from other values.
    """

    leaves: Mapping[str, Any]
    layers: Mapping[str, FlaxLayer]
    build: Callable[[Mapping[str, np.ndarray]], Any]
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bare: Sequence[str] = ()
    in_sequence: Mapping[str, str] = dataclasses.field(default_factory=dict)
    is_module: bool = False

    @classmethod
    def of(cls, target: Any) -> ParameterTree:
        """Return the tree of an `nnx.Module`, an `nnx.State`, Linen variables or a nested dictionary.

        Raises:
          TypeError: something else.
          ValueError: two leaves with one path.
        """
        if "flax.nnx" in sys.modules:
            from flax import nnx

            if isinstance(target, nnx.Module):
                return cls._of_module(target)
            if isinstance(target, nnx.State):
                return cls._of_state(target)
        if not isinstance(target, Mapping):
            raise TypeError(
                f"`target` is a {type(target).__name__}, expected an nnx.Module, an nnx.State, Linen variables or a "
                "nested dictionary of arrays"
            )
        paths = dict(_nested(target))
        names = {path: _dotted(path[1:] if path[0] in _collections(target) else path) for path in paths}
        _check_distinct(names)

        def build(values: Mapping[str, np.ndarray]) -> dict[Any, Any]:
            root: dict[Any, Any] = {}
            for path, name in names.items():
                node = root
                for key in path[:-1]:
                    node = node.setdefault(key, {})
                node[path[-1]] = values[name]
            return root

        return cls({name: paths[path] for path, name in names.items()}, {}, build)

    @classmethod
    def _of_module(cls, module: Any) -> ParameterTree:
        from flax import nnx

        from jaxdw.nnx import CausalConv1d, DepthwiseConv, DepthwiseConvTranspose

        kinds = {
            (nnx.Conv, DepthwiseConv, CausalConv1d): "conv",
            (nnx.Linear,): "linear",
            (nnx.BatchNorm,): "batch_norm",
            (nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm): "norm",
            (nnx.Embed,): "embedding",
        }
        layers: dict[str, FlaxLayer] = {}
        others, sequences = {}, set()
        for path, part in ((_dotted(path), part) for path, part in nnx.iter_modules(module)):
            kind = next((kind for types, kind in kinds.items() if isinstance(part, types)), None)
            if isinstance(part, DepthwiseConvTranspose):
                kind = depthwise_transpose_kind(part.channel_multiplier, not part.transpose_kernel)
            if isinstance(part, nnx.ConvTranspose):
                kind = "conv_transpose" if part.transpose_kernel else "conv_transpose:flipped"
            if isinstance(part, nnx.MultiHeadAttention):
                layers |= _projections(path, part)
                continue
            if path in layers:
                continue
            if kind:
                layers[path] = FlaxLayer(kind, part)
            elif isinstance(part, nnx.Sequential):
                sequences.add(path)
            elif not isinstance(part, (nnx.List, nnx.Dict)) and _is_flax(type(part)):
                others[path] = type(part).__name__
        tree = cls._of_state(nnx.state(module))
        bare = [name for name in tree.leaves if not _belongs(name, layers, others)]
        short = dict(_in_sequence([*layers, *bare], sequences))
        return dataclasses.replace(tree, layers=layers, others=others, bare=bare, in_sequence=short, is_module=True)

    @classmethod
    def _of_state(cls, state: Any) -> ParameterTree:
        from flax import nnx

        variables = {path: v for path, v in nnx.to_flat_state(state) if not isinstance(v, nnx.RngState)}
        names = {path: _dotted(path) for path in variables}
        _check_distinct(names)

        def build(values: Mapping[str, np.ndarray]) -> Any:
            return nnx.from_flat_state(
                [(path, variables[path].replace(_on_device(name, values[name]))) for path, name in names.items()]
            )

        return cls({name: variables[path].get_value() for path, name in names.items()}, {}, build)


def _projections(path: str, attention: Any) -> dict[str, FlaxLayer]:
    """Return the four projections of an `nnx.MultiHeadAttention`, as `nn.MultiheadAttention` has them."""
    head, heads = f"{path}." if path else "", attention.num_heads
    found = {f"{head}out": FlaxLayer(f"from_heads:{heads}", attention.out, "out_proj")}
    for k, name in enumerate(("query", "key", "value")):
        layer = getattr(attention, name)
        found[f"{head}{name}"] = FlaxLayer(f"in_projection:{heads}[{k}/3]", layer, "")
    return found


def empty_model(model: str, library: str, **options: Any) -> Any:
    """Return a network of `jaxdw.models` that has shapes and no values."""
    from flax import nnx

    import jaxdw.models

    make = getattr(jaxdw.models, model)
    return nnx.eval_shape(lambda: make(like=library, rngs=nnx.Rngs(0), **options))


def nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return nested dictionaries from dotted paths.

    >>> nested({"blocks.0.kernel": 1, "blocks.0.bias": 2})
    {'blocks': {'0': {'kernel': 1, 'bias': 2}}}
    """
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = root
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def _on_device(name: str, value: np.ndarray) -> Any:
    """Return a JAX array of the same bytes; JAX would narrow 64 bits silently where they are not enabled."""
    import jax
    import jax.numpy as jnp

    kept = jax.dtypes.canonicalize_dtype(value.dtype)
    if kept != value.dtype:
        raise ValueError(
            f"{name} is {value.dtype}, which JAX narrows to {kept} here: enable `jax_enable_x64`, convert the weights "
            f"yourself, or give a dictionary as the target (`nnx.to_pure_dict(nnx.state(model))`) to get NumPy arrays"
        )
    return jnp.asarray(value)


def _in_sequence(paths: Iterable[str], sequences: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield each path below an `nnx.Sequential`, and the same path without the sequence's `layers`."""
    for path in paths:
        parts = path.split(".")
        short = [p for i, p in enumerate(parts) if p != "layers" or ".".join(parts[:i]) not in sequences]
        if len(short) < len(parts):
            yield path, ".".join(short)


def _is_flax(kind: type) -> bool:
    return any(base.__module__.startswith("flax.nnx.nn.") for base in kind.__mro__)


def _belongs(name: str, layers: Mapping[str, FlaxLayer], others: Mapping[str, str]) -> bool:
    """Return True for a parameter that its layer's kind moves, or one of a layer of unknown kind."""
    path, _, leaf = name.rpartition(".")
    if path in layers:
        return leaf in {entry[0] for entry in KINDS[layers[path].kind].values() if entry is not None}
    return path in others


def _collections(variables: Mapping[Any, Any]) -> tuple[Any, ...]:
    """Return Linen's collections at the top of its variables; none in another tree."""
    return tuple(variables) if "params" in variables and all(map(_is_dict, variables.values())) else ()


def _nested(tree: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in tree.items():
        if _is_dict(value):
            yield from _nested(value, (*path, key))
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            yield (*path, key), value
        else:
            raise TypeError(f"`target` holds a {type(value).__name__} at {_dotted((*path, key))!r}, expected arrays")


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _check_distinct(names: Mapping[tuple[Any, ...], str]) -> None:
    first: dict[str, tuple[Any, ...]] = {}
    for path, name in names.items():
        if name in first:
            raise ValueError(f"`target` has two leaves at {name!r}: {first[name]} and {path}")
        first[name] = path
