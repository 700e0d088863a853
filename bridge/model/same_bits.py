"""A JAX model in PyTorch's own arithmetic, as one compiled program that returns the result of every region.

A region whose operators of PyTorch are all defined (`bridge.model.defined_operators`) is computed by their definitions
from JAX's operands and parameters. It is the same function, as its float64 values and errors show. Any other region is
computed by JAX's own equations.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.model.alignment import Alignment, Layout, Region, Tie, layouts
from bridge.model.defined_operators import Operator, Undefined, channels_first, channels_last, defined
from bridge.model.jax_side import jax_model
from bridge.model.jaxprs import arrays_in
from bridge.model.known_orders import KnownOrders
from bridge.model.model_inputs import INFERENCE, ModelInputs, both
from bridge.model.orders import Revealed
from bridge.model.parity import LayerParity, ModelParity, Track, relative
from bridge.model.port_parity import logits_of, not_compared, programs
from bridge.model.ports import Row, judged
from bridge.numerics import same_bits
from bridge.weights.manifest import WeightsManifest
from jaxdw.lowerings.cpu_fused import materialized
from jaxdw.models import Arithmetic

_log = logging.getLogger("bridge")


def same_bits_parity(
    module: Any,
    model: Any,
    inputs: Any,
    weights: WeightsManifest | None = None,
    *,
    layout: str | None = None,
    known: KnownOrders | None = None,
    name: str = "",
    track: Track = iter,
) -> ModelParity:
    """Compare every operation of a PyTorch module with its port to JAX, in PyTorch's own arithmetic.

    PyTorch runs as its user runs it. The order of each of its sums is revealed on this machine, for these shapes, this
    layout and these threads. JAX then runs as one compiled program in these orders, which returns the result of every
    operation. Each must have PyTorch's bits, or the reason is named. After a result with other bits the program goes on
    from PyTorch's, so that every operation is judged on its own.

    A model with a method `with_arithmetic`, which takes a `jaxdw.models.Arithmetic`, also runs in these orders as its
    user runs it. Its results must have PyTorch's bits, too.

    Args and raises: those of `model_parity`.
    """
    from bridge.model.graph_capture import eager, layout_of

    known = KnownOrders() if known is None else known
    _log.info("%s: running it in PyTorch", name)
    program, theirs, names, given = programs(module, model, inputs, weights, INFERENCE, layout)
    again = eager(module, both(inputs)[1], layout)
    if not all(same_bits(again[each], theirs.values[n]).all() for each, n in zip(theirs.results, theirs.outputs)):
        raise ValueError(f"`module` is {type(module).__name__}, which gives other bits when it runs again")
    alignment = Alignment(program, theirs, names, dict(zip(program.inputs, given.arrays)))
    steps = [_Step.of(alignment, region, known) for region in track(alignment.regions())]
    _log.info("%s: compiling it in JAX", name)
    whole = _OneProgram(alignment, steps)
    running = whole(given, len(steps))
    first = next((i for i, (step, y) in enumerate(zip(steps, running)) if not step.is_met_by(y)), len(steps))
    isolated = running if first == len(steps) else whole(given, first + 1)
    layers = [
        layer for step, y, grown in zip(steps, isolated, running) if (layer := step.judged(y, grown, known)) is not None
    ]
    orders = {step.path: step.revealed for step in steps if step.revealed is not None}
    ours = _result_in_order(model, orders, given, program.results[0])
    if ours is None:
        ends = [i for i, step in enumerate(steps) if step.region.part.output == program.outputs[0]]
        ours = running[ends[-1]] if ends else given.arrays[program.inputs.index(program.outputs[0])]
    return ModelParity(
        name,
        np.shape(given.arrays[0]),
        layers,
        not_compared(alignment),
        logits_of(ours, theirs),
        layout or layout_of(module),
        True,
        [layer.name for layer in layers if layer.verdict is not Verdict.IDENTICAL],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """A region, and how the program computes it.

    Attributes:
      alignment: of both models; region: one of its regions.
      received: where the operands of `region.part` come from: the tensor of PyTorch that stands for each one that
        depends on the data, and its layout, by the operand's number.
      run: takes these operands, and returns the result.
      undefined: why it runs JAX's own equations; empty where it runs PyTorch's operators.
      revealed: the orders of its sum, where it runs one.
    """

    alignment: Alignment
    region: Region
    received: Mapping[int, Tie]
    run: Callable[..., jax.Array]
    undefined: str
    revealed: Revealed | None

    @classmethod
    def of(cls, alignment: Alignment, region: Region, known: KnownOrders) -> _Step:
        """Return the step of the region that the alignment has just found."""
        received = {n: alignment.ties[n][-1] for n in region.part.inputs if n in alignment.ties}
        revealed, undefined = None, ""
        run: Callable[..., jax.Array] = region.part.traced
        if any(alignment.is_core(call) for call in region.calls):
            try:
                run, revealed = _operators(alignment, region, received, known)
                jax.eval_shape(run, *region.operands)
                if region.tie.is_proved:
                    region = dataclasses.replace(region, ours=None)  # the bound is that of PyTorch's operators
            except Undefined as reason:
                run, revealed, undefined = region.part.traced, None, str(reason)
        return cls(alignment, region, received, run, undefined, revealed)

    @property
    def is_apart(self) -> bool:
        """True where the result comes from a kernel."""
        return self.revealed is not None and not any(order.finish == "product" for order in self.revealed.orders)

    @property
    def expected(self) -> np.ndarray:
        """PyTorch's result."""
        return self.region.tie.layout.to_jax(self.alignment.graph.values[self.region.tie.number])

    @property
    def path(self) -> str:
        """The path of the layer in JAX: of its parameters, or of the module that adds."""
        leaves = self.alignment.leaves(self.region)
        return leaves[0].rpartition(".")[0] if leaves else self.alignment.scope(self.region.part.output)

    def is_met_by(self, y: np.ndarray) -> bool:
        """Return True where a result has PyTorch's bits."""
        return y.shape == self.expected.shape and bool(same_bits(y, self.expected.astype(y.dtype)).all())

    def judged(self, y: np.ndarray, running: np.ndarray, known: KnownOrders) -> LayerParity | None:
        """Return the row of a result on PyTorch's operands; None where the region only moves elements.

        Args:
          y: the result.
          running: the result where the program does not go on from PyTorch's.
          known: orders that were revealed before.
        """
        row = judged(self.alignment, self.region, known if self.revealed is None else None, y)
        if row is None:
            return None
        orders = {name: each.words for name, each in row.replayed.items()}
        trees = {name: each.trees for name, each in row.replayed.items()}
        if self.revealed is not None:
            orders, trees = {"PyTorch": str(self.revealed)}, {"PyTorch": self.revealed.trees}
        grown = 0.0 if self.is_met_by(running) else relative(running, self.expected)
        return LayerParity(
            row.name, row.torch, row.kind, y.shape, self._named(row), row.reason, grown, None, orders, trees
        )

    def _named(self, row: Row) -> Comparison | None:
        """Return the comparison, with the reason of other bits."""
        found = row.isolated
        if found is None or not found.verdict.passes or found.verdict is Verdict.IDENTICAL:
            return found
        if self.revealed is None:
            cause = self.undefined or f"PyTorch's {row.kind} has other bits here than jaxdw's definition of it"
            return found if found.verdict is Verdict.EXPLAINED else dataclasses.replace(found, cause=cause)
        cause = f"in PyTorch's order ({self.revealed}) JAX gives other bits for the same operands"
        return dataclasses.replace(found, verdict=Verdict.BUG, name="other bits", cause=cause)


