"""`jaxdw parity --html --bundle` and `jaxdw replay`."""

import sys

import pytest
import typer.testing

from bridge import cli

SMALL = ("parity", "--implementations", "torch.conv2d,jax.taps,numpy.exact")


def jaxdw(*arguments):
    return typer.testing.CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_a_page_and_a_bundle_are_written_and_the_bundle_is_repeated(tmp_path):
    page, bundle = tmp_path / "report.html", tmp_path / "bundle"
    assert jaxdw(*SMALL, "--html", page, "--bundle", bundle).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "report.html"]
    result = jaxdw("replay", bundle)
    assert result.exit_code == 0 and "Nothing changed since it was saved." in result.output
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"numpy": "', '"numpy": "0.'))
    assert "environment: numpy was 0." in jaxdw("replay", bundle).output


@pytest.mark.parametrize(
    "option, path, error",
    [
        ("--html", "missing/report.html", FileNotFoundError),
        ("--bundle", "file", NotADirectoryError),
        ("--bundle", "full", FileExistsError),
        ("--bundle", "missing/bundle", FileNotFoundError),
    ],
)
def test_a_path_that_cannot_be_written_fails_before_the_work(option, path, error, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    monkeypatch.setattr(cli.parity, "run_parity", lambda *_: pytest.fail("it worked first"))
    assert isinstance(jaxdw(*SMALL, option, tmp_path / path).exception, error)


def test_the_page_holds_the_command_that_was_typed(tmp_path, monkeypatch):
    arguments = [*SMALL, "--shape", "1x4x4x2", "--kernel-size", "3x3", "--html", str(tmp_path / "a page.html")]
    monkeypatch.setattr(sys, "argv", ["/somewhere/jaxdw", *arguments])
    assert jaxdw(*arguments).exit_code == 0
    text = (tmp_path / "a page.html").read_text()
    assert f"jaxdw {' '.join(arguments[:-1])}" in text and "a page.html&#39;</pre>" in text


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    assert "it has no manifest.json" in str(jaxdw("replay", tmp_path).exception)
