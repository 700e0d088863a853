"""`jaxdw audit`, as a user types it: terminal, JSON, and wrong arguments."""

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing
from rich.console import Console

from bridge import cli
from bridge.audit import PLATFORMS, Audit, AuditSubject, audit, platform
from bridge.audit.compiling import AuditMethod
from bridge.audit.findings import default_methods
from bridge.report.audit import print_audit, summary
from bridge.report.audit_schema import AuditReport
from jaxdw.geometry import Geometry
from tests.bridge.audit.test_findings import GEOMETRY, PLANTED, read

ROOT = Path(__file__).parents[3]
SMALL = ("--shape", "2x16x16x32")


def jaxdw(*arguments):
    """Exit code, standard output, and the one line of an error."""
    runner = typer.testing.CliRunner(env={"COLUMNS": "80"})
    result = runner.invoke(cli.app, ["audit", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, (ValueError, TypeError, OSError)), result.exception
        return 2, result.output, str(result.exception)
    return result.exit_code, result.output, ""


def report_of(*names, on="tpu:v5e", gradient=False):
    """A report of kept programs; nothing is compiled."""
    subject = AuditSubject(GEOMETRY, gradient=gradient)
    return AuditReport.of(Audit(platform(on), subject, tuple(read(name, gradient=gradient) for name in names)))


def printed(report, columns=200):
    console = Console(width=columns, file=io.StringIO())
    print_audit(report, console)
    return console.file.getvalue()


def test_the_default_methods_on_a_cpu(tmp_path):
    json = tmp_path / "audit.json"
    code, out, _ = jaxdw(*SMALL, "--json", json)
    words = " ".join(out.split())
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines())
    assert "auto (taps) the same as taps" in words and "pallas" not in words
    assert "patches library call" in words and "windows are materialised" in words
    report = AuditReport.model_validate_json(json.read_text())
    assert [each.way for each in report.findings] == ["taps", "rows", "patches", "grouped", "auto"]
    assert report.platform.name == "cpu" and "torch" not in report.environment
    assert sorted(tmp_path.iterdir()) == [json]


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(columns):
    report = report_of("v5e_taps", "v5e_grouped", "v5e_patches", "v5e_pallas")
    out = printed(report, columns)
    assert all(len(line) <= columns for line in out.splitlines()) and "\u2026" not in out
    for each in report.findings:
        assert re.search(rf"^ {each.label} +{re.escape(each.type_seen)} .* 51\.4 MB", out, re.MULTILINE)


def test_options_reach_the_geometry():
    options = ["--strides", "2,1", "--padding", "0:1,2", "--dilation", "2", "--multiplier", "3", "--bias"]
    code, out, _ = jaxdw("taps", *SMALL, *options, "--kernel-size", "3x5", "--dtype", "bfloat16", "--gradient")
    words = " ".join(out.split())
    assert code == 0, out
    expected = (
        "gradients of a depthwise convolution, input 2x16x16x32, kernel 3x5, stride 2,1, padding 0:1,2, dilation 2"
    )
    assert f"{expected}, multiplier 3, bias, bfloat16" in words


def test_the_json_holds_everything():
    report = report_of("v5e_grouped", "v5e_pallas", "h100_grouped")
    again = AuditReport.model_validate_json(report.to_json())
    assert again == report and again.to_json() == report.to_json()
    grouped = again.findings[0]
    assert [each.dtype for each in grouped.roundings] == ["bf16", "bf16"]
    assert grouped.steps[-1].results == ("f32[8,56,56,144]",) and grouped.steps[-1].cycles == 66066


@pytest.mark.parametrize(
    "names, seen, said",
    [
        (["v5e_taps"], ["f32"], "v5e_taps: float32 kept."),
        (["v5e_taps", "v5e_grouped"], ["f32", "bf16"], "v5e_taps: float32 kept. v5e_grouped: rounded to bf16."),
        (["h100_grouped"], ["tf32?"], "h100_grouped: may round to tf32."),
        (["v5e_pallas"], ["f32?"], "v5e_pallas: float32 kept outside of hand-written kernels, which are not read."),
    ],
)
def test_what_is_not_certain_has_a_question_mark(names, seen, said):
    report = report_of(*names)
    assert [each.type_seen for each in report.findings] == seen and summary(report) == said
    assert ("A question mark" in printed(report)) == any("?" in each for each in seen)


