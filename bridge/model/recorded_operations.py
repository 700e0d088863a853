"""Operators of a recorded graph as operations, channels last, and both frameworks' runs of them on other numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge.diagnosis import Comparison
from bridge.model.alignment import Alignment, Layout, Region, layer_of, layouts
from bridge.model.explanations import Replayed, explained
from bridge.model.known_orders import KnownOrders
from bridge.model.operations import Operation
from bridge.model.orders import Run
from bridge.model.torch_graph import Call, Ref

#: Operators without parameters, and what they are called.
_PLAIN = {"hardswish": "hard swish", "hardsigmoid": "hard sigmoid", "mean": "mean"}

#: The longest sums whose orders are revealed: masks for more terms take minutes.
_MOST_TERMS = 1536

_BATCH_NORM = {name: name for name in ("weight", "bias", "running_mean", "running_var")}

#: The arguments of PyTorch's operators by the names of a layer's parameters.
_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "convolution": {"weight": "weight", "bias": "bias"},
    "addmm": {"weight": "mat2", "bias": "self"},
    "mm": {"weight": "mat2"},
    "native_batch_norm": _BATCH_NORM,
    "_native_batch_norm_legit_no_training": _BATCH_NORM,
}


def operation_of(alignment: Alignment, call: Call) -> Operation | None:
    """Return an operator as an operation; None for one whose orders and forms are not known.

    These are convolutions of images, fully connected layers, batch norms, means over images, hard swish and hard
    sigmoid.
    """
    kind = _kind(alignment, call)
    settings: dict[str, Any] = {}
    if not kind:
        return None
    x = _value(alignment, call.get("input", call.get("mat1", call.get("self"))))
    names = _PARAMETERS.get(call.name, {})
    given = {own: call.get(argument) for own, argument in names.items() if isinstance(call.get(argument), Ref)}
    parameters = {own: _value(alignment, value) for own, value in given.items()}
    if kind == "convolution":
        for name in ("stride", "padding", "dilation"):
            settings[name] = [*call.get(name)] * (2 if len(call.get(name)) == 1 else 1)
        settings["groups"] = call.get("groups")
    elif kind == "linear":
        parameters["weight"] = np.ascontiguousarray(parameters["weight"].T)
    elif kind == "batch norm":
        settings["eps"] = call.get("eps")
    output = alignment.graph.values[call.outputs[0]]
    known = alignment.graph.runs.get(call.outputs[0])
    return Operation(
        kind,
        layer_of(call, alignment.names_of_values),
        (_channels_last(x),),
        output.reshape(output.shape[:2]) if kind == "mean" else _channels_last(output),
        parameters,
        settings,
        layout="" if known is None else known.layout,
        run=None if known is None else known.run,
    )


def _kind(alignment: Alignment, call: Call) -> str:
    """Return the kind of an operator whose operands are as an `Operation` has them; nothing for another."""
    data = alignment.data_of_torch
    x = _value(alignment, call.get("input", call.get("mat1", call.get("self"))))
    if x is None or x.dtype != np.float32 or alignment.graph.lower:
        return ""
    if call.name == "convolution":
        is_known = x.ndim == 4 and not call.get("transposed") and call.get("groups") in (1, x.shape[1])
        return "convolution" if is_known else ""
    if call.name in ("addmm", "mm"):
        is_layer = call.get("mat2").number not in data and call.get("alpha", 1) == call.get("beta", 1) == 1
        bias = _value(alignment, call.get("self")) if call.name == "addmm" else None
        return "linear" if is_layer and (bias is None or bias.ndim == 1) else ""
    if call.name == "mean":
        axes = {axis % x.ndim for axis in call.get("dim") or ()}
        return "mean" if x.ndim == 4 and axes == {2, 3} else ""
    if call.name in _PARAMETERS:
        return "" if call.get("training") or call.get("running_mean") is None else "batch norm"
    return _PLAIN.get(call.name, "")


def _value(alignment: Alignment, argument: Any) -> Any:
    return alignment.graph.values[argument.number] if isinstance(argument, Ref) else None


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, 1, -1) if array.ndim > 2 else array)


def replayed(
    alignment: Alignment, region: Region, call: Call, ours: np.ndarray, found: Comparison, known: KnownOrders
) -> tuple[Comparison, Mapping[str, Replayed]]:
    """Return EXPLAINED where replays in the orders of both frameworks reproduce both results, else `found`.

    Args:
      alignment: of both models.
      region: one whose only operator of PyTorch is `call`.
      call: the operator.
      ours: JAX's result.
      found: its comparison with PyTorch's.
      known: orders that were revealed before.
    """
    operation = operation_of(alignment, call)
    is_whole = alignment.root_of_all(region.tie.number) == alignment.root_of_all(call.outputs[0])
    if operation is None or not is_whole or ours.size != operation.output.size:
        return found, {}
    if operation.kind in ("convolution", "linear") and operation.parameters["weight"][0].size > _MOST_TERMS:
        return found, {}
    array = region.tie.layout.to_torch(ours)
    array = _channels_last(array.reshape(alignment.graph.values[call.outputs[0]].shape))
    runs = {"JAX": _run_of_jax(alignment, region, call, operation), "PyTorch": operation.run}
    return explained(operation, runs, array.reshape(operation.output.shape), found, known)


def _run_of_jax(alignment: Alignment, region: Region, call: Call, operation: Operation) -> Run | None:
    """Return JAX's equations as a function of other numbers; None where a parameter or the input is not found.

    Of a normalization it takes none, and returns the factor of x: its result for x = 1, a mean of 0 and no bias.
    """
    part, program = region.part, alignment.program
    data = [n for n in part.inputs if alignment.is_data(n)]
    places = {
        own: _place(alignment, region, call, argument) for own, argument in _PARAMETERS.get(call.name, {}).items()
    }
    if len(data) != 1 or any(places[name] is None for name in operation.parameters):
        return None
    layout = alignment.ties[data[0]][-1].layout
    kept = {n: np.asarray(program.constants[n]) for n in part.inputs if n not in data}

    def result(values: Mapping[int, np.ndarray]) -> np.ndarray:
        y = part.run(*({**kept, **values}[n] for n in part.inputs))
        shape = alignment.graph.values[call.outputs[0]].shape
        return _channels_last(region.tie.layout.to_torch(y).reshape(shape))

    def of_x(x: np.ndarray) -> np.ndarray:
        wanted = alignment.graph.values[alignment.ties[data[0]][-1].number]
        x = np.moveaxis(x, -1, 1) if x.ndim > 2 else x
        if x.size != wanted.size:  # PyTorch padded it beforehand: the same number everywhere
            x = np.full(wanted.shape, x.flat[0], x.dtype)
        return layout.to_jax(np.ascontiguousarray(x).reshape(wanted.shape))

    def run(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
        values = {data[0]: of_x(x)}
        for name, array in (("weight", weight), ("bias", bias)):
            place = places.get(name)
            if array is not None and place is not None:
                values[place[0]] = place[1].to_jax(np.asarray(array))
        return result(values)

    def factor() -> np.ndarray:
        values = {data[0]: np.ones(layout.shape, np.float32)}
        for name in ("running_mean", "bias"):
            if (place := places.get(name)) is not None:
                values[place[0]] = np.zeros_like(kept[place[0]])
        return result(values).reshape(-1, operation.output.shape[-1])[0]

    return factor if operation.kind == "batch norm" else run


def _place(alignment: Alignment, region: Region, call: Call, argument: str) -> tuple[int, Layout] | None:
    """Return the number of JAX's parameter for one of PyTorch's, and its layout; None where there is none of it."""
    value = call.get(argument)
    names = alignment.names_of_values.get(value.number, frozenset()) if isinstance(value, Ref) else frozenset()
    for n in region.part.inputs:
        path = alignment.program.parameters.get(n)
        for name in names & set(alignment.torch_names.get(path, ())) if path is not None else ():
            layer, _, own = name.rpartition(".")
            theirs, ours = alignment.graph.layers[layer][own], np.asarray(alignment.program.constants[n])
            for layout in itertools.islice(layouts(theirs.shape, ours.shape), 130):
                if ours.size == theirs.size and np.array_equal(layout.to_jax(theirs), ours):
                    return n, layout
    return None
