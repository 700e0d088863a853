"""The change that is proposed makes the two sides identical when it is run."""

import dataclasses

import numpy as np
import pytest

from bridge import Case, implementation
from bridge._implementations import jax_
from bridge.diagnosis.elimination import MOST_CHANGES, Change, Elimination, eliminate
from bridge.diagnosis.runs import CaseRuns, Unrunnable
from bridge.numerics import same_bits
from tests.bridge.diagnosis.test_attribution import draw


def question(seed):
    return draw(seed, (2, 5, 5, 3), padding=1)


def assert_verified(result, case):
    for change in result.changes:
        a, b = (implementation(name).run(case) for name in (change.a, change.b))
        assert same_bits(a, b).all()
        assert change.before > 0 and change.after > 0 and change.ratio == change.after / change.before
    assert len(result.changes) <= MOST_CHANGES


def test_the_question_in_pytorch_has_an_answer(seed):
    """The processor decides which methods over windows have the bits of the convolution; the convolution has them."""
    result = eliminate(question(seed), "torch.conv2d", "torch.unfold_matmul", isolated=False)
    changed = {(change.a, change.b) for change in result.changes}
    assert not result.identical and ("torch.conv2d", "torch.conv2d") in changed
    assert_verified(result, question(seed))
    text = " ".join(result.sentences())
    assert result.best.code[0] in text and "Time: " not in text  # 150 elements measure the call
    assert {change.a for change in result.changes} == {"torch.conv2d"}  # the reference stays
    families = [implementation(change.b).algorithm.family for change in result.changes]
    assert families == sorted(families, key="convolution".__eq__)  # what loses the windows comes last


def test_the_question_in_jax_has_an_answer(seed):
    result = eliminate(question(seed), "torch.conv2d", "jax.grouped", isolated=False)
    changed = {(change.a, change.b): change for change in result.changes}
    found = changed["torch.conv2d", "jax.taps"]
    assert found.kinds == ("method",) and 'method="taps"' in found.code[0]
    assert_verified(result, question(seed))


def test_both_sides_change_where_one_is_not_enough(seed):
    result = eliminate(question(seed), "torch.unfold_matmul", "jax.grouped", isolated=False)
    assert result.best.a != result.a and result.best.b != result.b and len(result.best.code) == 2
    assert_verified(result, question(seed))


@pytest.mark.parametrize("name", ["jax.taps[dtype=bfloat16]", "jax.grouped[dtype=bfloat16]"])
def test_a_lower_precision_is_removed_and_never_proposed(name, seed):
    result = eliminate(question(seed), "torch.conv2d", name, isolated=False)
    assert result.best is not None
    assert all("bfloat16" not in change.a + change.b for change in result.changes)
    assert_verified(result, question(seed))


def test_a_flag_of_xla_is_found(seed, monkeypatch):
    """Without FMA, shifted multiply-add rounds as PyTorch's own operations do."""
    code = {name: jax_.KNOBS["xla"].code[name] for name in ("default", "AVX")}
    monkeypatch.setitem(jax_.KNOBS, "xla", dataclasses.replace(jax_.KNOBS["xla"], code=code))
    case = question(seed)
    runs = CaseRuns(case)
    result = eliminate(case, "torch.taps", "jax.taps", runs=runs)
    flagged = implementation("jax.taps[xla=AVX]")
    if runs.digest(flagged) == runs.digest(implementation("torch.taps")):  # a processor of another kind has no AVX
        found = next(change for change in result.changes if change.b == flagged.name)
        assert found.kinds == ("flag",) and "--xla_cpu_max_isa=AVX" in found.code[0] and found.after > 0


def test_sides_that_agree_need_no_change(seed):
    result = eliminate(question(seed), "torch.conv2d", "jax.taps", isolated=False)
    assert result.identical and result.changes == () and "Nothing to change" in result.sentences()[0]


def test_that_nothing_was_found_is_said(seed):
    """Nothing in PyTorch rounds once, and the exact result has no settings."""
    case = draw(seed, (2, 5, 5, 3), (7, 7), padding=3)
    result = eliminate(case, "torch.conv2d[dtype=bfloat16]", "numpy.exact", isolated=False)
    if not result.changes:
        assert result.best is None and f"{result.tried} implementations were run" in result.sentences()[0]
    assert_verified(result, case)


def test_a_change_that_holds_for_this_input_only_is_not_proposed(seed):
    """These sums are exact in float32, so every method gives the same; on another draw these two do not."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 8, (2, 5, 5, 3)).astype(np.float32) + np.float32(2.0**-11)
    case = Case(x, rng.integers(1, 8, (3, 3, 1, 3)).astype(np.float32), padding=1)
    sides = "torch.unfold_matmul", "jax.grouped[dtype=bfloat16]"
    by_chance = implementation(sides[0]), implementation("jax.grouped")
    assert same_bits(*(each.run(case) for each in by_chance)).all()
    result = eliminate(case, *sides, isolated=False)
    assert not result.identical
    assert tuple(each.name for each in by_chance) not in {(change.a, change.b) for change in result.changes}


def test_a_side_that_fails_is_an_error(seed):
    with pytest.raises(Unrunnable, match=r"channels_last.* failed: .*PyTorch has no such format"):
        eliminate(draw(seed, (2, 9, 4), (3,)), "torch.conv2d[layout=channels_last]", "jax.taps")


def test_sentences_say_what_to_write_and_a_time_where_the_case_is_large():
    change = Change("torch.conv2d", "jax.taps", ("method",), ("new in place of old",), 2e-3, 1e-3)
    other = dataclasses.replace(change, a="torch.taps", b="jax.grouped")
    result = Elimination("torch.conv2d", "jax.grouped", False, [change, other], 9, [], measured=True)
    assert result.sentences() == [
        "Use jax.taps instead of jax.grouped: write new in place of old. Time: 1 ms instead of 2 ms.",
        "These changes work too: torch.taps instead of torch.conv2d.",
    ]
    assert "Time" not in dataclasses.replace(result, measured=False).sentences()[0]
