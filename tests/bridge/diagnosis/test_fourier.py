"""The checker judges convolutions by Fourier transforms by a bound of their own."""

import numpy as np
import pytest

import bridge
from bridge import Case
from bridge._implementations import implementation, implementations
from bridge.diagnosis.verdict import Verdict

NAMES = ["torch.conv2d", "jax.fft"]


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("quantity", ["y", "dx"])
def test_they_are_rounding_and_never_explained_or_tested_on_integers(quantity, seed):
    x, kernel, bias, dy = drawn(seed, (1, 12, 9, 3), (5, 3, 1, 3), (3,), (1, 6, 9, 3))
    case = Case(x, kernel, bias, strides=(2, 1))
    of = {} if quantity == "y" else {"dy": dy}
    found = bridge.parity(case, NAMES, explain=True, quantity=quantity, remedy=False, **of)
    (comparison,) = found.comparisons
    assert comparison.verdict == Verdict.ROUNDING and comparison.explained is None
    assert [test.implementation for test in found.integer_tests] == (["torch.conv2d"] if quantity == "y" else [])
    assert [order.implementation for order in found.orders] == ["torch.conv2d"]


def test_a_mistake_is_named_and_a_small_one_is_a_bug(seed):
    x, kernel = drawn(seed, (1, 12, 9, 3), (5, 3, 1, 3))
    case, method = Case(x, kernel), implementation("jax.fft")
    y = method.run(case)
    declared = (method.arithmetic(case),) * 2
    flipped = method.run(case.replace(kernel=np.ascontiguousarray(kernel[::-1])))
    assert bridge.compare(flipped, y, case, arithmetics=declared).verdict == Verdict.CONVENTION
    wrong = y.copy()
    wrong[0, 3, 3, 1] += 0.01
    assert bridge.compare(wrong, y, case, arithmetics=declared).verdict == Verdict.BUG


def test_a_gradient_that_is_no_convolution_has_no_bound(seed):
    x, kernel, dy = drawn(seed, (1, 12, 3), (5, 1, 6), (1, 12, 6))
    with pytest.raises(ValueError, match="for a gradient with zeros padding and a channel multiplier of 2"):
        bridge.parity(Case(x, kernel), ["jax.taps", "jax.fft"], quantity="dx", dy=dy)


def test_it_runs_only_where_it_is_named():
    assert "jax.fft" in implementations() and "jax.fft" not in implementations(untried=False)
