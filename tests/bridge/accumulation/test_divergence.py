"""The sentence on where two orders first diverge."""

import types

import numpy as np
import pytest

from bridge.accumulation import NotASum, Tree, divergence

CASES = {
    ("F[2, F[1, 0]]", "F[2, F[1, 0]]"): "a and b add in the same order everywhere.",
    ("F[2, F[1, 0]]", "(0+1)+2"): "a and b first diverge at the second product, on 4 of 4 elements: "
    "a fuses multiply and add (one rounding); b rounds the product first (two roundings).",
    ("((0+1)+2)+3", "F[3, ((0+1)+2)]"): "a and b first diverge at the fourth product, on 4 of 4 elements: "
    "a rounds the product first (two roundings); b fuses multiply and add (one rounding).",
    ("(0+1)+2", "0+(1+2)"): "a and b first diverge at addition 1, on 4 of 4 elements: "
    "a adds the rounded product 1 to the rounded product 0; b adds the rounded product 2 to the rounded product 1.",
    ("(((0+1)+2)+3)+b", "E[0, 1, 2, 3, b]"): "a and b first diverge at addition 1, on 4 of 4 elements: "
    "a adds the rounded product 1 to the rounded product 0; b adds all products exactly and rounds once.",
    ("F[4, (((0+1)+2)+3)]", "F[3, F[4, ((0+1)+2)]]"): "a and b first diverge at addition 3, on 4 of 4 elements: "
    "a adds the rounded product 3 to the sum of products 0 to 2; "
    "b adds product 4 to the sum of products 0 to 2 by a fused multiply-add.",
    ("F[1, 0]", None): "a and b cannot be compared on 4 of 4 elements: b is no conventional sum there.",
}


def order(name, text):
    trees, refusals = ([Tree.parse(text)], []) if text else ([], [NotASum("planted")])
    (outcome,) = trees or refusals
    labels = np.full(4, 0 if text else -1)
    return types.SimpleNamespace(
        implementation=name, trees=trees, refusals=refusals, labels=labels, outcome=lambda label: outcome
    )


@pytest.mark.parametrize("texts, said", CASES.items())
def test_each_kind_of_divergence_is_named(texts, said):
    a, b = texts
    assert divergence(order("a", a), order("b", b)) == said
