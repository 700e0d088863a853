"""model_parity: any PyTorch module and a JAX model with the same weights, operation by operation and as a whole."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridge.model.alignment import Alignment, Region, layer_of, parameter_names
from bridge.model.jax_side import JaxModel, jax_model, with_gradients
from bridge.model.jaxprs import ModelFails, Part, Program, read
from bridge.model.known_orders import KnownOrders
from bridge.model.model_inputs import Mode, ModelInputs, both
from bridge.model.parity import LayerParity, Logits, ModelParity, Track, relative
from bridge.model.ports import judged
from bridge.model.results import paired
from bridge.model.torch_graph import UNITS, TorchGraph
from bridge.weights.manifest import WeightsManifest

_log = logging.getLogger("bridge")

#: Orders that were revealed in this process. Each is proved on the data again where it is used.
_KNOWN = KnownOrders()


def model_parity(
    module: Any,
    model: Any,
    inputs: Any,
    weights: WeightsManifest | None = None,
    *,
    gradients: bool = False,
    training: bool = False,
    layout: str | None = None,
    known: KnownOrders | None = None,
    name: str = "",
    track: Track = iter,
) -> ModelParity:
    """Compare every operation of a PyTorch module with its port to JAX twice, in eval mode and float32.

    *Isolated*: the JAX operation gets PyTorch's operands, and the two results are compared within the bound of that one
    operation. *Running*: each network runs on its own on the same images; their difference grows from layer to layer.
    Where every isolated verdict is ROUNDING or stronger, each operation adds no more than its own rounding on the data
    that really flow through the network. Then all growth is these roundings, carried on.

    Args:
      module: the PyTorch model, an `nn.Module`.
      model: the JAX model with its weights: an `nnx.Module`; a Linen module and its variables, `(module, variables)`; a
        function and its parameters, `(function, parameters)`, called as `function(parameters, *inputs)`; or a callable
        tree of arrays, as Equinox has them.
      inputs: an array or several. Images are `(N, H, W, C)`, float32, already normalized: PyTorch gets them channels
        first. Other arrays are given to both as they are. `{"jax": ..., "torch": ...}` gives each its own.
      weights: the manifest of the conversion, `bridge.to_flax(module, model).manifest`; None: parameters are matched by
        their numbers, in any layout.
      gradients: compare the backward pass, too: every operation of it and every parameter's gradient, on PyTorch's own
        activations and incoming gradients. Those of the results are drawn.
      training: run the PyTorch module and an `nnx.Module` in training mode: statistics of the batch. Dropout must be 0.
      layout: of PyTorch's weights and images, "contiguous" or "channels_last"; None: that of the model.
      known: orders that were revealed before; None: none.
      name: of the network, for reports.
      track: wraps the loop over the operations, for a progress bar.

    Raises:
      ValueError, TypeError: inputs of another dtype or shape, a model of another kind; the message says which.
    """
    from bridge.model.graph_capture import layout_of

    known = _KNOWN if known is None else known
    mode = Mode(gradients, training)
    _log.info("%s: running it in PyTorch", name)
    program, theirs, names, given = programs(module, model, inputs, weights, mode, layout)
    alignment = Alignment(program, theirs, names, dict(zip((*program.incoming, *program.inputs), given.arrays)))
    running = _Running(alignment)
    layers: list[LayerParity] = []
    for region in track(alignment.regions()):
        row = judged(alignment, region, known)
        grown, amplification = running.follow(region)
        if row is not None:
            shape = tuple(program.avals[region.part.output].shape)
            orders = {name: each.words for name, each in row.replayed.items()}
            trees = {name: each.trees for name, each in row.replayed.items()}
            figures = (row.isolated, row.reason, grown, amplification, orders, trees)
            layers.append(LayerParity(row.name, row.torch, row.kind, shape, *figures))
    left = not_compared(alignment)
    left += [f"gradient of {each}" for each, n in theirs.gradients.items() if n not in theirs.outputs]
    first = given.arrays[len(program.incoming)]
    logits, layout = _logits(program, theirs, given), layout or layout_of(module)
    return ModelParity(name, np.shape(first), layers, left, logits, layout, gradients=mode.gradients)


def not_compared(alignment: Alignment) -> list[str]:
    """Return the layers or operators of PyTorch that stand in no region."""
    return [
        layer_of(call, alignment.names_of_values)
        for place, call in enumerate(alignment.graph.calls)
        if place in alignment.needed and place not in alignment.seen and alignment.is_core(call)
    ]


def programs(
    module: Any, model: Any, inputs: Any, manifest: WeightsManifest | None, mode: Mode, layout: str | None = None
) -> tuple[Program, TorchGraph, Mapping[str, Sequence[str]], ModelInputs]:
    """Return both programs with the same outputs in the same order, PyTorch's names of parameters, and JAX's inputs."""
    from bridge.model.graph_capture import graph

    given, theirs_given = both(inputs)
    made = jax_model(model, mode.training)
    theirs = graph(module, theirs_given, mode, layout)
    pieces = [] if manifest is None else manifest.moved
    moved = [(each.torch.name.partition("[")[0], each.flax.name) for each in pieces]  # a name may be `weight[0/3]`
    names = parameter_names(made.parameters, theirs, None if manifest is None else moved)
    try:
        program = read(made.function, made.parameters, given)
    except ModelFails as error:
        raise ValueError(f"{error}{_wrong_before(error.begun, theirs, names, given)}") from error
    pairs = paired(program.results, theirs.results)
    ours = [program.outputs[i] for i, _ in pairs]
    outputs, results = [theirs.outputs[i] for _, i in pairs], [theirs.results[i] for _, i in pairs]
    ours_named = [program.results[i] for i, _ in pairs]
    program = dataclasses.replace(program, outputs=ours, results=ours_named, settings=made.settings)
    graphs = program, dataclasses.replace(theirs, outputs=outputs, results=results)
    if not mode.gradients:
        return *graphs, names, given
    if len(pairs) < len(theirs.results):
        raise ValueError(f"`gradients` needs all results of PyTorch, {theirs.results}, and JAX gives {program.results}")
    return _both_ways(made, *graphs, names, given, [i for i, _ in pairs])


def _wrong_before(
    begun: Program | None, theirs: TorchGraph, names: Mapping[str, Sequence[str]], given: ModelInputs
) -> str:
    """Say what is wrong in the equations that JAX ran before it failed; nothing where all of them are right."""
    if begun is None:
        return ""
    graph = dataclasses.replace(theirs, outputs=[], results=[])
    alignment = Alignment(begun, graph, names, dict(zip(begun.inputs, given.arrays)))
    said: dict[str, str] = {}
    for region in alignment.regions():
        row = judged(alignment, region)
        if row is not None and row.isolated is not None and not row.isolated.verdict.passes:
            said.setdefault(row.name, row.isolated.cause)
    return "; wrong before it: " + "; ".join(f"{name}: {cause}" for name, cause in said.items()) if said else ""


def _both_ways(
    made: JaxModel,
    program: Program,
    theirs: TorchGraph,
    names: Mapping[str, Sequence[str]],
    given: ModelInputs,
    places: Sequence[int],
) -> tuple[Program, TorchGraph, Mapping[str, Sequence[str]], ModelInputs]:
    """Return what `programs` does with the gradients of the parameters as further outputs.

    Args:
      made, program, theirs, names, given: both models without gradients, and JAX's inputs.
      places: of the outputs among the results of `made`.
    """
    if theirs.lower:
        lower = min(theirs.lower.values())
        raise ValueError(f"`gradients` needs a module in float32, and this one computes in {lower}")
    drawn = {each: theirs.incoming[each] for each in theirs.results if each in theirs.incoming}
    avals = [program.avals[n] for n, each in zip(program.outputs, theirs.results) if each in drawn]
    incoming = [_in_shape(theirs.values[n], aval.shape).astype(aval.dtype) for n, aval in zip(drawn.values(), avals)]
    wanted = {}
    for path, array in made.parameters.items():
        known = names.get(path, ())
        own = path if path in known else known[0] if len(known) == 1 else ""
        if own in theirs.gradients and theirs.values[theirs.gradients[own]].size == array.size:
            wanted[path] = theirs.gradients[own]
    wanted = dict(sorted(wanted.items(), key=lambda item: item[1]))  # as the backward pass makes them
    both_ways = with_gradients(made, places, len(incoming), list(wanted))
    given = dataclasses.replace(given, arrays=[*incoming, *given.arrays])
    program = read(both_ways.function, made.parameters, given)
    starts, data = program.inputs[: len(incoming)], program.inputs[len(incoming) :]
    program = dataclasses.replace(program, settings=made.settings, incoming=starts, inputs=data)
    outputs = [*theirs.outputs, *wanted.values()]
    results = [*theirs.results, *(f"gradient of {path}" for path in wanted)]
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
    return logits_of(ours, theirs)


def logits_of(ours: np.ndarray, theirs: TorchGraph) -> Logits | None:
    """Return JAX's first result compared with PyTorch's; None where they are no numbers, or their sizes differ."""
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
