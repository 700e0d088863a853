"""`jaxdw convert`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.output import console, summarise
from bridge.progress import log, track
from bridge.weights.checkpoint import Format, convert_checkpoint
from bridge.weights.manifest import manifest_path


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help=".safetensors, .pt, .pth or .bin, an index of shards, a Hugging Face or an Orbax folder.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="The file to write, or with --to orbax the folder.")
    ],
    to: Annotated[
        Format,
        typer.Option(help="Whose names and layouts: flax or torch, as .safetensors; or orbax, Flax's as a folder."),
    ] = Format.FLAX,
    model: Annotated[
        str,
        typer.Option(help="As mobilenet_v2 or timm.mobilenet_v2. Default: the model that has all names of SOURCE."),
    ] = "",
    like: Annotated[
        str,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION",
            help="A function that returns the Flax model that takes the weights, or what `jaxdw model` takes.",
        ),
    ] = "",
    width: Annotated[float, typer.Option(help="Width multiplier of the model.")] = 1.0,
    part: Annotated[str, typer.Option(help="The entry of a training checkpoint to take, as state_dict_ema.")] = "",
    prefix: Annotated[str, typer.Option(help="Take only names that start with this prefix, and remove it.")] = "",
    merge: Annotated[
        bool, typer.Option("--merge", help="Multiply out weight normalization, spectral normalization and pruning.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite DESTINATION.")] = False,
) -> None:
    """Turn PyTorch weights into Flax weights or back, and account for every tensor.

    Values and dtypes are kept bit for bit. A manifest beside DESTINATION lists what went where, with hashes.
    """
    if like and width != 1.0:
        raise ValueError(f"`width` is {width}, expected none with --like: the function makes the model")
    target = None
    if like:
        from bridge.model.factories import flax_model_of

        log.info("making the model of %s", like)
        target = flax_model_of(like)
    log.info("reading %s", source)
    written = convert_checkpoint(
        source,
        destination,
        to=to,
        model=model or None,
        target=target,
        width=width,
        part=part or None,
        prefix=prefix or None,
        merge=merge,
        force=force,
        track=functools.partial(track, description=str(destination)),
    )
    line = f"{destination}: {len(written.arrays)} tensors, {written.nbytes} bytes"
    summarise(line)
    lines = [line]
    if manifest := written.manifest:
        lines.append(
            f"{manifest_path(destination)}: by the rules of {manifest.rules}, {len(manifest.moved)} tensors moved, "
            f"{len(manifest.kept)} kept that only PyTorch has; none missing, none left over"
        )
    console().print(*lines, sep="\n", highlight=False, markup=False)
