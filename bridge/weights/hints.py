"""Find causes of a mismatch in the arrays and the Flax layers, each with its fix."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import numpy as np

from bridge.weights.layouts import CONVOLUTION, MATRIX, POINTWISE
from bridge.weights.merge import in_parts
from bridge.weights.mismatch import Misfits, Shape
from bridge.weights.rules import Place
from bridge.weights.safetensors_ import octets
from bridge.weights.trees import FlaxLayer, ParameterTree

#: Names that adapters of PEFT, loralib and diffusers have.
_ADAPTER = re.compile(r"(^|[._])lora([._]|$)|(^|\.)(ia3_l|modules_to_save|base_layer)(\.|$)", re.IGNORECASE)


def hints(misfits: Misfits, weights: Mapping[str, np.ndarray], tree: ParameterTree) -> Iterator[str]:
    """Yield the causes and their fixes as sentences.

    Args:
      misfits: what does not fit.
      weights: of PyTorch, by name.
      tree: the target.
    """
    yield from _adapters(misfits)
    yield from _parts(misfits, weights)
    yield from _without_kind(misfits, tree)
    yield from _tied(misfits, weights)
    for place, shape, wanted in misfits.shapes:
        yield from _groups(place, shape, wanted, tree.layers)
        yield from _matrices(place, shape, wanted)


def _adapters(misfits: Misfits) -> Iterator[str]:
    if found := [name for name in misfits.unexpected if _ADAPTER.search(name)]:
        yield (
            f"{len(found)} tensors belong to LoRA or another adapter of PEFT, as {found[0]}, and to no layer: in "
            "PyTorch call `model.merge_and_unload()`, and convert what it returns"
        )


def _parts(misfits: Misfits, weights: Mapping[str, np.ndarray]) -> Iterator[str]:
    loose = set(misfits.unexpected)
    found = [(name, parts, how) for name, parts, how in in_parts(weights) if loose.intersection(parts)]
    if found:
        name, parts, how = found[0]
        others = f", and {len(found) - 1} more weights" if len(found) > 1 else ""
        yield (
            f"{name} is stored in parts, by {how}: {', '.join(parts)}{others}. `merge=True` (`jaxdw convert --merge`) "
            "multiplies them out as PyTorch does"
        )
    rest = [name for name in loose if re.search(r"(^|\.)parametrizations\.", name)]
    if rest and not found:
        yield (
            f"{min(rest)} is one part of a parametrization: give the live model with `merge=True`, or call "
            "`torch.nn.utils.parametrize.remove_parametrizations` where the checkpoint was made"
        )


def _without_kind(misfits: Misfits, tree: ParameterTree) -> Iterator[str]:
    found: dict[str, str] = {}
    for name in misfits.missing:
        parts = name.split(".")
        outermost = (".".join(parts[:depth]) for depth in range(len(parts)))
        if (path := next((path for path in outermost if path in tree.others), None)) is not None:
            found[path] = name
    if found:
        said = ", ".join(f"{path or 'the target'} ({tree.others[path]})" for path in [*found][:4])
        yield (
            f"rules have no kind for {said}: move the axes yourself in the dictionary of `load_weights`, and give a "
            f"rule for each parameter, as Rule(NAME_IN_PYTORCH, {next(iter(found.values()))!r}, 'array')"
        )


def _tied(misfits: Misfits, weights: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Yield arrays with two names, of which the target has one; a constant array proves nothing."""
    loose = {*misfits.unexpected, *(place.torch for place in misfits.unplaced)}
    shapes = {weights[name].shape for name in loose.intersection(weights)}
    first: dict[tuple[Shape, bytes], str] = {}
    for name, array in weights.items():
        if name not in loose and array.shape in shapes:
            first.setdefault(_identity(array), name)
    twice = {
        name: other
        for name, array in weights.items()
        if name in loose and (other := first.get(_identity(array))) and not _is_constant(array)
    }
    if twice:
        said = ", ".join(f"{name} is {other}" for name, other in [*twice.items()][:4])
        gone = ", ".join(f"weights[{name!r}]" for name in twice)
        yield (
            f"tied weights: {said}, and the target has one place for both. Leave the second name out of the "
            f"dictionary of `load_weights`: del {gone}"
        )
    embeddings: dict[Shape, str] = {}
    for name, array in weights.items():
        if array.ndim == 2 and re.search(r"(emb|wte|token).*weight$", name):
            embeddings.setdefault(array.shape[::-1], name)
    for flax, (wanted, torch) in misfits.missing.items():
        if torch and (other := embeddings.get(tuple(wanted))):
            yield (
                f"tied weights: the checkpoint may have {flax} as {other} {weights[other].shape}, once for both: "
                f"weights[{torch!r}] = weights[{other!r}] in the dictionary of `load_weights`"
            )


def _identity(array: np.ndarray) -> tuple[Shape, bytes]:
    return array.shape, hashlib.sha256(octets(array)).digest()


def _is_constant(array: np.ndarray) -> bool:
    return not array.size or not array.ndim or bool((array == array.flat[:1]).all())


def _matrices(place: Place, shape: Shape, wanted: Shape) -> Iterator[str]:
    """Yield a 1x1 convolution in one framework that is a matrix in the other."""
    path, flax = place.rule.torch, place.rule.flax
    if place.layout is MATRIX and POINTWISE.flax_shape(shape) == wanted:
        yield (
            f"{place.torch} belongs to a 1x1 convolution, and {place.flax} is a matrix: add Rule({path!r}, {flax!r}, "
            "'pointwise') to `rules`"
        )
    if place.layout is CONVOLUTION and CONVOLUTION.flax_shape((*shape, 1, 1)) == wanted:
        yield (
            f"{place.torch} is a matrix, and {place.flax} belongs to a 1x1 convolution: reshape it in the dictionary "
            f"of `load_weights`: weights[{place.torch!r}] = weights[{place.torch!r}][:, :, None, None]"
        )


def _groups(place: Place, shape: Shape, wanted: Shape, layers: Mapping[str, FlaxLayer]) -> Iterator[str]:
    """Yield another number of groups: the same taps and outputs, and other inputs per output."""
    if place.layout is not CONVOLUTION or len(shape) != len(wanted):
        return
    layer = layers.get(str(place.flax).rpartition(".")[0])
    features = getattr(layer.module, "features", 0) if layer else 0
    if shape[1] == wanted[-2] == 1 and features and shape[0] != wanted[-1] and shape[0] % features == 0:
        multiplier = shape[0] // features
        yield f"{place.torch} has {shape[0]} outputs: build DepthwiseConv with `channel_multiplier={multiplier}`"
    same = (*shape[2:], shape[0]) == (*wanted[:-2], wanted[-1])
    if not same or shape[1] == wanted[-2] or not shape[1]:
        return
    count = getattr(layer.module, "feature_group_count", None) or layer.module.features if layer else 1
    inputs = wanted[-2] * count
    if inputs % shape[1]:
        return
    groups, flax = inputs // shape[1], type(layer.module).__name__ if layer else "the target"
    fix = f"build {flax} with `feature_group_count={groups}`"
    if flax == "DepthwiseConv":
        fix = f"use nnx.Conv with `feature_group_count={groups}`"
    elif shape[1] == 1:
        fix += ", or as jaxdw.nnx.DepthwiseConv"
    kind = "a depthwise convolution" if shape[1] == 1 else "a convolution"
    yield f"{place.torch} {shape} belongs to {kind} of {groups} group(s), and the target's has {count}: {fix}"
