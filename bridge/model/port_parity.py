"""port_parity: any PyTorch module and a JAX model with the same weights, operation by operation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge.model.alignment import Alignment, Region, layer_of, parameter_names
from bridge.model.jax_side import program_of
from bridge.model.jaxprs import Part
from bridge.model.parity import LayerParity, Logits, ModelParity, Track, relative
from bridge.model.ports import judged
from bridge.weights.manifest import WeightsManifest

_log = logging.getLogger("bridge")


def port_parity(
    module: Any,
    model: Any,
    inputs: Any,
    manifest: WeightsManifest | None = None,
    *,
    name: str = "",
    track: Track = iter,
) -> ModelParity:
    """Compare every operation of a PyTorch module with its port to JAX, in eval mode and float32.

    The arguments and results are those of `bridge.model_parity`.
    """
    from bridge.model.graph_capture import graph

    ours_given, theirs_given = _both(inputs)
    _log.info("%s: running it in PyTorch", name)
    theirs = graph(module, theirs_given)
    program = program_of(model, ours_given)
    moved = None if manifest is None else [(each.torch.name, each.flax.name) for each in manifest.moved]
    alignment = Alignment(
        program, theirs, parameter_names(program, theirs, moved), dict(zip(program.inputs, ours_given))
    )
    running = _Running(alignment)
    layers: list[LayerParity] = []
    for region in track(alignment.regions()):
        row = judged(alignment, region)
        grown, amplification = running.follow(region)
        if row is not None:
            shape = tuple(program.avals[region.part.output].shape)
            layers.append(
                LayerParity(row.name, row.torch, row.kind, shape, row.isolated, row.reason, grown, amplification)
            )
    left = [
        layer_of(call, alignment.names_of_values)
        for place, call in enumerate(theirs.calls)
        if place not in alignment.seen and alignment.is_core(call)
    ]
    whole = Part(tuple(program.equations), (*program.inputs, *program.constants), program.outputs[0])
    ours = np.asarray(whole.run(*ours_given, *program.constants.values()))
    result = theirs.values[theirs.outputs[0]]
    pair = _as_one(ours, result)
    logits = Logits.of(*(y.reshape(-1, y.shape[-1] if y.ndim else 1) for y in pair))  # a number is one logit
    return ModelParity(name, np.shape(ours_given[0]), layers, left, logits)


def _as_one(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both outputs in JAX's layout; PyTorch's as it is where the shapes do not say how."""
    if ours.shape != theirs.shape and theirs.ndim > 2 and np.moveaxis(theirs, 1, -1).shape == ours.shape:
        theirs = np.moveaxis(theirs, 1, -1)
    if ours.size != theirs.size:
        raise ValueError(f"`model` gives an output of shape {ours.shape}, and PyTorch one of {theirs.shape}")
    return ours, theirs.reshape(ours.shape)


def _both(inputs: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the inputs of JAX and of PyTorch: images are channels last for JAX and channels first for PyTorch."""
    if isinstance(inputs, Mapping):
        if set(inputs) != {"jax", "torch"}:
            raise ValueError(f"`inputs` has the keys {sorted(inputs)}, expected 'jax' and 'torch'")
        ours, theirs = (_listed(inputs[key]) for key in ("jax", "torch"))
        if len(ours) != len(theirs):
            raise ValueError(f"`inputs` has {len(ours)} arrays for JAX and {len(theirs)} for PyTorch, expected as many")
        return ours, theirs
    ours = _listed(inputs)
    return ours, [np.moveaxis(x, -1, 1) if x.ndim == 4 and x.dtype.kind == "f" else x for x in ours]


def _listed(inputs: Any) -> list[np.ndarray]:
    given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    for x in given:
        if not isinstance(x, np.ndarray) or not x.size or x.dtype not in (np.float32, np.int32, np.int64, np.bool_):
            said = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise ValueError(
                f"`inputs` has a {said}, expected NumPy arrays of float32, int32, int64 or bool that are not empty"
            )
    return given


class _Running:
    """JAX's own run, region after region, and how far it is from PyTorch's."""

    def __init__(self, alignment: Alignment) -> None:
        self._alignment = alignment
        self._values: dict[int, Any] = {}
        self._growth: dict[int, float] = {}

    def follow(self, region: Region) -> tuple[float | None, float | None]:
        """Run a region on JAX's own values; return growth and amplification."""
        part, program = region.part, self._alignment.program
        given = []
        for n in part.inputs:
            if n in program.constants:
                given.append(program.constants[n])
            else:
                given.append(self._values.get(n, self._alignment.inputs.get(n)))
        if any(each is None for each in given):
            return None, None
        if part.equations:
            self._values[part.output] = part.run(*given)
        elif part.output not in self._values:
            self._values[part.output] = given[0]
        theirs = self._alignment.graph.values[region.tie.number]
        ours = np.asarray(self._values[part.output])
        grown = relative(ours, region.tie.layout.to_jax(theirs)) if ours.size == theirs.size else None
        before = max((self._growth.get(n, 0.0) for n in part.inputs), default=0.0)
        if grown is not None:
            self._growth[part.output] = grown
        return grown, grown / before if grown is not None and before > 0 else None
