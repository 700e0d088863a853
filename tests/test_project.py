"""The project as a whole: imports, versions, examples, and the documents with their code and commands."""

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.testing

import bridge
import jaxdw
from bridge import cli, requirements

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("module", ["jaxdw", "jaxdw.nnx", "jaxdw.linen", "jaxdw.models"])
def test_jaxdw_imports_without_torch_and_without_bridge(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'bridge'}} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).stdout == "[]\n"


def test_the_bounds_of_the_package_are_those_that_the_command_asks_for_and_lower_ones_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    given = dict(re.findall(r"'([\w]+)>=([\d.]+)'", str([*project["dependencies"], *extras["bridge"]])))
    assert {name: tuple(map(int, given[name].split("."))) for name in requirements.NEEDED} == requirements.NEEDED
    assert not re.search("<|==|~=", str([project["dependencies"], *extras.values()]))


def test_the_version_to_cite_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = re.findall(r"^(version|license): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert dict(cited) == {name: project[name] for name in ("version", "license")}


def test_a_version_that_is_newer_than_the_tested_ones_is_named(monkeypatch):
    assert requirements.untested() == ""
    monkeypatch.setattr(requirements.platform, "python_version", lambda: "3.99.1")
    assert requirements.untested().startswith("Warning: Python 3.99.1 is newer than the tested versions")
    monkeypatch.undo()
    monkeypatch.setattr(requirements, "TESTED", {**requirements.TESTED, "jax": (0, 7)})
    assert re.fullmatch(
        r"Warning: jax [\d.]+ is newer than the tested versions, up to jax 0\.7, .*", requirements.untested()
    )


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(example):
    done = run(sys.executable, str(ROOT / "examples" / example))
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES[1:]], ids=lambda page: page.name)
def test_no_line_of_the_documents_is_longer_than_120_characters(page):
    lines = [(number, line) for number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert [(number, line) for number, line in lines if not line.startswith("|")] == []  # a table row has no break


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES[1:]], ids=lambda page: page.name)
def test_no_line_of_a_paragraph_begins_as_an_item_of_a_list(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"(?<=[^\n]\n) +\d+\. .*", prose) == []  # the site would make it one


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_the_files_names_and_links_of_the_documents_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https:")]
    paths = re.findall(r"`((?:jaxdw|bridge|tests|benchmarks|examples)/[\w/.-]*\w)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for name in re.findall(r"`((?:jaxdw|bridge)(?:\.[a-zA-Z]\w*)+)", text):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_in_the_documents_runs(page):
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), {"__name__": "readme"})


def test_the_tutorial_runs_and_shows_that_jax_has_the_bits_of_pytorch(capsys):
    code = re.findall(r"^```python exec[^\n]*\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.M | re.S)
    exec("".join(code), {"__name__": "tutorial"})
    printed = capsys.readouterr().out
    assert "\n0 of 150 elements differ\n" in printed and "every bit replayed: False" not in printed


def test_the_pages_of_the_api_have_every_public_name():
    pages = "".join((ROOT / f"docs/api-{package}.md").read_text() for package in ("jaxdw", "bridge"))
    for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE):
        pkgutil.resolve_name(name)
    public = {f"bridge.{name}" for name in bridge._MODULES}
    functions = {name for name in dir(jaxdw) if getattr(getattr(jaxdw, name), "__module__", "").startswith("jaxdw.")}
    assert "unfold" in functions
    public |= {f"jaxdw.{name}" for name in functions}
    assert [name for name in public if not re.search(rf"^::: {name}\b", pages, re.MULTILINE)] == []


def commands():
    """The commands of the documents without comments, each in one line: a backslash at the end continues a line."""
    lines = "".join(code for page in PAGES for code in blocks(page, "sh")).replace("\\\n", "").splitlines()
    return sorted({re.split(r"\s+# ", line)[0] for line in lines if line.startswith("jaxdw ")})


@pytest.mark.parametrize("command", commands())
def test_commands_in_the_documents_run(command, tmp_path, monkeypatch):
    if "mymodel:" in command:  # the user's own function, in the current folder
        shutil.copy(ROOT / "tests/bridge/implementations/question.py", tmp_path / "mymodel.py")
        monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / w) if re.search(r"\.(json|html|svg)$", w) else w for w in shlex.split(command)]
    result = typer.testing.CliRunner().invoke(cli.app, words[1:])
    expected = 3 if "[precision=tpu-" in command else 0  # PRECISION, which such a command is there to show
    assert result.exit_code == expected, result.output
