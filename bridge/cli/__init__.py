"""The command `jaxdw`: one file per command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from bridge.cli import audit, bench, census, conformance, convert, doctor, invariance, model, parity, replay, reveal
from bridge.cli.options import take_groups
from bridge.cli.output import level
from bridge.console import complain, users_place
from bridge.environment import environment
from bridge.progress import Level, Progress, log
from bridge.requirements import versions

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

for command in (
    parity.parity,
    reveal.reveal,
    replay.replay,
    invariance.invariance,
    conformance.conformance,
    convert.convert,
    census.census,
    model.model,
    bench.bench,
    audit.audit,
    doctor.doctor,
):
    app.command()(take_groups(command))


def run() -> None:
    """Run the command line; a failure is one line and exit code 2, not a traceback with the exit code of BUG."""
    os.environ["PYTHONSAFEPATH"] = "1"  # a process that PyTorch or JAX starts imports nothing from the current folder
    anywhere = [word for word in sys.argv[1:] if word in ("--quiet", "--verbose", "-q", "-v")]
    words = [*anywhere, *(word for word in sys.argv[1:] if word not in anywhere)]
    try:
        code = app(words, standalone_mode=False)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and users_place(error) is None:  # of the command line's own parser
            raise
        code = complain(error, verbose=level() is Level.VERBOSE)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(versions())
        raise typer.Exit()


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only the verdict, in one line, and errors; no progress.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Also print the versions, each step with its time, every pair's figures, and tracebacks of errors.",
        ),
    ] = False,
) -> None:
    """Compare depthwise convolution in PyTorch and JAX, and prove what the difference is."""
    if quiet and verbose:
        raise ValueError("`--quiet` and `--verbose` are both given, expected one of them")
    context.with_resource(Progress(Level.QUIET if quiet else Level.VERBOSE if verbose else Level.NORMAL))
    if verbose:
        for name, value in environment().items():
            log.info("%s: %s", name, value)
