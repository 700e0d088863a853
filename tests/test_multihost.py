"""examples/multihost.py: two processes have the bits of one, and none waits without end for another."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "examples" / "multihost.py")]
LONG = 10**9


@pytest.fixture
def start():
    """Return a function that starts the program with arguments; end the processes after the test."""
    started = []

    def start(*arguments, **environment):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        process = subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**inherited, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def loopback():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def lines_until(process, text):
    """Return the lines that the process prints, up to the first with the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"it ended without {text!r}: {lines}, {process.stderr.read()}")


def test_two_processes_have_the_bits_of_one(start):
    process = start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said = [line for line in out.splitlines() if line.startswith("process")]
    for number in range(2):
        assert f"process {number} of 2: 2 devices, 1 of them here" in said
        assert f"process {number} of 2: the bits of one device" in said


def test_the_environment_stands_for_the_flags(start):
    address = loopback()
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address, "JAX_NUM_PROCESSES": "1"}
    process = start(JAX_PROCESS_ID="0", **shared)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "process 0 of 1: the bits of one device" in out


@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_dies_leaves_the_other_with_a_message(dead, start):
    address = loopback()
    processes = [
        start("--coordinator", address, "--processes", 2, "--process", number, "--rounds", LONG) for number in range(2)
    ]
    for process in processes:
        lines_until(process, "convolved")
    processes[dead].kill()
    _, err = processes[1 - dead].communicate(timeout=120)
    assert processes[1 - dead].returncode == 4, err
    assert f"process {1 - dead} of 2: stopped, because another process no longer answers: " in err


def test_a_process_that_falls_silent_leaves_the_other_with_a_message(start):
    address = loopback()
    waiting, silent = (
        start("--coordinator", address, "--processes", 2, "--process", number, "--rounds", LONG, "--time-limit", limit)
        for number, limit in ((0, 8), (1, 60))
    )
    for process in (waiting, silent):
        lines_until(process, "convolved")
    os.kill(silent.pid, signal.SIGSTOP)  # alive, and answers nothing
    _, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 3, err
    assert "process 0 of 2: no answer within 8 s (--time-limit); another process may have died" in err


def test_a_process_that_never_comes_is_not_waited_for_longer_than_the_limit(start):
    process = start("--coordinator", loopback(), "--processes", 2, "--process", 1, "--time-limit", 2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "process 1 of 2: the other processes did not all connect within 2 s (--time-limit); are they running?" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--processes", "2"], "expected --coordinator, --processes and --process together"),
        (["--coordinator", "host:1", "--processes", "2", "--process", "2"], "--process is 2, expected one of 0 to 1"),
        (["--coordinator", "host:1", "--processes", "two", "--process", "0"], "invalid int value: 'two'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message, start):
    process = start(*arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in err
