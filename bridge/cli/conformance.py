"""`jaxdw conformance`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.cli.options import JsonOption
from bridge.cli.output import check_outputs, console, summarise
from bridge.cli.parse import parse_names
from bridge.files import write_atomically


def conformance(
    function: Annotated[
        str, typer.Argument(metavar="MODULE:FUNCTION", help="Your own kernel, or the class of a layer.")
    ],
    kind: Annotated[str, typer.Option(help="What it computes: depthwise, causal or transpose.")] = "depthwise",
    checks: Annotated[list[str] | None, typer.Option(help="Some checks, separated by commas. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeat a run: the seed that it printed.", min=0)] = None,
    full: Annotated[bool, typer.Option("--full", help="The full counts, not a sample.")] = False,
    accumulator: Annotated[
        str, typer.Option(help="Format of the sums of half precision: float32, or same as the input.")
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Where PyTorch or JAX runs it, as cuda. Default: the CPU of PyTorch.")
    ] = "",
    jit: Annotated[bool, typer.Option("--jit/--no-jit", help="Compile a function of JAX arrays.")] = True,
    json: JsonOption = None,
) -> None:
    """Test a depthwise kernel of your own against exact results: geometry, edge sizes, dtypes, NaN, gradients, streams,
    races and memory.

    Exit code 0: no check failed; 1: one failed; 3: one failed by a lower precision, and none otherwise; 4: no check
    could be done; 2: unusable arguments, or the function computes no such convolution.
    """
    from bridge._conformance.conformance import conformance as run_conformance
    from bridge.report.conformance import print_conformance, summary

    check_outputs("jaxdw.conformance", json=json)
    result = run_conformance(
        function,
        kind,
        checks=parse_names(checks) or None,
        seed=seed,
        full=full,
        accumulator=accumulator,
        device=device,
        jit=jit,
    )
    print_conformance(result, console())
    summarise(f"{summary(result)} (seed {result.seed})")
    if json is not None:
        write_atomically(json, result.to_json())
    raise typer.Exit(result.verdict.exit_code)
