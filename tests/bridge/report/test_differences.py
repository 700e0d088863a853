"""The numbers behind the pictures, against plain counting."""

import itertools

import numpy as np
import pytest

from bridge.numerics import ulp_distance
from bridge.report.differences import bit_classes, class_pairs, differences, ratio_bins, ulp_bins
from tests.bridge.report import planted


def all_differences(diagnosis):
    return list(differences(diagnosis, pairs=99, channels=99))


@pytest.fixture(params=list(planted.KINDS))
def diagnosis(request, seed):
    return planted.KINDS[request.param](seed)


def test_classes_hold_every_name_once_and_their_bits_are_equal(diagnosis):
    classes = bit_classes(diagnosis)
    assert sorted(n for each in classes for n in each.names) == sorted(diagnosis.names)
    number = {name: each.letter for each in classes for name in each.names}
    for a, b in itertools.combinations(diagnosis.names, 2):
        assert (number[a] == number[b]) == (diagnosis.between(a, b).different == 0)


def test_two_classes_are_judged_by_their_worst_pair(diagnosis):
    for a, b, worst in class_pairs(diagnosis, bit_classes(diagnosis)):
        pairs = [diagnosis.between(*both) for both in itertools.product(a.names, b.names)]
        assert worst in pairs
        assert worst.verdict.rank() == max(c.verdict.rank() for c in pairs)


def test_histograms_count_every_finite_element_and_end_at_the_figures_of_the_comparison(diagnosis):
    for d in all_differences(diagnosis):
        c = d.comparison
        assert sum(b.count for b in d.ulp) + d.not_finite == c.elements
        assert d.ulp[0].count == c.elements - c.different
        assert sum(b.count for b in d.ratio) + d.not_finite == c.different
        furthest = [b for b in d.ulp if b.count][-1]
        assert furthest.low <= c.max_ulp <= furthest.high
        greatest = [b for b in d.ratio if b.count]
        assert not greatest or greatest[-1].low <= c.max_bound_ratio <= greatest[-1].high


def test_bins_of_ulp_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    distance = rng.integers(1, 2**64 - 1, 3000, dtype=np.uint64) >> rng.integers(0, 64, 3000, dtype=np.uint64)
    bins = ulp_bins(distance, same=7)
    counted = [0] * len(bins)
    for d in distance.tolist():
        counted[d.bit_length()] += 1
    counted[0] += 7
    assert [b.count for b in bins] == counted


def test_a_ratio_of_exactly_one_is_within_the_bound_and_the_next_is_not():
    for ratio, high in ((1.0, 1.0), (np.nextafter(1.0, 2.0), 10.0**0.25)):
        assert [b.high for b in ratio_bins(np.array([ratio])) if b.count] == [high]


@pytest.mark.parametrize("ratios", [[], [0.0], [1e-300], [np.inf], [1e12, 3.0], [5e-324, 0.5]], ids=str)
def test_every_ratio_is_in_a_bin_and_the_bound_is_an_edge(ratios):
    bins = ratio_bins(np.array(ratios))
    assert sum(b.count for b in bins) == len(ratios) and any(b.low == 1.0 for b in bins)


def test_maps_show_the_greatest_difference_at_its_place(seed):
    diagnosis = planted.scaled_tap(seed)
    for d in all_differences(diagnosis):
        a, b = (diagnosis.outputs[name].astype(float) for name in (d.comparison.a, d.comparison.b))
        field = np.abs(a - b).max(axis=0)
        maps = {m.title: m.cells for m in d.maps}
        np.testing.assert_array_equal(maps.pop("all channels"), field.max(axis=-1))
        for title, cells in maps.items():
            np.testing.assert_array_equal(cells, field[..., int(title.split()[1])])
        np.testing.assert_array_equal(d.by_channel, field.max(axis=(0, 1)))
        assert d.scale == field.max()


def test_a_large_map_is_reduced_without_losing_its_maximum(seed):
    (d,) = all_differences(planted.rounding(seed, shape=(1, 300, 9, 2)))
    for each in d.maps:
        assert max(each.cells.shape) <= 96 and each.shape == (300, 9)
    assert d.maps[0].cells.max() == d.comparison.max_abs


def test_the_greatest_ulp_is_the_distance_itself(seed):
    diagnosis = planted.rounding(seed)
    (d,) = all_differences(diagnosis)
    distance = ulp_distance(diagnosis.outputs[d.comparison.a], diagnosis.outputs[d.comparison.b])
    assert [int(np.count_nonzero((distance >= b.low) & (distance <= b.high))) for b in d.ulp] == [
        b.count for b in d.ulp
    ]
