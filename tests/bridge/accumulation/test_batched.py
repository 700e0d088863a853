"""Orders by many masks in one call: random trees come back, and what is no tree is refused."""

import math

import numpy as np
import pytest

from bridge.accumulation import BIAS, Tree
from bridge.accumulation.arithmetic import Accumulator
from bridge.accumulation.batched import ManySums, reveal_tree, starts_from_zero
from bridge.accumulation.insertion import Contradiction
from bridge.numerics import FLOAT32

FLOATS = Accumulator(FLOAT32)


def adding(tree):
    """Return the sums of rows by a tree, in NumPy."""

    def run(x, weights):
        value = {}
        for node in tree.nodes():
            below = [value[child] for child in node.children]
            if node.leaf == BIAS:
                result = weights[:, -1]
            elif node.kind == "leaf":
                result = np.float32(x) * weights[:, node.leaf]
            elif node.kind == "fma":
                result = FLOATS.fma(np.full(len(weights), x, np.float32), weights[:, node.leaf], below[0])
            else:
                result = below[0] + below[1]
            value[node] = result.astype(np.float32)
        return value[tree]

    return run


def random_tree(rng, leaves):
    if len(leaves) == 1:
        return Tree.of(leaves[0])
    if leaves[0] != BIAS and rng.random() < 0.4:
        return Tree.fma(leaves[0], random_tree(rng, leaves[1:]))
    cut = int(rng.integers(1, len(leaves)))
    return Tree.add(random_tree(rng, leaves[:cut]), random_tree(rng, leaves[cut:]))


def test_random_trees_come_back(seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(300 if full else 40):
        terms, has_bias = int(rng.integers(1, 40)), bool(rng.random() < 0.5)
        leaves = [*range(terms), *([BIAS] if has_bias else [])]
        rng.shuffle(leaves)
        tree = random_tree(rng, [leaf if leaf == BIAS else int(leaf) for leaf in leaves])
        assert reveal_tree(ManySums(adding(tree), terms, int(rng.integers(1, 30)), has_bias)) is tree


@pytest.mark.sampled(3)
@pytest.mark.parametrize("terms", [1280, 4096])
@pytest.mark.parametrize("family", ["chain", "backwards", "blocks", "lanes"])
def test_long_sums_take_two_questions_for_each_term(family, terms):
    chain = lambda leaves: Tree.chain(list(leaves), fused=True)  # noqa: E731
    tree = {
        "chain": lambda: chain(range(terms)),
        "backwards": lambda: chain(reversed(range(terms))),
        "blocks": lambda: Tree.add(Tree.add(chain(range(256)), chain(range(256, 500))), chain(range(500, terms))),
        "lanes": lambda: Tree.add(*(Tree.add(*(chain(range(k, terms, 4)) for k in pair)) for pair in ((0, 1), (2, 3)))),
    }[family]()
    asked = 0

    def run(x, weights):
        nonlocal asked
        asked += len(weights)
        return adding(tree)(x, weights)

    assert reveal_tree(ManySums(run, terms, 512)) is tree
    assert asked <= 5 * terms


def test_a_mean_is_scaled_back():
    tree = Tree.parse("((0+1)+(2+3))+4")
    run = adding(tree)
    mean = ManySums(lambda x, weights: run(x, weights) / np.float32(5), 5, 3, multiplies=False, scale=5.0)
    assert reveal_tree(mean) is tree


def test_the_sign_of_zero_tells_where_a_sum_starts():
    run = adding(Tree.parse("F[1, 0]"))
    assert not starts_from_zero(ManySums(run, 2, 1))
    assert starts_from_zero(ManySums(lambda x, weights: np.float32(0) + run(x, weights), 2, 1))


@pytest.mark.parametrize(
    "sums",
    [
        lambda weights: np.array([math.fsum(row.tolist()) for row in weights], np.float32),
        lambda weights: np.where(np.arange(len(weights)) % 2, *(adding(Tree.parse(t))(1, weights) for t in TWO)),
        lambda weights: np.full(len(weights), np.nan, np.float32),
    ],
    ids=["one rounding", "several orders", "not a number"],
)
def test_what_is_no_tree_is_refused(sums):
    with pytest.raises(Contradiction):
        reveal_tree(ManySums(lambda x, weights: sums(weights), 5, 4))


TWO = ("(((0+1)+2)+3)+4", "0+(1+(2+(3+4)))")
