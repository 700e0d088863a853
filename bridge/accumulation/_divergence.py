"""Where two accumulation orders first diverge."""

from __future__ import annotations

import dataclasses

from bridge.accumulation.order import AccumulationOrder, Fingerprint, NotASum
from bridge.accumulation.tree import BIAS, Tree

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first additions that only one of two orders has, on the largest class of elements whose orders differ.

    Attributes:
      elements: how many elements the class has.
      outcomes: of the first order and of the second, the tree of the class, or why there is none.
      nodes: in each tree the first addition that the other has not; none where an outcome is no tree.
      number: counts the additions of the first tree up to that one, from 1.
    """

    elements: int
    outcomes: tuple[Tree | NotASum, Tree | NotASum]
    nodes: tuple[Tree, ...]
    number: int


def first_divergence(a: AccumulationOrder, b: AccumulationOrder) -> Divergence | None:
    """Return where two orders first diverge, or None if they are the same everywhere.

    An order is a list of additions, in which each operand stands before the addition that it enters.
    """
    counts = {pair: n for pair, n in _classes(a, b).items() if a.outcome(pair[0]) != b.outcome(pair[1])}
    if not counts:
        return None
    pair = max(counts, key=lambda pair: (counts[pair], _products(a.outcome(pair[0]))))
    left, right = a.outcome(pair[0]), b.outcome(pair[1])
    if isinstance(left, NotASum) or isinstance(right, NotASum):
        return Divergence(counts[pair], (left, right), (), 0)
    number, node = _first_only(left, right)
    return Divergence(counts[pair], (left, right), (node, _first_only(right, left)[1]), number)


def divergence(a: AccumulationOrder, b: AccumulationOrder) -> str:
    """Return one sentence: the first addition that only one of two orders has.

    It speaks of the largest class of elements whose orders differ.
    """
    found = first_divergence(a, b)
    if found is None:
        return f"{a.implementation} and {b.implementation} add in the same order everywhere."
    both = f"{a.implementation} and {b.implementation}"
    where = f"{found.elements} of {a.labels.size} elements"
    if not found.nodes:
        which = a.implementation if isinstance(found.outcomes[0], NotASum) else b.implementation
        return f"{both} cannot be compared on {where}: {which} is no conventional sum there."
    node, twin = found.nodes
    orders = ((node, a), (twin, b))
    a_words, b_words = (_words(each, order.fingerprint) for each, order in orders)
    at = f"addition {found.number}"
    for one, other in ((node, twin), (twin, node)):
        operands = frozenset(child.leaf_set for child in one.children)
        if one.kind == "fma" and _signature(other) == ("add", None, operands | {Tree.of(one.leaf or 0).leaf_set}):
            at = f"the {_ordinal(1 + int(one.leaf or 0))} product"
            a_words, b_words = (_of_one_product(each, order.fingerprint) for each, order in orders)
    return f"{both} first diverge at {at}, on {where}: {a.implementation} {a_words}; {b.implementation} {b_words}."


def _classes(a: AccumulationOrder, b: AccumulationOrder) -> dict[tuple[int, int], int]:
    """Return the number of elements for each pair of labels."""
    found: dict[tuple[int, int], int] = {}
    for label in set(a.labels.ravel().tolist()):
        other = b.labels[a.labels == label]
        for twin in set(other.tolist()):
            found[label, twin] = int((other == twin).sum())
    return found


def _products(outcome: Tree | NotASum) -> int:
    return len(outcome.leaves) if isinstance(outcome, Tree) else 0


def _first_only(tree: Tree, other: Tree) -> tuple[int, Tree]:
    """Return the first addition of a tree that the other has not, and its number; the root where they share all."""
    theirs = {_signature(node) for node in other.nodes()}
    steps = [node for node in tree.nodes() if node.children] or [tree]
    only = ((number, node) for number, node in enumerate(steps, start=1) if _signature(node) not in theirs)
    return next(only, (len(steps), steps[-1]))


def _signature(node: Tree) -> tuple:
    """Return which leaves one addition adds to which, whatever the order inside its operands."""
    return node.kind, node.leaf, frozenset(child.leaf_set for child in node.children)


def _of_one_product(node: Tree, measured: Fingerprint) -> str:
    """Return how an addition takes up its product."""
    if node.kind == "fma":
        return "fuses multiply and add (one rounding)"
    if measured.products != "exact":
        return "rounds the product first (two roundings)"
    kept, output = measured.accumulator, measured.output
    rounds = kept is not None and output is not None and output.format.precision < kept.format.precision
    return "adds exact products" + (f" in {kept}" if kept else "") + (" and rounds at the end" if rounds else "")


def _words(node: Tree, measured: Fingerprint) -> str:
    kind = "exact" if measured.products == "exact" else "rounded"
    match node.kind:
        case "fma":
            return f"adds product {node.leaf} to {_operand(node.children[0], kind)} by a fused multiply-add"
        case "exact":
            return "adds all products exactly and rounds once"
        case "add":
            first, *others = (_operand(child, kind) for child in reversed(node.children))
            return f"adds {first} to {' and '.join(others)}"
    return "adds nothing"


def _operand(tree: Tree, kind: str) -> str:
    taps = [leaf for leaf in tree.leaves if isinstance(leaf, int)]
    if tree.size == 1:
        return f"the {kind} product {taps[0]}" if taps else "the bias"
    run = taps == list(range(taps[0], taps[-1] + 1)) and len(taps) > 2
    names = f"{taps[0]} to {taps[-1]}" if run else ", ".join(map(str, taps))
    return f"the sum of products {names}{' and the bias' if tree.has(BIAS) else ''}"


def _ordinal(number: int) -> str:
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"
