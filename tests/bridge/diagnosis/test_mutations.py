"""Every planted cause gets the right verdict and the right name, over random geometries, and never passes."""

import zlib

import numpy as np
import pytest

from bridge import compare
from tests.bridge.diagnosis.mutations import MUTATIONS, Redraw, backwards


def draws(mutation, rng, count):
    """`count` draws that are seen; a mutation that hardly ever is would not end."""
    found = attempts = 0
    while found < count:
        attempts += 1
        assert attempts < 60 * count, "the mutation is nearly always a no-op"
        try:
            actual, case = mutation.plant(rng)
        except Redraw:
            continue
        found += 1
        yield actual, case


@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_cause_is_found_and_named(name, seed, full):
    mutation = MUTATIONS[name]
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    count = 100 if full else 2
    misses = []
    for actual, case in draws(mutation, rng, count):
        swapped = bool(rng.integers(2))
        pair = (backwards(case), actual) if swapped else (actual, backwards(case))
        result = compare(*pair, case)
        assert not result.verdict.passes, (result, case.geometry)
        if result.verdict != mutation.verdict or result.name not in mutation.names:
            misses.append((result, case.geometry, case.bias is not None))
        elif result.verdict != "NONFINITE":
            assert "expected" in result.cause if swapped else "actual" in result.cause
    assert len(misses) <= 0.01 * count, misses
