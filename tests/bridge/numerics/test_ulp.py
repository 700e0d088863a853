"""ULP distances, against walks from number to number."""

import ml_dtypes
import numpy as np
import pytest

from bridge.numerics import ordered, ulp_distance

MOST = np.iinfo(np.uint64).max


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_number_of_two_bytes_has_its_rank(dtype):
    with np.errstate(invalid="ignore"):
        every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    numbers = np.unique(every[~np.isnan(every)])  # sorted, and -0 equals 0
    ranks = ordered(numbers.astype(dtype))
    np.testing.assert_array_equal(ranks, np.arange(len(numbers)) - len(numbers) // 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("start", [0.0, 1.0, -1.0, 2.0**-14, 1.5])
def test_a_walk_of_steps_is_as_many_ulp(dtype, start):
    begin = np.array(start, dtype)
    for direction in (-np.inf, np.inf):
        position = begin
        for steps in range(20):
            assert ulp_distance(begin, position) == ulp_distance(position, begin) == steps
            position = np.nextafter(position, dtype(direction))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_distance_within_a_binade_counts_spacings(dtype, seed):
    a, b = np.random.default_rng(seed).uniform(1, 2, (2, 1000)).astype(dtype)
    np.testing.assert_array_equal(ulp_distance(a, b), (np.abs(a - b) / np.spacing(dtype(1))).astype(np.uint64))


@pytest.mark.parametrize("dtype, infinity", [(np.float16, 0x7C00), (np.float32, 0x7F800000), (np.float64, 0x7FF << 52)])
def test_the_greatest_distance_does_not_overflow(dtype, infinity):
    assert ulp_distance(np.array(-np.inf, dtype), np.array(np.inf, dtype)) == 2 * infinity
    assert ulp_distance(np.finfo(dtype).max, dtype(np.inf)) == 1


def test_two_zeros_are_equal():
    assert ulp_distance(np.float32(-0.0), np.float32(0.0)) == 0


def test_nan_is_as_far_as_can_be_from_a_number_and_equal_to_nan():
    a, b = np.array([np.nan, np.nan, 1.0, -np.nan]), np.array([1.0, np.nan, np.nan, np.nan])
    distance = ulp_distance(a, b)
    assert distance.dtype == np.uint64
    assert distance.tolist() == [MOST, 0, MOST, 0]


def test_two_dtypes_are_refused():
    with pytest.raises(TypeError, match="`a` has dtype float32 and `b` has dtype float64, expected one dtype"):
        ulp_distance(np.ones(1, np.float32), np.ones(1))


def test_integers_are_refused():
    with pytest.raises(TypeError, match="`dtype` is"):
        ordered(np.ones(1, np.int32))
