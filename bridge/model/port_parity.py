"""port_parity: any PyTorch module and a JAX model with the same weights, operation by operation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridge.model.alignment import Alignment, Region, layer_of, parameter_names
from bridge.model.jax_side import jax_model, with_gradients
from bridge.model.jaxprs import Part, Program, read
from bridge.model.model_inputs import INFERENCE, Mode, ModelInputs, both
from bridge.model.parity import LayerParity, Logits, ModelParity, Track, relative
from bridge.model.ports import judged
from bridge.model.results import paired
from bridge.model.torch_graph import UNITS, TorchGraph
from bridge.weights.manifest import WeightsManifest

_log = logging.getLogger("bridge")


def port_parity(
    module: Any,
    model: Any,
    inputs: Any,
    manifest: WeightsManifest | None = None,
    *,
    mode: Mode = INFERENCE,
    name: str = "",
    track: Track = iter,
) -> ModelParity:
    """Compare every operation of a PyTorch module with its port to JAX, in float32.

    The arguments and results are those of `bridge.model_parity`.
    """
    program, theirs, names, given = _programs(module, model, inputs, manifest, mode, name)
    alignment = Alignment(program, theirs, names, dict(zip((*program.incoming, *program.inputs), given.arrays)))
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
    first = given.arrays[len(program.incoming)]
    return ModelParity(name, np.shape(first), layers, left, _logits(program, theirs, given), gradients=mode.gradients)


def _programs(
    module: Any, model: Any, inputs: Any, manifest: WeightsManifest | None, mode: Mode, name: str
) -> tuple[Program, TorchGraph, Mapping[str, Sequence[str]], ModelInputs]:
    """Return both programs with the same outputs in the same order, PyTorch's names of parameters, and JAX's inputs."""
    from bridge.model.graph_capture import graph

    given, theirs_given = both(inputs)
    made = jax_model(model, mode.training)
    _log.info("%s: running it in PyTorch", name)
    theirs = graph(module, theirs_given, mode)
    program = read(made.function, made.parameters, given)
    pairs = paired(program.results, theirs.results)
    moved = None if manifest is None else [(each.torch.name, each.flax.name) for each in manifest.moved]
    names = parameter_names(made.parameters, theirs, moved)
    ours = [program.outputs[i] for i, _ in pairs]
    outputs, results = [theirs.outputs[i] for _, i in pairs], [theirs.results[i] for _, i in pairs]
    if not mode.gradients:
        return (
            dataclasses.replace(program, outputs=ours, settings=made.settings),
            dataclasses.replace(theirs, outputs=outputs, results=results),
            names,
            given,
        )
    if len(pairs) < len(theirs.results):
        raise ValueError(f"`gradients` needs all results of PyTorch, {theirs.results}, and JAX gives {program.results}")
    if theirs.lower:
        raise ValueError(
            f"`gradients` needs a module in float32, and this one computes in {min(theirs.lower.values())}"
        )
    drawn = {each: theirs.incoming[each] for each in results if each in theirs.incoming}
    avals = [program.avals[n] for n, each in zip(ours, results) if each in drawn]
    incoming = [_in_shape(theirs.values[n], aval.shape).astype(aval.dtype) for n, aval in zip(drawn.values(), avals)]
    wanted = {
        path: theirs.gradients[own[0]]
        for path in made.parameters
        if len(own := list(names.get(path, ()))) == 1
        and own[0] in theirs.gradients
        and theirs.values[theirs.gradients[own[0]]].size == made.parameters[path].size
    }
    wanted = dict(sorted(wanted.items(), key=lambda item: item[1]))  # as the backward pass makes them
    both_ways = with_gradients(made, [i for i, _ in pairs], len(incoming), list(wanted))
    given = dataclasses.replace(given, arrays=[*incoming, *given.arrays])
    program = read(both_ways.function, made.parameters, given)
    starts, data = program.inputs[: len(incoming)], program.inputs[len(incoming) :]
    program = dataclasses.replace(program, settings=made.settings, incoming=starts, inputs=data)
    outputs, results = [*outputs, *wanted.values()], [*results, *(f"gradient of {path}" for path in wanted)]
    return program, dataclasses.replace(theirs, outputs=outputs, results=results, incoming=drawn), names, given


def _in_shape(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the gradient of a result as JAX has that result: as it is, or channels last."""
    for each in (array, np.moveaxis(array, 1, -1) if array.ndim > 2 else array):
        if each.shape == shape:
            return each
    raise ValueError(f"`gradients` needs results of the same shape, and JAX gives {shape} for PyTorch's {array.shape}")


def _logits(program: Program, theirs: TorchGraph, given: ModelInputs) -> Logits | None:
    """Return the first results compared, as JAX's user runs it; None where they are no numbers, or their sizes differ.

    A wrong size has a row of its own.
    """
    whole = Part(tuple(program.equations), (*program.incoming, *program.inputs, *program.constants), program.outputs[0])
    try:
        ours = whole.run(*given.arrays, *program.constants.values())
    except Exception as error:
        raise ValueError(f"`model` does not run as one program: {error}") from error
    result = theirs.values[theirs.outputs[0]]
    ours = ours.astype(np.float32) if ours.dtype.name in UNITS else ours
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
