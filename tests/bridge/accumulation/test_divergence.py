"""The sentence on where two orders first diverge."""

import io
import types

import numpy as np
import pytest
from rich.console import Console

import bridge
from bridge._implementations import implementation
from bridge.accumulation import NotASum, Tree, divergence
from bridge.accumulation.order import Rounding
from bridge.numerics import FLOAT32, FLOAT64
from bridge.report.orders import print_orders

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


def order(name, text, products="rounded", accumulator=None, output=None):
    trees, refusals = ([Tree.parse(text)], []) if text else ([], [NotASum("planted")])
    (outcome,) = trees or refusals
    labels = np.full(4, 0 if text else -1)
    return types.SimpleNamespace(
        implementation=name,
        trees=trees,
        refusals=refusals,
        labels=labels,
        outcome=lambda label: outcome,
        fingerprint=types.SimpleNamespace(products=products, accumulator=accumulator, output=output),
    )


@pytest.mark.parametrize("texts, said", CASES.items())
def test_each_kind_of_divergence_is_named(texts, said):
    a, b = texts
    assert divergence(order("a", a), order("b", b)) == said


def test_exact_products_are_not_said_to_be_rounded():
    wide = order("b", "(0+1)+2", "exact", Rounding(FLOAT64), Rounding(FLOAT32))
    assert divergence(order("a", "F[2, F[1, 0]]"), wide).endswith(
        "a fuses multiply and add (one rounding); b adds exact products in float64 and rounds at the end."
    )
    same = order("b", "(0+1)+2", "exact", Rounding(FLOAT32), Rounding(FLOAT32))  # of operands rounded before
    assert divergence(same, order("a", "F[2, F[1, 0]]")).startswith(
        "b and a first diverge at the second product, on 4 of 4 elements: b adds exact products in float32; a fuses"
    )
    assert "b adds the exact product 2 to the exact product 1." in divergence(
        order("a", "(0+1)+2"), order("b", "0+(1+2)", "exact")
    )


@pytest.mark.parametrize(
    "names, said",
    {
        ("jax.taps",): "a+b rounds both products first.",
        ("torch.taps[dtype=float64]",): "a+b adds exact products.",
        ("jax.taps", "torch.taps[dtype=float64]"): "products first, but adds exact ones in torch.taps[dtype=float64].",
    }.items(),
)
def test_the_legend_says_what_a_sum_does_with_its_products(names, said):
    case = bridge.Case(np.ones((1, 4, 4, 1), np.float32), np.ones((2, 2, 1, 1), np.float32))
    console = Console(file=io.StringIO(), width=200)
    print_orders([bridge.reveal(implementation(name), case) for name in names], console)
    assert said in console.file.getvalue()
