"""Correctly rounded sums, against fractions.Fraction."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given

from bridge.case import DTYPES, Case
from bridge.numerics import (
    Products,
    exact,
    exact_bias_gradient,
    exact_input_gradient,
    exact_kernel_gradient,
    exact_sum,
)
from tests import oracle
from tests.bridge.numerics.rationals import FORMATS, KINDS, operands, rounded
from tests.strategies import problems


def products_of(x, w, bias=None):
    return Products.of([(a, b, True) for a, b in zip(x, w)], x.shape[1:], bias)


def rational(x, w, bias):
    """The exact sums, and the exact sums of sizes, of finite columns."""
    total, size = [], []
    for k in range(x.shape[1]):
        terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x[:, k], w[:, k])]
        terms += [] if bias is None else [Fraction(float(bias[k]))]
        total.append(sum(terms))
        size.append(sum(map(abs, terms)))
    return total, size


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_the_rational_one_rounded_once(fmt, kind, seed, full):
    rng = np.random.default_rng(seed)
    columns = 20000 // (len(KINDS) * 4) + 1 if full else 60
    for terms in (2, 3, 9, 25) if full else (3, 9):
        x, w = operands(rng, fmt, (terms, columns), kind)
        finite = (np.isfinite(x) & np.isfinite(w)).all(axis=0)
        x, w = x[:, finite], w[:, finite]
        for bias in (None, operands(rng, fmt, (3, x.shape[1]), kind)[0][-1]):
            if bias is not None:
                bias = np.where(np.isfinite(bias), bias, fmt.dtype.type(-0.0))
            result = exact_sum(products_of(x, w, bias))
            total, size = rational(x, w, bias)
            expected = np.array([float(rounded(t, fmt)) for t in total])
            assert result.value.dtype == fmt.dtype
            np.testing.assert_array_equal(result.value.astype(np.float64), expected)
            assert not np.signbit(result.value[[t == 0 for t in total]]).any(), "an exact zero is +0"
            for k, (t, s) in enumerate(zip(total, size)):
                if np.isfinite(result.reference[k]) and np.isfinite(result.magnitude[k]):
                    assert abs(Fraction(result.reference[k]) - t) <= Fraction(result.reference_error[k])
                    assert s <= Fraction(result.magnitude[k]) <= s * (1 + Fraction(2) ** -40) + Fraction(2) ** -1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x, w, expected",
    [
        ([np.inf, 1], [0, 1], np.nan),
        ([np.inf, np.inf], [1, -1], np.nan),
        ([np.inf, 5], [-2, 1], -np.inf),
        ([np.nan, 1], [0, 1], np.nan),
        ([1, 1], [np.nan, 1], np.nan),
        ([6e4, 6e4, np.inf], [-6e4, -6e4, 1], np.inf),
        ([-0.0, -0.0], [1, 1], 0.0),
        ([1, -1], [1, 1], 0.0),
    ],
)
def test_what_is_not_finite_follows_ieee(dtype, x, w, expected):
    x, w = np.array(x).astype(DTYPES[dtype])[:, None], np.array(w).astype(DTYPES[dtype])[:, None]
    value = exact_sum(products_of(x, w)).value.astype(np.float64)
    np.testing.assert_array_equal(value, [expected])
    assert np.isnan(expected) or np.signbit(value[0]) == np.signbit(expected)


def test_a_float64_product_that_overflows_alone_is_still_exact():
    x = np.array([1e300, -1e300, 3.0])[:, None]
    assert exact_sum(products_of(x, np.array([1e300, 1e300, 1.0])[:, None])).value == 3.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [np.inf, np.nan])
def test_a_tap_on_padding_is_skipped(dtype, weight):
    one = np.ones(3, DTYPES[dtype])
    terms = [(one, one, True), (one, one * one.dtype.type(weight), np.array([False, True, False]))]
    value = exact_sum(Products.of(terms, (3,))).value.astype(np.float64)
    np.testing.assert_array_equal(value, [1.0, 1.0 + weight, 1.0])


def integers(rng, shape):
    return rng.integers(-8, 9, shape)


@given(problem=problems())
def test_a_convolution_and_its_gradients_are_those_of_the_oracle(problem):
    """In integers that every dtype holds, so that sums are exact and nothing is left to tolerance."""
    rng = np.random.default_rng(problem.seed)
    dtype = DTYPES["float64" if problem.seed % 2 else "float32"]
    x, kernel, bias = (integers(rng, s) for s in (problem.x_shape, problem.kernel_shape, problem.kernel_shape[-1:]))
    case = Case(x.astype(dtype), kernel.astype(dtype), bias.astype(dtype) if problem.bias else None, **problem.options)
    y = oracle.depthwise(x, kernel, bias if problem.bias else None, **problem.options).y
    np.testing.assert_array_equal(exact(case).value, y)

    dy = integers(rng, y.shape)
    kernel_size, channels = problem.kernel_shape[:-2], problem.x_shape[-1]
    rank, multiplier = len(kernel_size), problem.kernel_shape[-1] // channels
    # windows of the inputs' numbers say which input each tap reads; 0 is padding
    numbered = np.arange(1, x.size + 1).reshape(x.shape)
    read = oracle.windows(numbered, kernel_size, **problem.options)
    values = np.append(0, x.ravel())
    dx, dkernel, valid_terms = np.zeros(x.size + 1), np.zeros(kernel.shape), np.zeros(kernel.shape)
    for tap in itertools.product(*map(range, kernel_size)):
        under = np.repeat(read[(..., *tap, slice(None))], multiplier, axis=-1)
        np.add.at(dx, under, dy * kernel[(*tap, 0)])
        dkernel[(*tap, 0)] = (values[under] * dy).reshape(-1, kernel.shape[-1]).sum(axis=0)
        valid_terms[(*tap, 0)] = (under > 0).reshape(-1, kernel.shape[-1]).sum(axis=0)
    readings = np.bincount(read.ravel(), minlength=x.size + 1)[1:].reshape(x.shape) * multiplier

    dy = dy.astype(dtype)
    input_gradient, kernel_gradient = exact_input_gradient(case, dy), exact_kernel_gradient(case, dy)
    np.testing.assert_array_equal(input_gradient.value, dx[1:].reshape(x.shape))
    np.testing.assert_array_equal(kernel_gradient.value, dkernel)
    np.testing.assert_array_equal(
        exact_bias_gradient(case, dy).value, dy.astype(np.float64).reshape(-1, kernel.shape[-1]).sum(axis=0)
    )
    np.testing.assert_array_equal(np.broadcast_to(input_gradient.products.count, x.shape), readings)
    np.testing.assert_array_equal(np.broadcast_to(kernel_gradient.products.count, kernel.shape), valid_terms)
    valid = np.broadcast_to(case.geometry.valid_taps().sum(axis=tuple(range(rank, 2 * rank)))[..., None], y.shape)
    np.testing.assert_array_equal(np.broadcast_to(exact(case).products.count, y.shape), valid)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_gradient_over_several_blocks_is_rounded_once(dtype, seed):
    """Long sums, cut into blocks along batch and rows, in numbers whose float64 sums are exact or not."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((2, 40, 50, 32)).astype(DTYPES[dtype]) for _ in range(2))
    case = Case(x, np.ones((1, 1, 1, 32), DTYPES[dtype]))
    result = exact_kernel_gradient(case, dy)
    total, _ = rational(x.reshape(-1, 32), dy.reshape(-1, 32), None)
    fmt = next(fmt for fmt in FORMATS if fmt.dtype == DTYPES[dtype])
    np.testing.assert_array_equal(result.value.astype(np.float64).ravel(), [float(rounded(t, fmt)) for t in total])


def test_operands_of_two_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"`terms` and `bias` have dtypes \['float32', 'float64'\], expected one dtype"):
        Products.of([(np.ones(2), np.ones(2, np.float32), True)], (2,))


@pytest.mark.parametrize(
    "dy, error, message",
    [
        (np.ones((1, 4, 4, 2), np.float32), ValueError, r"`dy` has shape \(1, 4, 4, 2\), expected \(1, 4, 4, 1\)"),
        (np.ones((1, 4, 4, 1)), TypeError, "`dy` is float64, expected a NumPy array of float32"),
        ([1.0], TypeError, "`dy` is list, expected a NumPy array of float32"),
    ],
)
def test_a_cotangent_that_does_not_fit_is_refused(dy, error, message):
    case = Case(np.ones((1, 4, 4, 1), np.float32), np.ones((3, 3, 1, 1), np.float32))
    for gradient in (exact_input_gradient, exact_kernel_gradient, exact_bias_gradient):
        with pytest.raises(error, match=message):
            gradient(case, dy)
