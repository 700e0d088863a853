"""Shares against brute force, planted factors, and what cannot be run."""

import dataclasses
import itertools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from bridge import Case, implementation, parity
from bridge.diagnosis import attribution
from bridge.diagnosis.attribution import attribute, configured, factors, most_different, shapley
from bridge.diagnosis.runs import CaseRuns, Unrunnable, digest, neighbours


@pytest.fixture
def no_flips(monkeypatch):
    """Only the shares: each setting alone is many compilations."""
    monkeypatch.setattr(attribution, "neighbours", lambda side, case: [])


def draw(seed, shape=(2, 6, 6, 3), kernel=(3, 3), **options):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal(shape, np.float32), rng.standard_normal((*kernel, 1, shape[-1]), np.float32)
    return Case(x, w, **options)


def over_all_orders(players, value):
    """(shares, unexplained): what each player adds, averaged over every order; steps over a gap are unexplained."""
    shares, gaps = dict.fromkeys(players, Fraction(0)), Fraction(0)
    orders = list(itertools.permutations(players))
    for order in orders:
        last, steps = value(frozenset()), []
        for count, player in enumerate(order, start=1):
            steps.append(player)
            now = value(frozenset(order[:count]))
            if now is None:
                continue
            if len(steps) == 1:
                shares[player] += now - last
            else:
                gaps += now - last
            last, steps = now, []
    return [share / len(orders) for share in shares.values()], gaps / len(orders)


def games(missing):
    floats = st.floats(0, 10, allow_nan=False)
    values = st.none() | floats if missing else floats
    return st.integers(1, 5).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(values, min_size=2**n, max_size=2**n), floats, floats)
    )


@pytest.mark.parametrize("missing", [False, True])
def test_shares_are_the_average_over_all_orders(missing):
    @hypothesis.settings(max_examples=60)
    @given(games(missing))
    def check(game):
        n, values, first, last = game
        players = list(range(n))
        values[0], values[-1] = first, last

        def value(subset):
            found = values[sum(1 << p for p in subset)]
            return None if found is None else Fraction(found)

        shares = shapley(players, value)
        expected, gaps = over_all_orders(players, value)
        assert shares == expected
        assert sum(shares) + gaps == Fraction(last) - Fraction(first)
        assert missing or gaps == 0
        assert shapley(players[::-1], value) == shares[::-1]

    check()


def assert_sums_to_the_whole(result):
    assert sum(result.rows) + result.remainder == result.whole
    shown = [share for _, share in result.shares] + [result.unexplained]
    # each float is within half an ulp of its rational, and fsum rounds once
    slack = sum(math.ulp(share) for share in shown) + math.ulp(result.total)
    assert abs(math.fsum(shown) - result.total) <= slack


def test_framework_and_algorithm_are_separated(seed, no_flips):
    case = draw(seed, padding=1)
    result = attribute(case, "torch.unfold_matmul", "jax.grouped", isolated=False)
    assert [(f.name, f.a, f.b) for f in result.factors] == [
        ("framework", "torch", "jax"),
        ("algorithm", "channel loop", "convolution"),
    ]
    assert [c.name for c in result.configurations] == [
        "torch.unfold_matmul",
        "jax.unfold_matmul",
        "torch.conv2d",
        "jax.grouped",
    ]
    assert result.remainder == 0 and result.different > 0
    assert_sums_to_the_whole(result)


def test_a_planted_precision_has_nearly_all_of_the_share(seed, no_flips):
    case = draw(seed, padding=1)
    result = attribute(case, "torch.unfold_matmul", "jax.grouped[dtype=bfloat16]", isolated=False)
    shares = dict(result.shares)
    planted = "precision: dtype same → bfloat16"
    assert shares[planted] > 0.99 * result.total and result.remainder == 0
    assert_sums_to_the_whole(result)


def test_a_planted_flag_is_named(seed, no_flips):
    case = draw(seed, (2, 28, 28, 32), padding=1)
    name = "torch.unfold_einsum[matmul_precision=medium,threads=1]"
    result = attribute(case, "torch.unfold_einsum", name, isolated=False)
    assert [f.name for f in result.factors] == ["matmul_precision", "threads"]
    assert_sums_to_the_whole(result)
    if result.different:  # a processor without bfloat16 products ignores the setting
        assert result.rows[0] == result.whole and result.rows[1] == 0


def test_sides_that_agree_have_nothing_to_share(seed, no_flips):
    result = attribute(draw(seed), "jax.taps", "jax.taps", isolated=False)
    assert result.shares == [] and result.total == result.unexplained == 0 and result.different == 0


def test_given_outputs_that_do_not_repeat_are_unexplained(seed, no_flips):
    case = draw(seed)
    y = implementation("torch.conv2d").run(case)
    result = attribute(case, "torch.conv2d", "torch.conv2d", outputs=(y, y * np.float32(2)), isolated=False)
    assert result.total == result.unexplained > 0 and result.different == np.count_nonzero(y)
    assert_sums_to_the_whole(result)
    with pytest.raises(ValueError, match=r"`outputs\[1\]` is float64"):
        attribute(case, "torch.conv2d", "torch.conv2d", outputs=(y, y.astype(np.float64)), isolated=False)


