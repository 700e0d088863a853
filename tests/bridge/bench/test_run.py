"""Every suite from end to end on small shapes, and its reports."""

import functools
import io
import math
import xml.etree.ElementTree

import numpy as np
import pytest
from rich.console import Console

from bridge.bench import jax_peers, models, pictures, problems, run, scaling, special_layers, suites, torch_peers
from bridge.bench.process import read_report
from bridge.bench.schema import BEST, BenchReport, BenchSettings, RowRecord, SuiteRecord, WayRecord
from bridge.bench.terminal import print_report
from jaxdw.methods import METHODS

PEERS = {
    "layers": {"torch", "torch.channels_last", "lax.grouped", "nnx.Conv", "torch.unfold", "lax.patches"},
    "gradients": {"torch", "torch.channels_last", "lax.grouped", "nnx.Conv", "torch.unfold", "lax.patches"},
    "windows": {"torch.unfold", "lax.patches"},
    "blocks": {"torch", "torch.channels_last", "lax.grouped"},
    "convnext": {"torch", "torch.channels_last", "lax.grouped"},
}


def measured(**settings) -> BenchReport:
    settings = BenchSettings(**{"batch": 2, "rounds": 1, "layers": ("6x5x4:3:2",), "peers": ("all",), **settings})
    return run.run(settings)


def printed(report) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    return console.file.getvalue()


@pytest.fixture
def uncompiled(monkeypatch):
    """A machine where `torch.compile` finds no compiler: the first compilation takes half a minute."""
    monkeypatch.setattr(torch_peers, "compile_problem", lambda: "no C++ compiler")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("suite", PEERS)
def test_a_suite_runs_every_peer_and_all_results_are_right(suite, uncompiled, tmp_path):
    layer = "6x5x4:3:1" if suite == "convnext" else "6x5x4:3:2"
    report = measured(suites=(suite,), layers=(layer,))
    (record,) = report.suites
    (row,) = record.rows
    assert {way.name for way in row.ways} == PEERS[suite] | {"jaxdw"}
    assert all(way.median > 0 and len(way.milliseconds) == 1 for way in row.ways), row.ways
    assert report.wrong == [] and record.skipped == {"torch.compile": "no C++ compiler"}
    assert {summary.peer for summary in record.summaries} - {BEST} == PEERS[suite]
    assert bool(report.copies) == (suite != "convnext") and all(copy.best > 0 for copy in report.copies)
    path = tmp_path / "report.json"
    path.write_text(report.to_json())
    assert read_report(path) == report
    text = printed(report)
    assert f"2x{layer}" in text and "torch.compile was left out: no C++ compiler" in text
    root = xml.etree.ElementTree.fromstring(pictures.to_svg(report))
    assert root.tag.endswith("svg") and f"{layer}, " in xml.etree.ElementTree.tostring(root, "unicode")


SPECIAL = {
    "transposed": ("3x4x5:4:2 3x4x5:3:2 2x2x3:8:4", {"torch", "torch.channels_last", "lax.grouped"}),
    "causal": ("causal:2x9x5:4 step:3x5:4", {"torch", "torch.channels_last", "lax.grouped"}),
    "large": ("2x9x8x5:7 long:2x30x3:30", {"torch", "torch.channels_last", "torch.fft", "fft"}),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("suite", SPECIAL)
def test_other_layers_are_right_by_every_peer(suite, uncompiled, monkeypatch):
    names, peers = SPECIAL[suite]
    monkeypatch.setitem(suites.SPECIAL, suite, {"small": names})
    report = measured(suites=(suite,), layers=())
    (record,) = report.suites
    assert [row.name for row in record.rows] == names.split() and report.wrong == []
    assert all({way.name for way in row.ways} == peers | {"jaxdw"} for row in record.rows)
    assert [way.failed for row in record.rows for way in row.ways if not way.median] == []
    assert names.split()[0] in printed(report) and "svg" in pictures.to_svg(report)


@pytest.mark.parametrize("name", [name for names, _ in SPECIAL.values() for name in names.split()])
def test_the_checks_of_other_layers_find_a_wrong_weight(name, seed):
    layer = special_layers.SpecialLayer.parse(name, 1)
    (check,) = special_layers.checks(np.random.default_rng(seed), layer)
    wrong = {**check.arrays, "w": check.arrays["w"].copy()}
    wrong["w"].flat[seed % wrong["w"].size] += 1
    suite = next(suite for suite, (names, _) in SPECIAL.items() if name in names.split())
    (way,) = jax_peers.ways(problems.special_problem(suite, name, (), 1, seed), ["jaxdw"])
    assert check.misfit(way.fetch(way.start(check.arrays)())) == ""
    assert "y is wrong in" in check.misfit(way.fetch(way.start(wrong)()))


def test_a_whole_network_gives_what_pytorch_gives_in_float64(uncompiled, monkeypatch):
    monkeypatch.setattr(run, "model_problem", functools.partial(models.model_problem, width=0.35, classes=10))
    report = measured(suites=("models",), layers=("inference, batch 1",), batch=1, size=64, peers=("default",))
    (row,) = report.suites[0].rows
    assert {way.name for way in row.ways} == {"jaxdw", "torch", "torch.channels_last"}
    assert all(way.median for way in row.ways) and report.wrong == []
    assert "inference, batch 1" in printed(report) and "inference, batch 1, torch:" in pictures.to_svg(report)


def test_both_frameworks_train_to_the_same_state(full):
    if not full:
        pytest.skip("a step of training is compiled with the full counts only: half a minute")
    each = models.model_problem("training, batch 4", 64, 0)
    (check,) = each.checks()
    for way in jax_peers.ways(each, ["jaxdw"]) + torch_peers.ways(each, ["torch", "torch.channels_last"]):
        assert check.misfit(way.fetch(way.start(check.arrays)())) == "", way.name


@pytest.fixture(scope="module")
def network():
    each = models.model_problem("inference, batch 1", 64, 0, width=0.35, classes=10)
    return each, *each.checks()


def in_bfloat16(array):
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32) if array.dtype == np.float32 else array


