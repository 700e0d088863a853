"""Every operator that a PyTorch model called, as a graph of arrays in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

#: The unit roundoff of the dtypes below float32.
UNITS: Mapping[str, float] = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Ref:
    """An argument that is a tensor: the number of its value."""

    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One operator.

    Attributes:
      name: of the operator in `aten`, without overload and trailing underscore.
      arguments: by name; tensors as `Ref`, also in lists.
      outputs: numbers of its results.
      module: the path of the module that was running.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[int, ...]
    module: str

    @property
    def operands(self) -> tuple[int, ...]:
        """The numbers of all its tensors, in the order of the arguments."""
        return tuple(ref.number for ref in _refs(self.arguments.values()))

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)


@dataclasses.dataclass(frozen=True)
class Rerun:
    """An operator on other numbers of the same shapes, as `Operation.run` is, and the layout of its input in memory."""

    run: Callable[..., np.ndarray]
    layout: str


def _refs(values: Any) -> Iterator[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _refs(value)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchGraph:
    """A run of a model.

    Attributes:
      calls: in the order of running.
      values: every tensor, in PyTorch's layout.
      parameters: the name of each parameter and buffer, by its number.
      inputs, outputs: the numbers of the data and of the results.
      layers: of a layer by its path: its parameters and buffers by name, in PyTorch's layout.
      results: the name of each output.
      incoming: the gradient of each floating-point output by its name, from which the backward pass starts.
      gradients: the gradient of each parameter by its name; without those that the outputs do not depend on.
      lower: the dtype of each value below float32, one of `UNITS`; `values` has it in float32.
      runs: some operators by their first result, to be run on other numbers.
    """

    calls: Sequence[Call]
    values: Mapping[int, np.ndarray]
    parameters: Mapping[int, str]
    inputs: Sequence[int]
    outputs: Sequence[int]
    layers: Mapping[str, Mapping[str, np.ndarray]]
    results: Sequence[str] = ()
    incoming: Mapping[str, int] = dataclasses.field(default_factory=dict)
    gradients: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lower: Mapping[int, str] = dataclasses.field(default_factory=dict)
    runs: Mapping[int, Rerun] = dataclasses.field(default_factory=dict)


def without_repeats(calls: Sequence[Call], values: Mapping[int, np.ndarray]) -> tuple[list[Call], dict[int, int]]:
    """Return the calls without those that repeat an earlier one, and for each of their results the earlier number.

    A call repeats another that has the same name, the same arguments and results of the same bits: `q(n(x)) + k(n(x))`
    computes n(x) twice, and a port may compute it once.
    """
    first: dict[str, Call] = {}
    same: dict[int, int] = {}
    kept = []
    for call in calls:
        call = dataclasses.replace(call, arguments={k: _renumbered(v, same) for k, v in call.arguments.items()})
        earlier = first.setdefault(f"{call.name} {sorted(call.arguments.items())!r}", call)
        pairs = list(zip(call.outputs, earlier.outputs))
        if call.outputs and earlier is not call and all(_equal(values[a], values[b]) for a, b in pairs):
            same |= dict(pairs)
        else:
            kept.append(call)
    return kept, same


def _renumbered(value: Any, same: Mapping[int, int]) -> Any:
    if isinstance(value, Ref):
        return Ref(same.get(value.number, value.number))
    if type(value) in (list, tuple):
        return type(value)(_renumbered(each, same) for each in value)
    return value


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
