"""The conformance kit: it passes kernels without faults, and finds each planted one by the right check."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bridge
from bridge._conformance.checks import CHECKS
from tests.bridge.cli.command import jaxdw as command
from tests.bridge.conformance.kernels import CLEAN, FAULTS, conv1d_padded, conv2d

ROOT = Path(__file__).parents[3]

#: Checks of kernels without faults in the sample: the others take seconds each.
QUICK = ("geometry", "streaming", "activation", "memory_layouts", "inputs_unchanged")


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems gain nothing from threads, which spin while they wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CLEAN)
def test_a_kernel_without_faults_has_no_failure(name, seed, full):
    kernel, kind, options = CLEAN[name]
    result = bridge.conformance(kernel, kind, seed=seed, checks=None if full else QUICK, **options)
    assert not result.failures, str(result)
    assert result.passed and result.checks[0].outcome.tried >= 24


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_check(name, seed):
    planted = FAULTS[name]
    result = bridge.conformance(planted.kernel, planted.kind, seed=seed, checks=[planted.check])
    (failure,) = result.failures
    assert failure.check == planted.check and re.search(planted.said, failure.sentence), str(result)
    assert result.verdict.exit_code in (1, 3) and not result.passed


def test_the_smallest_case_reproduces_the_failure(seed):
    planted = FAULTS["flipped"]
    (failure,) = bridge.conformance(planted.kernel, checks=["geometry"], seed=seed).failures
    assert failure.case.x.size < 40 and failure.name == "kernel flipped"
    again = bridge.compare(failure.actual, failure.expected, failure.case)
    assert again.verdict == "CONVENTION" and again.name == failure.name


def test_the_same_seed_gives_the_same_result(seed):
    first, second = (bridge.conformance(conv2d, checks=["geometry", "edge_sizes"], seed=seed) for _ in range(2))
    assert json.loads(first.to_json()) == json.loads(second.to_json())
    assert bridge.conformance(conv2d, checks=["zeros"]).seed != bridge.conformance(conv2d, checks=["zeros"]).seed


def test_what_a_kernel_does_not_take_is_not_tested():
    def narrow(x, w, padding=0):
        if w.shape[-1] != 3:
            raise ValueError("a width of 3, please")
        return F.conv2d(x, w, padding=padding, groups=len(w))

    result = bridge.conformance(narrow, checks=["geometry", "gradients"], seed=0)
    assert not result.failures and result.checks[0].outcome.refused and "a width of 3" in result.checks[0].outcome.note
    assert {"1-D", "3-D", "a bias", "a channel multiplier"} == set(result.refused)

    def indexing(x, w, padding=0):
        return narrow(x, w[..., : 3 + [0, 0, 0][w.shape[-1] - 1]], padding)

    (failure,) = bridge.conformance(indexing, checks=["geometry"], seed=0).failures
    assert failure.name == "no result" and "IndexError" in failure.cause  # no refusal: an error of the code

    def padded_by_one(x, w):
        return F.conv2d(x, w, padding=1, groups=len(w))

    assert not bridge.conformance(padded_by_one, checks=["geometry", "edge_sizes", "dtypes"], seed=0).failures


def test_a_kernel_with_its_channels_last_and_one_without_an_axis(seed):
    def last(x, weight):  # (N, T, C), (C, K)
        return conv1d_padded(x.movedim(-1, 1), weight[:, None]).movedim(1, -1)

    result = bridge.conformance(last, "causal", checks=["geometry", "gradients", "inputs_unchanged"], seed=seed)
    assert not result.failures, str(result)
    assert result.framework == "torch" and "channels last" in result.called

    def changing(x, weight):
        y = last(x, weight)
        x += 1
        return y

    assert bridge.conformance(changing, "causal", checks=["inputs_unchanged"], seed=seed).failures


def test_functions_that_differentiate_nothing_are_skipped():
    def detached(x, weight):
        return conv1d_padded(x, weight).detach()

    for kernel in (detached, CLEAN["numpy_loop"][0]):
        kind = "causal" if kernel is detached else "depthwise"
        (check,) = bridge.conformance(kernel, kind, checks=["gradients"], seed=0).checks
        assert check.status == "skipped" and "gradient" in check.outcome.reason


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"kind": "dense"}, "`kind` is 'dense', expected one of depthwise, causal, transpose"),
        ({"checks": ["speed"]}, r"`checks` is \['speed'\], expected some of geometry, edge_sizes"),
        ({"checks": []}, r"`checks` is \[\]"),
        ({"checks": "geometry"}, "`checks` is 'geometry'"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": True}, "`seed` is True"),
        ({"accumulator": "double"}, "`accumulator` is 'double', expected one of float32, same"),
        ({"kind": "causal"}, "computes no causal convolution"),
        ({"device": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        bridge.conformance(conv2d, **arguments)


def test_what_is_no_function_is_named():
    with pytest.raises(TypeError, match="expected a function or a layer"):
        bridge.conformance(3)
    with pytest.raises(ValueError, match=r"expected package\.module:function"):
        bridge.conformance("conv2d")
    with pytest.raises(ValueError, match=r"a layer of class Conv2d, which has one geometry"):
        bridge.conformance(torch.nn.Conv2d(3, 3, 3, groups=3))


SUITES = """
import bridge
from tests.bridge.conformance.kernels import conv1d_padded, padded_on_the_wrong_side

