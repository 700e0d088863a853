"""Output of the commands: reports on standard output, one line with --quiet, and files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge._implementations import implementation
from bridge.console import Console, printable
from bridge.diagnosis import Diagnosis, Verdict
from bridge.files import check_writable
from bridge.progress import Level, Progress
from bridge.report import print_diagnosis
from bridge.testing import explanation


def level() -> Level:
    """Return the level that --quiet and --verbose set."""
    return Progress.current.verbosity if Progress.current is not None else Level.NORMAL


def console() -> Console:
    """Return the console for reports: standard output, or with --quiet nothing."""
    if Progress.current is not None:
        Progress.current.pause()
    return Console(quiet=level() is Level.QUIET)


def summarise(line: str) -> None:
    """Print the one line that --quiet leaves of a report."""
    if level() is Level.QUIET:
        print(printable(line))


def show(diagnosis: Diagnosis, compiler: Sequence[str]) -> None:
    """Print a diagnosis, with --verbose each pair's figures, and what is wrong with JAX's compiler."""
    print_diagnosis(diagnosis, console(), compiler, verbose=level() is Level.VERBOSE)
    if level() is Level.VERBOSE:
        differing = (each for each in diagnosis.comparisons if each.verdict is not Verdict.IDENTICAL)
        console().print(
            *(explanation(each, diagnosis.case) for each in differing), sep="\n", markup=False, soft_wrap=True
        )
    summarise(f"Verdict: {diagnosis.verdict}: {diagnosis.verdict.meaning}")


def compiler_faults(names: Sequence[str]) -> list[str]:
    """Return what is wrong with JAX's compiler, where one of these implementations may have run through it."""
    from bridge import compiler_probes

    if not any(map(_may_be_jax, names)):
        return []
    return compiler_probes.sentences(compiler_probes.quick_findings())


def _may_be_jax(name: str) -> bool:
    try:
        return implementation(name).framework == "jax"
    except ValueError:  # of another machine, or handed over as an object
        return True


def check_outputs(schema: str, **paths: Path | None) -> None:
    """Refuse, before the work, files that could not be written after it.

    Args:
      schema: what the files will hold.
      **paths: by the name of their option.
    """
    given = {f"--{option}": path for option, path in paths.items() if path is not None}
    for path in given.values():
        check_writable(path, schema)
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ValueError(f"`{'` and `'.join(given)}` are both {next(iter(given.values()))}, expected two files")


def command_line() -> str:
    """Return the shell command that repeats this one."""
    return shlex.join(["jaxdw", *sys.argv[1:]])


def exit_code(verdict: Verdict, fail_on: Verdict | None) -> int:
    """Return the exit code of a verdict: 1, and not 0, where it is as weak as `fail_on`."""
    return verdict.exit_code or int(fail_on is not None and verdict.rank() >= fail_on.rank())
