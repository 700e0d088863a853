"""`jaxdw census`, its file of results and its page."""

import json

import pytest
import typer.testing

from bridge import cli
from bridge._census import record, survey
from bridge.diagnosis import Verdict
from tests.references import reference

HERE = "tests.bridge.census.models"


def jaxdw(*arguments):
    """Exit code, and what was printed or the error."""
    result = typer.testing.CliRunner().invoke(cli.app, ["census", "--size", "16", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, (ValueError, OSError)), result.exception
        return 2, str(result.exception)
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.jsonl"


def test_models_are_run_and_summed_up(results, tmp_path):
    page = tmp_path / "census.html"
    code, out = jaxdw(f"{HERE}:small", f"{HERE}:dense", "--out", results, "--html", page)
    assert code == 0
    assert "1 model, 2 depthwise layers in 2 kernel geometries:" in out and "1 model without depthwise layers." in out
    first, second = record.read_records(results)
    assert [layer.layer for layer in first.layers] == ["1", "3"] and first.verdict.passes
    assert second.verdict is None and not second.layers
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "http" not in text.replace("http-equiv", "")
    assert "<b>Fix:</b>" in text and f"{HERE}:small" in text and "5x5, stride 2, padding 0, multiplier 2" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["census.html", "results.jsonl"]


def test_finished_models_are_skipped_and_failed_ones_run_again(results, monkeypatch):
    def names():
        return [json.loads(line)["model"].partition(":")[2] for line in results.read_text().splitlines()]

    code, out = jaxdw(f"{HERE}:small", f"{HERE}:broken", "--out", results)
    assert code == 2 and "1 model could not be run" in out and "failed in 1.1" in out
    assert jaxdw(f"{HERE}:small", f"{HERE}:broken", "--out", results)[0] == 2
    assert names() == ["small", "broken", "broken"]
    assert jaxdw(f"{HERE}:small", "--out", results, "--seed", 1)[0] == 0  # other settings: not the same result
    assert names() == ["small", "broken", "broken", "small"]
    monkeypatch.setattr(survey, "survey", lambda *_: pytest.fail("it was run again"))
    code, out = jaxdw(f"{HERE}:small", "--out", results)
    assert code == 0 and "2 depthwise layers" in out


def test_a_line_that_was_cut_short_is_run_again_and_replaced(results):
    jaxdw(f"{HERE}:small", "--out", results)
    whole = results.read_bytes()
    results.write_bytes(whole + whole[: len(whole) // 2])
    assert len(record.read_records(results)) == 1
    jaxdw(f"{HERE}:dense", "--out", results)
    assert results.read_bytes().startswith(whole) and len(record.read_records(results)) == 2


def test_a_file_that_is_no_result_is_refused_by_line(results):
    jaxdw(f"{HERE}:dense", "--out", results)
    results.write_text(results.read_text() + "{}\n")
    code, error = jaxdw(f"{HERE}:dense", "--out", results)
    assert code == 2 and "line 2 is no result of a census: `environment`: Field required" in error


def test_a_full_disk_leaves_the_results_as_they_were(results, monkeypatch):
    jaxdw(f"{HERE}:dense", "--out", results)
    before = results.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="was not written: No space left on device"):
        record.append_record(results, record.read_records(results)[0])
    assert results.read_bytes() == before


@pytest.mark.parametrize(
    "change, verdict, code",
    [
        ("kernel", "IDENTICAL", 0),
        ("kernel[::-1]", "CONVENTION", 1),
        ("kernel.at[0, 0].multiply(1.01)", "BUG", 1),
        ("kernel.at[0, 0].set(jnp.nan)", "NONFINITE", 1),
    ],
)
def test_exit_codes_are_those_of_the_weakest_verdict(change, verdict, code, tmp_path, monkeypatch, results):
    (tmp_path / "planted.py").write_text(
        "import jax.numpy as jnp\nimport jaxdw\n"
        "def conv(x, kernel, bias):\n"
        f"    return jaxdw.depthwise_conv(x, {change}, bias, padding=1, method='taps')\n"
    )
    (tmp_path / "layer.py").write_text(
        "from torch import nn\ndef one(): return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "planted", raising=False)
    page = tmp_path / "census.html"
    found, out = jaxdw("layer:one", "--implementations", "torch.conv2d,planted:conv", "--out", results, "--html", page)
    assert found == code and verdict in out and verdict in page.read_text()
    assert f"<b>Fix:</b> {'layer:one, 0: ' if code else 'Nothing to change'}" in page.read_text()
    assert record.read_records(results)[0].verdict.value == verdict


def planted(verdict=None, error=""):
    settings = record.CensusSettings(
        size=None, batch=1, seed=0, pretrained=False, weights=None, implementations=("a", "b"), explain=False
    )
    return record.CensusRecord(
        model="m",
        settings=settings,
        environment={},
        seconds=0,
        verdict=verdict,
        layers=[],
        idle=[],
        passed_over=[],
        error=error,
    )


@pytest.mark.parametrize(
    "records, fail_on, code",
    [
        ([planted(Verdict.IDENTICAL), planted(Verdict.ROUNDING)], None, 0),
        ([planted(Verdict.IDENTICAL), planted()], None, 0),
        ([planted(Verdict.ROUNDING), planted(Verdict.PRECISION)], None, 3),
        ([planted(Verdict.PRECISION), planted(Verdict.INCONCLUSIVE)], None, 4),
        ([planted()], None, 4),
        ([planted(Verdict.INCONCLUSIVE), planted(error="x")], None, 2),
        ([planted(Verdict.BUG), planted(error="x")], None, 1),
        ([planted(Verdict.INCONCLUSIVE), planted(Verdict.NONFINITE)], None, 1),
        ([planted(Verdict.ROUNDING)], Verdict.ROUNDING, 1),
        ([planted(Verdict.EXPLAINED)], Verdict.ROUNDING, 0),
        ([planted(Verdict.PRECISION)], Verdict.ROUNDING, 3),
    ],
)
def test_one_exit_code_says_the_gravest_of_many(records, fail_on, code):
    assert survey.exit_code(records, fail_on) == code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["small"], "expected timm:NAME"),
        ([f"{HERE}:small", "--out", "nowhere/results.jsonl"], "cannot be written: there is no folder"),
        ([f"{HERE}:small", "--implementations", "torch.conv2d"], "expected at least two, each once"),
        ([f"{HERE}:small", "--implementations", "torch.conv2d,jax.winograd"], "`implementation` is 'jax.winograd'"),
        ([f"{HERE}:small", f"{HERE}:dense", "--weights", __file__], "expected one model and not --pretrained"),
        ([f"{HERE}:small", "--weights", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    code, error = jaxdw(*arguments)
    assert code == 2 and message in error


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_real_model_has_nothing_weaker_than_rounding(results):
    reference("timm.mobilenet_v3_small")  # imports timm, or skips
    code, out = jaxdw("timm:tf_mobilenetv3_small_minimal_100", "--size", 64, "--out", results)
    assert code == 0 and "1 model, 11 depthwise layers in 2 kernel geometries:" in out
    (found,) = record.read_records(results)
    assert {layer.kind for layer in found.layers} == {"Conv2d", "Conv2dSame"}
    assert all(layer.own.verdict is Verdict.IDENTICAL for layer in found.layers)
    assert found.identical()[1] == 11
