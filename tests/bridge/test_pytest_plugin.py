"""The pytest plugin: light at start, and each failed assertion with its reports."""

import json
import tomllib
import xml.etree.ElementTree
from pathlib import Path

import pytest

from bridge.report.bundle import replay_bundle

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent.parent

TESTS = """
import numpy as np
import pytest
from bridge import Case
from bridge.testing import assert_parity as imported

def case(**options):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((1, 6, 6, 2), np.float32), rng.standard_normal((3, 3, 1, 2), np.float32)
    return Case(x, kernel, **{"padding": "VALID", **options})

def output(case):
    return sum((x * w).reshape(case.geometry.output_shape) for x, w, _ in case.tap_terms())

def test_fixture(assert_parity):
    assert_parity(output(case(padding=(1, 1), strides=2)), output(case(padding="SAME", strides=2)),
                  case(padding="SAME", strides=2), names=("mine", "theirs"))

@pytest.mark.parametrize("name", ["a/b c"])
def test_imported(name):
    wrong = output(case()) * np.float32(1.01)
    imported(wrong, output(case()), case())

def test_passes(assert_parity):
    assert_parity(output(case()), output(case()), case())

def test_other():
    assert 1 == 2
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a process of its own, with this plugin and no other."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return lambda *options: pytester.runpytest_subprocess("-p", "bridge.pytest_plugin", *options)


def test_the_distribution_has_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"jaxdw": "bridge.pytest_plugin"}


def test_nothing_heavy_is_imported_before_it_is_used(pytester, run):
    pytester.makepyfile(
        "import sys\n"
        "def test_light():\n"
        "    assert not {'numpy', 'jax', 'torch', 'rich', 'pydantic', 'jinja2', 'typer'} & set(sys.modules)\n"
        "def test_fails(): assert 1 == 2\n"
    )
    result = run("--parity-report", "reports")  # the failure is not ours either
    result.assert_outcomes(passed=1, failed=1)
    assert "0 failed assertions" in (pytester.path / "reports" / "index.html").read_text()


def test_failures_are_collected_from_all_processes(pytester, run):
    pytester.makepyfile(test_planted=TESTS)
    options = ("-p", "xdist", "-n", "2", "--parity-report", "out/reports", "--parity-bundle")
    result = run(*options, "--parity-sarif", "log.sarif", "--junitxml", "junit.xml")
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(["*mine and theirs: CONVENTION*", "parity: 2 diagnoses in *index.html"])

    folder = pytester.path / "out" / "reports"
    endings = sorted(path.suffix for path in folder.iterdir())
    assert endings == [".bundle", ".bundle", ".html", ".html", ".html", ".json", ".json"]
    index = (folder / "index.html").read_text()
    assert "2 failed assertions" in index and "test_planted.py::test_imported[a/b c]" in index
    for path in folder.iterdir():
        assert path.name == "index.html" or f'href="{path.name}"' in index
        if path.suffix == ".json":
            assert json.loads(path.read_text())["schema"].startswith("jaxdw.parity/")
        if path.suffix == ".bundle":
            diagnosis, changes = replay_bundle(path)
            assert not diagnosis.verdict.passes and changes == []

    log = json.loads((pytester.path / "log.sarif").read_text())
    assert log["version"] == "2.1.0"
    (sarif_run,) = log["runs"]
    rules = [rule["id"] for rule in sarif_run["tool"]["driver"]["rules"]]
    lines = TESTS.splitlines()
    for result, call in zip(sarif_run["results"], ("    assert_parity(output", "    imported(wrong")):
        assert rules[result["ruleIndex"]] == result["ruleId"] and result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "test_planted.py"
        start = location["physicalLocation"]["region"]["startLine"]
        assert any(line.startswith(call) for line in lines[start - 1 : start + 1])

    cases = xml.etree.ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    found = {case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")} for case in cases}
    assert found["test_fixture"]["parity_verdict"] == "CONVENTION" and found["test_fixture"]["parity_fix"]
    assert found["test_passes"] == found["test_other"] == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--parity-bundle",), "--parity-bundle is given without --parity-report DIR*"),
        (("--parity-report", "test_file.py"), "the reports of parity cannot be written: *test_file.py*"),
        (("--parity-sarif", "nowhere/log.sarif"), "the reports of parity cannot be written: *nowhere is no folder"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_tests(pytester, run, options, message):
    pytester.makepyfile(test_file="def test_one(): pass")
    result = run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
