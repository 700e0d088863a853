"""Run a case in a process of its own, for settings that a process reads once, such as XLA's flags.

The case goes there as arrays and JSON in a temporary folder, and the result comes back the same way; nothing is
pickled.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bridge._implementations.registry import implementation
from bridge.case import DTYPES, Case, options
from bridge.errors import ImplementationError
from bridge.memory import lack_of_memory
from bridge.process import last_line, run_module

#: Seconds after which the process is ended.
TIME_LIMIT = 120.0


def run(name: str, case: Case, *, environment: Mapping[str, str]) -> np.ndarray:
    """Return the output of the implementation of that name, with environment variables added.

    Raises:
      ImplementationError: the process failed or took longer than `TIME_LIMIT`; the message says which, and names a
        flag that XLA does not know.
    """
    with tempfile.TemporaryDirectory() as folder:
        _start(Path(folder), name, case, 0, environment)
        return np.load(Path(folder) / "y.npy", allow_pickle=False).view(case.dtype)


def seconds(name: str, case: Case, repetitions: int, *, environment: Mapping[str, str]) -> list[float]:
    """Return the seconds of each repetition there, after one that is not counted. Raises as `run`."""
    with tempfile.TemporaryDirectory() as folder:
        _start(Path(folder), name, case, repetitions, environment)
        return json.loads((Path(folder) / "seconds.json").read_text())


def _start(folder: Path, name: str, case: Case, repetitions: int, environment: Mapping[str, str]) -> None:
    save_case(folder, case)
    job = {"implementation": name, "repetitions": repetitions}
    (folder / "job.json").write_text(json.dumps(job))
    words = " ".join(f"{key}={value}" for key, value in environment.items())
    try:
        done = run_module(__name__, str(folder), time_limit=TIME_LIMIT, environment=environment)
    except TimeoutError:
        raise ImplementationError(
            f"{name} with {words} took longer than {TIME_LIMIT:g} s in a process of its own"
        ) from None
    if done.returncode:
        raise ImplementationError(f"{name} with {words} failed in a process of its own: {_reason(done.stderr)}")


def _reason(stderr: str) -> str:
    """Return the line that gives the reason: XLA's answer to a flag that it does not know or read is a page long."""
    unknown = re.search(r"Unknown flags? in XLA_FLAGS: (?P<flags>.*)", stderr)
    if unknown:
        return f"this XLA does not know the flag {unknown['flags'].strip()}"
    refused = re.search(r"(Couldn't interpret value.*)", stderr)
    if refused:
        return refused[1].strip()
    lack = next(filter(None, map(lack_of_memory, reversed(stderr.splitlines()))), "")
    return lack or last_line(stderr)


def save_case(folder: Path, case: Case) -> None:
    """Write a case into a folder, for `load_case` in another process."""
    given = {"x": case.x, "kernel": case.kernel} | ({} if case.bias is None else {"bias": case.bias})
    np.savez(folder / "case.npz", **{label: stored(array) for label, array in given.items()})  # type: ignore[arg-type]
    (folder / "case.json").write_text(json.dumps({"dtype": case.dtype.name, "options": options(case.geometry)}))


def load_case(folder: Path) -> Case:
    """Return the case that `save_case` wrote."""
    record = json.loads((folder / "case.json").read_text())
    with np.load(folder / "case.npz", allow_pickle=False) as arrays:
        data = {label: arrays[label].view(DTYPES[record["dtype"]]) for label in arrays}
    return Case(**data, **record["options"])


def stored(array: np.ndarray) -> np.ndarray:
    """Return the bits of a bfloat16 array, whose dtype .npy does not name; others as they are."""
    return array.view(np.uint16) if array.dtype == DTYPES["bfloat16"] else array


def _main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    case = load_case(folder)
    each = implementation(job["implementation"])
    if job["repetitions"]:
        times = each.seconds(case, 1 + job["repetitions"])[1:]
        (folder / "seconds.json").write_text(json.dumps(times))
    else:
        np.save(folder / "y.npy", stored(each.run(case)), allow_pickle=False)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
