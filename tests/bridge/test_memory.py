"""Memory: what cannot fit is refused before the work, and its lack is one line, whoever reports it."""

import dataclasses
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from bridge import Case, cli, implementation, memory, process, torch_models
from bridge._census.capture import capture
from bridge._implementations import ImplementationError
from bridge.model import graph_capture
from bridge.model.model_inputs import ModelInputs

CASE = Case(np.ones((1, 6, 6, 2), np.float32), np.ones((3, 3, 1, 2), np.float32), padding=1)

#: As NumPy, JAX, PyTorch, the C++ library and the loader of libraries say it.
LACKS = [
    np.linalg.LinAlgError("Unable to allocate 2.30 GiB for an array with shape (7,) and data type float64"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2466250752 bytes."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("std::bad_alloc"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    MemoryError(),
]


@pytest.mark.parametrize("error", LACKS, ids=str)
def test_a_lack_of_memory_is_recognized(error):
    line = memory.lack_of_memory(error)
    assert line.startswith("not enough memory: ") and "Use a smaller" in line and "\n" not in line
    assert memory.lack_of_memory(ImplementationError(f"a: {line}")) == f"a: {line}"  # said once


def test_other_errors_are_no_lack_of_memory():
    assert memory.lack_of_memory(RuntimeError("could not create a primitive")) == ""


def broken(error):
    """An implementation that raises it."""

    def compute(case, **knobs):
        raise error

    each = implementation("jax.taps")
    return dataclasses.replace(each, algorithm=dataclasses.replace(each.algorithm, compute=compute))


@pytest.mark.parametrize("error", [*LACKS[1:], KeyError("a"), AssertionError(), ZeroDivisionError("b")], ids=repr)
def test_whatever_a_framework_raises_has_the_name_of_the_implementation(error):
    with pytest.raises(ImplementationError, match=r"jax\.taps failed on input 1x6x6x2 and kernel 3x3x1x2: ") as caught:
        broken(error).run(CASE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torch.unfold_einsum", "jax.patches", "jax.unfold_matmul"])
def test_windows_that_cannot_fit_are_refused_before_they_are_made(name, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: memory.Free(100, "of 200 bytes"))
    implementation(name).run(CASE)  # what is small is not checked
    monkeypatch.setattr(memory, "CHECKED", 0)
    needed = (8 * 8 * 2 + 2 * CASE.x.size + 2 * 9 * CASE.x.size) * 4  # x padded, y twice, windows twice
    monkeypatch.setattr(memory, "free", lambda: memory.Free(needed, "of enough"))
    implementation(name).run(CASE)
    monkeypatch.setattr(memory, "free", lambda: memory.Free(needed - 1, "of too little"))
    with pytest.raises(ImplementationError, match=rf"{name} on input .* needs about .* are free \(of too little\)"):
        implementation(name).run(CASE)


def test_what_is_free_is_no_more_than_any_limit_says(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda which: (memory._LOADED + 12345, -1))
        assert min(limit.nbytes for limit in memory._own_limits()) <= 12345
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 850\ninactive_file 50\n")
    monkeypatch.setattr(memory, "_groups", lambda: [(tmp_path, "memory.max", "memory.current")])
    assert memory.free() == memory.Free(150, "of this container's memory")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free().limit != "of this container's memory"


@pytest.mark.parametrize("limit, message", [(5 << 20, "jax.patches on input 16x112x112x64"), (1 << 20, "ulimit -v")])
def test_under_a_limit_the_command_ends_with_one_line(limit, message):
    options = "--shape 16x112x112x64 --kernel-size 7x7 --padding 3 --implementations jax.patches,jax.grouped"
    command = f"ulimit -v {limit}; exec '{sys.executable}' -m bridge --quiet parity {options}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_fault_of_ours_is_one_line_and_no_verdict(monkeypatch, capsys):
    def fault(*arguments, **options):
        raise KeyError("planted\nfault")

    monkeypatch.setattr(cli.parity, "run_parity", fault)
    monkeypatch.setattr(process, "_named", set())  # another test may have named a module of the tests
    monkeypatch.setattr(sys, "argv", ["jaxdw", "parity"])
    with pytest.raises(SystemExit) as ended:
        cli.run()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "KeyError in test_memory.py" in error and error.count("\n") == 1


def test_networks_that_cannot_fit_are_refused_before_they_run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch_models, "CHECKED", 0)
    monkeypatch.setattr(memory, "CHECKED", 0)
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.ReLU())
    x = np.ones((2, 4, 9, 9), np.float32)
    result = 2 * 4 * 7 * 7 * 4
    for run, needed in (
        (lambda: capture(module, x, tmp_path), 2 * result),
        (lambda: graph_capture.graph(module, ModelInputs([x])), graph_capture._COPIES * 2 * result),
    ):
        monkeypatch.setattr(memory, "free", lambda needed=needed: memory.Free(needed, "of enough"))
        run()
        monkeypatch.setattr(memory, "free", lambda needed=needed: memory.Free(needed - 1, "of too little"))
        with pytest.raises(
            MemoryError, match=r"Sequential on \(2, 4, 9, 9\) needs about .* are free \(of too little\)"
        ):
            run()
