"""EXPLAINED for operations: both results are reproduced, in every bit, from the orders and forms of the arithmetic.

Sums of products are replayed in their revealed orders (`bridge.model.orders`). Other operations are replayed by the
algebraic forms below. A form of batch normalization takes its factor a either from correctly rounded operations, or as
the operation itself gives it for x = 1, m = 0 and b = 0: XLA's inverse square root is not correctly rounded, and no
claim is made on how it is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bridge.accumulation.arithmetic import Accumulator
from bridge.diagnosis import Comparison, Verdict
from bridge.model.known_orders import KnownOrders
from bridge.model.operation_verdicts import NAMES
from bridge.model.operations import Operation
from bridge.model.orders import Run, is_a_sum
from bridge.numerics import FLOAT32, same_bits, ulp_distance

_FLOATS = Accumulator(FLOAT32)


@dataclasses.dataclass(frozen=True, eq=False)
class Replayed:
    """How one result came about.

    Attributes:
      words: the order or the form.
      gives: which elements the replay reproduces: bool, of the operation's output.
    """

    words: str
    gives: np.ndarray


def explained(
    operation: Operation, runs: Mapping[str, Run | None], ours: np.ndarray, found: Comparison, known: KnownOrders
) -> tuple[Comparison, Mapping[str, str]]:
    """Return EXPLAINED where replays reproduce both results, else `found` with the number of elements explained.

    Args:
      operation: PyTorch's.
      runs: the operation in each framework, by the names of `NAMES`, with other numbers; None where it has none.
      ours: JAX's result for the operation's operands.
      found: their comparison.
      known: orders that were revealed before.

    Returns:
      The comparison, and the order or form of each result.
    """
    if found.verdict is not Verdict.ROUNDING:
        return found, {}
    ours = ours.reshape(operation.output.shape)
    sides = [_replayed(operation, name, runs[name], y, known) for name, y in zip(NAMES, (ours, operation.output))]
    if any(side is None for side in sides):
        return found, {}
    words = {name: side.words for name, side in zip(NAMES, sides) if side is not None}
    gives = np.logical_and(*(side.gives for side in sides if side is not None))
    count = int(np.count_nonzero(gives & ~same_bits(ours, operation.output)))
    cause = "; ".join(f"{name}: {said}" for name, said in words.items())
    if gives.all():
        return dataclasses.replace(found, verdict=Verdict.EXPLAINED, explained=count, cause=cause), words
    return dataclasses.replace(found, explained=count), words


def _replayed(operation: Operation, name: str, run: Run | None, y: np.ndarray, known: KnownOrders) -> Replayed | None:
    """Return how a result came about; None where nothing is known about the operation."""
    if is_a_sum(operation):
        if run is None:
            return None
        orders = known.revealed(operation, name, run, y)
        return Replayed(str(orders), orders.replayed)
    best: Replayed | None = None
    with np.errstate(all="ignore"):
        for words, value in _FORMS.get(operation.kind, _no_forms)(operation, run):
            gives = same_bits(value.astype(np.float32), y)
            if best is None or gives.sum() > best.gives.sum():
                best = Replayed(words, gives)
            if gives.all():
                break
    return best


_Forms = Iterator[tuple[str, np.ndarray]]


def _no_forms(operation: Operation, run: Run | None) -> _Forms:
    return iter(())


def _fma(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _FLOATS.fma(*np.broadcast_arrays(x, a, b)).astype(np.float32)


def _batch_norm(operation: Operation, run: Run | None) -> _Forms:
    x, p, one = operation.operands[0], operation.parameters, np.float32(1)
    m, v = p["running_mean"], p["running_var"]
    s, b = p.get("weight", np.ones_like(m)), p.get("bias", np.zeros_like(m))
    root = np.sqrt(v + np.float32(operation.settings["eps"]))
    factors = {"(1 / sqrt(v + e)) s": one / root * s, "s / sqrt(v + e)": s / root}
    if run is not None:
        measured = run()
        nearest = (s.astype(np.float64) / np.sqrt(v.astype(np.float64) + operation.settings["eps"])).astype(np.float32)
        distance = int(ulp_distance(measured, nearest).max(initial=0))
        factors[f"as computed, at most {distance} ULP from s / sqrt(v + e)"] = measured
    for words, a in factors.items():
        yield f"fma(x, a, fma(-m, a, b)), a = {words}", _fma(x, a, _fma(-m, a, b))
        yield f"fma(x - m, a, b), a = {words}", _fma(x - m, a, b)
        yield f"fma(x, a, b - m a), a = {words}", _fma(x, a, b - m * a)
        yield f"(x - m) a + b, a = {words}", (x - m) * a + b


def _hard_swish(operation: Operation, run: Run | None) -> _Forms:
    x, c, six = *_clipped(operation), np.float32(6)
    yield "(x c) / 6", x * c / six
    yield "x (c / 6)", x * (c / six)
    yield "(x c) (1 / 6)", x * c * (np.float32(1) / six)
    yield "x (c (1 / 6))", x * (c * (np.float32(1) / six))
    yield "(x / 6) c", x / six * c
    yield "(x (1 / 6)) c", x * (np.float32(1) / six) * c


def _hard_sigmoid(operation: Operation, run: Run | None) -> _Forms:
    _, c = _clipped(operation)
    yield "c / 6", c / np.float32(6)
    yield "c (1 / 6)", c * (np.float32(1) / np.float32(6))


def _clipped(operation: Operation) -> tuple[np.ndarray, np.ndarray]:
    """Return x, and c = min(max(x + 3, 0), 6)."""
    x = operation.operands[0]
    return x, np.clip(x + np.float32(3), np.float32(0), np.float32(6))


_FORMS: Mapping[str, Callable[[Operation, Run | None], _Forms]] = {
    "batch norm": _batch_norm,
    "hard swish": _hard_swish,
    "hard sigmoid": _hard_sigmoid,
}
