"""`jaxdw bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.options import JsonOption
from bridge.cli.output import check_outputs, console, level, summarise
from bridge.cli.parse import parse_names
from bridge.files import write_atomically


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="layers, gradients, windows, blocks, convnext, models, transposed, causal, large, or all of these; or "
            "scaling: how cost grows. Separated by commas. Default: layers."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Each round runs every way once; slow ways run in fewer.", min=1)] = 15,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these rows, separated by commas: a part of a row's or of a network's name, as 56x56 or "
            "MobileNetV2; or a layer of your own, height x width x channels:kernel:stride, as 56x56x144:3:2."
        ),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="default, all, or names separated by commas, as torch,torch.channels_last,lax.grouped."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Logical processors to use (Linux). Default: all.", min=1)] = None,
    size: Annotated[int, typer.Option(help="Height and width of the images of the suite models.", min=64)] = 224,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone",
            help="Time each way as in a loop of its own: PyTorch's idle threads spin as they do by default, and each "
            "timed call follows a pause and two untimed calls.",
        ),
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Compare jaxdw's own methods, and the choice of `auto`, instead of peers.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of data and order.", min=0)] = 0,
    json: JsonOption = None,
    svg: Annotated[Path | None, typer.Option(help="Draw times against copies, or growth of cost.")] = None,
    from_json: Annotated[
        Path | None, typer.Option(help="Show and draw what --json wrote before; nothing is measured.")
    ] = None,
) -> None:
    """Time jaxdw against PyTorch, lax and Flax on the layers of known networks.

    Results are checked first. Exit codes: 1 a result was wrong, and not timed; 2 unusable arguments or files.
    """
    from bridge.bench.pictures import to_svg
    from bridge.bench.process import check_threads, measured, read_report
    from bridge.bench.run import check
    from bridge.bench.schema import BenchSettings
    from bridge.bench.suites import ALL
    from bridge.bench.terminal import print_report

    check_outputs("jaxdw.bench", json=json, svg=svg)
    if json is not None and from_json is not None:
        raise ValueError(f"`--json` is {json}, expected no `--from-json`, which measures nothing")
    if from_json is not None:
        report = read_report(from_json)
    else:
        named = parse_names(suite) or ["layers"]
        settings = BenchSettings(
            suites=tuple(dict.fromkeys(name for each in named for name in (ALL if each == "all" else (each,)))),
            batch=batch,
            rounds=rounds,
            layers=tuple(parse_names(layers)),
            peers=tuple(parse_names(peers)) or ("default",),
            threads=threads,
            size=size,
            alone=alone,
            tune=tune,
            seed=seed,
        )
        check(settings)
        check_threads(threads)
        found = measured(settings, level())
        if isinstance(found, int):
            raise typer.Exit(found)
        report = found
    try:
        print_report(report, console())
        picture = to_svg(report) if svg is not None else ""
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError) as error:
        if from_json is None:
            raise
        raise ValueError(f"`--from-json` is {from_json}, whose figures do not fit together: {error!r}") from error
    summarise(f"{len(report.wrong)} results were wrong" if report.wrong else "every result that was timed was right")
    if json is not None:
        write_atomically(json, report.to_json())
    if svg is not None:
        write_atomically(svg, picture)
    raise typer.Exit(1 if report.wrong else 0)
