"""`jaxdw bench` on the command line."""

import os
import xml.etree.ElementTree

import pytest
import typer.testing

from bridge import cli
from bridge.bench import process
from bridge.bench.schema import BenchSettings

SMALL = ("bench", "--layers", "6x5x4:3:1", "--batch", "1", "--rounds", "2", "--peers", "torch,lax.grouped")


def jaxdw(*arguments):
    return typer.testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_a_run_prints_and_writes_and_is_shown_again(tmp_path, monkeypatch, capfd):
    for name in ("OMP_WAIT_POLICY", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    report, picture, again = tmp_path / "report.json", tmp_path / "picture.svg", tmp_path / "again.svg"
    result = jaxdw(*SMALL, "--threads", 1, "--json", report, "--svg", picture)
    assert result.exit_code == 0, (result.output, capfd.readouterr().err)
    assert capfd.readouterr().err == ""  # no progress where there is no terminal
    written = process.read_report(report)
    assert written.environment["OMP_WAIT_POLICY"] == "passive"
    assert written.environment["GLIBC_TUNABLES"] == process.KEEPS_MEMORY
    assert written.environment["torch threads"] == written.environment["logical processors used"] == "1"
    assert "OMP_WAIT_POLICY=passive" in result.output
    xml.etree.ElementTree.parse(picture)
    shown = jaxdw("bench", "--from-json", report, "--svg", again)
    assert shown.exit_code == 0 and shown.output == result.output
    assert again.read_text() == picture.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite", "nothing"], "`--suite` is 'nothing'"),
        (["--layers", "nothing"], "`--layers` is 'nothing', which selects no row of layers"),
        (["--peers", "nothing"], "`--peers` is 'nothing', expected default, all, or some of torch"),
        (["--threads", 10**6], f"`--threads` is 1000000, expected 1 to {len(os.sched_getaffinity(0))}"),
        (["--json", "missing/report.json"], "there is no folder missing"),
        (["--svg", "."], "is a folder, expected a file to write"),
        (["--json", "same", "--svg", "same"], "`--json` and `--svg` are both same, expected two files"),
        (["--from-json", "README.md"], "expected a report that --json wrote"),
        (["--from-json", "missing.json"], "missing.json"),
        (["--tune", "--suite", "blocks"], "`--suite` is 'blocks' with `--tune`"),
    ],
)
def test_bad_input_is_reported_before_the_work(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(process, "measured", lambda _: pytest.fail("it worked first"))
    monkeypatch.setattr("sys.argv", ["jaxdw", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds", "--batch", "--threads"])
def test_nothing_less_than_one_is_taken(option):
    assert jaxdw("bench", option, 0).exit_code == 2


def test_a_json_file_of_something_else_is_refused_with_its_first_fault(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": "jaxdw.parity/2"}')
    with pytest.raises(ValueError, match="expected a report that --json wrote: `schema`"):
        process.read_report(path)


def test_a_failure_of_the_process_is_an_exit_code_and_its_own_words(capfd):
    assert process.measured(BenchSettings(suites=("nothing",))) == 2
    assert capfd.readouterr().err.startswith("jaxdw: `--suite` is 'nothing'")
