"""Match the steps of the Flax model with PyTorch's operations: by parameters, then by which operation feeds which.

Nothing is matched by order or by shape. A layer is found by its parameters, whatever it reads, so that one wrong
activation does not hide the layers after it. Differences between the frameworks have counterparts too:

1. a step in whose place PyTorch has other operations on the same results;
2. a step that PyTorch lacks, whose input PyTorch passes on;
3. operations that the Flax model lacks, `Matching.missing`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from bridge.model.operations import INPUT, Operation
from bridge.model.steps import IMAGES, ModelStep
from bridge.weights.manifest import WeightsManifest

#: Kinds of a step whose operation has another kind in PyTorch.
_AS = {
    "depthwise": ("convolution",),
    "convolution": ("convolution",),
    "pointwise": ("convolution", "linear"),
    "linear": ("convolution", "linear"),
}


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """PyTorch's operations for one step of the Flax model. A place is an index of the operations.

    Attributes:
      operations: the places of its operations, in order; empty where PyTorch computes nothing.
      inputs: for each input of the step, the place whose result it is.
      output: the place whose result the step's is.
      wiring: where the frameworks read different results, which ones; empty where they agree.
    """

    operations: tuple[int, ...]
    inputs: tuple[int, ...]
    output: int
    wiring: str = ""


@dataclasses.dataclass(frozen=True)
class Missing:
    """Operations of PyTorch that the Flax model lacks.

    Attributes:
      after: the name of the step whose result it takes as it is.
      counterpart: the operations.
    """

    after: str
    counterpart: Counterpart


@dataclasses.dataclass(frozen=True)
class Matching:
    """Steps and their operations.

    Attributes:
      counterpart: by the name of a step.
      missing: what is missing before a step, by the step's name; the empty name is the end of the model.
      reasons: why a step has no counterpart, for every other step.
      left: the places of the operations that belong to no step.
    """

    counterpart: Mapping[str, Counterpart]
    missing: Mapping[str, Sequence[Missing]]
    reasons: Mapping[str, str]
    left: Sequence[int]


def match(every: Sequence[ModelStep], done: Sequence[Operation], manifest: WeightsManifest) -> Matching:
    """Match every step with the operations that ran."""
    return _Matcher(every, done, manifest).matching()


class _Matcher:
    """The state of one matching.

    `_values` holds, for a step, the places whose result its result is: several once something was missing after it.
    """

    def __init__(self, every: Sequence[ModelStep], done: Sequence[Operation], manifest: WeightsManifest) -> None:
        self._every = {step.name: step for step in every}
        self._done = done
        self._layers = {
            record.flax.name.rpartition(".")[0]: record.torch.name.rpartition(".")[0] for record in manifest.moved
        }
        self._by_layer: Mapping[str, list[int]] = collections.defaultdict(list)
        self._readers: Mapping[int, list[int]] = collections.defaultdict(list)
        for place, operation in enumerate(done):
            if operation.layer:
                self._by_layer[operation.layer].append(place)
            for producer in set(operation.producers):
                self._readers[producer].append(place)
        self._claimed: set[int] = set()
        self._values: dict[str, list[int]] = {IMAGES: [INPUT]}
        self._found: dict[str, Counterpart] = {}
        self._missing: dict[str, list[Missing]] = collections.defaultdict(list)
        self._reasons: dict[str, str] = {}

    def matching(self) -> Matching:
        for step in self._every.values():
            found = self._of_layer(step) if step.name in self._layers else self._of_inputs(step)
            if isinstance(found, str):
                self._reasons[step.name] = found
            else:
                self._take(step.name, found)
        last = next(reversed(self._every))
        if places := self._values.get(last):
            self._pass(last, self._exit(places[-1]), "")
        left = sorted(set(range(len(self._done))) - self._claimed)
        return Matching(self._found, self._missing, self._reasons, left)

    def _take(self, name: str, found: Counterpart) -> None:
        self._found[name] = found
        self._claimed.update(found.operations)
        self._values[name] = [found.output]

    def _of_layer(self, step: ModelStep) -> Counterpart | str:
        """Return the operation that took the layer's parameters, or the reason why there is none."""
        layer, (name,) = self._layers[step.name], step.inputs
        if len(places := self._by_layer[layer]) != 1:
            return f"{layer} in PyTorch ran {len(places)} times, expected once"
        operation = self._done[places[0]]
        if operation.kind not in _AS.get(step.kind, (step.kind,)):
            return f"{layer} in PyTorch is a {operation.kind}, expected a {step.kind}"
        if len(operation.producers) != 1:
            return f"{layer} in PyTorch reads {len(operation.producers)} results, expected one"
        (read,) = operation.producers
        if name not in self._values:
            self._added(name, read)
        wiring = ""
        if read not in self._values.setdefault(name, [read]) and not self._pass(name, read, step.name):
            wiring = f"it reads {name} in JAX, and {self._named(read)} in PyTorch"
        return Counterpart((places[0],), (read,), places[0], wiring)

    def _of_inputs(self, step: ModelStep) -> Counterpart | str:
        """Return the operation on the step's inputs, or the reason why there is none."""
        if absent := [name for name in step.inputs if name not in self._values]:
            return f"its input {absent[0]} has no counterpart"
        if step.is_opaque:
            return f"{step.kind} has a `__call__` of its own, whose operations are not known"
        known = [self._values[name] for name in step.inputs]
        last = tuple(places[-1] for places in known)
        found = self._among(step, known)
        if not found and step.is_activation:
            output = self._exit(last[0])
            return Counterpart(self._chain(last[0], output) or (), last, output)
        if not found:  # something elementwise is missing before the step
            found = self._among(step, [[*places, *self._cone(places[-1])] for places in known])
        if not found and len(others := self._on(last)) == 1:
            found = [Counterpart((others[0],), last, others[0])]
        if len(found) != 1:
            said = ", ".join(self._named(place) for place in last)
            return f"{step.kind} of {said} in PyTorch ran {len(found)} times, expected once"
        for name, read in zip(step.inputs, found[0].inputs):
            self._pass(name, read, step.name)
        return found[0]

    def _among(self, step: ModelStep, known: Sequence[Sequence[int]]) -> list[Counterpart]:
        """Return the operations of a step's kind, for all results that each of its inputs may be."""
        return [
            Counterpart((place,), inputs, place)
            for inputs in itertools.product(*known)
            for place in self._on(inputs)
            if self._done[place].kind == step.kind
        ]

    def _on(self, inputs: Sequence[int]) -> list[int]:
        """Return the unclaimed operations without parameters on exactly these results."""
        return [
            place
            for place in self._readers[inputs[0]]
            if self._is_free(place) and sorted(self._done[place].producers) == sorted(inputs)
        ]

    def _is_free(self, place: int) -> bool:
        return place != INPUT and place not in self._claimed and not self._done[place].layer

    def _cone(self, start: int) -> list[int]:
        """Return the unclaimed elementwise operations that depend on one result alone."""
        cone: list[int] = []
        for place in range(start + 1, len(self._done)):
            operation = self._done[place]
            inside = {start, *cone}.issuperset(operation.producers)
            if operation.is_elementwise and inside and self._is_free(place):
                cone.append(place)
        return cone

    def _exit(self, start: int) -> int:
        """Return the last of the elementwise operations on a result, or the result itself where there are none."""
        cone = self._cone(start)
        return next((p for p in reversed(cone) if not set(self._readers[p]) & set(cone)), start)

    def _chain(self, start: int, end: int) -> tuple[int, ...] | None:
        """Return the unclaimed operations without parameters from one result to another; None where there are none."""
        chain: set[int] = set()
        ahead, reached = [end], False
        while ahead:
            place = ahead.pop()
            if place == start:
                reached = True
            elif self._is_free(place) and place not in chain:
                chain.add(place)
                ahead.extend(self._done[place].producers)
        return tuple(sorted(chain)) if reached and chain else None

    def _pass(self, name: str, read: int, before: str) -> bool:
        """Note what is missing between a step's result and the one that PyTorch reads; return False for no path."""
        if read in self._values[name]:
            return True
        start = self._values[name][-1]
        if (chain := self._chain(start, read)) is None:
            return False
        self._missing[before].append(Missing(name, Counterpart(chain, (start,), read)))
        self._claimed.update(chain)
        self._values[name].append(read)
        return True

    def _added(self, name: str, read: int) -> None:
        """Take the step as lacking in PyTorch where PyTorch passes on one of the step's inputs."""
        step = self._every[name]
        inputs = [self._values.get(each, []) for each in step.inputs]
        if any(read in places for places in inputs) and all(inputs):
            del self._reasons[name]
            self._take(name, Counterpart((), tuple(places[-1] for places in inputs), read))

    def _named(self, place: int) -> str:
        return "the input" if place == INPUT else described(self._done[place])


def described(operation: Operation) -> str:
    """Name an operation: by its layer, or by its kind and module."""
    return operation.layer or f"{operation.kind} in {operation.module or 'the model itself'}"
