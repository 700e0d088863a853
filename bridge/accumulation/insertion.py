"""From sizes of common subtrees to the tree: leaves are inserted one at a time.

Let l(i, j) be the number of leaves under the lowest common ancestor of leaves i and j, in the whole tree. The
ancestors of a leaf are nested, so l distinguishes them: FPRev (Xie et al., USENIX ATC 2025) asks for l from a pivot to
all other leaves and recurses. Here leaf t joins the tree of the leaves before it, whose nodes carry their l. One l(t,
s) says where on the way from s to the root t branches off: between two nodes, which settles t, or at a node, and then
the search goes on below that node's other operands. A good guess of s settles t at once, n - 1 questions in all:
where a similar tree, that of other output elements, has it; else beside the leaf before it, for sums that run through
their leaves in order, or in blocks, or in halves; or one stride back, for sums in interleaved lanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bridge.accumulation.tree import Leaf, Tree

#: For leaf t, the l(t, s) that are known, by s.
Sizes = Mapping[int, Mapping[int, int]]


class Contradiction(Exception):
    """The sizes are those of no tree."""


@dataclasses.dataclass(frozen=True)
class Question:
    """The l(leaf, partner) to ask for.

    Attributes:
      leaf: which leaf.
      partner: the best guess.
      partners: all that serve, as bits.
    """

    leaf: int
    partner: int
    partners: int


@dataclasses.dataclass(eq=False)
class _Node:
    """A subtree of the leaves so far; `size` counts its leaves in the whole tree, `mask` holds those inserted."""

    mask: int
    size: int
    parent: _Node | None = None
    operands: list[_Node] = dataclasses.field(default_factory=list)


class Insertion:
    """The tree of the leaves inserted so far. `advance` inserts all that the known sizes settle."""

    def __init__(self, leaves: Sequence[int], like: Insertion | None = None):
        """`leaves`: in this order, ascending after the first; `like`: a whole tree that this one may resemble."""
        self._order = tuple(leaves)
        self._like = like
        self._position = {leaf: position for position, leaf in enumerate(leaves)}
        self._nodes: dict[int, _Node] = {}
        self._root: _Node | None = None
        self._stride = 1
        self._runs_on = False

    def advance(self, sizes: Sizes) -> Question | None:
        """Insert leaves until a size is missing: the question to ask, or None when the tree is whole.

        Raises:
          Contradiction: the sizes are those of no tree.
        """
        while len(self._nodes) < len(self._order):
            leaf = self._order[len(self._nodes)]
            question = self._insert(leaf, sizes.get(leaf, {}))
            if question is not None:
                return question
        for node in self._inner():
            if node.size != node.mask.bit_count():
                raise Contradiction(f"an addition of {node.size} leaves has {node.mask.bit_count()} below it")
        return None

    def siblings(self, leaf: int) -> int:
        """Return, as bits, the leaves of the other operand of the addition of two that `leaf` enters; 0: none."""
        parent = self._nodes[leaf].parent
        return parent.mask & ~(1 << leaf) if parent is not None and len(parent.operands) == 2 else 0

    def meeting(self, i: int, j: int) -> tuple[int, bool, bool]:
        """`(l(i, j), whether i itself is an operand where they meet, whether j is)`, of the whole tree."""
        node = _first_over(self._nodes[i], j, self._nodes[j], i)
        two = len(node.operands) == 2
        return node.size, two and self._nodes[i].parent is node, two and self._nodes[j].parent is node

    def tree(self, name: Sequence[Leaf], fused: frozenset[int] = frozenset()) -> Tree:
        """Return the whole tree with leaf i called `name[i]`, where the products of `fused` enter unrounded."""
        if self._root is None:
            return Tree.empty()
        built = {1 << leaf: Tree.of(name[leaf]) for leaf in self._order}
        unrounded = {self._nodes[leaf].parent: leaf for leaf in fused}
        for node in sorted(self._inner(), key=lambda node: node.mask.bit_count()):
            operands = [built.pop(operand.mask) for operand in node.operands]
            leaf = unrounded.get(node)
            if leaf is not None:
                (addend,) = (operand for operand in operands if operand is not Tree.of(name[leaf]))
                built[node.mask] = Tree.fma(name[leaf], addend)
            else:
                built[node.mask] = Tree.add(*operands)
        return built[self._root.mask]

    def _inner(self) -> list[_Node]:
        found, stack = [], [self._root] if self._root else []
        while stack:
            node = stack.pop()
            if node.operands:
                found.append(node)
                stack.extend(node.operands)
        return found

    def _beside(self, leaf: int, among: int) -> int:
        """Return those of the leaves `among` that meet `leaf` first."""
        node = self._nodes.get(leaf)
        while node is not None and not node.mask & among:
            node = node.parent
        return node.mask & among if node else 0

    def _insert(self, leaf: int, known: Mapping[int, int]) -> Question | None:
        new = _Node(1 << leaf, 1)
        if self._root is None:
            self._root = self._nodes[leaf] = new
            return None
        region, elsewhere, first_guess = self._root, [], True
        while True:
            # `leaf` is in or just above `region` or one of `elsewhere`, or is one more operand of their parent.
            above = region.parent
            ceiling = above.size if above else len(self._order) + 1
            partner = next((s for s in known if region.mask >> s & 1), None)
            if partner is None:
                return self._question(leaf, region, first_guess)
            first_guess = False
            size = known[partner]
            below = region if region.size < size else self._nodes[partner]
            while below is not region and (parent := below.parent) is not None and parent.size < size:
                below = parent
            if below is not region and (parent := below.parent) is not None and parent.size == size:
                if parent.mask.bit_count() == size:
                    raise Contradiction(f"leaves {leaf} and {partner} meet below {size} leaves, which are others")
                region, *elsewhere = (operand for operand in parent.operands if operand is not below)
            elif size < ceiling:
                self._branch_off(new, below, size)
                break
            elif size > ceiling or above is None:
                raise Contradiction(f"leaves {leaf} and {partner} meet above {ceiling} leaves, where they cannot")
            elif elsewhere:
                region, *elsewhere = elsewhere
            else:
                _join(new, above)
                break
        self._nodes[leaf] = new
        return None

    def _branch_off(self, new: _Node, sibling: _Node, size: int) -> None:
        """Insert a node of that size between `sibling` and its parent, with `new` as its other operand."""
        node = _Node(sibling.mask, size, sibling.parent, [sibling, new])
        if sibling.parent is None:
            self._root = node
        else:
            siblings = sibling.parent.operands
            siblings[siblings.index(sibling)] = node
        sibling.parent = new.parent = node
        self._note(new, sibling.mask)
        _add_to_masks(node, new.mask)

    def _note(self, new: _Node, sibling: int) -> None:
        """Note how far back the new leaf found its sibling: the next leaf is likely to find its own as far back."""
        position = self._position[new.mask.bit_length() - 1]
        self._stride = position - self._position[self._last(sibling)]
        self._runs_on = self._stride == 1 and sibling.bit_count() > 1

    def _question(self, leaf: int, region: _Node, first_guess: bool) -> Question:
        if self._like is not None and (expected := self._like._beside(leaf, region.mask)):
            return Question(leaf, lowest(expected), expected)
        guess = self._order[self._position[leaf] - self._stride]
        if first_guess and self._runs_on:
            # The last leaf was added to a sum of several. If this one follows it, each of them as its partner says so;
            # if not, the first, on which the others were added, tells the most.
            return Question(leaf, self._first(region.mask), region.mask)
        if not region.mask >> guess & 1:
            guess = self._last(region.mask) if first_guess else self._first(region.mask)
        return Question(leaf, guess, 1 << guess)

    def _first(self, mask: int) -> int:
        """Return the leaf of a set that was inserted first."""
        return self._order[0] if mask >> self._order[0] & 1 else lowest(mask)

    def _last(self, mask: int) -> int:
        """Return the leaf of a set that was inserted last."""
        return (mask & ~(1 << self._order[0]) or mask).bit_length() - 1


def _join(new: _Node, node: _Node) -> None:
    """Make `new` one more operand of a multi-way addition."""
    new.parent = node
    node.operands.append(new)
    _add_to_masks(node, new.mask)


def _add_to_masks(node: _Node | None, mask: int) -> None:
    while node is not None:
        node.mask |= mask
        node = node.parent


def _first_over(a: _Node | None, j: int, b: _Node | None, i: int) -> _Node:
    """Return the first node above leaf i that holds leaf j: climb from both (nodes a and b), the nearer one ends it."""
    while a is not None and b is not None:
        if a.mask >> j & 1:
            return a
        if b.mask >> i & 1:
            return b
        a, b = a.parent, b.parent
    raise AssertionError("leaves of one tree meet at its root")


def lowest(mask: int) -> int:
    """Return the least leaf of a set of bits."""
    return (mask & -mask).bit_length() - 1