def _operators(
    alignment: Alignment, region: Region, received: Mapping[int, Tie], known: KnownOrders
) -> tuple[Callable[..., jax.Array], Revealed | None]:
    """Return PyTorch's operators of a region as a function of JAX's operands, and the orders of its only sum.

    Raises:
      Undefined: not all operators are defined, or an operand is not found in JAX.
    """
    every = [defined(alignment, call, known) for call in region.calls]
    if not region.is_equal:
        raise Undefined("JAX's result is another one")
    places = {n: i for i, n in enumerate(region.part.inputs)}
    sources: dict[int, tuple[int, Layout]] = {}
    for number in region.sources:
        own = next(((n, tie.layout) for n, tie in received.items() if tie.number == number), None)
        found = own or _parameter(alignment, region, number)
        if found is None:
            raise Undefined("an operand of PyTorch is none of JAX's operands")
        sources[number] = places[found[0]], found[1]
    operators: list[Operator] = [each.run for each in every]
    sums = [each.revealed for each in every if each.revealed is not None]

    def run(*operands: jax.Array) -> jax.Array:
        values = {n: channels_last(layout.to_torch(operands[place])) for n, (place, layout) in sources.items()}
        for operator in operators:
            values |= operator(values)
        return region.tie.layout.to_jax(channels_first(values[region.tie.number]))

    return run, sums[0] if len(sums) == 1 else None


