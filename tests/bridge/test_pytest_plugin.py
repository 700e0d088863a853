"""The pytest plugin: light at start, and each failed assertion with its reports.

pytest's own fixture for such tests, `pytester`, takes modules out of this process that were imported meanwhile. PyTorch
and JAX do not survive that.
"""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree
from pathlib import Path

import pytest

from bridge.report.bundle import replay_bundle

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

@pytest.mark.xfail
def test_expected_to_fail(assert_parity):
    assert_parity(output(case()) + 1, output(case()), case())
"""


@pytest.fixture
def run(tmp_path):
    """Run pytest on one file in a process of its own, with this plugin and no other."""

    def run(*options, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        words = [sys.executable, "-m", "pytest", "-p", "bridge.pytest_plugin", "--rootdir", ".", *options]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_the_distribution_has_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"jaxdw": "bridge.pytest_plugin"}


def test_nothing_heavy_is_imported_before_it_is_used(tmp_path, run):
    tests = (
        "import sys\n"
        "def test_light():\n"
        "    assert not {'numpy', 'jax', 'torch', 'rich', 'pydantic', 'jinja2', 'typer'} & set(sys.modules)\n"
        "def test_fails(): assert 1 == 2\n"
    )
    result = run("--parity-report", "reports", test_light=tests)  # the failure is not ours either
    assert "1 failed, 1 passed" in result.stdout
    assert "0 failed assertions" in (tmp_path / "reports" / "index.html").read_text()


def test_failures_are_collected_from_all_processes(tmp_path, run):
    text = (ROOT / "docs/testing.md").read_text()
    files = {"test_planted": TESTS, "test_page": re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]}
    options = ("-p", "xdist", "-n", "2", "--parity-report", "out/reports", "--parity-bundle")
    result = run(*options, "--parity-sarif", "log.sarif", "--junitxml", "junit.xml", **files)
    assert "4 failed, 1 passed, 1 xfailed" in result.stdout and "mine and theirs: CONVENTION" in result.stdout
    assert fnmatch.filter(result.stdout.splitlines(), "parity: 3 diagnoses in *index.html")

    folder = tmp_path / "out" / "reports"
    endings = sorted(path.suffix for path in folder.iterdir())
    assert endings == [".bundle"] * 3 + [".html"] * 4 + [".json"] * 3
    index = (folder / "index.html").read_text()
    assert "3 failed assertions" in index and "test_planted.py::test_imported[a/b c]" in index
    for path in folder.iterdir():
        assert path.name == "index.html" or f'href="{path.name}"' in index
        if path.suffix == ".json":
            assert json.loads(path.read_text())["schema"].startswith("jaxdw.parity/")
        if path.suffix == ".bundle":
            diagnosis, changes = replay_bundle(path)
            assert not diagnosis.verdict.passes
            # other tests of this process may have changed PyTorch's settings
            assert [change for change in changes if not change.startswith("environment")] == []

    log = json.loads((tmp_path / "log.sarif").read_text())
    assert log["version"] == "2.1.0"
    (sarif_run,) = log["runs"]
    rules = [rule["id"] for rule in sarif_run["tool"]["driver"]["rules"]]
    lines = TESTS.splitlines()
    assert sarif_run["results"].pop(0)["ruleId"] == "CONVENTION"
    for result, call in zip(sarif_run["results"], ("    assert_parity(output", "    imported(wrong"), strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] and result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "test_planted.py"
        start = location["physicalLocation"]["region"]["startLine"]
        assert any(line.startswith(call) for line in lines[start - 1 : start + 1])

    cases = xml.etree.ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    found = {case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")} for case in cases}
    assert found["test_fixture"]["parity_verdict"] == "CONVENTION" and found["test_fixture"]["parity_fix"]
    told = re.search(r"E         cause     (.*)", text)[1]
    assert found["test_my_layer_has_pytorchs_result"]["parity_cause"].startswith(told)
    assert all(f"`{option}" in text for option in ("--parity-report", "--parity-bundle", "--parity-sarif"))
    assert found["test_passes"] == found["test_other"] == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (("--parity-bundle",), "--parity-bundle is given without --parity-report DIR*"),
        (("--parity-report", "test_file.py"), "the reports of parity cannot be written: *test_file.py*"),
        (
            ("--parity-report", "site"),
            "the reports of parity cannot be written: *index.html exists and is not a report of the kind jaxdw.pytest*",
        ),
        (
            ("--parity-sarif", "nowhere/log.sarif"),
            "the reports of parity cannot be written: *there is no folder *nowhere",
        ),
        (
            ("--parity-sarif", "test_file.py"),
            "the reports of parity cannot be written: *test_file.py exists and is not*",
        ),
        (("--parity-sarif", "."), "the reports of parity cannot be written: * is a folder, expected a file to write"),
        (("--parity-sarif", "pipe"), "the reports of parity cannot be written: *pipe is not a regular file*"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_tests(tmp_path, run, options, message):
    os.mkfifo(tmp_path / "pipe")
    foreign = tmp_path / "site" / "index.html"
    foreign.parent.mkdir()
    foreign.write_text("<!doctype html>\nmy own page")
    result = run(*options, test_file="def test_one(): pass")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert foreign.read_text() == "<!doctype html>\nmy own page"
    assert (tmp_path / "test_file.py").read_text() == "def test_one(): pass" and (tmp_path / "pipe").is_fifo()
    assert fnmatch.filter(result.stderr.splitlines(), f"ERROR: {message}")


PLANTED = """
from bridge.testing import Failure

