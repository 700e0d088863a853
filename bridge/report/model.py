"""Model parity in a terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.model.parity import LayerParity, ModelParity
from bridge.report.html import template, tone
from bridge.report.terminal import styled


def print_model(parity: ModelParity, console: Console) -> None:
    """Print one row per operation, what is wrong, and the answer in a few sentences."""
    table = Table(
        title=f"{escape(parity.name)}, {'x'.join(map(str, parity.images))}: PyTorch and JAX",
        box=rich.box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("isolated")
    for name in ("of bound", "growth", "ampl."):
        table.add_column(name, justify="right")
    for layer in parity.layers:
        verdict = "[yellow]not compared[/]" if layer.isolated is None else styled(layer.verdict)
        figures = [_figure(of_bound(layer)), _figure(layer.growth), _figure(layer.amplification)]
        table.add_row(escape(layer.name), escape(layer.kind), verdict, *figures)
    console.print(table)
    for line in remarks(parity):
        console.print(f"  {escape(line)}", highlight=False)
    console.print(f"{styled(parity.verdict)} {escape(summary(parity))}", highlight=False)


def summary(parity: ModelParity) -> str:
    """Return the answer in a few sentences.

    `growth` never decides a verdict. It is the difference that accumulates as both networks run free.
    """
    found = Counter(layer.verdict for layer in parity.layers if layer.isolated is not None)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in Verdict if found[verdict])
    compared = sum(found.values())
    told = [f"{compared} of {len(parity.layers)} operations compared on PyTorch's own activations: {counts or 'none'}."]
    if parity.first_wrong is not None:
        wrong = parity.first_wrong
        told.append(f"The first that is wrong is {wrong.name} ({wrong.torch} in PyTorch): {why(wrong)}.")
    elif parity.not_compared or parity.left:
        told.append("None of them is wrong. The others were not compared.")
    else:
        told.append("Growth is only rounding: no operation adds more than its rounding bound.")
    if growth := max((layer.growth for layer in parity.layers if layer.growth is not None), default=None):
        told.append(f"Running free, the networks differ by at most {growth:.2g} of a layer's norm.")
    logits = parity.logits
    told.append(
        f"Logits differ by at most {logits.max_abs:.2g} (greatest {logits.scale:.2g}); the same top {logits.top} on "
        f"{logits.same_top:.0%} of images, in the same order on {logits.same_order:.0%}, "
        f"the same first on {logits.same_first:.0%}."
    )
    return " ".join(told)


def remarks(parity: ModelParity) -> list[str]:
    """Return a line for each operation that does not pass or was not compared, with its reason."""
    lines = [f"{layer.name}: {layer.verdict}: {why(layer)}" for layer in parity.layers if layer.is_wrong]
    lines += [f"{layer.name} was not compared: {layer.reason}" for layer in parity.not_compared]
    return lines + [f"{name} of PyTorch was not compared: it has no counterpart" for name in parity.left]


def why(layer: LayerParity) -> str:
    """Return why an operation does not pass."""
    c = layer.isolated
    told = (layer.cause, c.place if c else "", f"fix: {c.fix}" if c and c.fix else "")
    return "; ".join(filter(None, told))


def of_bound(layer: LayerParity) -> float | None:
    """Return the greater of the two results' errors, as a share of the bound."""
    return None if layer.isolated is None else max(layer.isolated.side_bound_ratios)


def model_html(parity: ModelParity, *, command: str) -> str:
    """Return the whole report as a page.

    Args:
      parity: what to show.
      command: the shell command that repeats it.
    """
    return template("model.html.jinja", of_bound=of_bound).render(
        case=f"{parity.name}, images {'x'.join(map(str, parity.images))}, PyTorch and JAX",
        verdict=parity.verdict,
        meaning=summary(parity),
        parity=parity,
        remarks=remarks(parity),
        chart=growth_chart(parity.layers),
        environment=environment(),
        command=command,
    )


@dataclasses.dataclass(frozen=True)
class Dot:
    """A layer in the chart."""

    x: float
    y: float
    tone: str
    note: str


@dataclasses.dataclass(frozen=True)
class GrowthChart:
    """Growth through the network: layers from left to right, the relative difference on a scale of powers of ten.

    Attributes:
      width, height, left, right, top, bottom: of the picture and of its frame.
      line: the points of a polyline, "x,y x,y", where layers differ.
      dots: one per layer whose results differ, coloured by its isolated verdict.
      ticks: `(y, power of ten)`.
      summary: the picture in words.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    line: str
    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, int]]
    summary: str


def growth_chart(layers: Sequence[LayerParity]) -> GrowthChart | None:
    """Return the chart, or None where nothing differs."""
    grown = [(i, layer) for i, layer in enumerate(layers) if layer.growth]
    if not grown:
        return None
    width, height, left, right, top, bottom = 720.0, 300.0, 56.0, 708.0, 20.0, 256.0
    powers = [math.log10(layer.growth or 1.0) for _, layer in grown]
    low, high = math.floor(min(powers)), max(math.ceil(max(powers)), math.floor(min(powers)) + 1)

    def at(i: int, power: float) -> tuple[float, float]:
        x = left + (right - left) * (i + 0.5) / len(layers)
        return x, bottom - (bottom - top) * (power - low) / (high - low)

    places = [at(i, power) for (i, _), power in zip(grown, powers)]
    dots = [
        Dot(x, y, tone(layer.verdict), f"{layer.name}: {layer.growth:.2g}, isolated {layer.verdict}")
        for (x, y), (_, layer) in zip(places, grown)
    ]
    last = grown[-1][1]
    return GrowthChart(
        width,
        height,
        left,
        right,
        top,
        bottom,
        " ".join(f"{x:.1f},{y:.1f}" for x, y in places),
        dots,
        [(at(0, power)[1], power) for power in range(low, high + 1)],
        f"The relative difference of both networks, layer by layer: from {10 ** min(powers):.2g} to "
        f"{10 ** max(powers):.2g}, {last.growth:.2g} at {last.name}.",
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
