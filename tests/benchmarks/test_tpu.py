"""benchmarks/tpu.py on a few layers, whichever they are."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tpu
from bridge.bench.suites import layers_of

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jaxdw[tpu]'"
)
def test_auto_keeps_float32_and_copies_little(tmp_path, seed):
    layers = random.Random(seed).sample(list(map(str, layers_of("layers"))), 1)
    names = [part for layer in layers for part in ("--layer", layer)]
    path = tmp_path / "tpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "tpu.py", "--platform", "tpu:v5e", *names, "--out", path]
    variables = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["platforms"]["tpu:v5e"]
    assert list(rows) == layers
    for row in rows.values():
        auto = row["auto"]
        assert auto["narrowest"] == "f32" and auto["temporaries"] <= 1.2
        assert row["patches"]["optimal_seconds"] > auto["optimal_seconds"] and auto["estimated_cycles"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [(["--platform", "tpu:v99"], "tpu:v6e"), (["--layer", "56x56"], "`--layer` is '56x56', expected height")],
)
def test_unusable_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        tpu.parsed(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
