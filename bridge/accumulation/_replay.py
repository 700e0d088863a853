"""Recompute an output in NumPy by walking the revealed trees."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import numpy as np

from bridge.accumulation.arithmetic import Accumulator, flush
from bridge.accumulation.order import AccumulationOrder, Rounding
from bridge.accumulation.tree import BIAS, Leaf, Tree
from bridge.case import Case
from bridge.numerics import FLOAT32, FLOAT64, cast, exact, format_of, round_to, truncate_to

#: Elements at a time: a handful of float64 arrays of them stay in a core's cache.
_BLOCK = 1 << 15

#: Trees between two lines of progress.
_TOLD = 32

_log = logging.getLogger("bridge")

#: The operands of a leaf, which broadcast to one shape: (x, w) of a tap; of the bias (b, 1).
Operands = Callable[[Leaf | None], tuple[np.ndarray, np.ndarray]]


def replay(order: AccumulationOrder, case: Case) -> np.ndarray:
    """What the implementation computes for this case, if its order is as revealed: bit for bit.

    Trees are walked node by node, for blocks of output elements. Fused multiply-adds round once, as the hardware's do;
    subnormal numbers are flushed where the implementation's were. A zero that a fused multiply-add underflows to, in a
    sum that starts from zero, may have the other sign.

    Args:
      order: what `reveal` returned for the same geometry and dtype.
      case: any data.

    Returns:
      The output `(*batch, *output_spatial, C*M)` of the case's dtype; NaN for elements without a tree.

    Raises:
      ValueError: the case's geometry or dtype is not the one that was revealed.
    """
    if case.geometry != order.geometry or case.dtype != order.dtype:
        raise ValueError(
            f"`case` is {case.dtype} {case.geometry}, expected what was revealed: {order.dtype} {order.geometry}"
        )
    if order.trees and (case.bias is None) == _has_bias(order):
        given, expected = ("no bias", "one") if case.bias is None else ("a bias", "none")
        raise ValueError(f"`case` has {given}, expected what was revealed: {expected}")
    case = _rounded_inputs(order, case)
    y = np.full(case.geometry.output_shape, np.nan, case.dtype)
    with np.errstate(all="ignore"):
        for label, tree in enumerate(order.trees):
            if label and not label % _TOLD:
                _log.info("replaying %s: order %d of %d", order.implementation, label, len(order.trees))
            if tree.kind == "exact":
                np.copyto(y, exact(case).value, where=order.labels == label)
                continue
            for at, operands in _blocks(order.labels == label, case):
                accumulated = _walk(tree, operands, order)
                total = _output(accumulated, order)
                # A zero start makes -0 a +0; what only rounds to zero afterwards keeps its sign, unless it is flushed.
                positive = order.zero_start[at] & ((accumulated == 0) | ("output" in order.fingerprint.flushed))
                y[at] = np.where(positive, total + total.dtype.type(0), total)
        if order.fingerprint.padding_taps == "multiplied":
            _multiply_padding(y, case)
    return y


def _has_bias(order: AccumulationOrder) -> bool:
    return any(BIAS in tree.leaves for tree in order.trees)


def _rounded_inputs(order: AccumulationOrder, case: Case) -> Case:
    """The case with its inputs as they are when they are multiplied."""
    fingerprint, dtype = order.fingerprint, case.dtype

    def prepared(array: np.ndarray, rounding: Rounding | None, name: str) -> np.ndarray:
        if rounding is not None and rounding != Rounding(format_of(dtype)):
            to = truncate_to if rounding.toward_zero else round_to
            array = to(array.astype(np.float64), rounding.format).astype(dtype)
        fmt = rounding.format if rounding else format_of(dtype)
        return flush(array, fmt) if name in fingerprint.flushed else array

    return case.replace(
        x=prepared(case.x, fingerprint.x, "x"),
        kernel=prepared(case.kernel, fingerprint.kernel, "kernel"),
        bias=None if case.bias is None else prepared(case.bias, fingerprint.kernel, "kernel"),
    )


def _walk(tree: Tree, operands: Operands, order: AccumulationOrder) -> np.ndarray:
    """The sum by one tree, before it is rounded to the output's dtype."""
    fingerprint = order.fingerprint
    rounding = fingerprint.accumulator or default_accumulator(order.dtype)
    flushes = "output" in fingerprint.flushed
    add_up = Accumulator(rounding.format, rounding.toward_zero, flushes)
    narrower = fingerprint.products == "rounded" and rounding.format.precision > format_of(order.dtype).precision
    multiply = Accumulator(format_of(order.dtype), flushes=flushes) if narrower else add_up
    value: dict[Tree, np.ndarray] = {}
    for node in tree.nodes():
        below = [value.pop(child) for child in node.children]
        match node.kind:
            case "empty":
                # What multiplies its padding adds zeros of the weights' signs: -0 if all are, see `_multiply_padding`.
                result = np.array(-0.0 if fingerprint.padding_taps == "multiplied" else 0.0, add_up.dtype)
            case "leaf" if node.leaf == BIAS:
                result = add_up.hold(operands(BIAS)[0])
            case "leaf":
                result = multiply.product(*operands(node.leaf)).astype(add_up.dtype)
            case "fma":
                result = add_up.fma(*operands(node.leaf), below[0])
            case "add" if node is tree and fingerprint.bias == "rounded":
                result = add_up.add(*(_output(part, order).astype(add_up.dtype) for part in below))
            case "add":
                result = add_up.add(*below) if len(below) == 2 else add_up.aligned_sum(below)
        value[node] = result
    return value[tree]


