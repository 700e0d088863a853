"""Attribution and elimination as they are printed, written as JSON and drawn."""

import json

import typer.testing
from rich.console import Console

from bridge import cli
from bridge.diagnosis.attribution import attribute
from bridge.diagnosis.elimination import eliminate
from bridge.report.attribution import print_attribution, print_elimination
from tests.bridge.diagnosis.test_attribution import draw


def printed(show, result):
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(result, console)
    return capture.get()


def test_the_command_prints_and_writes_what_was_found(tmp_path):
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    names = "torch.conv2d,torch.unfold_matmul,torch.unfold_einsum"
    arguments = ["parity", "--attribute", "--implementations", names]
    for kind, path in paths.items():
        arguments += [f"--{kind}", str(path)]
    result = typer.testing.CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "unexplained" in result.output and "How to make the bits equal" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    report = json.loads(paths["json"].read_text())
    found = report["attribution"]
    assert [factor["name"] for factor in found["factors"]] == ["algorithm"]
    assert sum(f["share"] for f in found["factors"]) + found["unexplained"] == found["total"] > 0
    assert {c["name"] for c in found["configurations"]} == {found["a"], found["b"]}
    assert found["flips"] and all(flip["before"] in (found["a"], found["b"]) for flip in found["flips"])
    assert report["elimination"]["changes"] and not report["elimination"]["identical"]
    assert "Sources of the difference" in paths["html"].read_text()


def test_without_the_option_nothing_is_attributed(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["parity", "--implementations", "torch.conv2d,torch.taps", "--json", str(path)]
    result = typer.testing.CliRunner().invoke(cli.app, arguments)
    assert "unexplained" not in result.output
    report = json.loads(path.read_text())
    assert report["attribution"] is None and report["elimination"] is None


def test_names_with_brackets_and_reasons_are_printed_whole(seed):
    case = draw(seed, (2, 9, 4), (3,))
    text = printed(print_attribution, attribute(case, "torch.conv2d[threads=1]", "torch.taps[mkldnn=off]"))
    assert "torch.conv2d[threads=1] with one setting changed" in text
    assert "PyTorch has no such format" in " ".join(text.split()) and "torch.taps[mkldnn=off]" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_what_to_write_is_printed(seed):
    result = eliminate(draw(seed, (2, 5, 5, 3), padding=1), "torch.conv2d", "torch.unfold_matmul")
    text = " ".join(printed(print_elimination, result).split())
    assert result.best.code[0] in text and "Checked on this case and on another draw" in text
