"""Compare what no checkpoint holds: eps, momentum, stride, padding, dilation and groups of a live model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bridge.weights.names import plain_names, without_wrappers
from bridge.weights.rules import RuleBook
from bridge.weights.trees import FlaxLayer
from jaxdw.conv_transpose import transposed_padding
from jaxdw.geometry import Geometry, spatial_tuple

#: Paddings of PyTorch by the name that `Geometry` has for them; Flax has no "replicate".
_MODES = {"zeros": "zeros", "reflect": "reflect", "circular": "circular"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """One setting that differs.

    Attributes:
      said: the layer's path, its setting and the target's.
      flax: the type of the target's layer.
      fix: the arguments to build the target with.
    """

    said: str
    flax: str
    fix: str


def live_layers(source: Any, prefix: str | None) -> dict[str, Any]:
    """Return the convolutions and normalizations of a live model, by the name of a parameter that each has."""
    if not callable(getattr(source, "named_modules", None)):
        return {}
    found: dict[str, Any] = dict.fromkeys(map(without_wrappers, source.state_dict()))
    for path, layer in source.named_modules():
        if hasattr(layer, "eps") or hasattr(layer, "groups"):
            leaf = "running_var" if getattr(layer, "weight", None) is None else "weight"
            found[without_wrappers(f"{path}.{leaf}".lstrip("."))] = layer
        elif hasattr(layer, "num_heads") and getattr(layer, "in_proj_weight", None) is not None:
            found[without_wrappers(f"{path}.in_proj_weight".lstrip("."))] = layer
    return {name: layer for name, layer in plain_names(found, prefix).items() if layer is not None}


def differences(
    live: Mapping[str, Any], layers: Mapping[str, FlaxLayer], book: RuleBook, *, padded_before: bool
) -> Iterator[Difference]:
    """Yield the settings of a live model that are not those of the Flax layer that takes the weights.

    Args:
      live: layers, as `live_layers` returns them.
      layers: of the target.
      book: the rules.
      padded_before: True where a convolution that pads nothing may get an input that the model padded.
    """
    for name, theirs in live.items():
        path = name.rpartition(".")[0] or "the layer"
        for place in book.from_torch(name) or book.from_torch(f"{name}[0/3]"):
            layer = layers.get((place.flax or "").rpartition(".")[0])
            if layer is None:
                continue
            ours = layer.module
            if hasattr(theirs, "num_heads"):
                found = _heads_differences(theirs, ours)
            elif not hasattr(theirs, "groups"):
                found = _norm_differences(theirs, ours)
            elif place.rule.kind == "pointwise":
                found = _matrix_differences(theirs)
            else:
                found = _conv_differences(theirs, ours, padded_before)
            for said, fix in found:
                yield Difference(f"{path} has {said}", type(ours).__name__, fix)


def _heads_differences(theirs: Any, ours: Any) -> Iterator[tuple[str, str]]:
    heads = ours.out_features[0]
    if theirs.num_heads != heads:
        yield f"{theirs.num_heads} heads, the target's is {heads}", f"num_heads={theirs.num_heads}"


def _norm_differences(theirs: Any, ours: Any) -> Iterator[tuple[str, str]]:
    """Compare eps, groups and momentum.

    Flax's momentum weighs the old statistics, PyTorch's the new: one is 1 minus the other, but for its rounding.
    """
    eps, epsilon = theirs.eps, getattr(ours, "epsilon", None)
    if eps is None and theirs.weight is not None:  # an RMSNorm takes that of the dtype
        eps = float(ml_dtypes.finfo(str(theirs.weight.dtype).removeprefix("torch.")).eps)
    if isinstance(eps, (int, float)) and epsilon is not None and eps != epsilon:
        yield f"eps {eps}, the target's epsilon is {epsilon}", f"epsilon={eps}"
    groups, num_groups = getattr(theirs, "num_groups", None), getattr(ours, "num_groups", None)
    if groups is not None and num_groups is not None and groups != num_groups:
        yield f"num_groups {groups}, the target's is {num_groups}", f"num_groups={groups}"
    if not hasattr(theirs, "momentum") or getattr(ours, "momentum", None) is None:
        return
    if theirs.momentum is None:
        yield "momentum None (a cumulative average), which Flax lacks", "the running average of another training"
    elif abs(ours.momentum - (1 - theirs.momentum)) > np.finfo(float).eps:
        wanted = f"momentum={_one_minus(theirs.momentum)} (Flax's is 1 minus PyTorch's)"
        yield f"momentum {theirs.momentum}, the target's is {ours.momentum}, not 1 minus it", wanted


def _one_minus(momentum: float) -> str:
    """Return the shortest decimal that counts as 1 minus a momentum."""
    texts = (f"{1 - momentum:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if abs(float(text) - (1 - momentum)) <= np.finfo(float).eps)


def _conv_differences(theirs: Any, ours: Any, padded_before: bool) -> Iterator[tuple[str, str]]:
    is_dense_transpose = hasattr(ours, "transpose_kernel") and not hasattr(ours, "output_padding")
    if getattr(theirs, "transposed", False) != (hasattr(ours, "output_padding") or is_dense_transpose):
        kind = "a transposed convolution" if getattr(theirs, "transposed", False) else "a convolution"
        yield f"{kind}, the target a {type(ours).__name__}", f"{kind} in its place"
        return
    if hasattr(ours, "output_padding"):
        yield from _transpose_differences(theirs, ours)
    elif hasattr(ours, "initial_state"):
        yield from _causal_differences(theirs)
    if hasattr(ours, "output_padding") or not hasattr(ours, "strides"):
        return
    rank = len(theirs.kernel_size)
    names = {"stride": "strides", "dilation": "kernel_dilation"}
    for torch_name, name in names.items():
        wanted, given = tuple(getattr(theirs, torch_name)), _per_axis(name, getattr(ours, name), rank)
        if wanted != given:
            yield f"{torch_name} {wanted}, the target has {name} {given}", f"{name}={wanted}"
    if is_dense_transpose:
        return  # its padding has another meaning, and groups are in the shape
    if (given := _per_axis("input_dilation", ours.input_dilation, rank)) != (1,) * rank:
        yield f"no input dilation, the target's input_dilation is {given}", "input_dilation=1"
    groups = getattr(ours, "feature_group_count", None) or ours.features
    if theirs.groups != groups and hasattr(ours, "feature_group_count"):
        yield f"groups {theirs.groups}, the target's is {groups}", f"feature_group_count={theirs.groups}"
    if not _pads_itself(theirs):
        return
    wanted, mode = _padding(theirs), _MODES.get(theirs.padding_mode)
    if padded_before and not any(map(any, wanted)):
        return
    if mode is None:
        yield f"padding_mode {theirs.padding_mode!r}, which Flax lacks", "padding=0, after `jnp.pad(x, ..., 'edge')`"
    elif unlike := _other_size(theirs, ours, wanted, mode):
        size, pads = unlike
        said = f"padding {_compact(wanted)}{_with_mode(mode)}, the target's padding is {ours.padding!r}"
        said += f", which is {pads} at {size} positions" if isinstance(ours.padding, str) else ""
        yield said, f"padding={_as_argument(wanted, mode)}"


def _transpose_differences(theirs: Any, ours: Any) -> Iterator[tuple[str, str]]:
    """Compare the settings of two transposed depthwise layers, whose numbers mean the same."""
    rank = len(theirs.kernel_size)
    names = {"stride": "strides", "dilation": "kernel_dilation", "output_padding": "output_padding"}
    for torch_name, name in names.items():
        wanted, given = tuple(getattr(theirs, torch_name)), _per_axis(name, getattr(ours, name), rank, 0)
        if wanted != given:
            yield f"{torch_name} {wanted}, the target has {name} {given}", f"{name}={wanted}"
    if theirs.groups != ours.features:
        yield f"groups {theirs.groups}, the target's features are {ours.features}", f"features={theirs.groups}"
    wanted = tuple(theirs.padding)

    def padded(padding: Any) -> Any:
        return transposed_padding(theirs.kernel_size, tuple(theirs.stride), padding, 0, tuple(theirs.dilation))

    if _pads_itself(theirs) and (ours.padding == "CIRCULAR" or padded(ours.padding) != padded(wanted)):
        yield f"padding {wanted}, the target's padding is {ours.padding!r}", f"padding={wanted}"


def _causal_differences(theirs: Any) -> Iterator[tuple[str, str]]:
    """Compare with a causal convolution: stride and dilation are 1, and the padding is none, or all at the front."""
    for name in ("stride", "dilation"):
        if (value := tuple(getattr(theirs, name))) != (1,):
            yield f"{name} {value}, and a causal convolution has 1", "a DepthwiseConv in its place"
    taps = theirs.kernel_size[0]
    if _pads_itself(theirs) and (theirs.padding not in ((0,), (taps - 1,)) or theirs.padding_mode != "zeros"):
        said = f"padding {theirs.padding}{_with_mode(theirs.padding_mode)}"
        yield f"{said}, and a causal convolution has {taps - 1} zeros before the start", "a DepthwiseConv in its place"


def _other_size(theirs: Any, ours: Any, wanted: tuple[tuple[int, int], ...], mode: str) -> tuple[int, str] | None:
    """Return a size of an input at which the target pads otherwise, and that padding; None for no such size.

    "SAME" depends on the size where there is a stride.
    """
    rank, steps = len(wanted), tuple(theirs.stride)
    extent = max((k - 1) * d + 1 for k, d in zip(theirs.kernel_size, theirs.dilation))
    for size in range(extent, extent + 2 * max(steps) + 1):
        g = Geometry.of(
            (1, *(size,) * rank, 1),
            (*theirs.kernel_size, 1, 1),
            strides=steps,
            padding=ours.padding,
            kernel_dilation=tuple(theirs.dilation),
        )
        pads = mode != "zeros" or g.padding_mode != "zeros"
        if g.padding != wanted or (pads and g.padding_mode != mode and any(map(any, wanted))):
            return size, f"{_compact(g.padding)}{_with_mode(g.padding_mode)}"
    return None


def _matrix_differences(theirs: Any) -> Iterator[tuple[str, str]]:
    """Compare with a matrix, which is a 1x1 convolution of stride 1 without padding."""
    for name, plain in {"stride": 1, "groups": 1}.items():
        value = np.atleast_1d(getattr(theirs, name))
        if (value != plain).any():
            yield f"{name} {getattr(theirs, name)}, and the target is a matrix", "a convolution in its place"
    if _pads_itself(theirs) and any(map(any, _padding(theirs))):
        yield f"padding {theirs.padding}, and the target is a matrix", "a convolution in its place"


def _padding(theirs: Any) -> tuple[tuple[int, int], ...]:
    """Return (low, high) per axis of a convolution of PyTorch."""
    if theirs.padding == "valid":
        return ((0, 0),) * len(theirs.kernel_size)
    if theirs.padding == "same":
        totals = [(k - 1) * d for k, d in zip(theirs.kernel_size, theirs.dilation)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in theirs.padding)


def _pads_itself(theirs: Any) -> bool:
    """Return True where the layer pads by its settings, and not by code of a subclass."""
    own = [getattr(type(theirs), name, None) for name in ("forward", "_conv_forward")]
    return all(getattr(each, "__module__", "").startswith("torch.nn.") for each in own)


def _per_axis(name: str, value: Any, rank: int, smallest: int = 1) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * rank
    return spatial_tuple(name, value, smallest)


def _compact(pads: tuple[tuple[int, int], ...]) -> str:
    return str(tuple(low for low, _ in pads) if all(low == high for low, high in pads) else pads)


def _with_mode(mode: str) -> str:
    return "" if mode == "zeros" else f" ({mode})"


def _as_argument(pads: tuple[tuple[int, int], ...], mode: str) -> str:
    if mode != "zeros":
        return f"{mode.upper()!r}" if mode == "circular" or mode == "reflect" else _compact(pads)
    return _compact(pads)
