"""Mistakes that users make are named in full; their clean twins pass; near misses are named as that."""

import itertools
import re
import zlib

import numpy as np
import pytest
import torch.nn.functional as F

from bridge import Case, Verdict, compare
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Target
from bridge.numerics import exact
from tests.bridge.diagnosis.mutations import Redraw, backwards, geometry, in_order, seen
from tests.bridge.diagnosis.planted import BF16, F16, F32, FUNCTIONS, PLANTED, compared, make, of_torch, said, to

DTYPES = (F32, np.dtype(np.float64), BF16, F16)


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def chosen(seed, full, names, count):
    """All names in full, else a few that the seed draws."""
    return list(names) if full else [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]


def test_the_table_has_the_43_and_40_more():
    assert len(PLANTED) >= 83


def test_a_planted_mistake_is_told_and_its_clean_twin_passes(seed, full):
    misses = []
    for name in chosen(seed, full, list(PLANTED), 20):
        planted, start = PLANTED[name], [seed, zlib.crc32(name.encode())]
        result, _ = compared(planted, np.random.default_rng(start), compare)
        if result.verdict != planted.verdict or not re.search(planted.says, said(result), re.DOTALL):
            misses.append((name, result))
        twin, _ = compared(planted, np.random.default_rng(start), compare, clean=True)
        if not twin.verdict.passes:
            misses.append((f"clean twin of {name}", twin))
    assert not misses, misses


AFTER = [f"{name} after" for name in FUNCTIONS]


def test_a_function_and_one_wrong_element_is_a_bug(seed, full):
    for name in chosen(seed, full, AFTER, 3):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        y, case = PLANTED[name].plant(rng)
        y = y.copy()
        at = tuple(int(rng.integers(n)) for n in y.shape)
        y[at] += np.float32(rng.choice([-1, 1]) * rng.uniform(0.01, 1))
        result = compare(y, backwards(case), case)
        assert (result.verdict, result.name) == (Verdict.BUG, "single element"), (name, result)
        assert str(at) in result.place


def test_a_scale_or_shift_and_noise_beyond_the_bound_is_a_bug(rng, full):
    for _ in range(50 if full else 1):
        case = make(rng, bias=bool(rng.integers(2)))
        scale, shift = (rng.uniform(0.5, 2, 6).astype(np.float32) for _ in range(2))
        noise = rng.uniform(-1, 1, case.geometry.output_shape).astype(np.float32) * np.float32(1e-3)
        for y in (in_order(case.replace(x=case.x / np.float32(255))), in_order(case) * scale + shift):
            assert compare(y + noise * np.abs(y).mean(), backwards(case), case).verdict is Verdict.BUG


def test_few_wrong_elements_are_no_mistake_and_no_precision(rng, full):
    """One to three elements, off by little more than the bound or by much: nothing agrees with them by accident."""
    done = 0
    while done < (1000 if full else 4):
        case, dtype = geometry(rng), DTYPES[done % 4]
        arrays = {name: getattr(case, name) for name in ("x", "kernel", "bias")}
        case = case.replace(**{name: None if a is None else a.astype(dtype) for name, a in arrays.items()})
        output = Output("y", exact(case).value, Target(case))
        reference, allowed = (a.ravel() for a in output.expected)
        y = output.y.astype(np.float64)
        hit = rng.choice(y.size, int(rng.integers(1, 4)), replace=False)
        most = rng.choice([1, 14 if dtype.itemsize > 2 else 8])  # float16 does not overflow
        factor = rng.choice([-1, 1], len(hit)) * np.exp(rng.uniform(0, most, len(hit)))
        y.ravel()[hit] = reference[hit] + factor * allowed[hit]
        y = y.astype(dtype)
        if not Output("y", y, Target(case)).outside.any():
            continue
        done += 1
        result = compare(y, output.y, case)
        assert result.verdict is Verdict.BUG and result.name in ("single element", "few elements"), result


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_right_result_in_half_precision_is_no_mistake(rng, full, dtype):
    """The allowance for the roundings of a function or a scale must not explain a bug without it."""
    seeds = [*rng.integers(2**32, size=20), 2228121556]  # of the last, one error is 10.6 times the root mean square
    for drawn in seeds if full else rng.choice(seeds[-2:], 1):
        case = make(np.random.default_rng(drawn), dtype=dtype, kernel=(5, 5), padding=2)
        y = exact(case).value
        wrong = y.copy()
        wrong[..., 2] = (wrong[..., 2].astype(np.float32) * np.float32(1.03)).astype(dtype)
        assert compare(wrong, y, case).verdict is Verdict.BUG
        accumulated = compare(in_order(case), y, case)
        assert accumulated.verdict is Verdict.PRECISION and "accumulated in" in accumulated.cause


