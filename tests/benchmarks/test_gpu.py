"""benchmarks/gpu.py as a dry run on the CPU. No test needs a GPU, and no test checks a time."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import gpu
from bridge.bench.reference import convolve, gradients
from bridge.bench.suites import DepthwiseLayer, layers_of
from bridge.case import DTYPES
from bridge.numerics import BFLOAT16, TF32, exact, round_to

ROOT = Path(__file__).parents[2]


def read(path):
    return gpu.GpuReport.model_validate_json(path.read_text())


def test_a_dry_run_fills_every_section_and_calls_itself_one(tmp_path, monkeypatch):
    """The file holds to its schema, nothing is wrong or failed, and what a CPU can have is there."""
    monkeypatch.setattr(gpu, "OURS", ("pallas",))  # fewer programs to compile
    monkeypatch.setattr(gpu, "METHODS", [method for method in gpu.METHODS if method[1] is None])
    path = tmp_path / "report.json"
    assert gpu.main(["--out", str(path)]) == 0
    report = read(path)
    assert json.loads(path.read_text())["schema"] == gpu.SCHEMA
    assert report.dry_run == "dry run on cpu" and report.quick
    assert [section.name for section in report.sections] == list(gpu.SECTIONS)
    assert not any(section.failed or section.left_out for section in report.sections)
    assert {"jax", "torch", "device"} <= set(report.machine)
    assert len(report.copies) == 2 and set(report.call_microseconds) == {"jax", "torch"}
    assert {(c.method, c.quantity) for c in report.correctness} == {
        (method, quantity) for method in ("pallas", "taps", "grouped", "patches") for quantity in ("y", "dx", "dkernel")
    }
    assert {c.within for c in report.correctness} == {"float32 sums, rounded once"}
    assert all(f.order is not None and not f.failed for f in report.fingerprints)
    assert {f.implementation: f.same_order for f in report.fingerprints}["torch.conv2d"]
    assert [suite.suite for suite in report.suites] == ["layers", "gradients"]
    for suite in report.suites:
        (row,) = suite.rows
        assert [way.name for way in row.ways] == ["pallas", "lax.grouped", "lax.grouped[highest]", *gpu.OF_TORCH]
        assert not any(way.wrong or way.failed for way in row.ways)
        assert set(row.fraction_of_copy) == {way.name for way in row.ways}
        assert "best torch" in [summary.peer for summary in suite.summaries["pallas"]]


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(run):
        run.report.machine["before"] = "the failure"
        raise MemoryError("out of memory\nand a second line")

    def late(run):
        return ["what is left"] if run.late else []

    monkeypatch.setattr(gpu, "SECTIONS", {"broken": (broken, 0.0), "late": (late, 0.0), "next": (late, 1.0)})
    path = tmp_path / "report.json"
    assert gpu.main(["--out", str(path)]) == 1
    report = read(path)
    assert [section.failed for section in report.sections] == ["MemoryError: out of memory", "", ""]
    assert [section.left_out for section in report.sections] == [[], ["what is left"], []]
    assert report.machine["before"] == "the failure"


def test_a_run_that_is_cut_off_keeps_its_sections(tmp_path, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "SECTIONS", {"machine": gpu.SECTIONS["machine"], "interrupted": (interrupted, 1.0)})
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--out", str(path)])
    assert [section.name for section in read(path).sections] == ["machine"]


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--out", ROOT / "benchmarks/results/cpu.json", "dry run on cpu is no result"),
        ("--out", ROOT / "nowhere/report.json", "there is no folder"),
        ("--budget", "nan", "expected 1 or more"),
        ("--batch", 0, "expected 1 or more"),
    ],
)
def test_bad_input_is_reported_before_the_work(option, value, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SECTIONS", {"never": (lambda _: pytest.fail("it worked first"), 1.0)})
    with pytest.raises(SystemExit) as end:
        gpu.main([option, str(value)])
    assert end.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"`{option}` is {value}" in error and message in error


def test_a_program_that_does_not_compile_costs_its_own_way_alone():
    def broken(x):
        raise TypeError("no such thing")

    programs = gpu.compiled({"good": (jnp.sin, jnp.ones(3)), "bad": (broken, jnp.ones(3))})
    assert programs["good"](jnp.ones(3)).shape == (3,)
    assert isinstance(programs["bad"], TypeError)
    (record,) = gpu._judged(programs["bad"], [], {}, {"geometry": "", "dtype": "", "method": "bad"})
    assert record.failed == "TypeError: no such thing"


@pytest.mark.parametrize("of", ["float32", "bfloat16", "float16"])
def test_rounded_inputs_are_distinguished_from_rounded_sums(of):
    """A result is judged by the first arithmetic that explains it, and a wrong one by none."""
    dtype = DTYPES[of]
    case, _ = gpu._case((1, 8, 8, 64), (3, 3, 1, 64), {"padding": 1}, dtype)
    total = exact(case)
    judge = gpu._judge(total)
    assert judge(total.value)["within"] == "float32 sums, rounded once" and not judge(total.value)["misrounded"]
    if of == "float32":
        for fmt, name in ((TF32, "inputs cut to TF32"), (BFLOAT16, "inputs rounded to bfloat16")):
            x, kernel = (round_to(a.astype(np.float64), fmt).astype(dtype) for a in (case.x, case.kernel))
            assert judge(exact(case.replace(x=x, kernel=kernel)).value)["within"] == name
    wrong = total.value.copy()
    wrong[0, 3, 3, 5] += dtype.type(8)
    assert judge(wrong)["within"] == "" and judge(wrong)["misrounded"] == 1


@pytest.mark.parametrize("layer", ["7x7x96:11:1", "9x8x5:3:2"])
def test_the_whole_numbers_of_all_frameworks_are_the_same_and_their_sums_exact(layer):
    layer, batch = DepthwiseLayer.parse(layer), 3
    arrays = {
        xp.__name__: gpu._whole(xp, "gradients", layer, batch, xp.arange(batch, dtype=xp.int32), 1)
        for xp in (np, jnp, torch)
    }
    for name in ("x", "w", "dy"):
        for of in ("jax.numpy", "torch"):
            np.testing.assert_array_equal(np.asarray(arrays[of][name]), arrays["numpy"][name])
    wide = {name: array.astype(np.float64) for name, array in arrays["numpy"].items()}
    sums = convolve(np.abs(wide["x"]), np.abs(wide["w"]), layer), *gradients(*map(np.abs, wide.values()), layer)
    assert max(total.max() for total in sums) < 2**24


def test_the_greatest_sums_of_every_layer_are_exact():
    """x is at most 4095, w 3, dy 2; and dy is not zero at `POSITIONS` positions at most."""
    taps = max(layer.kernel**2 for layer in layers_of("layers"))
    assert max(4095 * 3 * taps, 2 * 3 * taps, 4095 * 2 * gpu.POSITIONS) < 2**24
    for layer in layers_of("layers"):
        height, width = layer.geometry(1).output_spatial
        every = math.ceil(2 * height * width / gpu.POSITIONS)
        assert 2 * math.ceil(height * width / every) <= gpu.POSITIONS


def test_a_way_that_is_off_in_one_place_is_found():
    layer, batch = DepthwiseLayer.parse("6x5x4:3:1"), 4
    run = gpu.Run(gpu.GpuReport(dry_run="", quick=True, batch=batch, budget_seconds=1.0), Path("unused"), None)

    def broken(x, w):
        y = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        )
        return (y.at[batch - 1, 5, 4, 3].add(1.0),)

    inputs = gpu.compiled({"inputs": gpu._jobs("layers", layer, batch)["inputs"]})
    row = gpu._times_of(run, "layers", layer, (), {"broken": jax.jit(broken), **inputs})
    assert "y is wrong in 1 of" in row.ways[0].wrong and row.ways[0].median is not None


def test_every_field_of_the_report_is_documented():
    text = (ROOT / "docs/accelerators.md").read_text()
    names = [field.alias or name for name, field in gpu.GpuReport.model_fields.items()]
    assert [name for name in names if f"`{name}`" not in text] == [] and f'"{gpu.SCHEMA}"' in text