def _parameter(alignment: Alignment, region: Region, number: int) -> tuple[int, Layout] | None:
    """Return the operand of JAX that is a parameter of PyTorch, in every bit, and its layout; None for none."""
    theirs, names = alignment.graph.values[number], alignment.names_of_values.get(number, frozenset())
    for n in region.part.inputs:
        if names & set(alignment.torch_names.get(alignment.program.parameters.get(n, ""), ())):
            ours = np.asarray(alignment.program.constants[n])
            for layout in itertools.islice(layouts(theirs.shape, ours.shape), 130) if ours.size == theirs.size else ():
                if same_bits(layout.to_jax(theirs), ours).all():
                    return n, layout
    return None


class _OneProgram:
    """All steps as one compiled program, which returns the result of each."""

    def __init__(self, alignment: Alignment, steps: Sequence[_Step]) -> None:
        used = {n for step in steps for n in step.region.part.inputs}
        self._constants = {n: each for n, each in alignment.program.constants.items() if n in used}
        self._theirs = {}  # PyTorch's operands, by the number in JAX and in PyTorch
        for step in steps:
            for n, operand in zip(step.region.part.inputs, step.region.operands):
                if n in step.received:
                    self._theirs[n, step.received[n].number] = operand
        inputs = alignment.program.inputs

        def run(given: Any, constants: Mapping[int, Any], theirs: Mapping[Any, Any], first: Any) -> list[jax.Array]:
            reached, results = dict(zip(inputs, given)), []
            for i, step in enumerate(steps):
                operands = []
                for n in step.region.part.inputs:
                    if n in constants:
                        operands.append(constants[n])
                    else:
                        other = theirs[n, step.received[n].number]
                        operands.append(jnp.where(first <= i, other, reached.get(n, other)))
                y = step.run(*operands)
                # or XLA would contract a product with the sum that reads it
                results.append(y if step.is_apart else materialized(y)[0])
                reached[step.region.part.output] = results[-1]
            return results

        self._run = jax.jit(run)

    def __call__(self, given: ModelInputs, first: int) -> list[np.ndarray]:
        """Return the result of each step.

        Args:
          given: the inputs.
          first: the number of the first step that takes PyTorch's operands.
        """
        return [np.asarray(y) for y in self._run(given.arrays, self._constants, self._theirs, first)]


def _result_in_order(model: Any, orders: Mapping[str, Revealed], given: ModelInputs, result: str) -> np.ndarray | None:
    """Return a result of a model in an `Arithmetic`, as its user runs it; None where it has not all of these orders.

    That is where a layer has several orders, or none, or a function has no defined roundings.
    """
    known = {
        path: found.channels[0][1].sum_order
        for path, found in orders.items()
        if len(found.channels) == 1 and found.channels[0][1].finish != "product"
    }
    try:
        made = jax_model(model.with_arithmetic(Arithmetic(known)))
    except (AttributeError, ValueError):
        return None

    @jax.jit
    def run(parameters: Mapping[str, Any], arrays: Sequence[Any]) -> Any:
        args, kwargs = given.split(arrays)
        return dict(arrays_in(made.function(parameters, *args, **kwargs)))[result]

    return np.asarray(run(made.parameters, given.arrays))
