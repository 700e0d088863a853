"""Reveal the order in which an operation of a network adds, for its very shapes, and prove it on its own data.

Convolutions of one group, fully connected layers and means are sums of products. Masks are put in the rows of the input
or in the columns of the weights, many to one call (`bridge.accumulation.batched`). A tree that is found so counts only
where replaying it on the operation's own operands gives the operation's own result, in every bit. Where it does not,
the sums of the first such element are asked by themselves.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bridge.accumulation.batched import ManySums, reveal_tree, starts_from_zero
from bridge.accumulation.insertion import Contradiction
from bridge.accumulation.tree import BIAS, Leaf, Tree
from bridge.model.operation_bounds import windows
from bridge.model.operations import Operation
from bridge.numerics import same_bits
from jaxdw import sum_order
from jaxdw.native import calls
from jaxdw.sum_order import SumOrder

#: An operation as a function of x `(N, H, W, C)` or `(N, C)`, weight and bias, as `Operation.run`.
Run = Callable[..., np.ndarray]

#: Different orders that are looked for in one operation.
MOST_ORDERS = 6

#: The longest sum that is asked by itself, which takes a run for each term.
_MOST_ALONE = 1536


@dataclasses.dataclass(frozen=True)
class Order:
    """One order of a sum.

    Attributes:
      tree: what is added when.
      from_zero: whether the first product of each chain is added to +0, which decides the sign of a zero.
      finish: of a mean, how the sum becomes a mean: "division" by the count, or "product" with the rounded 1 / count.
    """

    tree: Tree
    from_zero: bool
    finish: str = ""

    @property
    def sum_order(self) -> SumOrder:
        """The order as the kernels of `jaxdw` take it."""
        return SumOrder(tuple(_steps(self.tree, self.from_zero)))

    def __str__(self) -> str:
        return described(self.tree) + (f", then a {self.finish}" if self.finish else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Revealed:
    """The orders of an operation in one framework.

    Attributes:
      orders: those found, the most frequent first.
      labels: int8 of the operation's output: the first order whose replay gives that element; -1 for none.
      reason: why elements have none; empty where all have one.
      channels: which order the channels have, each up to a channel, ascending; empty where no such ranges give all
        elements.
    """

    orders: Sequence[Order]
    labels: np.ndarray
    reason: str = ""
    channels: Sequence[tuple[int, Order]] = ()

    @property
    def replayed(self) -> np.ndarray:
        """Which elements are reproduced, bool."""
        return self.labels >= 0

    def __str__(self) -> str:
        if len(self.channels) == 1:
            return str(self.channels[0][1])
        if self.channels:
            starts = (0, *(end for end, _ in self.channels))
            parts = zip(starts, self.channels)
            return "; ".join(f"channels {start} to {end - 1}: {order}" for start, (end, order) in parts)
        counts = [int((self.labels == number).sum()) for number in range(len(self.orders))]
        told = [f"{count} elements: {order}" for count, order in zip(counts, self.orders) if count]
        if lost := int((self.labels < 0).sum()):
            told.append(f"{lost} elements: {self.reason}")
        return "; ".join(told)

    @property
    def trees(self) -> Sequence[str]:
        """The orders in full, as `bridge.accumulation.Tree` writes them."""
        return [str(order.tree) for order in self.orders]


def is_a_sum(operation: Operation) -> bool:
    """Return whether an operation is one whose orders can be revealed."""
    if operation.kind == "convolution":
        return operation.settings["groups"] == 1 and operation.operands[0].ndim == 4
    return operation.kind in ("linear", "mean")


def revealed(operation: Operation, run: Run, y: np.ndarray, known: Sequence[Order] = ()) -> Revealed:
    """Reveal the orders of an operation, and prove them on its operands.

    Args:
      operation: PyTorch's, for shapes, operands and parameters.
      run: the operation in either framework.
      y: what it gave for these operands.
      known: orders that it had before; they are tried first.
    """
    sums = _Sums.of(operation, run)
    y = y.reshape(sums.shape)
    labels = np.full(sums.shape, -1, np.int8)
    orders: list[Order] = []

    def prove(order: Order) -> bool:
        """Label the elements that an order gives; return whether there are any."""
        gives = (labels < 0) & same_bits(sums.replay(order), y)
        if order in orders or not gives.any():
            return False
        labels[gives] = len(orders)
        orders.append(order)
        return True

    for order in known:
        if sums.fits(order):
            prove(order)
    reason = ""
    while (labels < 0).any() and len(orders) < MOST_ORDERS:
        lost = labels < 0
        for preferred in (lost & sums.is_middle[:, None], lost & sums.whole[:, None]):
            lost = preferred if preferred.any() else lost
        asked = np.argwhere(lost)
        row, column = asked[-1 if orders else 0].tolist()
        found = False
        for many in sums.probes((row, column)):
            try:
                tree = reveal_tree(many)
                zero = starts_from_zero(many)
            except Contradiction as contradiction:
                reason = f"no tree of additions: {contradiction}"
                continue
            if found := any([prove(Order(tree, zero, finish)) for finish in sums.finishes]):
                break
            reason = f"masks show {described(tree)}, and its replay gives other bits"
        if not found:
            break
    where = labels.reshape(operation.output.shape)
    if (labels < 0).any():
        return Revealed(orders, where, reason)
    return Revealed(orders, where, "", _by_channel(sums, orders, y, operation.output.shape[-1]))


def _by_channel(sums: _Sums, orders: Sequence[Order], y: np.ndarray, channels: int) -> Sequence[tuple[int, Order]]:
    """Return ranges of channels that have one order each, as long as can be."""
    if len(orders) == 1:
        return ((channels, orders[0]),)
    gives = [np.all(same_bits(sums.replay(order), y).reshape(-1, channels), axis=0) for order in orders]
    ranges: list[tuple[int, Order]] = []
    start = 0
    while start < channels:
        ends = [start + int(np.argmin(np.append(each[start:], False))) for each in gives]
        end = max(ends)
        if end == start or len(ranges) == MOST_ORDERS:
            return ()
        ranges.append((end, orders[ends.index(end)]))
        start = end
    return ranges


def described(tree: Tree) -> str:
    """Say an order in a few words.

    >>> described(Tree.parse("F[2, F[1, 0]]")), described(Tree.parse("(F[1, 0]+F[3, 2])+b"))
    ('one chain of 3 fused multiply-adds', '2 chains of 2 fused multiply-adds, added, the bias last')
    >>> described(Tree.parse("(0+1)+2")), described(Tree.parse("((0+1)+(2+3))+b"))
    ('one chain of 3 terms without FMA', 'a tree of height 3 without FMA')
    """
    sums = _added(tree)
    last = len(sums) > 1 and sums[-1] is Tree.of(BIAS)
    chains = [_chain(each) for each in (sums[:-1] if last else sums)]
    bias = ", the bias last" if last else ", the bias first" if chains[0][:1] == [BIAS] else ""
    lengths = [sum(leaf != BIAS for leaf in chain) for chain in chains]
    if set(lengths) == {1} and len(lengths) > 1:
        return f"one chain of {len(lengths)} terms without FMA{bias}"
    if all(chains):
        sizes = "+".join(map(str, lengths)) if len(set(lengths)) > 1 else str(lengths[0])
        many = "one chain" if len(chains) == 1 else f"{len(chains)} chains"
        return f"{many} of {sizes} fused multiply-adds{', added' if len(chains) > 1 else ''}{bias}"
    fused = len(tree.fused)
    return f"a tree of height {tree.height} " + ("without FMA" if not fused else f"with FMA for {fused} of its terms")


def _added(tree: Tree) -> list[Tree]:
    """Return the sums that are added one after another, the first one first."""
    later: list[Tree] = []
    while tree.kind == "add" and len(tree.children) == 2 and tree.children[1].kind != "add":
        tree, last = tree.children
        later.append(last)
    return [tree, *reversed(later)]


def _chain(tree: Tree) -> list[Leaf]:
    """Return the terms of a chain of fused multiply-adds in order; empty for anything else."""
    chain: list[Leaf] = []
    while tree.kind == "fma" and tree.leaf is not None:
        chain.append(tree.leaf)
        (tree,) = tree.children
    return [tree.leaf, *reversed(chain)] if tree.kind == "leaf" and tree.leaf is not None else []


def _steps(tree: Tree, from_zero: bool) -> Iterator[int]:
    """Yield the postfix program of a tree: `SumOrder.steps`."""
    for node in tree.nodes():
        match node.kind, node.leaf:
            case "empty", _:
                yield sum_order.ZERO
            case "leaf", str():
                yield sum_order.BIAS
            case "leaf", int(term) if from_zero:
                yield from (sum_order.ZERO, 2 * term + 1)
            case "leaf", int(term):
                yield 2 * term
            case "fma", int(term):
                yield 2 * term + 1
            case "add", _:
                yield sum_order.ADD


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
    """An operation as the matrix product x w + bias.

    Attributes:
      x: `(rows, terms)`; w: `(terms, columns)`; bias: `(columns,)` or None.
      whole: which rows read no padding, bool; is_middle: which are in the middle of an image.
      of_rows: takes rows `(rows, terms)`, one number for all weights and one for all biases; returns `(rows, columns)`.
        None where rows share numbers, as windows do.
      of_columns: takes one number for all of x, w and bias; None for a mean.
      shape: of the result, `(rows, columns)`.
      finishes: how a sum may become a result.
    """

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    whole: np.ndarray
    is_middle: np.ndarray
    of_rows: Callable[[np.ndarray, float, float], np.ndarray] | None
    of_columns: Callable[[float, np.ndarray, np.ndarray | None], np.ndarray] | None
    finishes: Sequence[str] = ("",)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.x), self.w.shape[1]

    @classmethod
    def of(cls, operation: Operation, run: Run) -> _Sums:
        if operation.kind == "mean":
            return cls._of_mean(operation, run)
        x, weight, bias = operation.operands[0], operation.parameters["weight"], operation.parameters.get("bias")
        is_linear = operation.kind == "linear"
        order = (1, 0) if is_linear else (2, 3, 1, 0)
        taps = weight.transpose(order).shape[:-1]
        columns = len(weight)
        terms = math.prod(taps)

        def of_matrix(w: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(w.reshape(*taps, columns).transpose(np.argsort(order)), np.float32)

        def of_rows(rows: np.ndarray, w: float, b: float) -> np.ndarray:
            biases = None if bias is None else np.full(columns, b, np.float32)
            y = run(rows.reshape(x.shape), np.full(weight.shape, w, np.float32), biases)
            return y.reshape(-1, columns)

        def of_columns(value: float, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
            return run(np.full(x.shape, value, np.float32), of_matrix(w), b).reshape(-1, columns)

        matrix, is_free = x, True
        if not is_linear:
            stride, padding, dilation = (operation.settings[key] for key in ("stride", "padding", "dilation"))
            is_free = set((*weight.shape[2:], *stride)) == {1} and not any(padding)
            matrix = windows(x, weight.shape[2:], stride, padding, dilation)
            read = windows(np.ones((1, *x.shape[1:3], 1), bool), weight.shape[2:], stride, padding, dilation)
            whole = np.tile(read.reshape(-1, read.shape[3] * read.shape[4]).all(axis=1), len(x))
        rows = np.ascontiguousarray(matrix.reshape(-1, terms))
        whole = np.ones(len(rows), bool) if is_linear else whole
        is_middle: np.ndarray = np.zeros(operation.output.shape[:-1], bool)
        is_middle[tuple(size // 2 for size in is_middle.shape)] = True
        w = np.ascontiguousarray(weight.transpose(order).reshape(terms, columns))
        return cls(rows, w, bias, whole, is_middle.ravel(), of_rows if is_free else None, of_columns)

    @classmethod
    def _of_mean(cls, operation: Operation, run: Run) -> _Sums:
        x = operation.operands[0]
        n, *spatial, c = x.shape

        def of_rows(rows: np.ndarray, w: float, b: float) -> np.ndarray:
            return run(np.moveaxis(rows.reshape(n, c, *spatial), 1, -1)).reshape(-1, 1)

        rows = np.ascontiguousarray(np.moveaxis(x, -1, 1).reshape(n * c, -1))
        ones, whole = np.ones((rows.shape[1], 1), np.float32), np.ones(len(rows), bool)
        return cls(rows, ones, None, whole, ~whole, of_rows, None, ("division", "product"))

    def fits(self, order: Order) -> bool:
        """Return whether an order has just the terms of these sums, and the bias where there is one."""
        return order.tree.leaves == (*range(len(self.w)), *([] if self.bias is None else [BIAS]))

    def replay(self, order: Order) -> np.ndarray:
        """Return the results by an order, `(rows, columns)`."""
        y = np.empty(self.shape, np.float32)
        calls.matmul(self.x, self.w, self.bias, y, order.sum_order, threads=os.cpu_count() or 1)
        n = np.float32(len(self.w))
        return y / n if order.finish == "division" else y * (np.float32(1) / n) if order.finish else y

    def probes(self, at: tuple[int, int]) -> Iterator[ManySums]:
        """Yield ways to ask for the order of an element, the cheapest first."""
        ways = []
        if self.of_rows is not None:
            ways.append((self.shape[0], self._rows_at(at[1])))
        if self.of_columns is not None:
            row = at[0] if self.whole[at[0]] or not self.whole.any() else int(self.whole.argmax())
            ways.append((self.shape[1], self._columns_at(row)))
        ways.sort(key=lambda way: -way[0])
        if len(self.w) > _MOST_ALONE:
            pass
        elif self.of_columns is not None:
            ways.append((1, self._columns_at(row, at[1])))
        elif self.of_rows is not None:
            ways.append((1, self._rows_at(at[1], at[0])))
        is_mean = self.of_columns is None
        for capacity, run in ways:
            yield ManySums(
                run, len(self.w), capacity, self.bias is not None, not is_mean, len(self.w) if is_mean else 1.0
            )

    def _rows_at(self, column: int, only: int | None = None) -> Callable[[float, np.ndarray], np.ndarray]:
        """Return the sums of rows in one column; if only one row is asked, all rows get its masks."""
        of_rows, terms = self.of_rows, len(self.w)
        assert of_rows is not None

        def run(x: float, weights: np.ndarray) -> np.ndarray:
            rows = np.broadcast_to(weights[-1:, :terms], (self.shape[0], terms)).copy()
            rows[: len(weights)] = weights[:, :terms]
            y = of_rows(rows, x, float(weights[0, -1]))[:, column]
            return y[: len(weights)] if only is None else y[only : only + 1]

        return run

    def _columns_at(self, row: int, only: int | None = None) -> Callable[[float, np.ndarray], np.ndarray]:
        """Return the sums of columns in one row; if only one column is asked, all columns get its masks."""
        of_columns, terms = self.of_columns, len(self.w)
        assert of_columns is not None

        def run(x: float, weights: np.ndarray) -> np.ndarray:
            columns = np.broadcast_to(weights[-1:], (self.shape[1], weights.shape[1])).copy()
            columns[: len(weights)] = weights
            bias = columns[:, -1].copy() if self.bias is not None else None
            y = of_columns(x, columns[:, :terms].T, bias)[row]
            return y[: len(weights)] if only is None else y[only : only + 1]

        return run
