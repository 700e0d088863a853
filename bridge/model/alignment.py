"""Find the values that a JAX model and a PyTorch model share, from the inputs to the results.

JAX's equations run in float64 on PyTorch's own values. A result that is one of PyTorch's tensors, to within the errors
of both, is *tied* to it. From there on that tensor takes its place, so every later equation gets PyTorch's values,
whatever was wrong before. Where a result is no tensor of PyTorch, the layers that follow say which one it stands for:
the kernel of a convolution or matrix product, or the parameters of a normalization, are the same in both models. What
such a layer reads in JAX is what it reads in PyTorch.

Between the tied values lie regions: equations of JAX, and operators of PyTorch. Either may be one or many. Nothing is
matched by order, by shape or by name.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bridge.model import aten, primitives
from bridge.model.elementwise_functions import Probed, are_one, probed
from bridge.model.jaxprs import Equation, Part, Program
from bridge.model.running_error import Bounded
from bridge.model.torch_evaluation import evaluate
from bridge.model.torch_graph import UNITS, Call, TorchGraph

#: Operators that normalize by statistics of their input or by given ones, and the argument that they normalize.
NORMALIZATIONS = {
    "native_layer_norm": "input",
    "native_group_norm": "input",
    "native_batch_norm": "input",
    "_native_batch_norm_legit": "input",
    "_native_batch_norm_legit_no_training": "input",
    "_fused_rms_norm": "input",
}

#: PyTorch's operators in one region, at most; beyond that its errors say nothing.
_LONGEST = 200
#: Elements that are compared before all are.
_SAMPLED = 48
#: Equations in which a function may be completed that has a tensor's numbers already.
_AHEAD = 24


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of PyTorch becomes an array of JAX: split into `split`, permuted, and reshaped to `shape`."""

    split: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    torch: tuple[int, ...]

    def is_reshaped(self) -> bool:
        """Return True where more than the order of the axes changes."""
        axes = [self.split[i] for i in self.permutation if self.split[i] != 1]
        return axes != [n for n in self.shape if n != 1]

    @functools.cached_property
    def axes(self) -> tuple[int, ...] | None:
        """The axes of PyTorch in JAX's order; None where more than their order changes."""
        wide, ones = ([i for i, n in enumerate(self.torch) if (n != 1) is is_wide] for is_wide in (True, False))
        is_whole = self.split == tuple(self.torch[i] for i in wide) and len(self.shape) == len(self.torch)
        if not is_whole or self.is_reshaped():
            return None
        ordered = iter([wide[i] for i in self.permutation])
        return tuple(ones.pop(0) if n == 1 else next(ordered) for n in self.shape)

    def to_jax(self, array: Any) -> Any:
        if self.axes is not None:
            return array.transpose(self.axes)
        return array.reshape(self.split).transpose(self.permutation).reshape(self.shape)

    def to_torch(self, array: Any) -> Any:
        if self.axes is not None:
            return array.transpose(np.argsort(self.axes))
        permuted = tuple(self.split[axis] for axis in self.permutation)
        return array.reshape(permuted).transpose(np.argsort(self.permutation)).reshape(self.torch)


def layouts(torch: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Layout]:
    """Yield the layouts that fit, the customary ones first: as it is, and channels last."""
    given = tuple(n for n in torch if n != 1) or (1,)
    wanted = tuple(n for n in shape if n != 1) or (1,)
    seen = set()
    rank = len(given)
    first = [tuple(range(rank))]
    if len(torch) > 2 and torch[1] != 1 and rank > 1:
        at = sum(n != 1 for n in torch[:1])
        first.insert(0, (*(i for i in range(rank) if i != at), at))
    orders = itertools.chain(first, itertools.permutations(range(rank)) if rank < 6 else ())
    for order in orders:
        if (given, order) not in seen:
            seen.add((given, order))
            if given == wanted and order != tuple(range(rank)) and tuple(given[i] for i in order) != wanted:
                continue
            yield Layout(given, order, shape, torch)
    if len(wanted) < 6:
        for order in itertools.permutations(range(len(wanted))):
            split = tuple(wanted[i] for i in order)
            back = tuple(int(i) for i in np.argsort(order))
            if (split, back) not in seen and split != given:
                seen.add((split, back))
                yield Layout(split, back, shape, torch)


@dataclasses.dataclass(frozen=True, eq=False)
class Tie:
    """A value of JAX that is a tensor of PyTorch.

    Attributes:
      number: of the tensor.
      layout: of the tensor as JAX has it.
      is_proved: true where float64 shows that both are the same function of the values before them.
    """

    number: int
    layout: Layout
    is_proved: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """What computes a tied value from tied values, in both frameworks.

    Attributes:
      part: JAX's equations; none where JAX's value is an earlier one.
      operands: the values of `part.inputs`, PyTorch's where they come from the data.
      ours: JAX's result on them with errors; None where nothing is known of an equation.
      unknown: why `ours` is None.
      calls: PyTorch's operators, moves included; none where PyTorch's tensor is an earlier one.
      sources: the tensors that the calls start from.
      tie: the tensor that the result is.
      is_equal: true where the result is the tensor, to within the errors.
      wiring: where the frameworks read different results, which ones; empty where they agree.
      reader: where they read different results, the path of the layer of JAX that reads.
      is_met: true where layers after it say which tensor the result stands for, and not its numbers.
    """

    part: Part
    operands: tuple[np.ndarray, ...]
    ours: Bounded | None
    unknown: str
    calls: tuple[Call, ...]
    sources: tuple[int, ...]
    tie: Tie
    is_equal: bool
    wiring: str = ""
    is_met: bool = False
    reader: str = ""


