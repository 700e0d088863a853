"""The order in which one output element is summed: an immutable tree over taps and bias.

Grammar of the text form, which `Tree.parse` reads back:

    order := "()" | tree | add
    tree  := leaf | fma | exact | "(" add ")"
    leaf  := tap | "b"                                a rounded product x_i w_i, i in raster order; or the bias
    add   := tree "+" tree { "+" tree }               one rounded addition; of three or more operands, a multi-way one
    fma   := "F[" tap ", " tree "]"                   fma(x_i, w_i, tree): the product enters unrounded
    exact := "E[" leaf ", " leaf { ", " leaf } "]"    the exact sum of products and bias, rounded once
    tap   := "0" | "1" | ...

Only the outermost addition stands without parentheses. `()` is the sum of nothing. Operands stand in the order of their
smallest leaf, the bias after all taps, since addition commutes: one order has one text.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Container, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

#: The leaf that is the bias.
BIAS = "b"
Leaf = int | str

_TOKENS = re.compile(r"\s*(F\[|E\[|\(\)|[()\],+]|b|\d+)")


class Tree:
    """A node and all below it. Equal trees are one object: `==` is `is`.

    Attributes:
      kind: "leaf", "add", "fma", "exact" or "empty".
      leaf: the tap or `BIAS` of a leaf, the tap whose product an fma takes in; else None.
      children: the operands that are trees: of an add two or more, of an fma one, of an exact sum its leaves.
      leaf_set: all leaves as bits: the bias is bit 0, tap i is bit i + 1. It stays small in a chain of thousands.
      height: additions on the longest way from a product to the root.

    >>> tree = Tree.fma(2, Tree.add(Tree.of(1), Tree.of(0)))
    >>> tree, tree.height, tree is Tree.parse("F[2, (0+1)]")
    (Tree('F[2, (0+1)]'), 2, True)
    """

    __slots__ = ("__weakref__", "children", "height", "kind", "leaf", "leaf_set")
    _interned: ClassVar[weakref.WeakValueDictionary[tuple[Any, ...], Tree]] = weakref.WeakValueDictionary()

    kind: str
    leaf: Leaf | None
    children: tuple[Tree, ...]
    height: int
    leaf_set: int

    def __new__(cls, kind: str, leaf: Leaf | None = None, children: Sequence[Tree] = ()) -> Tree:
        children = tuple(sorted(children, key=_first_leaf))
        # Children are unique objects, kept alive by their parent: their identities identify the node.
        key = (kind, leaf, *map(id, children))
        node = cls._interned.get(key)
        if node is None:
            below = 0 if leaf is None else _bit(leaf)
            for child in children:
                if below & child.leaf_set:
                    shown = ", ".join(map(str, children))
                    raise ValueError(f"`children` share leaves: {shown}, expected each leaf once")
                below |= child.leaf_set
            node = super().__new__(cls)
            for name, value in (
                ("kind", kind),
                ("leaf", leaf),
                ("children", children),
                ("leaf_set", below),
                ("height", 0 if not children else 1 + max(child.height for child in children)),
            ):
                object.__setattr__(node, name, value)
            cls._interned[key] = node
        return node

    @classmethod
    def of(cls, leaf: Leaf) -> Tree:
        """Return the leaf of one product, or of the bias."""
        if leaf != BIAS and (isinstance(leaf, bool) or not isinstance(leaf, (int, np.integer)) or leaf < 0):
            raise ValueError(f"`leaf` is {leaf!r}, expected a tap (0, 1, ...) or {BIAS!r}")
        return cls("leaf", leaf if leaf == BIAS else int(leaf))

    @classmethod
    def add(cls, *operands: Tree) -> Tree:
        """Return one rounded addition of two operands, or one multi-way addition of more."""
        if len(operands) < 2 or any(not operand.leaf_set for operand in operands):
            raise ValueError(f"`operands` are {operands}, expected two or more trees with leaves")
        return cls("add", None, operands)

    @classmethod
    def fma(cls, tap: Leaf | None, addend: Tree) -> Tree:
        """Return fma(x_tap, w_tap, addend)."""
        if not isinstance(tap, (int, np.integer)) or not addend.leaf_set:
            raise ValueError(f"`tap` is {tap!r} and `addend` {addend}, expected a tap and a tree with leaves")
        return cls("fma", cls.of(tap).leaf, (addend,))

    @classmethod
    def exact(cls, leaves: Sequence[Leaf]) -> Tree:
        """Return the exact sum, rounded once: it has no order."""
        if len(leaves) < 2:
            raise ValueError(f"`leaves` are {leaves!r}, expected two or more")
        return cls("exact", None, [cls.of(leaf) for leaf in leaves])

    @classmethod
    def empty(cls) -> Tree:
        """Return the sum of nothing: that of a window that lies wholly in the padding."""
        return cls("empty")

    @classmethod
    def chain(cls, leaves: Sequence[Leaf], *, fused: bool = False) -> Tree:
        """Return the leaves added one after another, from the first.

        >>> Tree.chain([0, 1, 2]), Tree.chain(["b", 0, 1], fused=True)
        (Tree('(0+1)+2'), Tree('F[1, F[0, b]]'))
        """
        tree = cls.of(leaves[0]) if leaves else cls.empty()
        for leaf in leaves[1:]:
            tree = cls.fma(leaf, tree) if fused and leaf != BIAS else cls.add(tree, cls.of(leaf))
        return tree

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Tree is immutable: cannot set {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tree.parse, (str(self),)

    def nodes(self) -> Iterator[Tree]:
        """Yield every node, operands before the node that adds them; the root is the last."""
        stack = [(self, False)]
        while stack:
            node, below_done = stack.pop()
            if below_done or not node.children:
                yield node
            else:
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.children))

    def __str__(self) -> str:
        text: dict[Tree, str] = {}
        for node in self.nodes():
            below = [text.pop(child) for child in node.children]
            match node.kind:
                case "leaf":
                    text[node] = str(node.leaf)
                case "empty":
                    text[node] = "()"
                case "add":
                    text[node] = f"({'+'.join(below)})"
                case "fma":
                    text[node] = f"F[{node.leaf}, {below[0]}]"
                case "exact":
                    text[node] = f"E[{', '.join(below)}]"
        return text[self][1:-1] if self.kind == "add" else text[self]

    def __repr__(self) -> str:
        return f"Tree({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Return the tree that a text form describes; operands may stand in any order.

        Raises:
          ValueError: not a text form; the message says where.

        >>> Tree.parse("8 + (((0+1)+(4+5)) + ((2+3)+(6+7)))")
        Tree('(((0+1)+(4+5))+((2+3)+(6+7)))+8')
        """
        if text.strip() == "()":
            return cls.empty()
        frames: list[tuple[str, list[Tree]]] = [("", [])]
        operand_next, at = True, 0
        while at < len(text.rstrip()):
            match = _TOKENS.match(text, at)
            token = match[1] if match else ""
            opener, operands = frames[-1]
            separator = "+" if opener in ("", "(") else ","
            closer = {"": "", "(": ")"}.get(opener, "]")
            if operand_next and token in ("F[", "E[", "("):
                frames.append((token, []))
            elif operand_next and (token == BIAS or token.isdigit()):
                operands.append(cls.of(BIAS if token == BIAS else int(token)))
                operand_next = False
            elif not operand_next and token == separator:
                operand_next = True
            elif not operand_next and token and token == closer:
                frames.pop()
                frames[-1][1].append(cls._combined(opener, operands, text))
            else:
                expected = "an operand" if operand_next else f"{separator!r} or {closer or 'the end'!r}"
                raise ValueError(f"`text` is {text!r}, expected {expected} at character {at}")
            at = match.end() if match else at
        if operand_next or len(frames) > 1:
            raise ValueError(f"`text` is {text!r}, which ends too early: expected a whole tree")
        operands = frames[0][1]
        return operands[0] if len(operands) == 1 else cls.add(*operands)

    @classmethod
    def _combined(cls, opener: str, operands: list[Tree], text: str) -> Tree:
        if opener == "(" and len(operands) > 1:
            return cls.add(*operands)
        if opener == "F[" and len(operands) == 2 and operands[0].kind == "leaf":
            return cls.fma(operands[0].leaf, operands[1])
        if opener == "E[" and all(operand.kind == "leaf" for operand in operands):
            return cls.exact([leaf for operand in operands for leaf in operand.leaves])
        raise ValueError(f"`text` is {text!r}, expected (tree+tree), F[tap, tree] or E[leaf, leaf]")

    def to_json(self) -> Any:
        """Return nested lists: a leaf is its tap or "b", else [kind, operand, ...]; an fma has its tap first."""
        built: dict[Tree, Any] = {}
        for node in self.nodes():
            below = [built.pop(child) for child in node.children]
            own = [node.leaf] if node.kind == "fma" else []
            built[node] = node.leaf if node.kind == "leaf" else [node.kind, *own, *below]
        return built[self]

    def restricted(self, leaves: Container[Leaf]) -> Tree:
        """Return the tree with only these leaves: every other product is zero, and adding it is skipped.

        >>> Tree.parse("F[3, ((0+1)+2)]").restricted({1, 3}), Tree.parse("F[1, 0]").restricted({1})
        (Tree('F[3, 1]'), Tree('1'))
        """
        kept: dict[Tree, Tree] = {}
        for node in self.nodes():
            below = [tree for child in node.children if (tree := kept.pop(child)).kind != "empty"]
            if node.leaf is not None and node.leaf in leaves:
                kept[node] = Tree.fma(node.leaf, below[0]) if below else Tree.of(node.leaf)
            elif len(below) < 2:
                kept[node] = below[0] if below else Tree.empty()
            else:
                kept[node] = Tree(node.kind, None, below)
        return kept[self]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All taps, ascending, and the bias last."""
        taps = (tap for tap, bit in enumerate(reversed(bin(self.leaf_set)[2:-1])) if bit == "1")
        return (*taps, *([BIAS] if self.has(BIAS) else []))

    @property
    def size(self) -> int:
        """The number of leaves."""
        return self.leaf_set.bit_count()

    def has(self, leaf: Leaf) -> bool:
        """Return whether a leaf is below."""
        return bool(self.leaf_set & _bit(leaf))

    @property
    def fused(self) -> tuple[int, ...]:
        """The taps whose products enter unrounded, ascending."""
        return tuple(sorted(node.leaf for node in self.nodes() if node.kind == "fma" and isinstance(node.leaf, int)))


def _bit(leaf: Leaf) -> int:
    return 1 if isinstance(leaf, str) else 2 << leaf


def _first_leaf(tree: Tree) -> float:
    """Return where a tree stands among its siblings: by its smallest tap, the bias alone last, the empty one first."""
    taps = tree.leaf_set >> 1
    return (taps & -taps).bit_length() if taps else np.inf if tree.leaf_set else -1
