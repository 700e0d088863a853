"""The real implementations: every element revealed, and replayed bit for bit."""

import numpy as np
import pytest

from bridge import Case, Verdict, implementation, parity
from bridge.accumulation import replay, reveal
from bridge.diagnosis import DEFAULT
from bridge.numerics import same_bits
from bridge.selftest import random_case

NAMES = [
    "torch.conv2d",
    "torch.conv2d[mkldnn=off]",
    "torch.unfold_matmul",
    "torch.unfold_einsum",
    "jax.grouped",
    "jax.patches",
    "jax.taps",
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_replay_reproduces_random_cases(name, seed, full):
    rng = np.random.default_rng(seed)
    elements, misses = 0, []
    for _ in range(200 if full else 3):
        case = random_case(rng)
        order = reveal(implementation(name), case)
        same = same_bits(replay(order, case), implementation(name).run(case))
        elements += same.size
        misses += [(case.geometry, int((~same).sum()), [str(r) for r in order.refusals])] * bool((~same).any())
    missed = sum(count for _, count, _ in misses)
    print(f"{name}: {elements - missed} of {elements} elements reproduced", *misses, sep="\n")
    assert missed <= 0.001 * elements, misses


def test_every_pair_of_the_questions_case_is_identical_or_explained():
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((2, 5, 5, 3), np.float32), rng.standard_normal((3, 3, 1, 3), np.float32), padding=1)
    diagnosis = parity(case, [*DEFAULT, "torch.conv2d[mkldnn=off]"])
    assert {c.verdict for c in diagnosis.comparisons} <= {Verdict.IDENTICAL, Verdict.EXPLAINED}
    assert all(c.explained == c.different for c in diagnosis.comparisons if c.different)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_a_chain_takes_few_runs(size):
    rng = np.random.default_rng(0)
    case = Case(
        rng.standard_normal((1, 12, 12, 4), np.float32), rng.standard_normal((size, size, 1, 4), np.float32), padding=1
    )
    for name in ("torch.conv2d", "jax.taps"):
        assert reveal(implementation(name), case).fingerprint.runs <= 3 * (size * size - 1) + 12
