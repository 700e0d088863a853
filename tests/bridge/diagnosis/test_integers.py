"""Small integers: what they catch, and what they leave alone."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from bridge import Case, Verdict, compare, implementation
from bridge.case import DTYPES
from bridge.diagnosis import integer_case, integer_test
from bridge.numerics import BFLOAT16, FLOAT32, Arithmetic, exact, format_of
from bridge.selftest import random_case
from tests.bridge.diagnosis.mutations import backwards, geometry, in_order, rounded


@dataclasses.dataclass(frozen=True)
class Computes:
    """An implementation that is a function."""

    name: str
    run: Callable


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("kernel_size", [(1,), (3, 3), (7, 7), (7, 7, 7), (500,)])
def test_every_operand_and_every_sum_of_sizes_is_exact(rng, dtype, kernel_size):
    shape = (1, *(k + 1 for k in kernel_size), 2)
    case = Case(np.ones(shape, dtype), np.ones((*kernel_size, 1, 2), dtype), np.ones(2, dtype))
    small = integer_case(case, seed=int(rng.integers(2**32)))
    for array in (small.x, small.kernel, small.bias):
        wide = array.astype(np.float64)
        assert (wide == np.rint(wide)).all() and np.abs(wide).max() <= 255
        assert (rounded(array, BFLOAT16) == array).all()
    assert small.x.all() and small.bias.all()
    # the sum of the sizes of all terms bounds every partial sum in every order
    least = min(format_of(dtype).precision, FLOAT32.precision if dtype.itemsize == 2 else 64)
    assert exact(small).magnitude.max() <= 2**least * (1 + 2**-40)


def test_two_orders_of_addition_agree(rng):
    for _ in range(10):
        case = geometry(rng)
        assert all(integer_test(Computes("sum", order), case).passed for order in (in_order, backwards))


@pytest.mark.parametrize("name", ["torch.conv2d", "torch.unfold_matmul", "jax.grouped", "jax.patches", "jax.taps"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_an_implementation_passes(rng, name, dtype):
    case = random_case(rng)
    case = case.replace(**{n: getattr(case, n).astype(DTYPES[dtype]) for n in ("x", "kernel")}, bias=None)
    result = integer_test(implementation(name), case, implementation(name).arithmetic(case))
    assert result.passed and result.verdict is Verdict.IDENTICAL, (result, case.geometry)


def scaled(factor):
    def run(case):
        kernel = case.kernel.copy()
        kernel.reshape(case.geometry.taps, -1)[0, 0] *= np.float32(factor)
        return in_order(case.replace(kernel=kernel))

    return run


def test_a_scaled_tap_that_hides_inside_the_bound_is_caught(rng):
    # off by less than a quarter of the bound of nine products; on integers by more than a unit in the last place
    x, kernel = rng.standard_normal((1, 12, 12, 2), np.float32), rng.standard_normal((3, 3, 1, 2), np.float32)
    case = Case(x, kernel, padding="VALID")
    mutant = Computes("mutant", scaled(1 + 2.0**-22))
    assert compare(mutant.run(case), backwards(case), case).verdict is Verdict.ROUNDING
    result = integer_test(mutant, case)
    assert not result.passed and result.verdict is Verdict.BUG


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (lambda c: in_order(c.replace(kernel=np.flip(c.kernel, 0))), Verdict.CONVENTION),
        (lambda c: in_order(c, lambda s: s.astype(ml_dtypes.bfloat16).astype(np.float32)), Verdict.PRECISION),
        (scaled(2), Verdict.BUG),
    ],
)
def test_what_integers_catch_has_its_own_verdict(rng, run, verdict):
    case = geometry(rng, rank=2, least=2)
    assert integer_test(Computes("mutant", run), case).verdict is verdict


def test_rounded_inputs_are_left_to_the_bound(rng):
    case = geometry(rng)

    def run(case):
        return in_order(case.replace(x=rounded(case.x, BFLOAT16), kernel=rounded(case.kernel, BFLOAT16)))

    assert integer_test(Computes("bfloat16", run), case).passed
    assert not compare(run(case), backwards(case), case).verdict.passes


def test_a_declared_lower_output_gets_smaller_integers(rng):
    case = geometry(rng)
    small = integer_case(case, Arithmetic.of("float32", output=BFLOAT16))
    y = in_order(small)
    assert (rounded(y, BFLOAT16) == y).all()