def test_errors_of_an_input_are_no_accumulator(rng, full):
    """Data in half precision, an input that was quantised by no customary rule."""
    for _ in range(30 if full else 2):
        dtype = (BF16, F16)[int(rng.integers(2))]
        case = make(rng, dtype=dtype, bias=bool(rng.integers(2)), shape=(2, 14, 15, 8))
        scale = np.float32(np.abs(case.x.astype(np.float32)).max() / rng.uniform(60, 120))
        x = (np.rint(case.x.astype(np.float32) / scale) * scale).astype(dtype)
        result = compare(exact(case.replace(x=x)).value, exact(case).value, case)
        assert "accumulator" not in result.name, result


def test_two_mistakes_are_told_on_random_geometries(rng, full):
    """A flipped kernel with a second mistake beside it."""
    second = {
        "no bias": lambda c: in_order(c.replace(bias=None)),
        "ReLU": lambda c: np.maximum(in_order(c), 0),
        "GELU": lambda c: of_torch(F.gelu)(in_order(c)),
        "x/255": lambda c: in_order(c.replace(x=c.x / np.float32(255))),
    }
    found = attempts = 0
    while found < (80 if full else 3):
        attempts += 1
        assert attempts < 1000
        case = geometry(rng, least=2, bias=True)
        name = str(rng.choice(list(second)))
        y = second[name](case.replace(kernel=np.flip(case.kernel, tuple(range(case.geometry.rank)))))
        try:
            seen(y, case)
        except Redraw:
            continue
        found += 1
        result = compare(y, backwards(case), case)
        assert result.verdict is Verdict.CONVENTION, (name, result, case.geometry)


def test_clean_comparisons_raise_no_alarm(rng, full):
    """Three right results of random geometries in each dtype, compared in pairs: 20,000 comparisons in full."""
    told = []
    for number in range(6_700 if full else 40):
        case, dtype = geometry(rng), DTYPES[number % 4]
        if dtype != F32:
            arrays = {name: getattr(case, name) for name in ("x", "kernel", "bias")}
            case = case.replace(**{name: None if a is None else a.astype(dtype) for name, a in arrays.items()})
        wide = (
            case
            if dtype.itemsize > 2
            else Case(*(to(F32, getattr(case, n)) for n in ("x", "kernel", "bias")), **how(case))
        )
        results = [in_order(wide).astype(dtype), backwards(wide).astype(dtype), exact(case).value]
        for a, b in itertools.combinations(results, 2):
            result = compare(a, b, case)
            assert result.verdict.passes, (result, case.geometry)
            told += [result] if "one-sided" in result.cause else []
    assert not told, told


def how(case):
    return {name: getattr(case, name) for name in ("strides", "padding", "kernel_dilation")}


def test_rounding_is_not_called_an_order_that_was_not_replayed(rng):
    case = make(rng)
    result = compare(in_order(case), backwards(case), case)
    assert (result.name, result.verdict) == ("rounding", Verdict.ROUNDING)
    assert "one-sided" not in result.cause
    assert compare(in_order(case), backwards(case), case, replayed=(in_order(case), backwards(case))).name == "order"


def test_one_channel_that_is_one_sided_is_told(rng):
    case = make(rng, shape=(4, 16, 16, 6))
    y = exact(case).value
    y[..., 3] = np.nextafter(y[..., 3], np.float32(-np.inf))
    result = compare(y, backwards(case), case)
    assert result.verdict is Verdict.ROUNDING
    assert "of channel 3 with an error lie below the exact result" in result.cause


def test_equal_windows_are_no_one_sided_error(rng):
    """A flat image: every error is the same, once."""
    case = make(rng, bias=False)
    case = case.replace(x=np.full_like(case.x, 0.1))
    assert "one-sided" not in compare(in_order(case), backwards(case), case).cause
