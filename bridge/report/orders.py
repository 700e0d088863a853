"""Revealed orders of addition in a terminal: fingerprints side by side, trees, and where two orders part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import rich.box
import rich.tree
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge.accumulation import BIAS, AccumulationOrder, NotASum, Tree
from bridge.accumulation.drawing import tree_svg
from bridge.case import Case
from bridge.environment import environment
from bridge.report.terminal import describe

#: Classes of elements drawn for each implementation; the rest are counted.
_DRAWN = 4

#: Least widths of the fingerprint table's columns: what is told, and what is said of it.
_FACT, _VALUE = 15, 12


def print_orders(orders: Sequence[AccumulationOrder], console: Console, *, every: bool = False) -> None:
    """The fingerprint tables, the trees (all of them if `every`), and one sentence on each order beside the first."""
    for few in _that_fit(orders, console.width):
        console.print(_fingerprints(few))
    for alike in _same_trees(orders):
        console.print(f"[bold]{escape(', '.join(order.implementation for order in alike))}[/]", highlight=False)
        classes = alike[0].classes()
        for tree, count, first in classes if every else classes[:_DRAWN]:
            console.print(f"  {count} of {alike[0].labels.size} elements, the first at {first}:", highlight=False)
            console.print(Padding(_drawn(tree), (0, 0, 0, 4)), highlight=False)
        if len(classes) > _DRAWN and not every:
            console.print(
                f"  and {len(classes) - _DRAWN} more classes of elements (--every shows them)", highlight=False
            )
        console.print()
    console.print(
        "[dim]F[8, t] is fma(x8 w8, t), one rounding; a+b rounds both products first. "
        "Taps count in raster order from 0.[/]\n",
        highlight=False,
    )
    for other in orders[1:]:
        console.print(parting(orders[0], other), highlight=False, markup=False)


def orders_to_json(orders: Sequence[AccumulationOrder], case: Case) -> str:
    """Fingerprints, trees and where each order parts from the first, as a JSON text."""
    record = {
        "schema": "jaxdw.reveal/1",
        "environment": environment(),
        "case": describe(case),
        "orders": [order.to_json() for order in orders],
        "partings": [parting(orders[0], other) for other in orders[1:]],
    }
    return json.dumps(record, indent=2) + "\n"


def parting(a: AccumulationOrder, b: AccumulationOrder) -> str:
    """One sentence: the first addition at which two orders part, in the largest class of elements that differ.

    Operands before what adds them, both orders are lists of additions; the first one that only one list has is told.
    """
    pairs = sorted(
        {(int(i), int(j)): int(n) for (i, j), n in _pairs(a, b).items() if _step(a, i) != _step(b, j)}.items(),
        key=lambda item: -item[1],
    )
    if not pairs:
        return f"{a.implementation} and {b.implementation} add in the same order everywhere."
    (i, j), count = pairs[0]
    left, right = _step(a, i), _step(b, j)
    here = f"{a.implementation} and {b.implementation}, on {count} of {a.labels.size} elements,"
    if isinstance(left, NotASum) or isinstance(right, NotASum):
        which = a.implementation if isinstance(left, NotASum) else b.implementation
        return f"{here} cannot be compared: {which} is no conventional sum there."
    steps = [[node for node in tree.nodes() if node.children] for tree in (left, right)]
    others = [{_signature(node) for node in other} for other in reversed(steps)]
    number, node = next((n, s) for n, s in enumerate(steps[0], start=1) if _signature(s) not in others[0])
    twin = next(s for s in steps[1] if _signature(s) not in others[1])
    return (
        f"{here} part at addition {number}: {a.implementation} adds {_words(node)}; {b.implementation} {_words(twin)}."
    )


def _pairs(a: AccumulationOrder, b: AccumulationOrder) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for label in set(a.labels.ravel().tolist()):
        other = b.labels[a.labels == label]
        for twin in set(other.tolist()):
            found[label, twin] = int((other == twin).sum())
    return found


def _step(order: AccumulationOrder, label: int) -> Tree | NotASum:
    return order.trees[label] if label >= 0 else order.refusals[-1 - label]


def _signature(node: Tree) -> tuple:
    """What one addition adds to what, whatever the order inside its operands."""
    return node.kind, node.leaf, frozenset(child.leaves for child in node.children)


def _words(node: Tree) -> str:
    if node.kind == "fma":
        return f"product {node.leaf}, unrounded, to {_operand(node.children[0])} (FMA)"
    if node.kind == "exact":
        return "everything exactly, and rounds once"
    first, *others = (_operand(child) for child in reversed(node.children))
    return f"{first} to {' and '.join(others)}"


def _operand(tree: Tree) -> str:
    names = ["the bias" if leaf == BIAS else str(leaf) for leaf in tree.leaves]
    if len(names) == 1:
        return names[0] if names[0] == "the bias" else f"the rounded product {names[0]}"
    taps = [leaf for leaf in tree.leaves if leaf != BIAS]
    span = (
        f"{taps[0]}..{taps[-1]}" if taps == list(range(taps[0], taps[-1] + 1)) and len(taps) > 2 else ", ".join(names)
    )
    return f"the sum of {span}"


def _same_trees(orders: Sequence[AccumulationOrder]) -> list[list[AccumulationOrder]]:
    """Orders in groups that add every element alike."""
    groups: list[list[AccumulationOrder]] = []
    for order in orders:
        for group in groups:
            if group[0].trees == order.trees and not order.refusals and (group[0].labels == order.labels).all():
                group.append(order)
                break
        else:
            groups.append([order])
    return groups


def _that_fit(orders: Sequence[AccumulationOrder], width: int) -> Iterator[list[AccumulationOrder]]:
    """Orders in as few tables as the width allows."""
    few: list[AccumulationOrder] = []
    used = _FACT
    for order in orders:
        column = 3 + max(_VALUE, len(order.implementation))
        if few and used + column > width:
            yield few
            few, used = [], _FACT
        few, used = [*few, order], used + column
    yield few


def _fingerprints(orders: Sequence[AccumulationOrder]) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=_FACT - 3)
    for order in orders:
        table.add_column(escape(order.implementation), overflow="fold", min_width=_VALUE)
    rows = [_facts(order) for order in orders]
    for fact in rows[0]:
        table.add_row(fact, *(row[fact] for row in rows))
    return table


def _facts(order: AccumulationOrder) -> dict[str, str]:
    f = order.fingerprint
    return {
        "trees": str(len(order.trees)) + (f" + {len(order.refusals)} refused" if order.refusals else ""),
        "products": f.products or "exact",
        "accumulator": str(f.accumulator or "not seen"),
        "input x": str(f.x or "not seen"),
        "weights": str(f.kernel or "not seen"),
        "output": str(f.output or "not seen"),
        "subnormals": "flushed" if f.flushed else "kept",
        "padding taps": f.padding_taps or "none",
        "bias": f.bias or "none",
        "repeatable": "yes" if f.deterministic else "no",
        "runs": str(f.runs),
    }


def pictures(orders: Sequence[AccumulationOrder]) -> dict[str, str]:
    """For the HTML report: what each picture shows, and the tree as an `<svg>`; the largest class of elements first."""
    found = {}
    for alike in _same_trees(orders):
        names = ", ".join(order.implementation for order in alike)
        for tree, count, first in alike[0].classes()[:_DRAWN]:
            if isinstance(tree, Tree):
                title = f"{names}: {count} of {alike[0].labels.size} elements, the first at {first}"
                found[title] = tree_svg(tree, title)
    return found


def _drawn(tree: Tree | NotASum) -> rich.tree.Tree:
    root = rich.tree.Tree("", hide_root=True)
    if isinstance(tree, NotASum):
        root.add(f"not a sum: {tree.reason}")
    else:
        root.add(str(tree))
        if _forks(tree):
            _grow(root, tree)
    return root


def _forks(tree: Tree) -> bool:
    return tree.kind == "add" and all(len(child.leaves) > 1 for child in tree.children)


def _grow(parent: rich.tree.Tree, tree: Tree) -> None:
    """Branches down to chains of single products, which stay one line each."""
    if _forks(tree):
        branch = parent.add("+")
        for child in tree.children:
            _grow(branch, child)
    else:
        parent.add(str(tree))
