"""Reveal one order with many masks in one call, where an operation computes many sums of the same order.

A matrix product has a sum for each row and each column. Where all are added in the same order, each can carry masks of
its own: a call answers as many questions as the product has rows, or columns. The recursion is that of FPRev (Xie et
al., USENIX ATC 2025): the sizes l(p, j) of the common subtrees of one leaf p with all others give the way from p to the
root, and each operand on that way is a smaller problem. A chain, block chains and lanes of n terms take 2 n questions.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bridge.accumulation import masks
from bridge.accumulation.insertion import Contradiction
from bridge.accumulation.tree import BIAS, Tree
from bridge.numerics import FLOAT32


@dataclasses.dataclass(frozen=True)
class ManySums:
    """Sums of float32 that one call computes, all in the same order.

    Attributes:
      run: takes x, one number for all terms, and weights `(q, leaves)`, the bias last; returns the `(q,)` sums. All
        rows have the same bias.
      terms: the number of products in a sum.
      capacity: the most sums of a call.
      has_bias: whether a bias is added.
      multiplies: whether terms are products; if not, x is 1.
      scale: what a result is multiplied by to give the sum: of a mean its number of terms.
    """

    run: Callable[[float, np.ndarray], np.ndarray]
    terms: int
    capacity: int
    has_bias: bool = False
    multiplies: bool = True
    scale: float = 1.0

    @property
    def leaves(self) -> int:
        """The number of terms and the bias."""
        return self.terms + self.has_bias

    def answers(self, given: masks.Masks, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return the sums where leaf i is +M and leaf j is -M, for each pair (i, j): `(len(pairs),)`, float64.

        The bias is the leaf `terms`, and always i.
        """
        y = np.empty(len(pairs))
        biased = np.array([i == self.terms for i, _ in pairs], bool)
        asked = np.array(pairs).reshape(-1, 2)
        for high in (False, True):
            chosen = np.flatnonzero(biased == high)
            for start in range(0, len(chosen), self.capacity):
                some = chosen[start : start + self.capacity]
                weights = np.full((len(some), self.leaves), given.unit, np.float32)
                if self.has_bias:  # it is not multiplied by x
                    weights[:, -1] = given.unit * given.x
                rows = np.arange(len(some))
                weights[rows, asked[some, 0]] = given.bias_mask if high else given.mask
                weights[rows, asked[some, 1]] = -given.mask
                y[some] = self.run(given.x, weights)
        return y * self.scale


def reveal_tree(sums: ManySums) -> Tree:
    """Return the order in which all these sums are added.

    Raises:
      Contradiction: the answers are those of no tree of additions of two, or not of the same one for all sums.
    """
    if sums.leaves < 2:
        return Tree.of(BIAS if sums.terms == 0 else 0) if sums.leaves else Tree.empty()
    return _built(sums, *_paths(sums))


def starts_from_zero(sums: ManySums) -> bool:
    """Return whether a sum of nothing but -0 is +0, as one that starts from +0 is."""
    weights = np.full((1, sums.leaves), -1.0 if sums.multiplies else -0.0, np.float32)
    if sums.has_bias:
        weights[:, -1] = -0.0
    return not np.signbit(sums.run(0.0 if sums.multiplies else 1.0, weights)[0])


#: A leaf, or the operand that is the problem of this number, counted from `leaves`.
_Path = list[int]


def _paths(sums: ManySums) -> tuple[list[int], list[_Path]]:
    """Return the first leaf of each problem, and what is added to it on the way to its root, in order."""
    n = sums.leaves
    given = masks.wide(FLOAT32, subnormals=False)
    rng = np.random.default_rng(0)
    problems: list[tuple[int, list[int]]] = [(0, list(range(1, n)))]
    paths: list[_Path] = []
    while len(paths) < len(problems):
        level = problems[len(paths) :]
        pairs = [(max(first, j), min(first, j)) for first, others in level for j in others]
        units = sums.answers(given, pairs) / given.unit
        outside = np.rint(units)
        if not ((np.abs(units - outside) <= 0.25) & (outside >= 0) & (outside <= n - 2)).all():
            raise Contradiction("the masks leave remainders that are no count of terms")
        sizes = iter((n - outside).astype(int).tolist())
        for _, others in level:
            groups: dict[int, list[int]] = collections.defaultdict(list)
            for leaf in others:
                groups[next(sizes)].append(leaf)
            path, count = [], 1
            for size in sorted(groups):
                group = groups[size]
                count += len(group)
                if size != count:
                    raise Contradiction(f"{count} leaves meet in an addition of {size}")
                if len(group) == 1:
                    path.append(group[0])
                    continue
                # Beside a leaf that is added late nearly all others are one operand: another choice halves it.
                start = int(rng.integers(len(group))) if 2 * len(group) > len(others) else 0
                path.append(n + len(problems))
                problems.append((group[start], group[:start] + group[start + 1 :]))
            paths.append(path)
    return [first for first, _ in problems], paths


def _built(sums: ManySums, firsts: list[int], paths: list[_Path]) -> Tree:
    """Return the tree, with the products that enter unrounded."""
    n = sums.leaves
    joins = [(leaf, first) for first, path in zip(firsts, paths) for leaf in path if leaf < n]
    joins += [(first, firsts[path[0] - n]) for first, path in zip(firsts, paths) if path and path[0] >= n]
    fused = _fused(sums, joins)
    trees: list[Tree | None] = [None] * len(paths)
    for number in reversed(range(len(paths))):
        first, path = firsts[number], paths[number]
        tree = _leaf(sums, first)
        for at, entering in enumerate(path):
            if entering >= n:
                operand = trees[entering - n]
                assert operand is not None
                tree = Tree.fma(first, operand) if at == 0 and first in fused else Tree.add(tree, operand)
            elif entering in fused:
                tree = Tree.fma(entering, tree)
            elif at == 0 and first in fused:
                tree = Tree.fma(first, _leaf(sums, entering))
            else:
                tree = Tree.add(tree, _leaf(sums, entering))
        trees[number] = tree
    assert trees[0] is not None
    return trees[0]


def _leaf(sums: ManySums, leaf: int) -> Tree:
    return Tree.of(BIAS if leaf == sums.terms else leaf)


def _fused(sums: ManySums, joins: Sequence[tuple[int, int]]) -> set[int]:
    """Return the terms whose products enter unrounded, of leaves that join a sum in which the other leaf is."""
    if not sums.multiplies:
        return set()
    given = masks.product_rounding(FLOAT32, FLOAT32)
    pairs = [(max(pair), min(pair)) for pair in joins]
    signs = np.rint(sums.answers(given, pairs) / given.residue)
    if not (np.abs(signs) <= 1).all():
        raise Contradiction("products are neither rounded nor taken in by a fused multiply-add")
    return {(i if sign > 0 else j) for (i, j), sign in zip(pairs, signs) if sign}
