"""`jaxdw replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.output import compiler_faults, console, show
from bridge.report.bundle import replay_bundle


def replay(
    folder: Annotated[Path, typer.Argument(help="The folder that `jaxdw parity --bundle` saved.", metavar="DIR")],
    import_functions: Annotated[
        bool,
        typer.Option("--import-functions", help="Import functions that the folder names: do so only if you trust it."),
    ] = False,
) -> None:
    """Repeat a saved diagnosis here, and say what changed. Exit codes are those of `parity`."""
    diagnosis, changes = replay_bundle(folder, import_functions=import_functions)
    show(diagnosis, compiler_faults(diagnosis.names))
    console().print("Changed since it was saved:" if changes else "Nothing changed since it was saved.", style="bold")
    for change in changes:
        console().print(f"  {change}", highlight=False, markup=False)
    raise typer.Exit(diagnosis.verdict.exit_code)
