"""`jaxdw invariance`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge._invariance.conditions import KINDS
from bridge.cli.cases import CaseOptions, allow_depth
from bridge.cli.options import JsonOption
from bridge.cli.output import check_outputs, console, summarise
from bridge.cli.parse import parse_names, parse_sizes
from bridge.files import write_atomically


def invariance(
    implementations: Annotated[
        list[str] | None,
        typer.Argument(
            help="As `jaxdw doctor` lists them, or your own package.module:function. Default: those of `jaxdw parity`."
        ),
    ] = None,
    *,
    given: CaseOptions,
    conditions: Annotated[
        list[str] | None,
        typer.Option(help=f"Kinds of conditions, separated by commas: {', '.join(KINDS)}. Default: all."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "2,3,8",
    explain: Annotated[
        bool | None,
        typer.Option(
            "--explain/--no-explain",
            help="Reveal the accumulation order before and after each change. Default: if the output is small.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = None,
    fail_on_change: Annotated[
        bool, typer.Option("--fail-on-change", help="Exit 1 if bits change, 4 if a cell could not be computed.")
    ] = False,
) -> None:
    """Show with which conditions the result of one sample changes: batch, position, threads, layout, instruction set,
    jit, torch.compile, sharding.

    Without arguments: on the first sample of the question's own case. Takes about half a minute. Exit code 0, unless
    --fail-on-change is given; 2: unusable arguments, or an implementation fails on the sample alone.
    """
    from bridge._invariance.table import invariance as run_invariance
    from bridge.report.invariance import print_invariance, summary

    check_outputs("jaxdw.invariance", json=json)
    case = given.case()
    allow_depth(case.geometry.taps)
    table = run_invariance(
        case,
        parse_names(implementations) or None,
        conditions=None if conditions is None else parse_names(conditions),
        batches=parse_sizes("--batches", batches),
        explain=explain,
    )
    print_invariance(table, console())
    summarise(summary(table))
    if json is not None:
        write_atomically(json, table.to_json())
    raise typer.Exit(table.exit_code if fail_on_change else 0)
