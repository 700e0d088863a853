"""The text form, identity, JSON, height and bound of accumulation trees."""

import copy
import json
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from bridge.accumulation import BIAS, Tree
from tests.bridge.accumulation.planted import random_tree

seeds = st.integers(0, 2**32 - 1)


def a_tree(seed, **options):
    rng = np.random.default_rng(seed)
    leaves = [*range(int(rng.integers(1, 12))), *([BIAS] if rng.random() < 0.5 else [])]
    return random_tree(rng, leaves, **options)


@pytest.mark.parametrize(
    ("text", "leaves", "height"),
    [
        ("()", (), 0),
        ("0", (0,), 0),
        ("b", ("b",), 0),
        ("0+b", (0, "b"), 1),
        ("F[1, 0]", (0, 1), 1),
        ("F[8, F[7, F[1, 0]]]", (0, 1, 7, 8), 3),
        ("(((0+1)+(4+5))+((2+3)+(6+7)))+8", tuple(range(9)), 4),
        ("F[8, ((F[0, 2]+F[1, 3])+(F[4, 6]+F[5, 7]))]", tuple(range(9)), 4),
        ("(0+1+2)+3", (0, 1, 2, 3), 2),
        ("E[0, 1, b]", (0, 1, "b"), 1),
    ],
)
def test_a_text_form_reads_back_as_itself(text, leaves, height):
    tree = Tree.parse(text)
    assert str(tree) == text
    assert tree.leaves == leaves
    assert tree.height == height


@given(seeds)
def test_every_tree_survives_text_json_copy_and_pickle(seed):
    tree = a_tree(seed, most_operands=4)
    assert Tree.parse(str(tree)) is tree
    assert json.loads(json.dumps(tree.to_json())) == tree.to_json()
    assert copy.deepcopy(tree) is tree
    assert pickle.loads(pickle.dumps(tree)) is tree


def test_addition_commutes_and_does_not_associate():
    assert Tree.parse("b + (1+0)") is Tree.parse("(0+1)+b")
    assert Tree.parse("(0+1)+2") is not Tree.parse("0+(1+2)")
    assert Tree.parse("(0+1)+2") is not Tree.parse("0+1+2")


def test_a_deep_chain_neither_recurses_nor_loses_its_text():
    chain = Tree.chain(range(3000), fused=True)
    assert chain.height == 2999
    assert Tree.parse(str(chain)) is chain


@pytest.mark.parametrize(
    "text", ["", "0+", "+0", "(0)", "(0+1", "0)", "F[0]", "F[b, 0]", "F[(0+1), 2]", "E[0]", "x", "0 1"]
)
def test_what_is_no_text_form_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match="expected"):
        Tree.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tree.of(-1),
        lambda: Tree.of("c"),
        lambda: Tree.of(True),
        lambda: Tree.add(Tree.of(0)),
        lambda: Tree.add(Tree.of(0), Tree.of(0)),
        lambda: Tree.fma(BIAS, Tree.of(0)),
        lambda: Tree.exact([0]),
    ],
)
def test_a_tree_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_a_tree_cannot_be_changed():
    with pytest.raises(AttributeError, match="immutable"):
        Tree.of(0).leaf = 1
