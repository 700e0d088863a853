"""Revealed accumulation orders in a terminal: fingerprints, trees, and where two orders first diverge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

import rich.box
import rich.tree
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge.accumulation import AccumulationOrder, NotASum, Tree, divergence, first_divergence
from bridge.accumulation.drawing import tree_svg
from bridge.case import Case
from bridge.environment import environment
from bridge.report.answer import divergences
from bridge.report.terminal import describe

#: Classes of elements drawn for each implementation; the rest are counted.
_DRAWN = 2

#: Leaves of the widest tree that has room beside another.
_BESIDE = 11

#: Classes of elements pictured beside the first, where their order is another one.
_PICTURED = 9

#: Least widths of the fingerprint table's columns: the property, and its value.
_FACT, _VALUE = 15, 12


def print_orders(orders: Sequence[AccumulationOrder], console: Console, *, every: bool = False) -> None:
    """Print the fingerprints, the trees (all of them if `every`), and how each order differs from the first one."""
    for few in _that_fit(orders, console.width):
        console.print(_fingerprints(few))
    for group in _same_trees(orders):
        console.print(f"[bold]{escape(', '.join(order.implementation for order in group))}[/]", highlight=False)
        classes = group[0].classes()
        for tree, count, first in classes if every else classes[:_DRAWN]:
            console.print(f"  {count} of {group[0].labels.size} elements, the first at {first}:", highlight=False)
            console.print(Padding(_drawn(tree), (0, 0, 0, 4)), highlight=False)
        if len(classes) > _DRAWN and not every:
            console.print(
                f"  and {len(classes) - _DRAWN} more classes of elements (--every shows them)", highlight=False
            )
        console.print()
    console.print(
        f"[dim]F\\[8, t] is fma(x8, w8, t): one rounding. {escape(_sums(orders))} "
        "Taps are numbered in raster order from 0.[/]\n",
        highlight=False,
    )
    for sentence in divergences(orders[0], orders[1:]):
        console.print(sentence, highlight=False, markup=False)


def orders_to_json(orders: Sequence[AccumulationOrder], case: Case) -> str:
    """Return fingerprints, trees and where each order first diverges from the first one, as a JSON text."""
    record = {
        "schema": "jaxdw.reveal/2",
        "environment": environment(),
        "case": describe(case),
        "orders": [order.to_json() for order in orders],
        "divergences": [divergence(orders[0], other) for other in orders[1:]],
    }
    return json.dumps(record, indent=2) + "\n"


def _sums(orders: Sequence[AccumulationOrder]) -> str:
    """Return what a+b does with its products."""
    exact = [order.implementation for order in orders if order.fingerprint.products == "exact"]
    if len(exact) == len(orders):
        return "a+b adds exact products."
    return "a+b rounds both products first" + (f", but adds exact ones in {', '.join(exact)}." if exact else ".")


def _same_trees(orders: Sequence[AccumulationOrder]) -> list[list[AccumulationOrder]]:
    """Return groups of orders that have the same tree in every element."""
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
    """Yield the orders in as few tables as the width allows."""
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


@dataclasses.dataclass(frozen=True)
class DrawnOrder:
    """The accumulation order of implementations that share it.

    Attributes:
      names: the implementations, separated by commas.
      svg: the tree of one class of elements; empty where it is no conventional sum.
      caption: which elements it is of, and how many others have the same order without the taps in the padding.
      others: (caption, `<svg>`) of each class with another order, the largest first.
      left_out: how many classes with another order are not among them.
    """

    names: str
    svg: str
    caption: str
    others: list[tuple[str, str]]
    left_out: int


@dataclasses.dataclass(frozen=True)
class DrawnDivergence:
    """An order beside that of the reference, the first addition that only one has in a ring; or an order alone.

    Attributes:
      sentence: where they first diverge, and how.
      drawings: the reference and the other; one drawing if all implementations share an order.
      wide: whether the trees need the width of the page, one below the other.
    """

    sentence: str
    drawings: list[DrawnOrder]
    wide: bool


def pictures(orders: Sequence[AccumulationOrder]) -> list[DrawnDivergence]:
    """Return each distinct order beside that of the first implementation."""
    groups = _same_trees(orders)
    if not groups or not orders[0].labels.size:
        return []
    reference, *others = groups
    if not others:
        tree = _fullest(reference[0])
        return [DrawnDivergence("", [_drawn_order(reference, tree)], _is_wide(tree))]
    drawn = []
    for group in others:
        found = first_divergence(reference[0], group[0])
        if found is None:  # they differ only in why elements have no tree
            continue
        nodes: Sequence[Tree | None] = found.nodes or (None, None)
        drawings = [_drawn_order(*each) for each in zip((reference, group), found.outcomes, nodes)]
        wide = any(map(_is_wide, found.outcomes))
        drawn.append(DrawnDivergence(divergence(reference[0], group[0]), drawings, wide))
    return drawn


def _drawn_order(group: Sequence[AccumulationOrder], shown: Tree | NotASum, ringed: Tree | None = None) -> DrawnOrder:
    names, order = ", ".join(each.implementation for each in group), group[0]
    caption, folded, others = "", 0, []
    for tree, count, first in order.classes():
        told = _caption(tree, count, order.labels.size, first)
        if tree is shown:
            caption = told
        elif isinstance(tree, Tree) and isinstance(shown, Tree) and shown.restricted(tree.leaves) is tree:
            folded += count
        else:
            others.append((told, _svg(tree, names)))
    if folded:
        caption += f". {folded} more have this order without the taps in the padding"
    return DrawnOrder(names, _svg(shown, names, ringed), caption, others[:_PICTURED], max(0, len(others) - _PICTURED))


def _fullest(order: AccumulationOrder) -> Tree | NotASum:
    """Return the tree with the most products, of those the most frequent; the first refusal if there is no tree."""
    outcomes = [tree for tree, _, _ in order.classes()]
    return max(outcomes, key=lambda tree: len(tree.leaves) if isinstance(tree, Tree) else -1)


def _is_wide(outcome: Tree | NotASum) -> bool:
    return isinstance(outcome, Tree) and len(outcome.leaves) > _BESIDE


def _caption(tree: Tree | NotASum, count: int, size: int, first: tuple[int, ...]) -> str:
    why = f", no conventional sum: {tree.reason}" if isinstance(tree, NotASum) else ""
    return f"{count} of {size} elements, the first at {first}{why}"


def _svg(tree: Tree | NotASum, names: str, ringed: Tree | None = None) -> str:
    return tree_svg(tree, names, ringed) if isinstance(tree, Tree) else ""


def _drawn(tree: Tree | NotASum) -> rich.tree.Tree:
    root = rich.tree.Tree("", hide_root=True)
    if isinstance(tree, NotASum):
        root.add(escape(f"not a sum: {tree.reason}"))
    else:
        root.add(str(tree))
        if _forks(tree):
            _grow(root, tree)
    return root


def _forks(tree: Tree) -> bool:
    return tree.kind == "add" and all(len(child.leaves) > 1 for child in tree.children)


def _grow(parent: rich.tree.Tree, tree: Tree) -> None:
    """Add branches down to chains of single products, which stay one line each."""
    if _forks(tree):
        branch = parent.add("+")
        for child in tree.children:
            _grow(branch, child)
    else:
        parent.add(str(tree))
