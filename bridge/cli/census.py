"""`jaxdw census`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from bridge._implementations import implementation
from bridge.cli.options import FailOnOption, HtmlOption
from bridge.cli.output import check_outputs, command_line, console, summarise
from bridge.cli.parse import parse_names
from bridge.environment import environment
from bridge.files import write_atomically
from bridge.progress import track


def census(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="timm:NAME, torchvision:NAME, transformers:FOLDER, or package.module:factory, which returns a module "
            "or a module and its inputs. NAME may be a pattern: 'timm:efficientnet*'.",
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint for the one model named. Default: random weights.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights, which the library may download.")
    ] = False,
    size: Annotated[
        int | None,
        typer.Option(help="Height and width of the image. Default: 224, or the size that the model requires.", min=1),
    ] = None,
    batch: Annotated[int, typer.Option(help="Inputs at once.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of random weights and inputs.", min=0)] = 0,
    implementations: Annotated[
        list[str] | None,
        typer.Option(
            help="Implementations to compare, separated by commas; the first is the reference. Default: conv2d, lax's, "
            "jax.taps."
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Reveal and replay accumulation orders, to prove EXPLAINED; slow.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Results as JSON, one line per model; models in this file are not run again.")
    ] = None,
    html: HtmlOption = None,
    fail_on: FailOnOption = None,
) -> None:
    """Run PyTorch models, and give each depthwise layer its verdict on the input that it received.

    Exit codes are those of `parity` for the weakest verdict.

    2 also means that a model could not be run, and 4 that no model has a depthwise layer.
    """
    from bridge._census.census import DEFAULT
    from bridge._census.record import CensusSettings, append_record, finished, read_records
    from bridge._census.survey import exit_code, survey
    from bridge._census.zoo import expand
    from bridge.report.census import census_html, print_census, summary

    check_outputs("jaxdw.census", out=out, html=html)
    chosen = [implementation(name).name for name in parse_names(implementations) or DEFAULT]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"`--implementations` is {chosen}, expected at least two, each once")
    names = expand(models)
    if weights is not None and (len(names) > 1 or pretrained):
        raise ValueError(f"`--weights` is {weights}, expected one model and not --pretrained: got {', '.join(names)}")
    settings = CensusSettings(
        size=size,
        batch=batch,
        seed=seed,
        pretrained=pretrained,
        weights=None if weights is None else f"{weights}, changed {weights.stat().st_mtime_ns}",
        implementations=tuple(chosen),
        explain=explain,
    )
    done = {} if out is None else finished(read_records(out), settings, environment())
    records = []
    for number, name in enumerate(names, start=1):
        shown = f"model {number} of {len(names)}, {name}, layer"
        record = done.get(name) or survey(name, settings, weights, functools.partial(track, description=shown))
        if out is not None and name not in done:
            append_record(out, record)
        records.append(record)
    print_census(records, chosen, console())
    summarise(summary(records))
    if html is not None:
        write_atomically(html, census_html(records, chosen, command=command_line()))
    raise typer.Exit(exit_code(records, fail_on))
