"""benchmarks/tpu.py on a few layers, whichever they are."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bridge.bench.suites import layers_of

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tpu.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jaxdw[tpu]'"
)
def test_auto_keeps_float32_and_copies_little(tmp_path, seed):
    layers = random.Random(seed).sample(list(map(str, layers_of("layers"))), 2)
    names = [part for layer in layers for part in ("--layer", layer)]
    done = run("--platform", "tpu:v5e", *names, "--out", str(tmp_path / "tpu.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tpu.json").read_text())["platforms"]["tpu:v5e"]
    assert list(rows) == layers
    for row in rows.values():
        auto = row["auto"]
        assert auto["narrowest"] == "f32" and auto["temporaries"] <= 1.2
        assert row["patches"]["optimal_seconds"] > auto["optimal_seconds"] and auto["estimated_cycles"] > 0


def test_what_cannot_be_is_refused():
    done = run("--platform", "tpu:v99")
    assert done.returncode == 2 and "tpu:v6e" in done.stderr
    done = run("--layer", "56x56")
    assert done.returncode == 2 and "`--layer` is '56x56', expected height" in done.stderr