class TestRight(bridge.conformance.Suite):
    function = staticmethod(conv1d_padded)
    kind = "causal"

class TestWrong(bridge.conformance.Suite):
    function = padded_on_the_wrong_side
    kind, seed = "causal", 5
"""


def test_each_check_is_a_test_of_pytest(tmp_path):
    (tmp_path / "test_kernels.py").write_text(SUITES)
    options = ("-p", "bridge.pytest_plugin", "-p", "no:cacheprovider", "-v", "--parity-report", "parity", "-rs")
    environment = {
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for check in CHECKS:
        assert re.search(rf"TestRight::test_{check.name} (PASSED|SKIPPED)", done.stdout)
    assert "CONVENTION (causal padding)" in done.stdout and "set `seed = 5` in the class to repeat it" in done.stdout
    assert "only a causal kernel with a state streams" in done.stdout
    (document, *_) = (tmp_path / "parity").glob("*Wrong*geometry*.json")
    assert json.loads(document.read_text())["name"] == "causal padding"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kitkernels.py").write_text(
        "import torch.nn.functional as F\n"
        "def right(x, w):\n    return F.conv1d(F.pad(x, (w.shape[-1] - 1, 0)), w, groups=len(w))\n"
        "def wrong(x, w):\n    return right(x, w.flip(-1))\n"
        "def rounded(x, w):\n    return right(x.bfloat16().to(x.dtype), w.bfloat16().to(w.dtype))\n"
    )
    chosen = ("--kind", "causal", "--checks", "geometry,dtypes", "--seed", "3")
    code, printed, _ = command("conformance", "kitkernels:right", *chosen)
    assert code == 0 and "2 of 2 checks passed; no check failed" in printed
    code, printed, _ = command("--quiet", "conformance", "kitkernels:wrong", *chosen, "--json", "wrong.json")
    assert code == 1 and printed == "0 of 2 checks passed; CONVENTION in geometry, dtypes (seed 3)\n"
    report = json.loads((tmp_path / "wrong.json").read_text())
    assert report["schema"] == "jaxdw.conformance/1" and report["verdict"] == "CONVENTION" and report["environment"]
    assert report["failures"][0]["name"] == "kernel flipped" and report["failures"][0]["data"]["x"]
    assert command("conformance", "kitkernels:rounded", *chosen)[0] == 3
    code, _, error = command("conformance", "kitkernels:missing")
    assert code == 2 and "has no 'missing'" in error