def with_another_epsilon(name, array):
    return array + np.float32(1e-3 - 1e-5) if name.endswith("running_var") else array


def test_a_network_passes_its_own_check_in_float64(network):
    each, check = network
    assert check.misfit(torch_peers.truth(each.weights, 0.35, check.arrays)) == ""


@pytest.mark.parametrize("mistake", ["shifted", "bfloat16", "epsilon"])
def test_a_network_with_a_mistake_is_found_out(mistake, network):
    each, check = network
    arrays, weights = check.arrays, each.weights
    if mistake == "shifted":  # as "SAME" pads at stride 2: all zeros on the far side
        arrays = {"images": np.roll(arrays["images"], 1, axis=(1, 2))}
    elif mistake == "bfloat16":
        weights = {name: in_bfloat16(array) for name, array in weights.items()}
    else:
        weights = {name: with_another_epsilon(name, array) for name, array in weights.items()}
    found = check.misfit(torch_peers.truth(weights, 0.35, arrays))
    assert "from PyTorch's in float64; weights rounded to TF32 move it" in found


def test_tuning_compares_the_methods_and_says_which_auto_takes():
    """All methods except kernels of another processor, which a CPU interprets, and Fourier transforms."""
    report = measured(suites=("layers", "gradients"), tune=True)
    for record in report.suites:
        (row,) = record.rows
        assert [way.name for way in row.ways] == [m for m in METHODS if m not in ("pallas", "fft")]
        assert row.auto in METHODS
        assert "interprets its kernels" in record.skipped["pallas"] and "not exact" in record.skipped["fft"]
        assert all(way.median for way in row.ways), row.ways
    assert report.copies == [] and "auto's time over the fastest time" in printed(report)
    assert "pallas was left out: a CPU interprets its kernels" in " ".join(printed(report).split())
    with pytest.raises(ValueError, match="`--svg` has nothing to draw"):
        pictures.to_svg(report)


def test_scaling_fits_an_exponent_to_each_quantity(monkeypatch):
    monkeypatch.setattr(scaling, "SCALES", {"batch": (1, 4, 16), "kernel": (1, 3)})
    report = measured(suites=("scaling",), layers=("6x6x4:3:1",))
    works = [(quantity, work) for quantity in ("batch", "taps") for work in ("forward", "gradients")]
    assert [(scale.quantity, scale.work) for scale in report.scaling] == works
    assert [point.value for point in report.scaling[-1].points] == [1, 9]
    batch = report.scaling[0]
    assert [point.batch for point in batch.points] == [1, 4, 16] and math.isfinite(batch.time_exponent)
    assert [point.output_bytes for point in batch.points] == [4 * 6 * 6 * 4 * n for n in (1, 4, 16)]
    assert "1-16" in printed(report)
    assert "gradients, batch 16" in pictures.to_svg(report)


def row(name, **medians) -> RowRecord:
    ways = [WayRecord.of(way, [ms], 0.1) for way, ms in medians.items()]
    return RowRecord(name=name, networks=(), batch=8, nbytes=1 << 20, flops=None, ways=ways)


def test_the_means_are_those_of_known_ratios():
    rows = [
        row("a", jaxdw=1.0, torch=2.0, **{"torch.channels_last": 4.0, "lax.grouped": 10.0}),
        row("b", jaxdw=3.0, torch=6.0, **{"torch.channels_last": 2.0}),
    ]
    found = {each.peer: each for each in SuiteRecord.of("layers", rows, {}, 1.0).summaries}
    assert found["torch"].geometric_mean == 0.5 and found["torch"].rows == 2
    assert found["lax.grouped"].geometric_mean == pytest.approx(0.1, rel=2**-50) and found["lax.grouped"].rows == 1
    best = found[BEST]
    assert (best.least, best.greatest, best.greatest_at) == (0.5, 1.5, "b")
    assert best.geometric_mean == pytest.approx(math.sqrt(0.75), rel=2**-50)


def test_a_wrong_result_is_reported_and_left_out_of_the_picture():
    rows = [row("7x7x4:3:1", jaxdw=1.0, torch=2.0)]
    rows[0].ways.append(WayRecord.of("torch.channels_last", [], wrong="y is wrong in 1 of 9 elements"))
    settings = BenchSettings(suites=("layers",))
    info = dict.fromkeys(["processor", "cores", "logical processors used", "torch", "torch threads"], "x")
    info |= dict.fromkeys(["jax", "jax platform", "jaxdw"], "x")
    report = BenchReport(
        environment=info,
        settings=settings,
        copies=[],
        suites=[SuiteRecord.of("layers", rows, {}, 1.0)],
        scaling=[],
        seconds=1.0,
    )
    assert report.wrong == ["layers, 7x7x4:3:1: torch.channels_last: y is wrong in 1 of 9 elements"]
    assert "torch.channels_last wrong, not timed: y is wrong in 1 of 9 elements" in " ".join(printed(report).split())
    xml.etree.ElementTree.fromstring(pictures.to_svg(report))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"suites": ("layers",), "layers": ("7x7x4:2:1",)}, "`--layers` is '7x7x4:2:1', expected height"),
        (
            {"suites": ("windows",), "peers": ("torch",)},
            "`--peers` is 'torch', expected default, all, or some of torch.u",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(settings, message):
    with pytest.raises(ValueError) as error:
        measured(**{"layers": (), **settings})
    assert message in str(error.value)