def default_accumulator(dtype: np.dtype) -> Rounding:
    """What to assume where no element adds three terms: float64 for float64, and float32 for the rest."""
    return Rounding(FLOAT64 if dtype == np.float64 else FLOAT32)


def _output(y: np.ndarray, order: AccumulationOrder) -> np.ndarray:
    rounding = order.fingerprint.output or Rounding(format_of(order.dtype))
    if rounding.toward_zero or rounding.format is not format_of(order.dtype):
        y = (truncate_to if rounding.toward_zero else round_to)(y.astype(np.float64), rounding.format)
    y = y.astype(order.dtype) if y.dtype == np.float32 else cast(y, order.dtype)
    return flush(y, rounding.format) if "output" in order.fingerprint.flushed else y


def _multiply_padding(y: np.ndarray, case: Case) -> None:
    """What zero times a weight does to a sum: NaN from a weight that is not finite, +0 to a sum that is -0."""
    negative_zero = (y == 0) & np.signbit(y)
    if np.isfinite(case.kernel).all() and not negative_zero.any():
        return
    g = case.geometry
    valid = g.valid_taps().reshape(*g.output_spatial, g.taps)
    for tap, w in enumerate(case.kernel.reshape(g.taps, g.features)):
        padded = ~valid[..., tap, None]
        np.copyto(y, np.nan, where=padded & ~np.isfinite(w))
        np.copyto(y, 0.0, where=negative_zero & padded & ~np.signbit(w))


def _blocks(where: np.ndarray, case: Case) -> Iterator[tuple[tuple, Operands]]:
    """Indices of the output, and the operands there: views where the elements fill a box, gathered where not."""
    if not where.any():
        return
    box = tuple(_extent(np.asarray(where.any(axis=_all_but(axis, where.ndim)))) for axis in range(where.ndim))
    if where[box].all():
        for block in _boxes(box):
            yield block, _box_operands(case, block)
        return
    flat = np.flatnonzero(where)
    for start in range(0, len(flat), _BLOCK):
        at = np.unravel_index(flat[start : start + _BLOCK], where.shape)
        yield at, _gathered_operands(case, at)


def _all_but(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)


def _extent(present: np.ndarray) -> slice:
    found = np.flatnonzero(present)
    return slice(int(found[0]), int(found[-1]) + 1)


def _boxes(box: tuple[slice, ...]) -> Iterator[tuple[slice, ...]]:
    """The box cut along its first axes, until each part holds about a block."""
    sizes = [axis.stop - axis.start for axis in box]
    steps, room = [], _BLOCK
    for size in reversed(sizes):
        steps.append(max(1, min(size, room)))
        room //= max(1, size)
    cuts = [
        [slice(start, min(start + step, axis.stop)) for start in range(axis.start, axis.stop, step)]
        for axis, step in zip(box, reversed(steps))
    ]
    return itertools.product(*cuts)


def _box_operands(case: Case, block: tuple[slice, ...]) -> Operands:
    g = case.geometry
    batch, spatial, features = block[: len(g.batch)], block[len(g.batch) : -1], block[-1]
    weights, bias, one = _weights(case)
    channels: slice | np.ndarray = features
    if g.multiplier > 1:
        channels = np.arange(features.start, features.stop) // g.multiplier
    x = case.x[(*batch, ..., channels)]

    def operands(leaf: Leaf | None) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(leaf, int):
            return bias[features], one
        taps = np.unravel_index(leaf, g.kernel_size)
        window = x
        for axis, (source, tap, rows) in enumerate(zip(g.sources, taps, spatial)):
            index = source[rows, tap]
            whole = (slice(None),) * (len(batch) + axis)
            window = window[(*whole, _as_slice(index))]
        return window, weights[leaf, features]

    return operands


def _weights(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights by tap and feature, the bias by feature, and one."""
    g = case.geometry
    bias = np.zeros(g.features, case.dtype) if case.bias is None else case.bias
    return case.kernel.reshape(g.taps, g.features), bias, np.ones((), case.dtype)


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    """An index that ascends evenly as a slice, which copies nothing."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step > 0 and (np.diff(index) == step).all():
        return slice(int(index[0]), int(index[-1]) + 1, step)
    return index


def _gathered_operands(case: Case, at: tuple[np.ndarray, ...]) -> Operands:
    g = case.geometry
    batch, spatial, feature = at[: len(g.batch)], at[len(g.batch) : -1], at[-1]
    weights, bias, one = _weights(case)

    def operands(leaf: Leaf | None) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(leaf, int):
            return bias[feature], one
        taps = np.unravel_index(leaf, g.kernel_size)
        sources = tuple(source[rows, tap] for source, tap, rows in zip(g.sources, taps, spatial))
        return case.x[(*batch, *sources, feature // g.multiplier)], weights[leaf, feature]

    return operands