def test_a_setting_that_cannot_be_is_shown_with_its_reason(seed):
    flat = attribute(draw(seed, (2, 9, 4), (3,)), "torch.conv2d", "torch.taps", isolated=False)
    skipped = [f for f in flat.flips if f.reason]
    assert [f.setting for f in skipped] == ["layout"] * 2 and "PyTorch has no such format" in skipped[0].reason


def test_a_configuration_that_does_not_exist_is_unexplained_and_says_why(seed, no_flips):
    case = draw(seed)
    own = dataclasses.replace(
        implementation("torch.taps"),
        name="torch.own",
        algorithm=dataclasses.replace(implementation("torch.taps").algorithm, family="own"),
    )
    result = attribute(case, own, "jax.grouped", isolated=False)
    missing = [c for c in result.configurations if c.value is None]
    assert [(c.changed, c.reason) for c in missing] == [(("framework",), "jax has no counterpart of torch.own")]
    assert_sums_to_the_whole(result)


def test_the_exact_reference_is_one_factor(seed, no_flips):
    result = attribute(draw(seed), "torch.conv2d", "numpy.exact", isolated=False)
    assert [f.name for f in result.factors] == ["framework and algorithm"] and result.remainder == 0


def test_values_with_one_sided_infinities_stay_finite(seed, no_flips):
    case = draw(seed)
    x = case.x.copy()
    x[0, 2, 2] = np.inf
    result = attribute(case.replace(x=x), "jax.patches", "jax.taps", isolated=False)
    assert np.isfinite(result.total) and result.different > 0
    assert_sums_to_the_whole(result)


def test_a_side_that_fails_is_an_error(seed):
    with pytest.raises(Unrunnable, match="PyTorch has no such format"):
        attribute(draw(seed, (2, 9, 4), (3,)), "torch.conv2d[layout=channels_last]", "jax.taps")


def test_too_many_settings_are_refused(seed):
    a = "torch.conv2d[deterministic=on,dtype=float64,fp32_precision=tf32,layout=channels_last,mkldnn=off,threads=1]"
    b = "jax.taps[jit=off,precision=high,xla=O0]"
    with pytest.raises(ValueError, match=r"`a` and `b` differ in 11 settings .* expected at most 8"):
        attribute(draw(seed), a, b)


def test_a_knob_that_the_framework_lacks_is_without_effect():
    a, b = implementation("torch.conv2d[mkldnn=off]"), implementation("jax.grouped[precision=high]")
    chosen = factors(a, b)
    assert [f.name for f in chosen] == ["framework", "mkldnn", "precision"]
    assert configured(a, b, chosen, {"framework"}).name == "jax.grouped"
    assert configured(a, b, chosen, {"precision"}).name == a.name
    assert configured(a, b, chosen, {f.name for f in chosen}).name == b.name
    assert configured(a, b, chosen, set()).name == a.name


@given(st.data())
def test_the_corners_of_the_factorial_are_the_two_sides(data):
    pool = [
        implementation(n) for n in ("torch.conv2d", "jax.taps", "torch.unfold_matmul", "jax.grouped", "numpy.exact")
    ]
    case = Case(np.zeros((1, 5, 5, 2), np.float32), np.zeros((3, 3, 1, 2), np.float32))
    a, b = (
        data.draw(st.sampled_from([s, *(i for _, i in neighbours(s, case))]))
        for s in data.draw(st.tuples(st.sampled_from(pool), st.sampled_from(pool)))
    )
    chosen = factors(a, b)
    assert configured(a, b, chosen, set()).name == a.name
    assert configured(a, b, chosen, {f.name for f in chosen}).name == b.name


def test_flips_restore_the_settings(seed):
    before = torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_deterministic_debug_mode()
    attribute(draw(seed, (2, 9, 4), (3,)), "torch.conv2d", "torch.unfold_matmul", isolated=False)
    assert (torch.backends.mkldnn.enabled, torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before


def test_equal_digests_are_equal_bits():
    zero, nan = np.zeros(2, np.float32), np.array([np.nan, 1], np.float32)
    assert digest(zero) == digest(np.zeros(2, np.float32)) != digest(-zero)
    assert digest(nan) == digest(-nan * np.float32([1, -1]))


def test_a_failure_is_remembered_and_not_repeated(seed):
    runs = CaseRuns(draw(seed, (2, 9, 4), (3,)))
    each = implementation("torch.conv2d[layout=channels_last]")
    assert runs.digest(each) is None and runs.failures.keys() == {each.name} and runs.tried == 1
    with pytest.raises(Unrunnable, match="expected 'contiguous'"):
        runs.output(each)


def test_the_pair_that_differs_most_crosses_the_frameworks(seed):
    case = draw(seed, padding=1)
    names = ["numpy.exact", "torch.conv2d", "torch.unfold_matmul", "jax.taps[dtype=bfloat16]", "jax.taps"]
    a, b = most_different(parity(case, names))
    assert {a.partition(".")[0], b.partition(".")[0]} == {"torch", "jax"} and "bfloat16" in a + b
    assert most_different(parity(case, ["numpy.exact", "jax.taps"])) is None
