"""Look rules up: by their name, or by the names of PyTorch's and Flax's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bridge.weights.architectures import ARCHITECTURES, coverage
from bridge.weights.rules import Rule, RuleBook
from bridge.weights.trees import ParameterTree

#: An architecture ("torchvision.mobilenet_v2"); or a network whose library the names show ("mobilenet_v2"); or the
#: user's own rules.
Rules = str | Sequence[Rule]


def choose_rules(
    rules: Rules | None, torch: Sequence[str], tree: ParameterTree, automatic: bool = True
) -> tuple[str, RuleBook]:
    """Return rules for names of PyTorch and a tree of Flax, and a label for them.

    With `automatic`, the user's own rules come before those that the tree and the names choose.

    Raises:
      ValueError: an unknown name; or no name, and a tree that does not say what its layers are.
    """
    if rules is not None and not isinstance(rules, str) and automatic and tree.is_module:
        label, book = choose_rules(None, torch, tree)
        return (f"your own, and of {label}" if rules else label), RuleBook(rules, book)
    if rules is not None and (not isinstance(rules, str) or rules in ARCHITECTURES):
        return named_rules(rules, tree.leaves)
    books = {
        name: RuleBook(architecture.rules(tree.leaves))
        for name, architecture in ARCHITECTURES.items()
        if rules in (None, architecture.model)
    }
    if rules is None:
        books = {name: books[name] for name in covering(tree.leaves, books)}
    elif not books:
        networks = dict.fromkeys(architecture.model for architecture in ARCHITECTURES.values())
        known = ", ".join((*networks, *ARCHITECTURES))
        raise ValueError(f"`rules` is {rules!r}, expected one of {known}, or a sequence of Rule")
    if books:
        best = max(books, key=lambda name: coverage(books[name], torch))
        return best, books[best]
    if not tree.is_module:
        raise ValueError(
            "`rules` is None, expected rules, or the `nnx.Module` itself as `target`: the target is no known "
            "architecture, and a bare tree does not say whether a kernel is a convolution's, a transposed "
            "convolution's or a matrix"
        )
    kinds = {path: layer.kind for path, layer in tree.layers.items()} | dict.fromkeys(tree.bare, "array")
    paths = [(path, path) for path in kinds] + [(s, path) for path, s in tree.in_sequence.items() if path in kinds]
    rules = [Rule(tree.layers[p].torch_path(s) if p in tree.layers else s, p, kinds[p]) for s, p in paths]
    return "equal names", RuleBook(rules)


def named_rules(rules: Rules, flax: Iterable[str]) -> tuple[str, RuleBook]:
    """Return the rules of an architecture for these parameters of Flax, or the user's own, with a label."""
    if not isinstance(rules, str):
        return "your own", RuleBook(rules)
    if rules not in ARCHITECTURES:
        raise ValueError(f"the rules are {rules!r}, expected one of {', '.join(ARCHITECTURES)}, or a sequence of Rule")
    return rules, RuleBook(ARCHITECTURES[rules].rules(flax))


def covering(flax: Iterable[str], books: Mapping[str, RuleBook]) -> list[str]:
    """Return the labels of the books that have a rule for each of these parameters of Flax."""
    names = list(flax)
    return [label for label, book in books.items() if all(map(book.from_flax, names))]