class Planted(Failure):
    verdict, meaning = "MISMATCH", "planted"

    def documents(self, command):
        return {}

def fails():
    raise Planted("planted")
"""

BASE = """
from planted import fails

class Base:
    def test_direct(self):
        fails()  # direct

    def test_method(self):
        self.check()  # method
"""

HEIR = """
from base import Base
from planted import fails

# longer than the other file: no line below is a line of both



class TestHeir(Base):
    def check(self):
        fails()
"""


def test_an_inherited_test_is_located_in_the_file_that_defines_it(tmp_path, run):
    result = run("--parity-sarif", "log.sarif", planted=PLANTED, base=BASE, test_heir=HEIR)
    assert "2 failed" in result.stdout
    results = json.loads((tmp_path / "log.sarif").read_text())["runs"][0]["results"]
    places = [result["locations"][0]["physicalLocation"] for result in results]
    assert [place["artifactLocation"]["uri"] for place in places] == ["base.py"] * 2
    lines = [BASE.splitlines()[place["region"]["startLine"] - 1] for place in places]
    assert lines == ["        fails()  # direct", "        self.check()  # method"]


def test_reports_of_an_older_run_stay_until_a_test_is_run(tmp_path, run):
    options = ("--parity-report", "reports", "--parity-sarif", "log.sarif")
    files = {
        "planted": PLANTED,
        "test_fails": "from planted import fails as test_fails",
        "test_skipped": "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass",
        "test_broken": "import nothing_of_this_name",
        "test_passes": "def test_passes(): pass",
    }
    assert "1 failed" in run(*options, "test_fails.py", **files).stdout
    written = [tmp_path / "reports" / "index.html", tmp_path / "log.sarif"]
    before = [path.read_bytes() for path in written]
    assert b"1 failed assertion " in before[0] and b"MISMATCH" in before[1]
    for more, code in (
        (("--collect-only", "test_fails.py"), pytest.ExitCode.OK),
        (("test_skipped.py",), pytest.ExitCode.OK),
        ((), pytest.ExitCode.INTERRUPTED),
    ):
        assert run(*options, *more).returncode == code
        assert [path.read_bytes() for path in written] == before
    assert run(*options, "test_passes.py").returncode == pytest.ExitCode.OK
    assert "0 failed assertions" in written[0].read_text()
    assert json.loads(written[1].read_text())["runs"][0]["results"] == []
