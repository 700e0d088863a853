"""The verdicts of compare: which, why and where."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from bridge import Case, Verdict, compare
from bridge.case import DTYPES
from bridge.numerics import (
    BFLOAT16,
    Arithmetic,
    error_bound,
    exact,
    exact_input_gradient,
    exact_kernel_gradient,
)
from tests.bridge.diagnosis.mutations import backwards, in_order, rounded
from tests.strategies import problems


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def make(rng, x_shape=(2, 9, 8, 5), kernel_size=(3, 3), bias=True, dtype=np.float32, multiplier=1, **options):
    features = x_shape[-1] * multiplier
    return Case(
        rng.standard_normal(x_shape).astype(dtype),
        rng.standard_normal((*kernel_size, 1, features)).astype(dtype),
        rng.standard_normal(features).astype(dtype) if bias else None,
        **options,
    )


def test_equal_bits_are_identical(rng):
    case = make(rng)
    y = in_order(case)
    result = compare(y, y.copy(), case)
    assert (result.verdict, result.different, result.cause) == (Verdict.IDENTICAL, 0, "")


def test_another_order_of_addition_is_rounding(rng):
    case = make(rng)
    result = compare(in_order(case), backwards(case), case)
    assert result.verdict is Verdict.ROUNDING
    assert 0 < result.max_bound_ratio <= 1
    assert max(result.own_bound_ratios) <= 1


@pytest.mark.parametrize("drawn", [None, 2228121556])  # of this seed, other padding that is zero too has a wider bound
def test_two_sides_are_each_held_to_their_own_bound(seed, drawn):
    # a is 1.5 of its bound above the exact result, and b is 0.4 above it
    case = make(np.random.default_rng(seed if drawn is None else drawn))
    total = exact(case)
    bound = error_bound(Arithmetic.of("float32", flushes_subnormals=True), total)
    a, b = total.value.copy(), total.value.copy()
    at = np.unravel_index(np.argmax(bound / np.abs(total.reference)), a.shape)  # where the format resolves the bound
    a[at], b[at] = total.reference[at] + 1.5 * bound[at], total.reference[at] + 0.4 * bound[at]
    result = compare(a, b, case)
    assert result.max_bound_ratio <= 1 < result.own_bound_ratios[0]
    assert (result.verdict, result.name, result.where) == (Verdict.BUG, "single element", at)


def test_replays_that_reproduce_both_sides_explain_the_difference(rng):
    case = make(rng)
    a, b = in_order(case), backwards(case)
    assert compare(a, b, case, replayed=(a.copy(), b.copy())).verdict is Verdict.EXPLAINED
    partly = compare(a, b, case, replayed=(b.copy(), b.copy()))
    assert (partly.verdict, partly.explained) == (Verdict.ROUNDING, 0)


def test_zeros_of_other_signs_are_not_identical_bits(rng):
    case = make(rng, bias=False)
    case = case.replace(x=np.where(np.arange(5) == 2, np.float32(0), case.x))
    y = in_order(case)
    other = np.where(y == 0, -np.float32(0), y)
    assert compare(y, other, case).verdict is Verdict.ROUNDING


@pytest.mark.sampled(1)
@pytest.mark.parametrize("zero", ["x", "kernel"])
def test_products_that_are_all_zero_decide_nothing(rng, zero):
    case = make(rng, (1, 4, 4, 2), (2, 2), bias=False)  # no hypothesis is screened out, so each is tried in full
    case = case.replace(**{zero: np.zeros_like(getattr(case, zero))})
    result = compare(in_order(case), in_order(case), case)
    assert (result.verdict, result.name) == (Verdict.INCONCLUSIVE, "nothing to decide")
    assert compare(in_order(case) + 1, in_order(case), case).verdict is Verdict.BUG


def test_a_bias_alone_decides(rng):
    case = make(rng)
    case = case.replace(x=np.zeros_like(case.x))
    assert compare(in_order(case), in_order(case), case).verdict is Verdict.IDENTICAL
    assert compare(in_order(case.replace(bias=None)), in_order(case), case).name == "bias missing"


def test_an_empty_output_decides_nothing(rng):
    case = make(rng, x_shape=(0, 9, 8, 5))
    y = np.zeros(case.geometry.output_shape, np.float32)
    assert compare(y, y, case).verdict is Verdict.INCONCLUSIVE


def test_a_difference_where_a_partial_sum_may_overflow_is_inconclusive(rng):
    case = make(rng, bias=False)
    case = case.replace(x=case.x * np.float32(2.0**124), kernel=np.abs(case.kernel) * 16)
    y = exact(case).value
    assert np.isfinite(y).any() and not np.isfinite(y).all()
    other = np.where(np.isfinite(y), np.nextafter(y, np.float32(0)), y)
    result = compare(y, other, case)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "overflow" in result.cause


def test_elements_that_are_not_finite_must_agree_and_the_others_are_judged(rng):
    case = make(rng)
    x = case.x.copy()
    x[0, 4, 4, 1], x[1, 2, 2, 3] = np.nan, np.inf
    case = case.replace(x=x)
    with np.errstate(invalid="ignore"):
        a, b = in_order(case), backwards(case)
    assert not np.isfinite(a).all()
    assert compare(a, b, case).verdict is Verdict.ROUNDING
    wrong = a.copy()
    wrong[0, 0, 0, 0] += 1
    assert compare(wrong, b, case).name == "single element"
    wrong = np.where(np.isnan(a), np.float32(0), a)
    result = compare(wrong, b, case)
    assert result.verdict is Verdict.NONFINITE
    assert "an operand there is NaN or infinite" in result.cause


def test_a_planted_nan_names_its_side_and_place(rng):
    case = make(rng)
    y = in_order(case)
    y[1, 2, 3, 4] = np.nan
    result = compare(y, backwards(case), case, names=("mine", "theirs"))
    assert (result.verdict, result.where) == (Verdict.NONFINITE, (1, 2, 3, 4))
    assert "mine cannot overflow there" in result.cause and "(1, 2, 3, 4)" in result.place


# Texts that a user acts on


def test_a_scaled_tap_is_named_with_its_channel_and_factor(rng):
    case = make(rng)
    kernel = case.kernel.copy()
    kernel[1, 2, 0, 3] *= np.float32(1.01)
    result = compare(in_order(case.replace(kernel=kernel)), backwards(case), case)
    assert result.place == "tap (1, 2) of channel 3 is scaled by 1.01"


def test_a_tap_is_named_only_if_every_element_is_then_within_its_bound(rng):
    case = make(rng, x_shape=(2, 30, 30, 3))
    kernel = case.kernel.copy()
    kernel[1, 2, 0, 1] *= np.float32(1.01)
    y = in_order(case.replace(kernel=kernel))
    assert compare(y, backwards(case), case).name == "tap"
    total = exact(case.replace(kernel=kernel))
    bound = error_bound(Arithmetic.of("float32", flushes_subnormals=True), total)
    at = (*(int(rng.integers(n)) for n in y.shape[:3]), 1)
    y[at] += np.float32(rng.choice([-1, 1]) * 7 * bound[at])
    assert compare(y, backwards(case), case).name in ("channels", "positions")


def test_a_tap_scaled_in_one_batch_entry_is_named_with_both(rng):
    case = make(rng, x_shape=(4, 9, 8, 5))
    kernel = case.kernel.copy()
    kernel[1, 2, 0] *= np.float32(1.01)
    y = backwards(case)
    y[2] = in_order(case.replace(kernel=kernel))[2]
    assert compare(y, backwards(case), case).place == (
        "tap (1, 2) of every channel is scaled by 1.01, only in batch entries 2"
    )


def test_symmetric_padding_for_same_is_fixed_in_the_words_of_a_call(rng):
    case = make(rng, x_shape=(2, 8, 8, 3), padding=1, strides=2)
    result = compare(in_order(case.replace(padding="SAME")), backwards(case), case)
    assert result.name == "SAME against symmetric padding"
    assert result.fix == '`padding=1` instead of `padding="SAME"`'
    assert result.place == "padding"


def test_both_sides_with_one_mistake_blame_the_case_once_each(rng):
    case = make(rng)
    flipped = case.replace(kernel=case.kernel[::-1])
    result = compare(in_order(flipped), backwards(flipped), case)
    assert (result.verdict, result.name) == (Verdict.CONVENTION, "kernel flipped")
    assert "actual has" in result.cause and "expected has" in result.cause


def test_rounded_inputs_name_the_operands(rng):
    case = make(rng)
    result = compare(in_order(case.replace(x=rounded(case.x, BFLOAT16))), backwards(case), case)
    assert (result.name, result.place) == ("bfloat16 inputs", "inputs: x")
    assert "highest" in result.fix


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: c.replace(kernel=c.kernel[::-1]), "kernel flipped"),
        (lambda c: c.replace(bias=None), "bias missing"),
        (lambda c: c.replace(x=c.x[..., ::-1]), "input channels permuted"),
        (lambda c: c.replace(padding="CIRCULAR"), "padding mode"),
    ],
)
def test_a_mistake_is_named_in_every_dtype(rng, dtype, change, name):
    case = make(rng, dtype=dtype)
    result = compare(exact(change(case)).value, exact(case).value, case)
    assert (result.verdict, result.name) == (Verdict.CONVENTION, name)


def test_a_bias_near_another_is_not_taken_for_it():
    # of this seed, the rounding of y is greater than the distance of two biases
    case = make(np.random.default_rng(2170177477), dtype=ml_dtypes.bfloat16)
    result = compare(exact(case.replace(x=case.x[..., ::-1])).value, exact(case).value, case)
    assert (result.verdict, result.name) == (Verdict.CONVENTION, "input channels permuted")
    assert "bias" not in result.fix


def test_float32_in_place_of_float64_is_a_precision(rng):
    case = make(rng, dtype=np.float64)
    low = Case(*(a.astype(np.float32) for a in (case.x, case.kernel, case.bias)))
    result = compare(in_order(low).astype(np.float64), exact(case).value, case)
    assert (result.verdict, result.name) == (Verdict.PRECISION, "float32 inputs and output")


def test_a_bfloat16_accumulator_for_bfloat16_data_is_a_precision(rng):
    case = make(rng, dtype=ml_dtypes.bfloat16, bias=False, kernel_size=(5, 5), x_shape=(2, 20, 20, 4))
    result = compare(in_order(case), exact(case).value, case)
    assert (result.verdict, result.name) == (Verdict.PRECISION, "bfloat16 accumulator")


# Gradients


GRADIENTS = {"dx": exact_input_gradient, "dkernel": exact_kernel_gradient}


@pytest.mark.parametrize("quantity", GRADIENTS)
@pytest.mark.parametrize(
    ("change", "verdict", "name"),
    [
        (lambda c, dy: (c, dy), "IDENTICAL", ""),
        (lambda c, dy: (c.replace(padding=((2, 0), (1, 1))), dy), "CONVENTION", "padding off by one"),
        (lambda c, dy: (c, rounded(dy, BFLOAT16)), "PRECISION", "bfloat16 inputs"),
        (lambda c, dy: (c, np.where(np.arange(5) == 2, 2 * dy, dy)), "BUG", "channel scaled"),
    ],
)
def test_gradients_get_verdicts_too(rng, quantity, change, verdict, name):
    case = make(rng, padding=1)
    dy = rng.standard_normal(case.geometry.output_shape).astype(np.float32)
    gradient = GRADIENTS[quantity]
    result = compare(gradient(*change(case, dy)).value, gradient(case, dy).value, case, quantity=quantity, dy=dy)
    assert (result.verdict, result.name) == (verdict, name)


# Any geometry: every padding kind, sizes of zero and one, any batch axes, in every dtype


def test_a_planted_error_never_passes_on_any_geometry(full):
    plants = st.sampled_from(["add", "scale", "nan", "roll"])
    check = given(problems(), st.sampled_from(list(DTYPES.values())), plants)(assert_that_a_planted_error_fails)
    settings(max_examples=200 if full else 12)(check)()


def assert_that_a_planted_error_fails(problem, dtype, plant):
    x, kernel, bias = problem.arrays(dtype)
    case = Case(x, kernel, bias, **problem.options)
    total = exact(case)
    rng = np.random.default_rng(problem.seed)
    y = total.value.copy()
    hit = rng.random(y.shape) < rng.choice([0.02, 0.5, 1])
    if plant == "add":
        y = np.where(hit, y + dtype.type(3), y)
    elif plant == "scale":
        y = np.where(hit, y * dtype.type(1.5), y)
    elif plant == "nan":
        y = np.where(hit, dtype.type(np.nan), y)
    else:
        y = np.roll(y, 1, axis=int(rng.integers(y.ndim)))
    declared = Arithmetic.of(dtype, flushes_subnormals=True, output_roundings=1 if bias is None else 2)
    allowed = error_bound(declared, total) + total.reference_error
    conforms = (np.abs(y.astype(np.float64) - total.reference) <= allowed).all()
    result = compare(y, total.value, case)
    decided = bool(y.size) and ((x.any() and kernel.any()) or bias is not None)
    assert result.verdict.passes == (conforms and (decided or result.different > 0)), result


# Bad input


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((2, 5, 9, 8), "it looks channels-first; move the channels to the last axis"),
        ((2, 8, 9, 5), "axes 1 and 2 look swapped"),
        ((2, 9, 8), "expected 4 axes, found 3"),
        ((3, 9, 8, 5), r"the batch is \(3,\), expected \(2,\)"),
        ((2, 9, 8, 6), "6 channels on the last axis, expected 5"),
        ((2, 7, 6, 5), 'padding="VALID" gives this shape'),
        ((2, 11, 10, 5), r"padding=2 gives this shape"),
        ((2, 5, 4, 5), "strides=2 gives this shape"),
        ((2, 9, 9, 5), r"1 more along axis 2; padding=.* gives this shape"),
    ],
)
def test_an_array_of_another_shape_is_refused_with_its_likely_cause(rng, shape, hint):
    case = make(rng)
    expected = in_order(case)
    with pytest.raises(ValueError, match=rf"`actual` has shape .*, expected \(2, 9, 8, 5\): .*{hint}"):
        compare(np.zeros(shape, np.float32), expected, case)


def test_a_shape_of_a_swapped_stride_and_dilation_is_recognised(rng):
    case = make(rng, x_shape=(1, 12, 12, 2), strides=2, padding="VALID")
    swapped = case.replace(strides=1, kernel_dilation=2)
    with pytest.raises(ValueError, match=r"strides=1, kernel_dilation=2"):
        compare(in_order(swapped), in_order(case), case)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ([[1.0]], "`actual` is a list, expected a NumPy array"),
        (np.zeros((2, 9, 8, 5)), "`actual` has dtype float64, expected float32, the dtype of the case"),
    ],
)
def test_an_array_of_another_type_is_refused(rng, actual, message):
    case = make(rng)
    with pytest.raises(TypeError, match=message):
        compare(actual, in_order(case), case)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "dz"}, "`quantity` is 'dz', expected one of y, dx, dkernel, dbias"),
        ({"quantity": "dx"}, "`dy` is None with `quantity` 'dx': expected the gradient by the output"),
        ({"dy": np.zeros(1)}, "`dy` is given with `quantity` 'y': expected None for the output"),
    ],
)
def test_a_quantity_comes_with_its_gradient(rng, options, message):
    case = make(rng)
    with pytest.raises(ValueError, match=message):
        compare(in_order(case), in_order(case), case, **options)
