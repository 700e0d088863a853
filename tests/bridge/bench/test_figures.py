"""Medians, quartiles, means and exponents on numbers whose answer is known."""

import pytest

from bridge.bench.figures import Quartiles, exponent, geometric_mean, quartiles


@pytest.mark.parametrize(
    "times, expected",
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([1.0, 2.0], (1.25, 1.5, 1.75)),
        ([5.0, 1.0, 4.0, 2.0, 3.0], (2.0, 3.0, 4.0)),
        ([1.0, 1.0, 1.0, 1.0, 100.0], (1.0, 1.0, 1.0)),
    ],
)
def test_the_quartiles_are_the_known_ones(times, expected):
    assert quartiles(times) == Quartiles(*expected)


def test_no_times_have_no_median():
    with pytest.raises(ValueError, match="`times` is empty"):
        quartiles([])


def test_a_mean_of_ratios_does_not_care_which_way_they_are_taken():
    ratios = [0.5, 1.0, 8.0]
    assert geometric_mean([2.0, 2.0]) == 2.0
    assert geometric_mean(ratios) * geometric_mean([1 / r for r in ratios]) == pytest.approx(1.0, rel=2**-50)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(p):
    sizes = [1, 3, 10, 30, 100]
    assert exponent(sizes, [7 * size**p for size in sizes]) == pytest.approx(p, abs=2**-45)