class Alignment:
    """The state of one alignment; `regions` yields what it finds, in the order of JAX's equations.

    Attributes:
      claimed: the numbers of the tensors that are tied, with the value of JAX that is tied first.
      seen: the calls that stand in some region.
      torch_names: PyTorch's names of each parameter of JAX.
      region_of: the region that ends at a value of JAX, without its operands and its result.
    """

    def __init__(
        self,
        program: Program,
        graph: TorchGraph,
        names: Mapping[str, Sequence[str]],
        inputs: Mapping[int, np.ndarray],
    ) -> None:
        self.program, self.graph = program, graph
        self.inputs = {n: x.astype(np.float32) if x.dtype.name in UNITS else x for n, x in inputs.items()}
        self.torch_names = names
        self._producer = {n: (i, e) for i, e in enumerate(program.equations) for n in e.outputs}
        self._readers: dict[int, list[tuple[int, Equation]]] = collections.defaultdict(list)
        for i, equation in enumerate(program.equations):
            for n in equation.inputs:
                self._readers[n].append((i, equation))
        self._maker = {n: (i, c) for i, c in enumerate(graph.calls) for n in c.outputs}
        self._data = self._depending([*graph.inputs, *graph.incoming.values()])
        self.late = self._depending(graph.incoming.values())
        self._late = set(program.incoming)
        for equation in program.equations:
            if self._late & set(equation.inputs):
                self._late |= set(equation.outputs)
        self._leaves: dict[int, frozenset[str]] = {n: frozenset([path]) for n, path in program.parameters.items()}
        for equation in program.equations:
            if not any(self.is_data(n) for n in equation.inputs):
                leaves = frozenset(leaf for n in equation.inputs for leaf in self._leaves.get(n, ()))
                self._leaves |= dict.fromkeys(equation.outputs, leaves)
        self._torch_names = self._parameters_of_values()
        self._users: dict[str, list[int]] = collections.defaultdict(list)
        for i, call in enumerate(graph.calls):
            if self._data & set(call.outputs):
                for name in {n for operand in call.operands for n in self._torch_names.get(operand, ())}:
                    self._users[name].append(i)
        self._by_size: dict[int, list[int]] = collections.defaultdict(list)
        for call in graph.calls:
            if call.name not in aten.KEEPING:
                for n in _results(call):
                    if n in self._data and graph.values[n].dtype.kind == "f":
                        self._by_size[graph.values[n].size].append(n)
        self._sums = {
            n: (float(graph.values[n].sum(dtype=np.float64)), float(np.abs(graph.values[n]).sum(dtype=np.float64)))
            for each in self._by_size.values()
            for n in each
        }
        self._rough = max((8 * UNITS[name] for name in graph.lower.values()), default=2.0**-9)
        self.values: dict[int, Bounded | None] = {}
        self._forgotten: set[int] = set()
        self._made: dict[Any, Bounded | None] = {}  # the last results of `exact`
        self._unknown: dict[int, str] = {}
        self.ties: dict[int, list[Tie]] = {}
        self.claimed: dict[int, int] = {}
        self.seen: set[int] = set()
        self._visited: set[int] = set()
        self.region_of: dict[int, Region] = {}
        self._errors: dict[int, np.ndarray] = {}  # of activations, for the backward pass
        self._unlike: dict[int, tuple[int, str]] = {}  # values of another size than what PyTorch's reader reads

    # --- what depends on what

    def _depending(self, on: Iterable[int]) -> set[int]:
        """Return the numbers of PyTorch's values that depend on some."""
        data = set(on)
        for call in self.graph.calls:
            if data & set(call.operands):
                data |= set(call.outputs)
        return data

    def _parameters_of_values(self) -> dict[int, frozenset[str]]:
        """Return the parameters that a value of PyTorch without data is made of."""
        names = {n: frozenset([name]) for n, name in self.graph.parameters.items()}
        for call in self.graph.calls:
            if not self._data & set(call.outputs):
                some = frozenset(n for operand in call.operands for n in names.get(operand, ()))
                names |= dict.fromkeys(call.outputs, some)
        return names

    def is_data(self, number: int) -> bool:
        """Return True for a value of JAX that depends on the data."""
        return number not in self._leaves and number not in self.program.constants

    def is_backward(self, region: Region) -> bool:
        """Return True for a region of the backward pass."""
        return region.tie.number in self.late

    def is_back(self, numbers: Sequence[int]) -> bool:
        """Return True where values of JAX depend on incoming gradients."""
        return not self._late.isdisjoint(numbers)

    def is_zero(self, region: Region) -> bool:
        """Return True where JAX's result is 0, and does not depend on the data."""
        return not self.is_back([region.part.output]) and region.ours is not None and not np.any(region.ours.value)

    def result_of(self, region: Region) -> str:
        """Return the name of the result that a region's end is; empty for none."""
        made = self.root_of_all(region.tie.number)
        found = (name for n, name in zip(self.graph.outputs, self.graph.results) if self.root_of_all(n) == made)
        return next(found, "")

    def is_core(self, call: Call) -> bool:
        """Return True for an operator of PyTorch that computes something from the data."""
        return call.name not in aten.MOVES and any(n in self._data for n in call.operands)

    @functools.cached_property
    def needed(self) -> set[int]:
        """The places of the calls on which the results depend."""
        needed: set[int] = set()
        ahead = list(self.graph.outputs)
        while ahead:
            place, call = self._maker.get(ahead.pop(), (-1, None))
            if call is not None and place not in needed:
                needed.add(place)
                ahead.extend(call.operands)
        return needed

    @property
    def data_of_torch(self) -> set[int]:
        """The numbers of PyTorch's values that depend on the data."""
        return self._data

    @property
    def names_of_values(self) -> Mapping[int, frozenset[str]]:
        """The parameters that PyTorch's values without data are made of."""
        return self._torch_names

    def torch_with_numbers(self, array: np.ndarray) -> list[str]:
        """Return the parameters of PyTorch that have the numbers of an array, in any layout."""
        wanted = _content(array)
        return [
            f"{layer}.{own}" if layer else own
            for layer, arrays in self.graph.layers.items()
            for own, each in arrays.items()
            if each.size == array.size and _content(each) == wanted
        ]

    def leaves(self, region: Region) -> list[str]:
        """Return the paths of the parameters that JAX's equations take."""
        return [self.program.parameters[n] for n in region.part.inputs if n in self.program.parameters]

    def scope(self, number: int) -> str:
        """Return the path of the module of JAX that made a value, or the layer whose parameters it took."""
        if number not in self._producer:
            return ""
        return self._producer[number][1].scope

    def is_layer(self, scope: str) -> bool:
        """Return True for the path of a module of JAX that has parameters of its own, and no modules."""
        below = [path[len(scope) + 1 :] for path in self.program.parameters.values() if path.startswith(f"{scope}.")]
        return bool(below) and not any("." in each for each in below)

    def scope_before(self, part: Part) -> str:
        """Return the path of the last module, or else layer, on the way to some equations of JAX; empty for none."""
        ahead = {self._producer[n] for n in part.inputs if n in self._producer}
        while ahead:
            last = max(ahead, key=lambda each: each[0])
            if path := last[1].scope or self._layer_of(last[1]):
                return path
            ahead.remove(last)
            ahead |= {self._producer[n] for n in last[1].inputs if n in self._producer}
        return ""

    # --- the walk

    def regions(self) -> Iterator[Region]:
        """Walk JAX's equations, and yield each region as soon as its end is tied."""
        incoming = zip(self.program.incoming, self.graph.incoming.values())
        for number, given in (*incoming, *zip(self.program.inputs, self.graph.inputs)):
            array = self.graph.values[given]
            shape = self.program.avals[number].shape
            layout = next(
                (
                    each
                    for each in layouts(array.shape, shape)
                    if np.array_equal(each.to_jax(array), self.inputs[number], equal_nan=True)
                ),
                None,
            )
            if layout is None:
                raise ValueError("`inputs` are not the same numbers for both models")
            self._tie(number, Tie(given, layout))
        for number, value in self.program.constants.items():
            is_parameter = number in self.program.parameters
            if not primitives.is_numeric(self.program.avals[number].dtype):
                self.values[number], self._unknown[number] = None, "random numbers have no bound"
                continue
            self.values[number] = Bounded.exact(value) if is_parameter else Bounded.constant(value)
            if (u := UNITS.get(np.dtype(self.program.avals[number].dtype).name)) and not is_parameter:
                made = Bounded.exact(value)
                self.values[number] = Bounded(made.value, 0.0, 2 * u * np.abs(made.value) + 2.0**-24)
        for i, equation in enumerate(self.program.equations):
            found = False
            for region in self._equation(i, equation):
                yield region
                found = True
            if found:
                self._forget_before(i)
        for number, given in zip(self.program.outputs, self.graph.outputs):
            yield from self._meet(number, given, len(self.program.equations))
            if not any(self._same(tie.number, given) for tie in self.ties.get(number, ())):
                yield from self._unlike_before(self._part(number)[0])
                result = self.graph.results[self.graph.outputs.index(given)]
                wiring = self._read_otherwise(number, given) if number in self.ties else ""
                region = self._region(number, Tie(given, self._own_layout(given)), False, wiring)
                yield dataclasses.replace(region, reader=f"result {result}".strip())
        if not self.graph.outputs:  # JAX failed before it had results
            yield from self._unread()

    def _unread(self) -> Iterator[Region]:
        """Yield the last values of JAX, each as the result of PyTorch's layer that it comes from."""
        for number in self.program.outputs:
            equations = self._part(number)[0]
            unlike = list(self._unlike_before(equations))
            yield from unlike
            places = {self._place_of(equation) for equation in equations} - {None}
            if unlike or number in self.ties or len(places) != 1:
                continue
            wanted = self.graph.calls[places.pop()].outputs[0]  # type: ignore[index]
            has_size = math.prod(self.program.avals[number].shape) == self.graph.values[wanted].size
            tie = self._fitting(number, wanted, 0, None, None) if has_size else Tie(wanted, self._own_layout(wanted))
            if tie is not None and wanted not in self.claimed:
                yield self._region(number, tie, False)

    def _forget_before(self, last: int) -> None:
        """Drop the values that nothing needs any more: what reads them has run, and is tied or dropped itself."""
        kept = {*self._unlike, *self.program.outputs, *self.program.constants}
        for n in sorted(set(self.values) - kept, reverse=True):
            if all(place <= last and self._is_over(equation) for place, equation in self._readers[n]):
                del self.values[n]
                self._forgotten.add(n)

    def _is_over(self, equation: Equation) -> bool:
        """Return True where no later equation reads the results of one but as tensors of PyTorch."""
        return all(n in self.ties or n in self._forgotten for n in equation.outputs)

    def _own_layout(self, number: int) -> Layout:
        shape = self.graph.values[number].shape
        return Layout(shape, tuple(range(len(shape))), shape, shape)

    def _unlike_before(self, equations: Sequence[Equation]) -> Iterator[Region]:
        """Yield each value whose reader in PyTorch reads another number of elements, where the result is wrong."""
        made = [n for equation in equations for n in (*equation.inputs, *equation.outputs)]
        for value in [n for n in self._unlike if n in made]:
            given, reader = self._unlike.pop(value)
            tie, wiring = Tie(given, self._own_layout(given)), ""
            if value in self.ties:
                wiring = self._read_otherwise(value, given)
            yield dataclasses.replace(self._region(value, tie, False, wiring), reader=reader)

    def _read_otherwise(self, value: int, wanted: int) -> str:
        ours, theirs = self.described(self.ties[value][-1].number), self.described(wanted)
        part = "another part of " if ours == theirs else ""
        return f"it reads {part}{ours} in JAX, and {theirs} in PyTorch"

    def _equation(self, i: int, equation: Equation) -> Iterator[Region]:
        if not any(self.is_data(n) for n in equation.inputs):
            self._evaluate(equation)
            return
        yield from self._anchor(i, equation)
        self._evaluate(equation)
        if equation.name in primitives.KEEPING:
            return
        for number in equation.outputs:
            value = self.values.get(number)
            if value is None or value.value.dtype != np.float64:
                continue
            found = self._search(number, value)
            if found is None:
                found = self._otherwise(equation, number)
            if found is not None:
                yield self._region(number, found, True, is_met=False)
                self._tie(number, found)

    def _evaluate(self, equation: Equation) -> None:
        operands = [self.values.get(n) for n in equation.inputs]
        if any(each is None for each in operands):
            reason = next(self._unknown[n] for n in equation.inputs if self.values.get(n) is None)
            self._forget(equation, reason)
            return
        try:
            results = primitives.evaluate(equation, operands, lower=bool(self.graph.lower))  # type: ignore[arg-type]
        except primitives.UnknownPrimitive as error:
            self._forget(equation, f"no bound is known for {error} in JAX")
            return
        self.values |= zip(equation.outputs, results)

    def _forget(self, equation: Equation, reason: str) -> None:
        for n in equation.outputs:
            self.values[n] = None
            self._unknown[n] = reason

    def _tie(self, number: int, tie: Tie) -> None:
        if self.graph.incoming and tie.number not in self._errors:
            given = (*self.graph.inputs, *self.graph.incoming.values())
            made = None if tie.number in given else self.theirs(tie.number)
            if made is not None and made.value.dtype == np.float64:
                errors = np.asarray(made.rounding, np.float64) + made.function
                self._errors[tie.number] = np.broadcast_to(errors, made.shape)
        array = tie.layout.to_jax(self.graph.values[tie.number])
        self.values[number] = Bounded.exact(array)
        self.ties.setdefault(number, []).append(tie)
        self.claimed.setdefault(tie.number, number)

    # --- ties by value

    def _search(self, number: int, value: Bounded) -> Tie | None:
        """Return the tensor that a value is, if there is one."""
        sources = self._sources(number)
        near = {tie.number for n in sources for tie in self.ties.get(n, ())}
        mine = {self.ties[n][-1].number for n in sources if n in self.ties}
        total = float(value.value.sum())
        candidates = []
        for n in self._by_size.get(value.value.size, ()):
            sum_, size = self._sums[n]
            if np.isfinite(total) and abs(sum_ - total) > self._rough / 2 * size + float(np.sum(value.function)):
                continue
            call = self._maker[n][1]
            roots = {self.root(each) for each in call.operands if each in self._data}
            candidates.append((n in self.claimed, not roots <= near, self._maker[n][0], n))
        candidates.sort()
        here = None
        is_before = False  # only the next operator of PyTorch is the reduction
        own = [n for *_, n in candidates if n in mine]
        for is_claimed, *_, n in candidates:
            if is_claimed and own:  # it may be what it comes from
                break
            if n not in own and (tie := self._verified(value, n, number)) is not None:
                if own and self._is_reduced(number, n):
                    is_before = True
                    break
                if here is None:
                    here = self.function_of_ours(*self._part(number), number)
                is_early = here is not None and self._is_early(number, here, n)
                return None if is_early or self._is_unfinished(number, n) else tie
        several = len([n for n in sources if n in self.ties]) > 1
        for n in own:
            if (tie := self._verified(value, n, number)) is not None:
                # of several values, it completes the computation of one; of one alone, it is a function that these
                # data do not tell from doing nothing
                return tie if several or is_before else None
        for is_claimed, *_, n in candidates:
            if is_claimed and n not in own and (tie := self._verified(value, n, number)) is not None:
                return tie
        return None

    def _is_reduced(self, number: int, n: int) -> bool:
        """Return True where PyTorch reduces to make a tensor, as over axes of size one, and JAX has not reduced yet."""
        calls = [self.graph.calls[i] for i in (self.calls(n) or ((), ()))[0]]
        plain = primitives.ELEMENTWISE | primitives.MOVES
        return any(call.name in aten.REDUCTIONS for call in calls) and all(
            equation.name in plain for equation in self._part(number)[0]
        )

    def _is_early(self, number: int, here: Probed, n: int) -> bool:
        """Return True where a value only has a tensor's numbers here, and a later one is the same function."""
        found = self.calls(n)
        wanted = (
            None if found is None else self.function_of_theirs([self.graph.calls[i] for i in found[0]], found[1], n)
        )
        if wanted is None or are_one(here, wanted):
            return False
        start = self._producer[number][0] + 1
        for equation in self.program.equations[start : start + _AHEAD]:
            if equation.name in primitives.ELEMENTWISE and np.dtype(equation.aval.dtype) == np.float32:
                later = self.function_of_ours(*self._part(equation.outputs[0]), equation.outputs[0])
                if later is not None and are_one(later, wanted):
                    return True
        return False

    def _is_unfinished(self, number: int, n: int) -> bool:
        """Return True where a value has a tensor's numbers by chance, and the last step of its operator comes later.

        So a sum is a mean where all is zero or one thing is summed, and an exponential is a softmax that is one at one
        place. A step that PyTorch has after it is not its own.
        """
        made = [self.graph.calls[i].name for i in (self.calls(n) or ((), ()))[0]]
        if not aten.SEVERAL_STEPS.intersection(made):
            return False
        after = {call.name.rstrip("_") for call in self.graph.calls if n in map(self.root_of_all, call.operands)}
        values: dict[int, Bounded] = {}
        start = self._producer[number][0] + 1
        for equation in self.program.equations[start : start + _AHEAD]:
            has_parameters = any(leaf in self.program.parameters for leaf in equation.inputs)
            depends = any(each == number or each in values for each in equation.inputs)
            operands = [values.get(each, self.values.get(each)) for each in equation.inputs]
            if (
                equation.name in primitives.CONTRACTIONS
                or has_parameters
                or not depends
                or any(v is None for v in operands)
            ):
                continue
            try:
                values |= zip(equation.outputs, primitives.evaluate(equation, operands))  # type: ignore[arg-type]
            except primitives.UnknownPrimitive:
                continue
            later = values[equation.outputs[0]]
            is_step = equation.name in primitives.ELEMENTWISE and equation.name not in after
            if is_step and later.value.size == self.graph.values[n].size and self._verified(later, n) is not None:
                return True
        return False

    def function_of_ours(self, equations: Sequence[Equation], inputs: Sequence[int], output: int) -> Probed | None:
        """Return the function that equations compute, where it is one of one number."""
        data = [n for n in inputs if self.is_data(n)]
        moves = primitives.KEEPING - {"rev"} | {"broadcast_in_dim"}
        if len(data) != 1 or not equations or any(n in self.program.parameters for n in inputs):
            return None
        if any(e.name not in primitives.ELEMENTWISE and e.name not in moves for e in equations):
            return None
        shape = self.program.avals[data[0]].shape

        def of(probes: np.ndarray) -> Bounded:
            values = {n: self._constant(n) for n in inputs if n != data[0]}
            values[data[0]] = Bounded(probes.reshape(shape))
            places = {data[0]: _places(shape)}
            for equation in equations:
                values |= zip(equation.outputs, primitives.evaluate(equation, [values[n] for n in equation.inputs]))
                if followed := [places[n] for n in equation.inputs if n in places]:
                    moved = primitives.evaluate(equation, followed) if equation.name in moves else followed
                    places |= zip(equation.outputs, moved)
            return _moved_back(values[output], places.get(output))

        return probed(of, math.prod(shape))

    def _constant(self, number: int) -> Bounded:
        value = self.values[number]
        if value is None:
            raise KeyError(number)
        return value

    def function_of_theirs(self, calls: Sequence[Call], sources: Sequence[int], output: int) -> Probed | None:
        """Return the function that operators of PyTorch compute, where it is one of one number."""
        data = [n for n in sources if n in self._data]
        others = [n for n in sources if n not in self._data]
        known = aten.ELEMENTWISE | aten.KEEPING
        if len(data) != 1 or not calls or any(c.name not in known or c.name == "flip" for c in calls):
            return None
        if any(self.graph.values[n].size != 1 for n in others):
            return None
        shape = self.graph.values[data[0]].shape

        def of(probes: np.ndarray) -> Bounded:
            values = {n: Bounded.exact(self.graph.values[n]) for n in others}
            values[data[0]] = Bounded(probes.reshape(shape))
            places = {data[0]: _places(shape)}
            for call in calls:
                values |= zip(call.outputs, evaluate(call, values))
                if followed := [places[n] for n in call.operands if n in places]:
                    places |= zip(call.outputs, evaluate(call, places) if call.name in aten.KEEPING else followed)
            return _moved_back(values[output], places.get(output))

        return probed(of, math.prod(shape))

    def _verified(self, value: Bounded, n: int, number: int | None = None) -> Tie | None:
        """Return the tie of a value, that of `number`, to a tensor in the layout in which both are one."""
        array = self.graph.values[n]
        theirs, fitting = None, None
        size = value.value.size
        at = np.linspace(0, size - 1, min(_SAMPLED, size)).astype(np.int64)
        wanted = value.value.ravel()[at]
        rough = self._rough * float(np.abs(wanted).max(initial=0.0))
        places = np.unravel_index(at, value.shape) if value.shape else ...
        for layout in itertools.chain(self._own_layouts(n, number), layouts(array.shape, value.shape)):
            here = layout.to_jax(array)
            with np.errstate(all="ignore"):
                if (np.abs(here[places] - wanted) > rough + 1e-30).any():
                    continue
            if theirs is None:
                theirs = self.theirs(n)
                if theirs is None:
                    return None
            allowed = layout.to_jax(np.broadcast_to(theirs.rounding + np.asarray(theirs.function), array.shape))
            with np.errstate(all="ignore"):
                outside = np.abs(here - value.value) > allowed + value.function
            is_one = not outside.any() and (np.isfinite(here) == np.isfinite(value.value)).all()
            if not is_one and not (number is not None and n in self.late and self._is_eased(number, Tie(n, layout))):
                continue
            fitting = Tie(n, layout) if fitting is None else fitting
            if not _are_apart(layout, theirs, value):
                return Tie(n, layout, is_proved=True)
        return fitting

    def _own_layouts(self, n: int, number: int | None) -> Iterator[Layout]:
        """Yield the layouts that a tensor has for what is computed of it, where the value of `number` has its shape.

        All but the rounding of x @ x.T, or of what is computed from that, is equal in two layouts. A matrix product is
        as it is, and other values are as their operands of the same shape are.
        """
        array = self.graph.values[n]
        if number is None or self.program.avals[number].shape != array.shape:
            return
        made = self._maker.get(self.root_of_all(n), (0, None))[1]
        if made is not None and made.name in aten.MATRIX_PRODUCTS:
            yield self._own_layout(n)
        for source in self._sources(number):
            for tie in self.ties.get(source, ()):
                if (tie.layout.torch, tie.layout.shape) == (array.shape, array.shape):
                    yield tie.layout

    def _is_eased(self, number: int, tie: Tie) -> bool:
        """Return True where a gradient is a tensor within the errors of `eased`."""
        equations, inputs = self._part(number)
        found = self.eased(Part(tuple(equations), tuple(inputs), number), tie.number)
        if found is None:
            return False
        ours, theirs = found
        here = tie.layout.to_jax(self.graph.values[tie.number])
        errors = np.broadcast_to(np.asarray(theirs.rounding) + theirs.function, theirs.shape)
        with np.errstate(all="ignore"):
            return not (np.abs(here - ours.value) > tie.layout.to_jax(errors) + ours.function).any()

    def _otherwise(self, equation: Equation, number: int) -> Tie | None:
        """Try the earlier tensors that an operand has been tied to."""
        several = [n for n in equation.inputs if len(self.ties.get(n, ())) > 1]
        for n in several:
            kept = self.values[n]
            for tie in self.ties[n][-2::-1]:
                self.values[n] = Bounded.exact(tie.layout.to_jax(self.graph.values[tie.number]))
                self._evaluate(equation)
                value = self.values.get(number)
                found = None if value is None else self._search(number, value)
                if found is not None:
                    self.ties[n].append(tie)
                    return found
            self.values[n] = kept
            self._evaluate(equation)
        return None

    def _keeps(self, call: Call) -> bool:
        """Return True for an operator that keeps all elements, as PyTorch's other strides of a mean do."""
        sizes = [self.graph.values[n].size for n in (*call.operands[:1], *call.outputs[:1])]
        return call.name in aten.KEEPING or (call.name == "as_strided" and len({*sizes}) == 1)

    def root(self, number: int) -> int:
        """Return the tensor whose elements a tensor of PyTorch has, each once."""
        while number in self._maker and self._keeps(self._maker[number][1]) and number not in self.claimed:
            operands = self._maker[number][1].operands
            number = operands[0]
        return number

    def calls(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the calls that make a tensor from tied ones, in order, and what they start from; None for too many."""
        calls: set[int] = set()
        sources: set[int] = set()
        ahead = [number]
        while ahead:
            n = ahead.pop()
            if (n in self.claimed and n != number) or n not in self._maker or not self._maker[n][1].operands:
                sources.add(n)  # one that was made of nothing is a constant, as `zeros`
                continue
            place, call = self._maker[n]
            if place not in calls:
                calls.add(place)
                ahead.extend(call.operands)
                if len(calls) > _LONGEST:
                    return None
        return tuple(sorted(calls)), tuple(sorted(sources))

    def theirs(self, number: int) -> Bounded | None:
        """Return a tensor of PyTorch in float64 with its errors, from the tied ones; None where nothing is known."""
        found = self.calls(number)
        if found is None:
            return None
        places, sources = found
        return self.exact([self.graph.calls[i] for i in places], sources, number)

    def exact(self, calls: Sequence[Call], sources: Sequence[int], number: int) -> Bounded | None:
        """Return a tensor that calls make from sources, in float64 with its errors; None where nothing is known."""
        key = number, tuple(call.outputs for call in calls), tuple(sources)
        if key not in self._made:
            self._made = dict(list(self._made.items())[-3:])
            self._made[key] = evaluated(self.graph, calls, sources).get(number)
        return self._made[key]

    def eased(self, part: Part, number: int) -> tuple[Bounded, Bounded] | None:
        """Return JAX's and PyTorch's value of a gradient where one keeps an activation and the other computes it again.

        PyTorch's activations are rounded, so that one does not follow from another. Where both do not read the same
        ones, each has the error of its own operator. Gradients that only one reads have theirs. Returns None where both
        read the same.
        """
        found = self.calls(number)
        if found is None:
            return None
        ours = {n: self.ties[n][-1] for n in part.inputs if n in self.ties}
        read = {tie.number for tie in ours.values()}
        one_sided = {n for n in read ^ set(found[1]) if n in self._errors}
        if not one_sided:
            return None
        if one_sided - self.late:
            one_sided |= {n for n in read | set(found[1]) if n in self._errors and n not in self.late}
        errors = {n: self._errors[n] for n in one_sided}
        theirs = evaluated(self.graph, [self.graph.calls[i] for i in found[0]], found[1], errors).get(number)
        if theirs is None:
            return None
        values = {n: self.values[n] for n in part.inputs}
        for n, tie in ours.items():
            if tie.number in errors:
                array = self.graph.values[tie.number]
                values[n] = _of_tensor(tie.layout.to_jax(array), tie.layout.to_jax(errors[tie.number]))
        try:
            for equation in part.equations:
                operands = [values[n] for n in equation.inputs]
                if any(each is None for each in operands):
                    return None
                values |= zip(equation.outputs, primitives.evaluate(equation, operands))  # type: ignore[arg-type]
        except primitives.UnknownPrimitive:
            return None
        result = values[part.output]
        return None if result is None else (result, theirs)

    # --- ties by layers

    def _anchor(self, i: int, equation: Equation) -> Iterator[Region]:
        """Tie what a layer of JAX reads to what PyTorch's layer with the same parameters reads."""
        leaves = {leaf for n in equation.inputs for leaf in self._leaves.get(n, ())}
        data = [n for n in equation.inputs if self.is_data(n)]
        if not leaves and len(data) == 2:
            yield from self._anchor_of_kernel(i, equation, data)
        if not leaves or len(data) != 1:
            return
        place = self._place_of(equation)
        if place is None or place in self._visited:
            return
        call = self.graph.calls[place]
        if call.name in NORMALIZATIONS:
            self._visited.add(place)
        operand = next(n for n in call.operands if n in self._data)
        yield from self._meet(data[0], operand, i, call, equation)

    def _place_of(self, equation: Equation) -> int | None:
        """Return the place of the operator of PyTorch that takes the same parameters; None where it is not one."""
        leaves = {leaf for n in equation.inputs for leaf in self._leaves.get(n, ())}
        names = {name for leaf in leaves for name in self.torch_names.get(leaf, ())}
        places = {place for name in names for place in self._users.get(name, ())}
        is_late = not self._late.isdisjoint(equation.inputs)
        is_sum = equation.name in primitives.CONTRACTIONS and not self._is_scaling(equation)
        kinds = aten.CONTRACTIONS if is_sum else NORMALIZATIONS
        places = {
            p
            for p in places
            if self.graph.calls[p].name in kinds and self.late.isdisjoint(self.graph.calls[p].outputs) != is_late
        }
        return places.pop() if len(places) == 1 else None

    def _anchor_of_kernel(self, i: int, equation: Equation, data: Sequence[int]) -> Iterator[Region]:
        """Tie the incoming gradient of a kernel's gradient: the activation that is its other factor tells the layer."""
        late, early = ([n for n in data if (n in self._late) is is_late] for is_late in (True, False))
        sums = (*primitives.CONTRACTIONS, "outer_product", "depthwise_conv_kernel_gradient")
        if equation.name not in sums or not late or not early:
            return
        activation = self._plain(early[0])
        if activation not in self.ties:
            return
        wanted = self.root_of_all(self.ties[activation][-1].number)
        found = [
            (call, [n for n in call.operands if n in self.late])
            for call in self.graph.calls
            if call.name in aten.CONTRACTIONS and any(self.root_of_all(n) == wanted for n in call.operands)
        ]
        found = [(call, gradients) for call, gradients in found if len(gradients) == 1]
        if len(found) == 1:
            yield from self._meet(late[0], found[0][1][0], i, found[0][0], equation)

    def _is_scaling(self, equation: Equation) -> bool:
        """Return True for a depthwise convolution of one tap: a product with one number per channel."""
        geometry = equation.params.get("geometry")
        return geometry is not None and math.prod(geometry.kernel_size) == 1 and geometry.multiplier == 1

    def _meet(
        self, number: int, given: int, before: int, call: Call | None = None, equation: Equation | None = None
    ) -> Iterator[Region]:
        """Tie a value of JAX, or one that it comes from, to a tensor of PyTorch that takes the same place."""
        roots = [self.root(given)]
        while (
            (made := self._maker.get(roots[-1])) is not None
            and made[1].name in ("constant_pad_nd", "pad")
            and roots[-1] not in self.claimed
        ):
            roots.append(self.root(made[1].operands[0]))
        meeting = None
        dominators = list(self._dominators(number))
        if call is not None and call.name in NORMALIZATIONS:
            # The scale may follow the statistics, as in (x - m) / s * scale: x is read already. If all scales are 1 and
            # all biases 0, the result is there before them.
            read = {*roots, *call.outputs}
            if any(tie.number in read for n in dominators for tie in self.ties.get(n, ())):
                return
        for value in dominators:
            for wanted in roots:
                if math.prod(self.program.avals[value].shape) == self.graph.values[wanted].size:
                    meeting = value, wanted
                    break
            made_by = self._producer.get(value)
            is_layer = made_by is not None and made_by[1].name in primitives.CONTRACTIONS
            if meeting or is_layer or (call is not None and call.name not in NORMALIZATIONS):
                break  # what a layer computes stands for nothing before the layer
        if meeting is None:
            if equation is not None:
                is_norm = call is not None and call.name in NORMALIZATIONS
                value = self._normalized(dominators) if is_norm else self._plain(number)
                self._unlike.setdefault(value, (roots[-1], self._layer_of(equation)))
            return
        value, wanted = meeting
        if any(tie.number == wanted or self._same(tie.number, wanted) for tie in self.ties.get(value, ())[-1:]):
            return
        older = next((tie for tie in self.ties.get(value, ()) if tie.number == wanted), None)
        tie = older or self._fitting(value, wanted, before, call, equation)
        if tie is None:
            return
        here = self._constant(value).value if wanted in self.late and value in self.ties else None
        if older is None and here is not None and np.array_equal(here, tie.layout.to_jax(self.graph.values[wanted])):
            self.seen.update((self.calls(wanted) or ((), ()))[0])
        elif older is None:
            wiring = self._wired_otherwise(value, wanted, before)
            is_equal = self._is_right(value, tie)
            if value not in self.ties and not is_equal:
                yield from self._unlike_before(self._part(value)[0])
            if not wiring and not is_equal:
                yield from self._split(value, tie, before)
                is_equal = self._is_right(value, tie)
            is_equal = is_equal and not wiring
            reader = "" if equation is None else self._layer_of(equation)
            yield dataclasses.replace(self._region(value, tie, is_equal, wiring), reader=reader)
        self._tie(value, tie)
        self._again(value, before)

    def _normalized(self, dominators: Sequence[int]) -> int:
        """Return which of some values, the last one first, a norm reads: it reads that for its statistics, too."""
        made_by = (self._producer[n][1].name if n in self._producer else "" for n in dominators)
        layer = next((place for place, name in enumerate(made_by) if name in primitives.CONTRACTIONS), 0)
        several = (n for n in dominators[layer::-1] if len(self._readers[n]) > 1)
        return next(several, dominators[0])

    def _layer_of(self, equation: Equation) -> str:
        """Return the path of the layer whose parameters an equation takes."""
        leaves = sorted(leaf for n in equation.inputs for leaf in self._leaves.get(n, ()))
        return leaves[0].rpartition(".")[0] if leaves else equation.scope

    def _is_right(self, number: int, tie: Tie) -> bool:
        """Return True where a value of JAX that is not tied is a tensor of PyTorch."""
        value = self.values.get(number)
        return number not in self.ties and value is not None and self._is_tensor(value, tie)

    def _is_tensor(self, value: Bounded, tie: Tie) -> bool:
        """Return True where a value is a tensor of PyTorch in this layout, to within the errors of both."""
        if value.value.dtype != np.float64:
            return np.array_equal(tie.layout.to_jax(self.graph.values[tie.number]), value.value)
        theirs = self.theirs(tie.number)
        if theirs is None:
            return False
        here = tie.layout.to_jax(self.graph.values[tie.number])
        allowed = tie.layout.to_jax(np.broadcast_to(theirs.rounding + np.asarray(theirs.function), theirs.shape))
        rough = 2.0**-9 * float(np.abs(here).max(initial=0.0)) + 1e-30  # greater errors say nothing
        with np.errstate(all="ignore"):
            is_near = np.abs(here - value.value) <= np.minimum(allowed + value.function, rough)
        return bool((is_near | (~np.isfinite(here) & ~np.isfinite(value.value))).all())

    def _split(self, value: int, tie: Tie, before: int) -> Iterator[Region]:
        """Find one wrong step in a region whose other steps are right, and yield it.

        The step ends at a value of JAX and at a tensor of PyTorch, from which JAX's other equations give PyTorch's
        result.
        """
        equations, inputs = self._part(value)
        found = self.calls(tie.number) if tie.number not in self.claimed else ((), (tie.number,))
        if found is None or not equations:
            return
        places, sources = found
        late = [i for i in places if not self.late.isdisjoint(self.graph.calls[i].outputs)]
        if tie.number in self.late and sum(self.is_core(self.graph.calls[i]) for i in late) < 2:
            return  # one gradient has many terms, any of which could be made to fit
        tied = [n for n in inputs if n in self.ties]
        theirs = [n for n in sources if n in self._data]
        calls = [self.graph.calls[i] for i in places if self.is_core(self.graph.calls[i])]
        theirs += [n for call in calls for n in _results(call)]
        ours = [*tied, *(n for e in equations for n in e.outputs if n != value)]
        ours = [n for n in ours if self.is_data(n) and _is_float(self.values.get(n))]
        if tie.number in self.late:
            theirs, ours = [n for n in theirs if n in self.late], [n for n in ours if n in self._late]
        found_step: tuple[int, Tie] | None = None
        for middle, n in itertools.islice(self._pairs(ours, theirs, tie.number), self._tries(equations)):
            if found_step is not None and (
                found_step[1].number != n or not _is_elementwise(equations, found_step[0], middle)
            ):
                continue
            shape = self.program.avals[middle].shape
            fitting = sorted(itertools.islice(layouts(self.graph.values[n].shape, shape), 24), key=Layout.is_reshaped)
            for layout in fitting[:3]:
                if self._gives(middle, Tie(n, layout), equations, value, tie):
                    found_step = middle, Tie(n, layout)  # the last value that may be this tensor, as in relu(relu(x))
                    break
        if found_step is not None:
            yield self._region(*found_step, False)
            self._tie(*found_step)
            self._again(found_step[0], before)

    def _pairs(self, ours: Sequence[int], theirs: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
        """Yield values of JAX with tensors of PyTorch of their size, the first ones of both first."""
        places = itertools.product(range(len(ours)), range(len(theirs)))
        for i, j in sorted(places, key=sum):
            middle, n = ours[i], theirs[j]
            known = self.ties[middle][-1].number if middle in self.ties else None
            size = math.prod(self.program.avals[middle].shape)
            if n not in (end, known) and self.graph.values[n].dtype.kind == "f" and self.graph.values[n].size == size:
                yield middle, n

    def _tries(self, equations: Sequence[Equation]) -> int:
        """Return how many tries of these equations take a few seconds."""
        elements = sum(math.prod(e.aval.shape) for e in equations)
        return max(30, min(1000, 10**9 // (elements + 20000 * len(equations))))

    def _gives(self, middle: int, new: Tie, equations: Sequence[Equation], value: int, tie: Tie) -> bool:
        """Return True where a region gives PyTorch's result once one of its values is another tensor."""
        values = dict(self.values)
        values[middle] = Bounded.exact(new.layout.to_jax(self.graph.values[new.number]))
        changed = {middle}
        for equation in equations:
            if changed & set(equation.inputs) and middle not in equation.outputs:
                operands = [values.get(n) for n in equation.inputs]
                if any(each is None for each in operands):
                    return False
                try:
                    values |= zip(equation.outputs, primitives.evaluate(equation, operands))  # type: ignore[arg-type]
                except primitives.UnknownPrimitive:
                    return False
                changed |= set(equation.outputs)
        result = values.get(value)
        if value not in changed or result is None:
            return False
        kept = self.claimed.get(new.number)
        self.claimed.setdefault(new.number, middle)
        try:
            return self._is_tensor(result, tie)
        finally:
            if kept is None:
                del self.claimed[new.number]

    def _wired_otherwise(self, value: int, wanted: int, before: int) -> str:
        """Return which tensors are read, where PyTorch's is an earlier one or comes from layers that JAX runs later."""
        if value not in self.ties:
            return ""
        calls = self.calls(wanted)
        later = {
            name
            for equation in self.program.equations[before + 1 :]
            for n in equation.inputs
            for leaf in self._leaves.get(n, ())
            for name in self.torch_names.get(leaf, ())
        }
        ahead = {
            name
            for place in (calls[0] if calls else ())
            for n in self.graph.calls[place].operands
            for name in self._torch_names.get(n, ())
        }
        if wanted not in self.claimed and calls is not None and not ahead & later:
            return ""
        return self._read_otherwise(value, wanted)

    def described(self, number: int) -> str:
        """Name a tensor of PyTorch by the layer that made it."""
        while number in self._maker and self._maker[number][1].name in aten.MOVES and self._maker[number][1].operands:
            number = self._maker[number][1].operands[0]
        return "the input" if number not in self._maker else layer_of(self._maker[number][1], self._torch_names)

    def _same(self, one: int, other: int) -> bool:
        """Return True where two tensors are one, moved."""
        return self.root_of_all(one) == self.root_of_all(other)

    def root_of_all(self, number: int) -> int:
        while number in self._maker and self._keeps(self._maker[number][1]):
            number = self._maker[number][1].operands[0]
        return number

    def _dominators(self, number: int) -> Iterator[int]:
        """Yield the values through which all flows that a value depends on, since the last ties; itself first."""
        frontier = {self._plain(number)}
        while frontier:
            if len(frontier) == 1:
                yield next(iter(frontier))
            last = max(frontier, key=lambda n: self._producer[n][0] if n in self._producer else -1)
            if last in self.ties or last not in self._producer:
                return
            frontier.discard(last)
            frontier |= {self._plain(n) for n in self._producer[last][1].inputs if self.is_data(n)}

    def _plain(self, number: int) -> int:
        """Return the value that a value is, moved, padded or converted."""
        while number not in self.ties and number in self._producer:
            equation = self._producer[number][1]
            if equation.name not in (*primitives.KEEPING, "pad", "convert_element_type"):
                break
            number = equation.inputs[0]
        return number

    def _fitting(
        self, value: int, wanted: int, before: int, call: Call | None, equation: Equation | None
    ) -> Tie | None:
        """Return the tie in the layout with which the layer computes PyTorch's result, or else the nearest one."""
        array = self.graph.values[wanted]
        shape = self.program.avals[value].shape
        found = [Tie(wanted, each) for each in itertools.islice(layouts(array.shape, shape), 130)]
        if len(found) < 2:
            return found[0] if found else None
        now = self.values.get(value)
        if now is not None and np.isfinite(now.value).all():
            with np.errstate(all="ignore"):
                distances = [float(np.abs(tie.layout.to_jax(array) - now.value).sum()) for tie in found]
            order = np.argsort(distances, kind="stable")
            is_near = distances[order[0]] < 2.0**-7 * float(np.abs(array).sum())
            found = [found[k] for k in order] if is_near else found
        if call is None or equation is None:
            return found[0]
        kept = dict(self.values)
        try:
            for tie in found[:24]:
                self.values[value] = Bounded.exact(tie.layout.to_jax(array))
                self._again(value, before)
                for following in self.program.equations[before : before + 4]:  # a bias may follow
                    if not any(n in self.ties for n in following.outputs):
                        self._evaluate(following)
                    result = self.values.get(following.outputs[0])
                    size = self.graph.values[call.outputs[0]].size
                    is_full = result is not None and _is_float(result) and result.value.size == size
                    if result is not None and is_full and self._verified(result, call.outputs[0]):
                        return tie
        finally:
            self.values = kept
        return found[0]

    def _again(self, value: int, before: int) -> None:
        """Evaluate what depends on a value again, up to an equation."""
        changed = {value}
        start = self._producer[value][0] + 1 if value in self._producer else 0
        for equation in self.program.equations[start:before]:
            is_read = changed & set(equation.inputs) and not self._is_over(equation)
            if is_read and not any(n in self.ties for n in equation.outputs):
                self._evaluate(equation)
                changed |= set(equation.outputs)

    # --- regions

    def _sources(self, number: int) -> list[int]:
        """Return the tied values that a value comes from."""
        return self._part(number)[1]

    def _part(self, number: int) -> tuple[list[Equation], list[int]]:
        """Return the equations that make a value from tied ones, parameters and constants, and what they take."""
        places: set[int] = set()
        inputs: dict[int, None] = {}
        ahead = [number]
        while ahead:
            n = ahead.pop()
            if (n in self.ties and n != number) or n not in self._producer:
                inputs[n] = None
                continue
            if n == number and n in self.ties:
                inputs[n] = None
                continue
            place, equation = self._producer[n]
            if place not in places:
                places.add(place)
                ahead.extend(equation.inputs)
        return [self.program.equations[i] for i in sorted(places)], list(inputs)

    def _region(self, number: int, tie: Tie, is_equal: bool, wiring: str = "", is_met: bool = True) -> Region:
        equations, inputs = self._part(number)
        operands = tuple(self._operand(n) for n in inputs)
        is_known = tie.number in self.claimed or wiring
        found = ((), (tie.number,)) if is_known else self.calls(tie.number)
        places, sources = found or ((), ())
        self.seen.update(places)
        part = Part(tuple(equations), tuple(inputs), number)
        calls = tuple(self.graph.calls[i] for i in places)
        ours, unknown = self.values.get(number), self._unknown.get(number, "")
        region = Region(part, operands, ours, unknown, calls, tuple(sources), tie, is_equal, wiring, is_met)
        self.region_of.setdefault(number, dataclasses.replace(region, operands=(), ours=None))
        return region

    def _operand(self, number: int) -> np.ndarray:
        if number in self.program.constants:
            return np.asarray(self.program.constants[number])
        tie = self.ties[number][-1]
        array = tie.layout.to_jax(self.graph.values[tie.number])
        dtype = self.program.avals[number].dtype
        is_own = array.dtype.kind == "f" and self.graph.lower.get(tie.number) != np.dtype(dtype).name
        return array if is_own else array.astype(dtype, copy=False)


def _results(call: Call) -> tuple[int, ...]:
    """Return the results of an operator, without the statistics that a normalization also returns."""
    return call.outputs[:1] if call.name in NORMALIZATIONS else call.outputs


def _is_elementwise(equations: Sequence[Equation], first: int, last: int) -> bool:
    """Return True where the equations from one value to another are elementwise."""
    needed, reached = {last}, {first}
    for equation in reversed(equations):
        if needed & set(equation.outputs):
            needed |= set(equation.inputs)
    for equation in equations:
        if reached & set(equation.inputs) and needed & set(equation.outputs):
            if equation.name not in primitives.ELEMENTWISE | primitives.KEEPING:
                return False
            reached |= set(equation.outputs)
    return True


def _places(shape: tuple[int, ...]) -> Bounded:
    """Return an array that holds the place of each of its elements."""
    return Bounded.exact(np.arange(math.prod(shape), dtype=np.float64).reshape(shape))


def _moved_back(y: Bounded, places: Bounded | None) -> Bounded:
    """Return the elements of a result where those were that they come from; as they are where each is of several."""
    if places is None or places.shape != y.shape:
        return y
    back = np.argsort(places.value, axis=None)
    errors = (np.broadcast_to(np.asarray(each, np.float64), y.shape).ravel()[back] for each in (y.rounding, y.function))
    return Bounded(y.value.ravel()[back], *errors)


def _is_float(value: Bounded | None) -> bool:
    return value is not None and value.value.dtype == np.float64


def layer_of(call: Call, names: Mapping[int, Sequence[str] | frozenset[str]]) -> str:
    """Return the path of the layer whose parameters a call takes, or else its operator and the module that ran it."""
    own = [name for n in call.operands for name in names.get(n, ())]
    if own:
        return sorted(own)[0].rpartition(".")[0] or sorted(own)[0]
    return f"{call.name} in {call.module or 'the model itself'}"


def evaluated(
    graph: TorchGraph, calls: Sequence[Call], sources: Sequence[int], errors: Mapping[int, np.ndarray] | None = None
) -> dict[int, Bounded]:
    """Return the results of calls in float64 with their errors; results of which nothing is known are left out.

    Sources are taken for exact, but for those with `errors`.
    """
    errors = {} if errors is None else errors
    values = {n: _of_tensor(graph.values[n], errors.get(n)) for n in sources}
    for call in calls:
        if all(n in values for n in call.operands):
            try:
                values |= zip(call.outputs, evaluate(call, values))
                values |= {
                    n: _rounded(graph, call, n, values[n]) for n in call.outputs if n in graph.lower and n in values
                }
                chosen = (n for n in call.outputs if n not in values and graph.values[n].dtype.kind == "i")
                values |= {n: Bounded.exact(graph.values[n]) for n in chosen}  # the places of maxima
            except aten.UnknownOperator:
                if all(values[n].value.dtype.kind in "iub" for n in call.operands):  # nothing is rounded
                    values |= {n: Bounded.exact(graph.values[n]) for n in call.outputs}
    return values


def _rounded(graph: TorchGraph, call: Call, number: int, y: Bounded) -> Bounded:
    """Return a result that PyTorch computes in float32 and rounds to a lower dtype; attention also rounds weights."""
    u = UNITS[graph.lower[number]]
    size = np.abs(y.value) + np.asarray(y.rounding)
    if "attention" in call.name:
        size = size + 4 * max(float(np.abs(graph.values[n]).max(initial=0.0)) for n in call.operands)
    return Bounded(y.value, np.asarray(y.rounding) + u * size + 2.0**-126, y.function)


def _are_apart(layout: Layout, theirs: Bounded, ours: Bounded) -> bool:
    """Return True where both are other functions in a layout: further apart than the errors of float64."""
    function = layout.to_jax(np.broadcast_to(np.asarray(theirs.function, np.float64), theirs.shape))
    with np.errstate(all="ignore"):
        return bool((np.abs(layout.to_jax(theirs.value) - ours.value) > function + ours.function).any())


def _of_tensor(array: np.ndarray, errors: np.ndarray | None) -> Bounded:
    made = Bounded.exact(array)
    return made if errors is None else Bounded(made.value, errors, errors)


def parameter_names(
    parameters: Mapping[str, Any], graph: TorchGraph, moved: Sequence[tuple[str, str]] | None
) -> dict[str, list[str]]:
    """Return PyTorch's names for the parameters of JAX by their paths.

    Args:
      parameters: of JAX's model, by path.
      graph: PyTorch's model.
      moved: pairs of PyTorch's and JAX's names, as a manifest has them; None: parameters with the same numbers, in any
        layout.
    """
    names: dict[str, list[str]] = collections.defaultdict(list)
    if moved is not None:
        for torch, flax in moved:
            names[flax].append(torch)
        return names
    theirs: dict[Any, list[str]] = collections.defaultdict(list)
    for layer, arrays in graph.layers.items():
        for own, array in arrays.items():
            theirs[_content(array)].append(f"{layer}.{own}" if layer else own)
    for path, array in parameters.items():
        if primitives.is_numeric(array.dtype):
            names[path] = theirs.get(_content(np.asarray(array)), [])
    return names


def _content(array: np.ndarray) -> tuple[int, bytes]:
    """Return what two arrays share that hold the same numbers in any layout."""
    return array.size, hashlib.sha256(np.sort(array, axis=None).astype(np.float64).tobytes()).digest()
