"""A run in a process of its own: the settings that keep one framework from slowing the other are read at its start.

PyTorch's idle OpenMP threads spin for some milliseconds after each call, to be ready for another. So they take the
processor from the next way. `OMP_WAIT_POLICY=passive` lets them sleep; it must be set before torch is imported. A
policy that the caller has set is kept. If ways are timed alone, PyTorch's default policy is kept. The number of
processors is set at the start, too.

The C library gives memory back to the system when much of it is free, and takes it anew in a later call. The system
zeroes each such page, which can take twice as long as a layer. Which way pays depends on what the others freed before.
So the library keeps blocks below 32 MiB, as it would in a loop of one way, unless the caller has set `GLIBC_TUNABLES`.
It still takes larger blocks from the system in each call, as it does by default.

The process reads settings.json in a folder, and writes report.json there.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

import pydantic
import rich.progress

from bridge.bench.schema import BenchReport, BenchSettings
from bridge.console import Console, complain
from bridge.files import read_regular
from bridge.process import run_module
from bridge.progress import Level, Progress, track
from bridge.records import first_problem

#: The settings of glibc by which it keeps 4 GiB of freed memory, in blocks below 32 MiB: its own limit grows to that.
KEEPS_MEMORY = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"

#: Seconds after which a run is ended: one day.
TIME_LIMIT = 86_400.0


def measured(settings: BenchSettings, level: Level = Level.NORMAL) -> BenchReport | int:
    """Run in a process of its own; return the report, or the exit code if the process failed with a message.

    Raises:
      OSError: the process was ended from outside, or took longer than `TIME_LIMIT`.
    """
    # the peers run on the processor, so jaxdw must too
    added = {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", KEEPS_MEMORY),
    }
    if not settings.alone:
        added["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "settings.json").write_text(settings.model_dump_json())
        done = run_module(__name__, folder, level.name, time_limit=TIME_LIMIT, environment=added, capture=False)
        report = Path(folder, "report.json")
        if done.returncode < 0:
            number = -done.returncode
            raise OSError(
                f"the process that measures was ended by signal {number}"
                + ", perhaps for lack of memory" * (number in (6, 9))
            )
        if done.returncode:
            return done.returncode
        return BenchReport.model_validate_json(report.read_text())


def read_report(path: Path) -> BenchReport:
    """Read a report that `jaxdw bench --json` wrote.

    Raises:
      ValueError: the file holds something else.
      OSError: it cannot be read.
    """
    try:
        return BenchReport.model_validate_json(read_regular(path))
    except pydantic.ValidationError as error:
        problem = first_problem(error)
        raise ValueError(f"`--from-json` is {path}, expected a report that --json wrote: {problem}") from None


def check_threads(threads: int | None) -> None:
    """Raise ValueError if so many logical processors are not available."""
    if threads is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"`--threads` is {threads}, which only Linux can limit: leave it out")
    available = len(os.sched_getaffinity(0))
    if not 1 <= threads <= available:
        raise ValueError(f"`--threads` is {threads}, expected 1 to {available}, the logical processors available")


def _main(folder: Path, level: Level) -> None:
    settings = BenchSettings.model_validate_json((folder / "settings.json").read_text())
    if settings.threads is not None:  # before a framework starts its threads, which inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    from bridge.bench.run import run
    from bridge.bench.torch_peers import set_threads

    if settings.threads is not None:
        set_threads(settings.threads)
    # no thread for an automatic refresh: it would run during the measurements
    console = Console(stderr=True)
    bar = functools.partial(rich.progress.track, console=console, transient=True, auto_refresh=False)
    show = bar if console.is_terminal and level is Level.NORMAL else track
    with Progress(level, threaded=False):
        report = run(settings, lambda rows, suite: show(rows, description=suite))
    (folder / "report.json").write_text(report.to_json())


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), Level[sys.argv[2]])
    except Exception as error:
        sys.exit(complain(error, verbose=sys.argv[2] == Level.VERBOSE.name))
    except KeyboardInterrupt:  # the command was interrupted as well, and says so
        sys.exit(130)
