"""The command line as a whole: versions, help, quiet and verbose, errors, progress."""

import os
import re
import subprocess
import sys

import pytest

from bridge import cli, progress
from tests.bridge.cli.command import jaxdw


def test_quiet_leaves_one_line_and_verbose_adds_steps_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("bridge.compiler_probes.PROBES", ())  # they have tests of their own
    names = ("--implementations", "torch.conv2d,jax.grouped")
    code, out, _ = jaxdw("--quiet", "parity", *names, "--bundle", tmp_path / "saved")
    assert code == 0 and out.startswith("Verdict: ") and out.count("\n") == 1
    for command in (("doctor", "--cases", 1), ("reveal", "jax.taps"), ("replay", tmp_path / "saved")):
        assert jaxdw("-q", *command)[1].count("\n") == 1
    plain, verbose = ("\n".join(jaxdw(*more, "parity", *names)[1:]) for more in ((), ("--verbose",)))
    for words in ("s: numpy: ", "s: running jax.grouped", "torch.conv2d and jax.grouped: ", "  greatest "):
        assert words in verbose and words not in plain
    assert jaxdw("--quiet", "--verbose", "doctor")[2].startswith("`--quiet` and `--verbose` are both given")


def test_the_console_says_its_version_completes_and_takes_general_options_anywhere(monkeypatch, capsys):
    assert re.match(r"jaxdw \d\S+, jax \d\S+, flax \d\S+, torch \d\S+, Python 3\.\d+\.\d+", jaxdw("--version")[1])
    code = "import sys; sys.argv[0] = 'jaxdw'; from bridge.__main__ import main; main()"
    asked = {"_JAXDW_COMPLETE": "complete_bash", "COMP_WORDS": "jaxdw re", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert done.returncode == 0 and done.stdout.split() == ["reveal", "replay"], done
    monkeypatch.setattr(sys, "argv", ["jaxdw", "parity", "--implementations", "jax.taps,jax.rows", "--quiet"])
    with pytest.raises(SystemExit, match="0"):
        cli.run()
    assert capsys.readouterr().out.startswith("Verdict: ")


BASE_INSTALL = """
import importlib.metadata, sys
version = importlib.metadata.version
absent = ("torch", "typer", "rich", "pydantic", "jinja2")
sys.modules.update(dict.fromkeys(absent))
def only_the_base(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = only_the_base
sys.argv[0] = "jaxdw"
from bridge.__main__ import main
main()
"""


def test_a_base_install_answers_what_it_can():
    def run(*words):
        command = [sys.executable, "-c", BASE_INSTALL, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert ", torch none, " in run("--version").stdout
    told = run("--help").stdout
    assert all(f"\n  {name} " in told for name in ("parity", "reveal", "convert", "census", "doctor"))
    assert "pip install 'jaxdw[bridge]'" in told and told == run().stdout == run("parity", "--help").stdout
    done = run("parity")
    assert done.returncode == 2 and done.stderr.startswith("jaxdw: ") and done.stderr.count("\n") == 1


def test_progress_is_a_plain_line_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)
    with progress.Progress(threaded=False):
        assert list(progress.track("ab", "letter\x1b[2J")) == ["a", "b"]
    assert capsys.readouterr().err == "jaxdw: 0 s: letter\\x1b[2J: 1 of 2\n"  # the next only after a while
    with progress.Progress(progress.Level.QUIET, threaded=False):
        progress.log.info("step")
    progress.log.info("step of a library")
    assert capsys.readouterr().err == ""


def test_help_shows_defaults_and_brackets():
    out = " ".join(jaxdw("parity", "--help", COLUMNS="120")[1].replace("│", " ").split())
    assert (
        "[default: (2x5x5x3)]" in out
        and "[default: channels_last]" in out
        and "jax.grouped[precision=tpu-default]" in out
    )


def test_the_console_prints_an_error_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "bridge", "parity", "--shape", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "jaxdw: `--shape` is 'x', expected sizes such as 2x5x5x3 or 2,5,5,3\n"
