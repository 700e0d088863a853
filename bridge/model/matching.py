"""Which operation of PyTorch is which step of the Flax model: by the parameters' places, then by who feeds whom."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from bridge.model.operations import INPUT, Operation
from bridge.model.steps import IMAGES, Step
from bridge.weights.manifest import Manifest

#: Kinds of a step that are another kind of operation in PyTorch.
_CONVOLUTIONS = ("convolution", "linear")
_AS = {
    "depthwise": ("convolution",),
    "convolution": ("convolution",),
    "pointwise": _CONVOLUTIONS,
    "linear": _CONVOLUTIONS,
}


@dataclasses.dataclass(frozen=True)
class Matching:
    """Steps and their operations.

    Attributes:
      operation: for the name of a step, the place of its operation.
      reasons: for every other step, why it has none.
      left: the places of the operations that are no step's.
    """

    operation: Mapping[str, int]
    reasons: Mapping[str, str]
    left: Sequence[int]


def match(every: Sequence[Step], done: Sequence[Operation], manifest: Manifest) -> Matching:
    """A layer is the one whose parameters it took, as the manifest says; it must also read the same results.

    Any other step is the only operation of its kind on the results of the operations that its inputs are. Nothing is
    matched by order or by shape.
    """
    torch_layers = {
        record.flax.name.rpartition(".")[0]: record.torch.name.rpartition(".")[0] for record in manifest.moved
    }
    by_layer: dict[str, list[int]] = collections.defaultdict(list)
    by_inputs: dict[tuple, list[int]] = collections.defaultdict(list)
    for place, operation in enumerate(done):
        if operation.layer:
            by_layer[operation.layer].append(place)
        else:
            by_inputs[operation.kind, *sorted(operation.producers)].append(place)
    found = {IMAGES: INPUT}
    reasons = {}
    for step in every:
        if absent := [name for name in step.inputs if name not in found]:
            reasons[step.name] = f"its input {absent[0]} has no counterpart"
            continue
        producers = sorted(found[name] for name in step.inputs)
        if step.name in torch_layers:
            layer = torch_layers[step.name]
            candidates = by_layer[layer]
            said = f"{layer} in PyTorch"
        else:
            layer = ""
            candidates = by_inputs[step.kind, *producers]
            said = f"{step.kind} of {', '.join(_named(done, place) for place in producers)} in PyTorch"
        if len(candidates) != 1:
            reasons[step.name] = f"{said} ran {len(candidates)} times, expected once"
            continue
        operation = done[candidates[0]]
        if layer and operation.kind not in _AS.get(step.kind, (step.kind,)):
            reasons[step.name] = f"{said} is a {operation.kind}, expected a {step.kind}"
        elif layer and sorted(operation.producers) != producers:
            reads = ", ".join(_named(done, place) for place in operation.producers)
            reasons[step.name] = f"{said} reads {reads}, expected {', '.join(step.inputs)}"
        else:
            found[step.name] = candidates[0]
    del found[IMAGES]
    return Matching(found, reasons, sorted(set(range(len(done))) - set(found.values())))


def _named(done: Sequence[Operation], place: int) -> str:
    return "the input" if place == INPUT else described(done[place])


def described(operation: Operation) -> str:
    """An operation in a few words."""
    return operation.layer or f"{operation.kind} in {operation.module or 'the model itself'}"
