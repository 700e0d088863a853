"""Multiply out weights that a checkpoint holds in parts, as PyTorch does before it uses them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: How the parts of one weight are named, `{}` is the weight's own name, and the function that joins them in this order:
#: 1. weight normalization, as a hook and as a parametrization; 2. spectral normalization, the same; 3. pruning.
_PARTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("{}_g", "{}_v"), "weight norm"),
    (("parametrizations.{}.original0", "parametrizations.{}.original1"), "weight norm"),
    (("{}_orig", "{}_u", "{}_v"), "spectral norm"),
    (("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"), "spectral norm"),
    (("{}_orig", "{}_mask"), "pruning"),
)


def in_parts(names: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield the weights that are there in parts: name, names of the parts in order, and the method.

    >>> list(in_parts({"conv.weight_g": 1, "conv.weight_v": 2, "conv.bias": 3}))
    [('conv.weight', ('conv.weight_g', 'conv.weight_v'), 'weight norm')]
    """
    for first in names:
        for patterns, method in _PARTS:
            found = re.fullmatch(r"(.*\.|)" + re.escape(patterns[0]).replace(r"\{\}", r"(\w+?)"), first)
            if found is None:
                continue
            path, own = found.groups()
            parts = tuple(path + pattern.format(own) for pattern in patterns)
            if all(part in names for part in parts) and path + own not in names:
                yield path + own, parts, method
                break


def merged(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the parts of each weight by the weight, bit for bit as PyTorch computes it."""
    whole = {parts: (name, method) for name, parts, method in in_parts(tensors)}
    by_first = {parts[0]: parts for parts in whole}
    rest = {part for parts in whole for part in parts}
    result = {}
    for name, tensor in tensors.items():
        if name in by_first:
            parts = by_first[name]
            own, method = whole[parts]
            result[own] = _JOINED[method](*(tensors[part] for part in parts))
        elif name not in rest:
            result[name] = tensor
    return result


def live_state(module: Any) -> dict[str, Any]:
    """Return the state of a live model with every parametrized tensor evaluated, as the model in eval mode has it."""
    import torch

    state = dict(module.state_dict())
    for path, layer in module.named_modules():
        own = getattr(layer, "parametrizations", None)
        if not isinstance(own, torch.nn.ModuleDict):
            continue
        head = f"{path}." if path else ""
        training = [each for each in layer.modules() if each.training]
        layer.eval()
        try:
            with torch.no_grad():
                values = {f"{head}{name}": getattr(layer, name) for name in own}
        finally:
            for each in training:
                each.training = True
        for name in [name for name in state if name.startswith(f"{head}parametrizations.")]:
            del state[name]
        state |= values
    return state


def _weight_norm(g: Any, v: Any) -> Any:
    import torch

    own = [axis for axis, size in enumerate(g.shape) if size != 1]
    return torch._weight_norm(v, g, own[0] if own else 0 if g.ndim else -1)


def _spectral_norm(weight: Any, u: Any, v: Any) -> Any:
    matrix = weight if weight.shape[0] == len(u) else weight.transpose(0, 1)
    return weight / u.dot(matrix.flatten(1).mv(v))


_JOINED: Mapping[str, Callable[..., Any]] = {
    "weight norm": _weight_norm,
    "spectral norm": _spectral_norm,
    "pruning": lambda weight, mask: weight * mask,
}
