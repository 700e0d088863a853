"""The gradient by the input is a convolution of its own: the same sums, revealed and replayed like any other."""

import numpy as np
import pytest

from bridge import Case, Verdict, implementation, parity
from bridge.accumulation import replay, reveal
from bridge.accumulation.gradient import InputGradient, input_gradient_case
from bridge.numerics import exact, exact_input_gradient, same_bits
from bridge.selftest import random_case

NAMES = ["torch.conv2d", "torch.unfold_matmul", "torch.unfold_einsum", "jax.grouped", "jax.patches", "jax.taps"]


def problem(rng, **options):
    case = random_case(rng, multiplier=1, **options)
    return case, rng.standard_normal(case.geometry.output_shape, np.float32)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_adjoint_convolution_is_the_gradient(rank, seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(100 if full else 15):
        case, dy = problem(rng, rank=rank)
        adjoint = exact(input_gradient_case(case, dy)).value
        assert same_bits(adjoint, exact_input_gradient(case, dy).value).all(), case.geometry


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_replayed_bit_for_bit(name, seed, full):
    rng = np.random.default_rng(seed)
    elements = reproduced = 0
    for _ in range(30 if full else 3):
        case, dy = problem(rng)
        order = reveal(InputGradient(implementation(name), case), input_gradient_case(case, dy))
        again = replay(order, input_gradient_case(case, dy))
        same = same_bits(again, implementation(name).input_gradient(case, dy))
        assert same[order.labels >= 0].all(), case.geometry
        elements, reproduced = elements + same.size, reproduced + int(same.sum())
    assert reproduced >= 0.999 * elements


def test_the_gradients_of_the_questions_case_are_explained():
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((2, 5, 5, 3), np.float32), rng.standard_normal((3, 3, 1, 3), np.float32), padding=1)
    dy = rng.standard_normal((2, 5, 5, 3), np.float32)
    diagnosis = parity(case, quantity="dx", dy=dy)
    assert {c.verdict for c in diagnosis.comparisons} <= {Verdict.IDENTICAL, Verdict.EXPLAINED}
    assert all(c.explained == c.different for c in diagnosis.comparisons if c.different)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"padding": "CIRCULAR"}, "`case` has multiplier 1 and circular padding, expected 1 and zeros"),
        (
            {"kernel": np.zeros((3, 3, 1, 4), np.float32)},
            "`case` has multiplier 2 and zeros padding, expected 1 and zeros",
        ),
    ],
)
def test_another_gradient_is_refused(change, message):
    case = Case(np.zeros((1, 5, 5, 2), np.float32), np.zeros((3, 3, 1, 2), np.float32)).replace(**change)
    with pytest.raises(ValueError) as caught:
        input_gradient_case(case, np.zeros(case.geometry.output_shape, np.float32))
    assert message in str(caught.value)
