"""Where two orders of addition part."""

from __future__ import annotations

from bridge.accumulation.order import AccumulationOrder, NotASum
from bridge.accumulation.tree import BIAS, Tree


def divergence(a: AccumulationOrder, b: AccumulationOrder) -> str:
    """One sentence: the first addition at which two orders part, in the largest class of elements that differ.

    Operands before what adds them, both orders are lists of additions; the first one that only one list has is told.
    """
    counts = {pair: n for pair, n in _classes(a, b).items() if _tree(a, pair[0]) != _tree(b, pair[1])}
    if not counts:
        return f"{a.implementation} and {b.implementation} add in the same order everywhere."
    pair = max(counts, key=counts.__getitem__)
    left, right = _tree(a, pair[0]), _tree(b, pair[1])
    here = f"{a.implementation} and {b.implementation}, on {counts[pair]} of {a.labels.size} elements,"
    if isinstance(left, NotASum) or isinstance(right, NotASum):
        which = a.implementation if isinstance(left, NotASum) else b.implementation
        return f"{here} cannot be compared: {which} is no conventional sum there."
    number, node = _first_only(left, right)
    _, twin = _first_only(right, left)
    return (
        f"{here} part at addition {number}: {a.implementation} adds {_words(node)}; "
        f"{b.implementation} adds {_words(twin)}."
    )


def _classes(a: AccumulationOrder, b: AccumulationOrder) -> dict[tuple[int, int], int]:
    """How many elements have each pair of labels."""
    found: dict[tuple[int, int], int] = {}
    for label in set(a.labels.ravel().tolist()):
        other = b.labels[a.labels == label]
        for twin in set(other.tolist()):
            found[label, twin] = int((other == twin).sum())
    return found


def _tree(order: AccumulationOrder, label: int) -> Tree | NotASum:
    return order.trees[label] if label >= 0 else order.refusals[-1 - label]


def _first_only(tree: Tree, other: Tree) -> tuple[int, Tree]:
    """The first addition of a tree that the other has not, and its number; the root where all are alike but for it."""
    theirs = {_signature(node) for node in other.nodes()}
    steps = [node for node in tree.nodes() if node.children] or [tree]
    only = ((number, node) for number, node in enumerate(steps, start=1) if _signature(node) not in theirs)
    return next(only, (len(steps), steps[-1]))


def _signature(node: Tree) -> tuple:
    """What one addition adds to what, whatever the order inside its operands."""
    return node.kind, node.leaf, frozenset(child.leaves for child in node.children)


def _words(node: Tree) -> str:
    match node.kind:
        case "fma":
            return f"product {node.leaf}, unrounded, to {_operand(node.children[0])} (FMA)"
        case "exact":
            return "everything exactly, and rounds once"
        case "add":
            first, *others = (_operand(child) for child in reversed(node.children))
            return f"{first} to {' and '.join(others)}"
    return "nothing"


def _operand(tree: Tree) -> str:
    taps = [leaf for leaf in tree.leaves if isinstance(leaf, int)]
    if len(tree.leaves) == 1:
        return f"the rounded product {taps[0]}" if taps else "the bias"
    run = taps == list(range(taps[0], taps[-1] + 1)) and len(taps) > 2
    names = f"{taps[0]}..{taps[-1]}" if run else ", ".join(map(str, taps))
    return f"the sum of {names}{' and the bias' if BIAS in tree.leaves else ''}"
