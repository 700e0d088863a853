"""assert_parity: passes on rounding, and its failure is the diagnosis."""

import json

import numpy as np
import pytest

from bridge import Case, Verdict
from bridge.testing import ParityFailure, assert_parity
from tests.bridge.diagnosis.mutations import backwards, in_order


@pytest.fixture
def case(seed):
    rng = np.random.default_rng(seed)
    return Case(
        rng.standard_normal((2, 8, 8, 3), np.float32),
        rng.standard_normal((3, 3, 1, 3), np.float32),
        padding=1,
        strides=2,
    )


def test_rounding_passes_and_returns_the_comparison(case):
    assert assert_parity(in_order(case), backwards(case), case).verdict is Verdict.ROUNDING
    assert assert_parity(in_order(case), in_order(case), case).verdict is Verdict.IDENTICAL


def test_the_failure_is_the_diagnosis_in_some_twenty_lines(case):
    same = in_order(case.replace(padding="SAME"))
    with pytest.raises(AssertionError) as failure:
        assert_parity(same, backwards(case), case, names=("mine", "theirs"))
    message = str(failure.value)
    assert message.startswith(
        "mine and theirs: CONVENTION (SAME against symmetric padding): a named mistake explains it"
    )
    for part in ("elements", "ULP", "of the bound", "`padding=1` instead of", "x (2, 8, 8, 3)"):
        assert part in " ".join(message.split())
    assert len(message.splitlines()) <= 20 and max(map(len, message.splitlines())) <= 120


def test_what_cannot_be_decided_does_not_pass(case):
    case = case.replace(x=np.zeros_like(case.x))
    with pytest.raises(AssertionError, match="INCONCLUSIVE"):
        assert_parity(in_order(case), in_order(case), case)


def test_another_shape_is_an_error_and_not_a_failure(case):
    with pytest.raises(ValueError, match="`actual` has shape"):
        assert_parity(np.zeros((2, 3, 8, 8), np.float32), backwards(case), case)


@pytest.mark.parametrize("quantity", ["dx", "dkernel", "dbias"])
def test_a_failure_of_a_gradient_has_a_report_and_says_why_it_has_no_bundle(case, quantity, tmp_path):
    case = case.replace(bias=np.ones(3, np.float32))
    shapes = {"dx": case.x.shape, "dkernel": case.kernel.shape, "dbias": (3,)}
    wrong = np.zeros(shapes[quantity], np.float32)
    dy = np.ones(case.geometry.output_shape, np.float32)
    with pytest.raises(ParityFailure) as failure:
        assert_parity(wrong, wrong + 1, case, names=("mine", "mine"), quantity=quantity, dy=dy)
    documents = failure.value.documents("pytest tests/test_mine.py")
    report = json.loads(documents.pop("json"))
    assert report["quantity"] == quantity and report["comparisons"][0]["b"] == "mine (expected)" and not documents
    assert failure.value.save_bundle(tmp_path / "bundle") == "a bundle holds outputs, not gradients"
    assert not (tmp_path / "bundle").exists()


def test_channels_of_a_bias_gradient_in_another_order_are_named(case):
    case = case.replace(bias=np.ones(3, np.float32))
    dy = np.random.default_rng(0).standard_normal(case.geometry.output_shape).astype(np.float32)
    dbias = dy.reshape(-1, 3).sum(0)
    with pytest.raises(ParityFailure, match="outputs permuted"):
        assert_parity(dbias[[1, 2, 0]], dbias, case, quantity="dbias", dy=dy)
