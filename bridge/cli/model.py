"""`jaxdw model`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.cli.options import FailOnOption, HtmlOption, JsonOption
from bridge.cli.output import check_outputs, command_line, console, exit_code, summarise
from bridge.files import write_atomically
from bridge.progress import counted, log

if TYPE_CHECKING:
    from bridge.model import ModelParity


def model(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="mobilenet_v1, mobilenet_v2, mobilenet_v3_small or mobilenet_v3_large, of the library that the "
            "weights come from; or of a named library, as timm.mobilenet_v2. Or package.module:factory, a function "
            "that returns a PyTorch module, its port to JAX, inputs, and perhaps the manifest of the conversion.",
        ),
    ],
    weights: Annotated[Path | None, typer.Option(help="PyTorch's checkpoint. Default: random weights.")] = None,
    random_seed: Annotated[
        int, typer.Option(help="Seed of random weights, and of a random image where none is given.", min=0)
    ] = 0,
    image: Annotated[
        Path | None,
        typer.Option(
            help="A picture, scaled, cut and normalized as torchvision does; or .npy (H,W,3) of floats, taken as it is."
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the image.", min=32)] = 224,
    width: Annotated[float, typer.Option(help="Width multiplier.")] = 1.0,
    batch: Annotated[int | None, typer.Option(help="Number of random images. Default: 1.", min=1)] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of PyTorch's images and weights, contiguous or channels_last. Default: that of the model.",
            metavar="LAYOUT",
        ),
    ] = None,
    same_bits: Annotated[
        bool,
        typer.Option(
            "--same-bits",
            help="Run JAX in the orders of PyTorch's sums, as one program: every result must have PyTorch's bits.",
        ),
    ] = False,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="Compare the backward pass, too: every operation of it and each parameter's gradient."
        ),
    ] = False,
    training: Annotated[
        bool,
        typer.Option("--training", help="Run both models in training mode: statistics of the batch, no dropout."),
    ] = False,
    json: JsonOption = None,
    html: HtmlOption = None,
    fail_on: FailOnOption = None,
) -> None:
    """Compare a whole network in PyTorch and JAX: each operation by itself, and how differences grow.

    EXPLAINED: both results follow, in every bit, from the orders in which the frameworks add, which are revealed here
    for these shapes, this layout and these threads. With --same-bits JAX adds in PyTorch's orders.

    Exit codes are those of `parity`, for the weakest verdict; 4 where an operation could not be compared.
    """
    from bridge.model import model_parity, same_bits_parity
    from bridge.model.factories import PortPair, made_by
    from bridge.model.graph_capture import check_layout
    from bridge.model.known_orders import KnownOrders
    from bridge.model.originals import compared_pair, random_images, read_image

    check_outputs("jaxdw.model", json=json, html=html)
    check_layout(layout)
    if same_bits and (gradients or training):
        raise ValueError("`same_bits` compares inference alone, expected no --gradients, --training")
    if ":" in network:
        given = {
            "--weights": weights,
            "--image": image,
            "--batch": batch,
            "--size": None if size == 224 else size,
            "--width": None if width == 1.0 else width,
        }
        if own := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"`network` is {network!r}, whose function makes all: expected no {', '.join(own)}")
        log.info("%s: making both networks", network)
        made, name = made_by(network), network
    else:
        if image is not None and batch is not None:
            raise ValueError(f"`batch` is {batch}, expected none with --image: an .npy file may hold several images")
        images = random_images(size, random_seed, batch or 1) if image is None else read_image(image, size)
        log.info("%s: making both networks", network)
        pair = compared_pair(network, weights=weights, seed=random_seed, width=width)
        made, name = PortPair(pair.module, pair.model, images, pair.manifest), pair.name
    known = KnownOrders.of_this_machine()
    shown = functools.partial(counted, description=f"{name}, operation")
    compare = same_bits_parity if same_bits else functools.partial(model_parity, gradients=gradients, training=training)
    parity = compare(*made, layout=layout, known=known, name=name, track=shown)
    known.save()
    _report(parity, json, html)
    raise typer.Exit(exit_code(parity.verdict, fail_on))


def _report(parity: ModelParity, json: Path | None, html: Path | None) -> None:
    """Print a comparison, and write the files that are asked for."""
    from bridge.model.record import ModelReport
    from bridge.report.model import model_html, print_model, summary

    print_model(parity, console())
    summarise(f"{parity.verdict} {summary(parity)}")
    if json is not None:
        write_atomically(json, ModelReport.of(parity).to_json())
    if html is not None:
        write_atomically(html, model_html(parity, command=command_line()))
