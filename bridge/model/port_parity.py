"""port_parity: any PyTorch module and a JAX model with the same weights, operation by operation."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from bridge.model.alignment import Alignment, Region, layer_of, parameter_names
from bridge.model.jax_side import jax_model
from bridge.model.jaxprs import Part, Program, read
from bridge.model.model_inputs import ModelInputs, both
from bridge.model.parity import LayerParity, Logits, ModelParity, Track, relative
from bridge.model.ports import judged
from bridge.model.results import paired
from bridge.model.torch_graph import TorchGraph
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

    given, theirs_given = both(inputs)
    made = jax_model(model)
    _log.info("%s: running it in PyTorch", name)
    theirs = graph(module, theirs_given)
    program = read(made.function, made.parameters, given)
    pairs = paired(program.results, theirs.results)
    outputs = [program.outputs[i] for i, _ in pairs]
    program = dataclasses.replace(program, outputs=outputs, settings=made.settings)
    theirs = dataclasses.replace(theirs, outputs=[theirs.outputs[i] for _, i in pairs])
    moved = None if manifest is None else [(each.torch.name, each.flax.name) for each in manifest.moved]
    alignment = Alignment(
        program, theirs, parameter_names(program, theirs, moved), dict(zip(program.inputs, given.arrays))
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
        if place in alignment.needed and place not in alignment.seen and alignment.is_core(call)
    ]
    return ModelParity(name, np.shape(given.arrays[0]), layers, left, _logits(program, theirs, given))


def _logits(program: Program, theirs: TorchGraph, given: ModelInputs) -> Logits | None:
    """Return the first results compared, as JAX's user runs it; None where they are no numbers, or their sizes differ.

    A wrong size has a row of its own.
    """
    whole = Part(tuple(program.equations), (*program.inputs, *program.constants), program.outputs[0])
    ours, result = whole.run(*given.arrays, *program.constants.values()), theirs.values[theirs.outputs[0]]
    if ours.shape != result.shape and result.ndim > 2 and np.moveaxis(result, 1, -1).shape == ours.shape:
        result = np.moveaxis(result, 1, -1)
    if ours.size != result.size or not ours.size or {ours.dtype.kind, result.dtype.kind} != {"f"}:
        return None
    return Logits.of(*(y.reshape(-1, ours.shape[-1] if ours.ndim else 1) for y in (ours, result)))


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
