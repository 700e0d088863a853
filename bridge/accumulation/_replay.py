"""Recompute an output in NumPy by walking the revealed trees."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.accumulation.arithmetic import Accumulator, flush
from bridge.accumulation.convolution import as_sums
from bridge.accumulation.order import AccumulationOrder, Rounding
from bridge.accumulation.sums import Change, Operands, SumsOfProducts
from bridge.accumulation.tree import BIAS, Tree
from bridge.numerics import FLOAT32, FLOAT64, cast, format_of
from bridge.numerics.products import blocks

if TYPE_CHECKING:  # it imports JAX, and this package needs NumPy alone
    from bridge.case import Case

#: Elements per step: a handful of float64 arrays of them stay in a core's cache.
_BLOCK = 1 << 15

#: Trees between two lines of progress.
_TOLD = 32

_log = logging.getLogger("bridge")


def replay(order: AccumulationOrder, case: Case | SumsOfProducts) -> np.ndarray:
    """Return what the implementation computes for this case, bit for bit, if its order is as revealed.

    Trees are walked node by node, for blocks of output elements. Fused multiply-adds round once, as in hardware.
    Subnormal numbers are flushed where the implementation flushed them. A zero to which a fused multiply-add
    underflows, in a sum that starts from zero, may have the other sign.

    Args:
      order: what `reveal` returned for the same geometry and dtype.
      case: any data; or other sums of products.

    Returns:
      The output, of the case's dtype; NaN for elements without a tree.

    Raises:
      ValueError: the case's geometry, dtype or bias is not what was revealed.
    """
    sums = as_sums(case)
    if sums.layout != order.layout or sums.dtype != order.dtype:
        raise ValueError(
            f"`case` is {sums.dtype} {sums.layout}, expected what was revealed: {order.dtype} {order.layout}"
        )
    if order.trees and sums.has_bias != any(tree.has(BIAS) for tree in order.trees):
        given, expected = ("a bias", "none") if sums.has_bias else ("no bias", "one")
        raise ValueError(f"`case` has {given}, expected what was revealed: {expected}")
    sums = _rounded_inputs(order, sums)
    y = np.full(sums.shape, np.nan, sums.dtype)
    with np.errstate(all="ignore"):
        for label, tree in enumerate(order.trees):
            if label and not label % _TOLD:
                _log.info("replaying %s: order %d of %d", order.implementation, label, len(order.trees))
            if tree.kind == "exact":
                np.copyto(y, sums.exact(), where=order.labels == label)
                continue
            for at in _blocks(order.labels == label):
                accumulated = _walk(tree, sums.operands(at), order)
                total = _output(accumulated, order)
                # A zero start makes -0 a +0; what only rounds to zero afterwards keeps its sign, unless it is flushed.
                positive = order.zero_start[at] & ((accumulated == 0) | ("output" in order.fingerprint.flushed))
                y[at] = np.where(positive, total + total.dtype.type(0), total)
        if order.fingerprint.padding_taps == "multiplied":
            _multiply_padding(y, sums)
    return y


def _rounded_inputs(order: AccumulationOrder, sums: SumsOfProducts) -> SumsOfProducts:
    """Return the sums with their inputs as they are when they are multiplied."""
    fingerprint, own = order.fingerprint, Rounding(format_of(order.dtype))

    def change(rounding: Rounding | None, name: str) -> Change:
        def changed(array: np.ndarray) -> np.ndarray:
            if rounding not in (None, own):
                array = rounding(array.astype(np.float64)).astype(order.dtype)
            return flush(array, (rounding or own).format) if name in fingerprint.flushed else array

        return changed

    return sums.changed(change(fingerprint.x, "x"), change(fingerprint.kernel, "kernel"))


def _walk(tree: Tree, operands: Operands, order: AccumulationOrder) -> np.ndarray:
    """Return the sum by one tree, before it is rounded to the output's dtype."""
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
    """Return the accumulator to assume where no element adds three terms: float64 for float64, else float32."""
    return Rounding(FLOAT64 if dtype == np.float64 else FLOAT32)


def _output(y: np.ndarray, order: AccumulationOrder) -> np.ndarray:
    rounding = order.fingerprint.output or Rounding(format_of(order.dtype))
    if rounding.toward_zero or rounding.format is not format_of(order.dtype):
        y = rounding(y.astype(np.float64))
    y = y.astype(order.dtype) if y.dtype == np.float32 else cast(y, order.dtype)
    return flush(y, rounding.format) if "output" in order.fingerprint.flushed else y


def _multiply_padding(y: np.ndarray, sums: SumsOfProducts) -> None:
    """Change sums as zero times a weight does: to NaN if the weight is not finite, from -0 to +0."""
    negative_zero = (y == 0) & np.signbit(y)
    for term, w in enumerate(sums.weights):
        if negative_zero.any() or not np.isfinite(w).all():
            padded = ~sums.reads[..., term]
            np.copyto(y, np.nan, where=padded & ~np.isfinite(w))
            np.copyto(y, 0.0, where=negative_zero & padded & ~np.signbit(w))


def _blocks(where: np.ndarray) -> Iterator[tuple]:
    """Yield indices of the elements: a slice per axis where they are all of a range, index arrays where not."""
    if not where.any():
        return
    ranges = []
    for axis in range(where.ndim):
        present = np.flatnonzero(where.any(axis=tuple(other for other in range(where.ndim) if other != axis)))
        ranges.append(slice(int(present[0]), int(present[-1]) + 1))
    if where[tuple(ranges)].all():
        for block in blocks([each.stop - each.start for each in ranges], _BLOCK):
            yield tuple(slice(whole.start + part.start, whole.start + part.stop) for whole, part in zip(ranges, block))
        return
    flat = np.flatnonzero(where)
    for start in range(0, len(flat), _BLOCK):
        yield np.unravel_index(flat[start : start + _BLOCK], where.shape)