def test_an_estimate_is_never_shown_as_a_measurement():
    assert "neither is a measurement" in printed(report_of("v5e_taps"))
    assert "neither is a measurement" not in printed(report_of("h100_taps", on="cuda:h100"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--platform", "tpu:v9"], r"`--platform` is 'tpu:v9', expected one of cpu, tpu:v2, .*cuda:h100"),
        (["tap"], r"`METHOD` is 'tap', expected one of auto, taps, .*package.module:function"),
        (["grouped[precision=double]"], r"'precision=double', expected \[precision=\] one of default, high, highest"),
        (["--precision", "bf16"], r"`precision` is 'bf16', expected one of default, high, highest"),
        (["--dtype", "int8"], r"`dtype` is 'int8', expected one of float32"),
        (["--dtype", "float64", "--platform", "tpu:v5e"], r"float32, float16 or bfloat16 on tpu:v5e"),
        (["no.such.module:f"], r"`METHOD` is 'no.such.module:f', and 'no.such.module' cannot be imported: Module"),
        ([PLANTED + "nothing"], r"has no 'nothing'"),
        (["tests.references:conv2d"], r"`METHOD` is"),
        (["--shape", "8x56"], r"`x`|`kernel`"),
        (["--shape", "eight"], r"`--shape` is 'eight', expected sizes"),
        (["--shape", "0x9x9x4"], r"`x` has shape \(0, 9, 9, 4\), expected no size of zero"),
        (["--shape", "1x2x2x4", "--padding", "0"], r"output|kernel"),
        (["--shape", "99999x99999x9x9"], r"2147483648 elements at most"),
        (["--padding", "LEFT"], r"LEFT"),
        (["--json", "no/such/folder/a.json"], r"no/such/folder"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, monkeypatch):
    monkeypatch.setattr("bridge.audit.platforms.importlib.util.find_spec", lambda package: package)
    code, out, error = jaxdw(*arguments)
    assert code == 2 and not out and re.search(message, error), error


@pytest.mark.parametrize("name, extra", [("tpu:v5e", "tpu"), ("cuda:h100", "cuda")])
def test_a_platform_without_its_package_says_which_extra_has_it(name, extra, monkeypatch):
    monkeypatch.setattr("bridge.audit.platforms.importlib.util.find_spec", lambda package: None)
    code, _, error = jaxdw("--platform", name)
    assert code == 2 and error.endswith(f"pip install 'jaxdw[{extra}]'")
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"jaxdw[{extra}]")):
        audit(["taps"], AuditSubject(Geometry.of((1, 4, 4, 2), (3, 3, 1, 2))), name)


def test_a_function_that_fails_is_named_and_the_rest_is_reported(tmp_path):
    path = tmp_path / "audit.json"
    code, out, _ = jaxdw(PLANTED + "raises", "taps", *SMALL, "--json", path)
    assert code == 2 and "raises raised RuntimeError" in " ".join(out.split()) and "fused loop" in out
    failed, fine = AuditReport.model_validate_json(path.read_text()).findings
    assert "as planted" in failed.error and not fine.error


def test_a_compiler_that_ends_its_process_takes_one_method_with_it(monkeypatch):
    monkeypatch.setattr("bridge.audit.platforms.importlib.util.find_spec", lambda package: package)
    monkeypatch.setattr(sys, "executable", "false")
    found = audit(["taps", "grouped"], AuditSubject(Geometry.of((1, 4, 4, 2), (3, 3, 1, 2))), "tpu:v5e").findings
    ended = "the process that compiles for tpu:v5e ended: it said nothing"
    assert [(each.way, each.error) for each in found] == [("taps", ended), ("grouped", ended)]


def test_pallas_is_among_the_defaults_where_it_has_kernels():
    assert {name: "pallas" in default_methods(each) for name, each in PLATFORMS.items()} == {
        name: name != "cpu" for name in PLATFORMS
    }


def test_brackets_say_the_precision_of_one_method():
    assert AuditMethod.parse("grouped[precision=high]").precision == "high"
    assert AuditMethod.parse(f"{PLANTED}clean[precision=highest]").name == f"{PLANTED}clean[precision=highest]"


OWN = "import jax\n\n\ndef f(x, kernel):\n    return jax.nn.relu(x * kernel[1, 1, 0])\n"


def run(*arguments, folder):
    """In a process of its own, from a folder; torch must not be imported, by this command nor by its children."""
    code = "import sys; sys.modules['torch'] = None; from bridge.cli import run; run()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code, "audit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_a_function_of_the_current_folder_without_torch(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    done = run("own:f", "taps", *SMALL, folder=tmp_path)
    assert done.returncode == 0 and "own:f fused loop" in done.stdout, done.stderr


def test_a_tpu_that_is_not_present(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jaxdw[tpu]'")
    (tmp_path / "own.py").write_text(OWN)
    names = ["grouped", "grouped[precision=highest]", "own:f", "pallas"]
    done = run(*names, "--platform", "tpu:v5e", "--json", "audit.json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"(jaxdw: \d+ s: .*\n)*", done.stderr)  # progress alone
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    report = AuditReport.model_validate_json((tmp_path / "audit.json").read_text())
    assert [each.narrowest for each in report.findings] == ["bf16", "f32", "f32", "f32"]
    assert any("rounded to bf16 before the copy" in each for each in report.findings[0].hazards)
    assert all((each.optimal_seconds or 0) > 0 and (each.estimated_cycles or 0) > 0 for each in report.findings)
