"""Output elements grouped by their answers: those of one group are summed in the same order, as far as is known."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bridge.accumulation.insertion import Contradiction, Insertion, Question
from bridge.accumulation.masks import Masks

#: More groups than this is no structure of an implementation: the answers are noise.
MOST_GROUPS = 20_000


@dataclasses.dataclass(eq=False)
class Group:
    """Elements that gave the same answers.

    Attributes:
      leaves: the leaves that these elements add, in the order in which to insert them.
      count: how many elements.
      sizes: l(i, j) by i and j, both ways round.
      signs: by i and j: +1 where product i was seen to enter unrounded beside j, -1 where j was beside i, 0 neither.
      refusal: why the answers are not those of a tree.
      exact: whether no answer depended on any order.
      settled: whether the tree is known.
    """

    leaves: tuple[int, ...]
    count: int
    sizes: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)
    signs: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)
    refusal: str | None = None
    exact: bool = False
    settled: bool = False
    insertion: Insertion | None = None

    def split(self, count: int) -> Group:
        """Return a part of this group, with the same answers so far."""
        sizes, signs = ({leaf: dict(seen) for leaf, seen in known.items()} for known in (self.sizes, self.signs))
        whole = self.insertion if self.settled else None
        return Group(self.leaves, count, sizes, signs, self.refusal, self.exact, self.settled, whole)

    @functools.cached_property
    def leaf_set(self) -> int:
        """The leaves as bits."""
        return sum(1 << leaf for leaf in self.leaves)

    def wants_product(self, leaf: int) -> bool:
        """Return whether the leaf is added and has a sibling, and was not seen beside a leaf of it."""
        if self.refusal is not None or self.exact or not self.settled or not self.leaf_set >> leaf & 1:
            return False
        siblings = self.whole.siblings(leaf)
        return siblings != 0 and not any(siblings >> seen & 1 for seen in self.signs.get(leaf, ()))

    def answer(self, i: int, j: int, sign: int | None, size: int | None) -> None:
        """Note the answers of a run; None stands for an answer that its masks cannot give."""
        if size is not None:
            self.sizes.setdefault(i, {})[j] = self.sizes.setdefault(j, {})[i] = size
        if sign is not None:
            self.signs.setdefault(i, {})[j] = sign
            self.signs.setdefault(j, {})[i] = -sign

    def advance(self, like: Insertion | None) -> Question | None:
        """Return the next question, or None once the group is settled, refused or found exact."""
        if self.insertion is None:
            self.insertion = Insertion(self.leaves, like)
        try:
            question = self.insertion.advance(self.sizes)
        except Contradiction as contradiction:
            if all(size == 2 for partners in self.sizes.values() for size in partners.values()):
                self.exact = self.settled = True
            else:
                self.refusal = f"no tree of additions gives these sums: {contradiction}"
            return None
        self.settled = question is None
        return question

    @property
    def whole(self) -> Insertion:
        """The tree of a settled group."""
        assert self.insertion is not None
        assert self.settled
        return self.insertion


class Partition:
    """Every element's group; refined as answers come in.

    Attributes:
      groups: the groups.
      labels: int32, flat: the group of each element.
    """

    def __init__(self, leaf_sets: list[tuple[int, ...]], labels: np.ndarray):
        self.labels = labels.astype(np.int32)
        counts = np.bincount(self.labels, minlength=len(leaf_sets))
        self.groups = [Group(leaves, int(count), settled=len(leaves) < 2) for leaves, count in zip(leaf_sets, counts)]
        for group in self.groups:
            if group.settled:
                group.insertion = Insertion(group.leaves)
                group.insertion.advance({})

    def open(self) -> list[Group]:
        """Return the groups whose tree is not known yet."""
        return [group for group in self.groups if group.refusal is None and not group.settled]

    def most_like(self, leaves: int) -> Insertion | None:
        """Return the known tree that has most of these leaves."""
        known = [group for group in self.groups if group.settled and not group.exact and group.refusal is None]
        return max(known, key=lambda group: (leaves & group.leaf_set).bit_count()).whole if known else None

    @property
    def without_tree(self) -> int:
        """Elements whose answers are those of no tree."""
        return sum(group.count for group in self.groups if group.refusal is not None or group.exact)

    def record(
        self, i: int, j: int, answers: tuple[np.ndarray, np.ndarray, np.ndarray], terms: int, masks: Masks
    ) -> None:
        """Split the groups by what leaves i and j answered to `masks`: `(sign, count, sound)` for every element."""
        sign, count, sound = answers
        asked = np.array(
            [group.leaf_set >> i & group.leaf_set >> j & 1 and group.refusal is None for group in self.groups], bool
        )
        codes = 3 * (terms + 1) + 1
        code = np.where(sound & asked[self.labels], 1 + (sign + 1) * (terms + 1) + count, 0)
        combined = self.labels.astype(np.int64) * codes + code
        found = np.bincount(combined, minlength=len(self.groups) * codes)
        present = np.flatnonzero(found)
        if len(present) > MOST_GROUPS:
            raise ValueError(f"`implementation` gave more than {MOST_GROUPS} different answers, expected a few")
        parents = present // codes
        alone = np.bincount(parents, minlength=len(self.groups)) == 1
        groups = []
        for at, parent in zip(present.tolist(), parents.tolist()):
            group = self.groups[parent] if alone[parent] else self.groups[parent].split(int(found[at]))
            groups.append(group)
            if not asked[parent]:
                continue
            sign_of, count_of = divmod(at % codes - 1, terms + 1)
            if at % codes == 0 or count_of > len(group.leaves) - 2:
                group.refusal = "the masks leave remainders that are no count of terms"
                continue
            sign_seen = sign_of - 1 if masks.residue else None
            group.answer(i, j, sign_seen, len(group.leaves) - count_of if masks.unit else None)
        renumbered = np.zeros(len(found), np.int32)
        renumbered[present] = np.arange(len(present))
        self.labels, self.groups = renumbered[combined], groups

    def check(self) -> None:
        """Refuse the settled groups with an answer that their tree would not give."""
        for group in self.groups:
            if group.refusal is not None or group.exact or not group.settled:
                continue
            unrounded = fused_leaves(group)
            for i, partners in group.sizes.items():
                if any(group.whole.meeting(i, j)[0] != size for j, size in partners.items()):
                    group.refusal = f"term {i} does not meet the others where they say that it does"
            for i, signs in group.signs.items():
                for j, sign in signs.items():
                    _, i_enters, j_enters = group.whole.meeting(i, j)
                    if sign != (i_enters and i in unrounded) - (j_enters and j in unrounded):
                        group.refusal = f"a product is unrounded beyond its first addition (terms {i} and {j})"


def fused_leaves(group: Group) -> frozenset[int]:
    """Return the leaves of a settled group that were seen to enter unrounded where they are added."""
    meeting = group.whole.meeting
    return frozenset(
        i for i, signs in group.signs.items() if any(sign > 0 and meeting(i, j)[1] for j, sign in signs.items())
    )
