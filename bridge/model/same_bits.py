"""A MobileNet of `jaxdw.models` in the orders of PyTorch's sums, as one compiled program.

Only these networks can be told in which order to add: `jaxdw.models.Arithmetic`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.model.explanations import Replayed, explained
from bridge.model.known_orders import KnownOrders
from bridge.model.matching import Counterpart, Matching, Missing, described, match
from bridge.model.operation_verdicts import judge, judge_others, recognized
from bridge.model.operations import INPUT, Operation
from bridge.model.orders import is_a_sum
from bridge.model.parameters import with_parameters
from bridge.model.parity import LayerParity, Logits, ModelParity, Track, relative
from bridge.model.steps import (
    IMAGES,
    ByChannel,
    ModelStep,
    OneProgram,
    in_eval_mode,
    logits_in_order,
    on_other_numbers,
    parameters_of,
    steps,
)
from bridge.numerics import same_bits
from bridge.weights.manifest import WeightsManifest
from jaxdw.models import MobileNet

_log = logging.getLogger("bridge")


def same_bits_parity(
    module: Any,
    model: MobileNet,
    images: np.ndarray,
    manifest: WeightsManifest,
    *,
    layout: str | None = None,
    known: KnownOrders | None = None,
    name: str = "",
    track: Track = iter,
) -> ModelParity:
    """Compare a MobileNet in PyTorch with its Flax twin in PyTorch's own arithmetic: any difference is a bug, or named.

    PyTorch runs as its user runs it. The order of each of its sums is revealed on this machine, for these shapes, this
    layout and these threads. JAX then runs as one compiled program in these orders, which returns the result of every
    operation. Each must have PyTorch's bits, and so must the logits of the model with the same arithmetic. After a
    result with other bits the program goes on from PyTorch's, so that every operation is judged on its own.

    Args and raises: those of `model_parity`.
    """
    from bridge.model.capture import eager, layout_of, operations

    model = _checked(model, images)
    known = KnownOrders() if known is None else known
    _log.info("%s: running it in PyTorch", name)
    done, theirs = operations(module, images, layout)
    if not same_bits(theirs, eager(module, images, layout)).all():
        raise ValueError(f"`module` is {type(module).__name__}, which gives other bits when it runs again")
    every = steps(model)
    matching = match(every, done, manifest)
    networks = _Networks(images, done, known, is_one_program=True)
    for step in track(every):
        networks.reveal(step, matching)
    _log.info("%s: compiling it in JAX", name)
    program = OneProgram(model, networks.orders)
    shapes = program.shapes(images)
    received = {
        step.name: networks.received(step, matching.counterpart[step.name], shapes)
        for step in every
        if step.name in matching.counterpart
    }
    replaced = {name: [False] * len(operands) for name, operands in received.items()}
    networks.running = program(images, received, replaced)
    for step in every:
        if step.name in received:
            reached = (networks.running[name] for name in step.inputs)
            replaced[step.name] = [not same_bits(a, b).all() for a, b in zip(reached, received[step.name])]
    if any(map(any, replaced.values())):
        networks.running = program(images, received, replaced)
    layers = [layer for step in every for layer in networks.layers(step, matching)]
    layers += map(networks.missing, matching.missing.get("", ()))
    if (ours := logits_in_order(model, networks.orders, images)) is None:
        ours = networks.running[every[-1].name]
    return ModelParity(
        name,
        images.shape,
        layers,
        [described(done[place]) for place in matching.left],
        Logits.of(ours, theirs),
        layout or layout_of(module),
        True,
        [layer.name for layer in layers if layer.verdict is not Verdict.IDENTICAL],
    )


def _checked(model: MobileNet, images: np.ndarray) -> MobileNet:
    """Return the model in eval mode."""
    if not isinstance(model, MobileNet):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a MobileNet of `jaxdw.models`")
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4 or not images.size:
        given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"`images` is {given}, expected a NumPy array (N, H, W, C) of float32 that is not empty")
    return in_eval_mode(model)


class _Networks:
    """Both networks on the same images, while the Flax model runs step by step, or after it ran as one program.

    Attributes:
      running: the result of each step in the Flax model's own run, by its name.
      growth: of each step that was compared.
      orders: of PyTorch's sums, by the name of a step, where JAX computes in them.
    """

    def __init__(
        self, images: np.ndarray, done: Sequence[Operation], known: KnownOrders, *, is_one_program: bool = False
    ) -> None:
        self._images = images
        self._done = done
        self._known = known
        self._is_one_program = is_one_program
        self._revealed: dict[str, Replayed] = {}
        self.orders: dict[str, ByChannel] = {}
        self.running: dict[str, Any] = {IMAGES: images}
        self.growth = {IMAGES: 0.0}

    def layers(self, step: ModelStep, matching: Matching) -> Iterator[LayerParity]:
        """Yield what PyTorch has before a step that JAX lacks, and the step compared with PyTorch's operations."""
        yield from map(self.missing, matching.missing.get(step.name, ()))
        if (counterpart := matching.counterpart.get(step.name)) is not None:
            yield self._layer(step, counterpart)
        else:
            shape, reason = self.running[step.name].shape, matching.reasons[step.name]
            yield LayerParity(step.name, "", step.kind, shape, None, reason, None, None)

    def reveal(self, step: ModelStep, matching: Matching) -> None:
        """Note the order of PyTorch's sums in place of a step, if it is one order for all elements."""
        counterpart = matching.counterpart.get(step.name)
        if counterpart is None or len(counterpart.operations) != 1:
            return
        operation = self._done[counterpart.operations[0]]
        if operation.run is None or not is_a_sum(operation) or step.kind == "depthwise":
            return
        if operation.output.dtype != np.float32:
            return
        found = self._known.revealed(operation, "PyTorch", operation.run, operation.output)
        self._revealed[step.name] = Replayed(str(found), found.replayed, found.trees)
        if found.channels and all(order.finish != "product" for _, order in found.channels):
            self.orders[step.name] = [(end, order.sum_order) for end, order in found.channels]

    def received(self, step: ModelStep, counterpart: Counterpart, shapes: Mapping[str, Any]) -> list[np.ndarray]:
        """Return PyTorch's operands of a step in the shapes that JAX's operands have."""
        return [self._at(place).reshape(shapes[name]) for name, place in zip(step.inputs, counterpart.inputs)]

    def _layer(self, step: ModelStep, counterpart: Counterpart) -> LayerParity:
        """Compare one step with PyTorch's operations there."""
        ranks = [self.running[name].ndim for name in step.inputs]
        received = [_as_rank(self._at(place), rank) for place, rank in zip(counterpart.inputs, ranks)]

        def run(*operands: np.ndarray) -> np.ndarray:
            return np.asarray(step.compiled(*operands))

        replayed: Mapping[str, Replayed] = {}
        try:
            fed = np.asarray(self.running[step.name]) if self._is_one_program else run(*received)
        except (TypeError, ValueError) as error:
            isolated: Comparison | str = f"it does not accept PyTorch's operands: {error}"
        else:
            kind = recognized(step.kind, run, received[0]) if step.is_activation else step.kind
            isolated = self._judged(step.name, kind, counterpart, fed)
            if isinstance(isolated, Comparison) and len(counterpart.operations) == 1:
                isolated, replayed = self._explained(step, counterpart, received[0], fed, isolated)
        if counterpart.wiring and isinstance(isolated, Comparison) and isolated.verdict.passes:
            changes: dict[str, Any] = {"name": "wiring", "cause": counterpart.wiring, "place": ""}
            fix = "let both read the result of the same layer"
            isolated = dataclasses.replace(isolated, verdict=Verdict.BUG, fix=fix, **changes)
        found = self._parity(step.name, step.kind, counterpart, isolated, step.name, step.inputs)
        if found.growth is not None:
            self.growth[step.name] = found.growth
        words = {name: each.words for name, each in replayed.items()}
        return dataclasses.replace(found, orders=words, trees={name: each.trees for name, each in replayed.items()})

    def _explained(
        self, step: ModelStep, counterpart: Counterpart, received: np.ndarray, fed: np.ndarray, isolated: Comparison
    ) -> tuple[Comparison, Mapping[str, Replayed]]:
        """Return the verdict after replays and after a look at the parameters, and how the results came about."""
        operation = self._done[counterpart.operations[0]]
        replayed: Mapping[str, Replayed] = {}
        if step.name not in self.orders:
            runs = {"JAX": on_other_numbers(step, received), "PyTorch": operation.run}
            isolated, replayed = explained(operation, runs, fed, isolated, self._known)
        if self._is_one_program and step.name in self._revealed:
            replayed = {**replayed, "PyTorch": self._revealed[step.name]}
        if isolated.verdict.passes:
            isolated = with_parameters(isolated, parameters_of(step.layer), operation, self._done)
        if isolated.verdict.passes and isolated.verdict is not Verdict.IDENTICAL and step.name in self.orders:
            cause = f"in PyTorch's order ({self._revealed[step.name].words}) JAX gives other bits for the same operands"
            isolated = dataclasses.replace(isolated, verdict=Verdict.BUG, name="other bits", cause=cause)
        return isolated, replayed

    def missing(self, missing: Missing) -> LayerParity:
        """Compare operations of PyTorch that the Flax model lacks with doing nothing."""
        counterpart = missing.counterpart
        kind = " and then ".join(self._done[place].kind for place in counterpart.operations)
        name = f"{missing.after.removesuffix('.norm')}.{kind.replace(' ', '_')}"
        isolated = self._judged(name, "identity", counterpart, self._at(counterpart.inputs[0]))
        return self._parity(name, kind, counterpart, isolated, missing.after, (missing.after,))

    def _at(self, place: int) -> np.ndarray:
        """Return PyTorch's result at a place of the operations."""
        return self._images if place == INPUT else self._done[place].output

    def _judged(self, name: str, kind: str, counterpart: Counterpart, ours: np.ndarray) -> Comparison | str:
        """Return the verdict on JAX's result for the operands of PyTorch's operations, or why there is none."""
        some = [self._done[place] for place in counterpart.operations]
        if len(some) == 1 and (some[0].layer or some[0].kind == kind):
            return judge(some[0], ours)
        given = self._at(counterpart.inputs[0])
        if not some:
            some = [Operation("identity", "", "", (), (given,), self._at(counterpart.output), {}, {})]
            fix = f"leave it out of the Flax model: {name}"
        else:
            some[0] = dataclasses.replace(some[0], operands=(given, *some[0].operands[1:]))
            fix = f"compute {' and then '.join(each.kind for each in some)} there in the Flax model"
        return judge_others(kind, some, ours, fix)

    def _parity(
        self, name: str, kind: str, counterpart: Counterpart, isolated: Comparison | str, at: str, inputs: Sequence[str]
    ) -> LayerParity:
        """Return one row, for the result of the step `at`."""
        running = self.running[at]
        grown = relative(np.asarray(running), self._at(counterpart.output))
        before = max((self.growth[each] for each in inputs if each in self.growth), default=0.0)
        operations = [self._done[place] for place in counterpart.operations]
        return LayerParity(
            name,
            ", ".join(dict.fromkeys(each.layer or each.module for each in operations)) or "nothing",
            kind,
            running.shape,
            isolated if isinstance(isolated, Comparison) else None,
            isolated if isinstance(isolated, str) else "",
            grown,
            grown / before if grown is not None and before > 0 else None,
        )


def _as_rank(x: np.ndarray, rank: int) -> np.ndarray:
    """Drop the axes of size one that PyTorch keeps of a mean over an image."""
    return x if x.ndim == rank else x.reshape(x.shape[0], *(n for n in x.shape[1:] if n > 1))
