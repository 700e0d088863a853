"""Model parity in a terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.model.parity import LayerParity, ModelParity
from bridge.report.html import heading, template
from bridge.report.terminal import styled, table


def print_model(parity: ModelParity, console: Console) -> None:
    """Print one row per operation, what is wrong, and the answer in a few sentences."""
    title = f"{escape(case(parity))}"
    columns = (">differ", "order in PyTorch") if parity.same_bits else (">of bound", ">growth", ">ampl.")
    made = table(title, "layer", "kind", "bits" if parity.same_bits else "isolated", *columns)
    for layer in parity.layers:
        verdict = "[yellow]not compared[/]" if layer.isolated is None else styled(layer.verdict)
        if parity.same_bits:
            differ = "" if layer.isolated is None else f"{layer.isolated.different:,}"
            figures = [differ, escape(layer.orders.get("PyTorch", ""))]
        else:
            figures = [_figure(of_bound(layer)), _figure(layer.growth), _figure(layer.amplification)]
        made.add_row(escape(layer.name), escape(layer.kind), verdict, *figures)
    console.print(made)
    for line in remarks(parity):
        console.print(f"  {escape(line)}", highlight=False)
    console.print(f"{styled(parity.verdict)} {escape(summary(parity))}", highlight=False)


def case(parity: ModelParity) -> str:
    """Return what was compared."""
    how = "JAX in PyTorch's orders, one program" if parity.same_bits else "PyTorch and JAX"
    how += ", and their gradients" if parity.gradients else ""
    return f"{parity.name}, images {'x'.join(map(str, parity.images))}, {parity.layout}: {how}"


def summary(parity: ModelParity) -> str:
    """Return the answer in a few sentences.

    `growth` never decides a verdict. It is the difference that accumulates when each network runs end to end.
    """
    found = Counter(layer.verdict for layer in parity.layers if layer.isolated is not None)
    counts = ", ".join(f"{found[verdict]} {verdict}" for verdict in Verdict if found[verdict])
    compared = sum(found.values())
    told = [f"{compared} of {len(parity.layers)} operations compared on PyTorch's own activations: {counts or 'none'}."]
    if parity.different:
        share = parity.explained / parity.different
        told.append(
            f"Replays explain {parity.explained:,} of {parity.different:,} differing elements ({_percent(share)})."
        )
    if parity.first_wrong is not None:
        wrong = parity.first_wrong
        told.append(f"The first that is wrong is {wrong.name} ({wrong.torch} in PyTorch): {why(wrong)}.")
    elif parity.not_compared or parity.left:
        told.append("None of them is wrong. The others were not compared.")
    elif parity.same_bits:
        results = "has all bits of PyTorch's" if not parity.replaced else "that is not named above has PyTorch's bits"
        told.append(f"JAX ran as one compiled program in PyTorch's arithmetic. Every result {results}.")
    else:
        told.append("Growth is only rounding: no operation adds more than its rounding bound.")
    if growth := max((layer.growth for layer in parity.layers if layer.growth is not None), default=None):
        told.append(f"Run end to end, the networks differ by at most {growth:.2g} of a layer's norm.")
    logits = parity.logits
    if logits is None:
        return " ".join(told)
    if parity.same_bits:
        told.append(f"{logits.different:,} of {logits.classes * parity.images[0]:,} logits have other bits.")
    if not logits.different:
        return " ".join(told)
    told.append(
        f"Logits differ by at most {logits.max_abs:.2g} (greatest {logits.scale:.2g}). The top {logits.top} are "
        f"the same on {logits.same_top:.0%} of images, in the same order on {logits.same_order:.0%}, "
        f"with the same first on {logits.same_first:.0%}."
    )
    return " ".join(told)


def remarks(parity: ModelParity) -> list[str]:
    """Return a line for each operation that does not pass or was not compared, with its reason."""
    lines = [f"{layer.name}: {layer.verdict}: {why(layer)}" for layer in parity.layers if layer.is_wrong]
    if parity.same_bits:
        named = (layer for layer in parity.layers if layer.name in parity.replaced and layer.verdict.passes)
        lines += [f"{each.name}: {each.verdict}: {each.cause}; the program went on from PyTorch's" for each in named]
    lines += [f"{layer.name} was not compared: {layer.reason}" for layer in parity.not_compared]
    return lines + [f"{name} of PyTorch was not compared: it has no counterpart" for name in parity.left]


def why(layer: LayerParity) -> str:
    """Return why an operation does not pass."""
    c = layer.isolated
    told = (layer.cause, c.place if c else "", f"fix: {c.fix}" if c and c.fix else "")
    return "; ".join(filter(None, told))


def fix(parity: ModelParity) -> str:
    """Return what to change."""
    wrong = parity.first_wrong
    if wrong is not None and wrong.isolated is not None:
        known = f"{wrong.isolated.fix}." if wrong.isolated.fix else f"no fix is known; {why(wrong)}."
        return f"{wrong.name}: {known}"
    if parity.not_compared or parity.left:
        return "None is known: some operations were not compared. The reasons stand below."
    if parity.verdict is Verdict.IDENTICAL:
        return "Nothing to change: every operation has the bits of PyTorch's."
    if parity.verdict is Verdict.EXPLAINED:
        return "None is needed: the orders in which the frameworks add explain every difference."
    return "None is needed: every difference is rounding."


def of_bound(layer: LayerParity) -> float | None:
    """Return the greater of the two results' errors, as a share of the bound."""
    return None if layer.isolated is None else max(layer.isolated.own_bound_ratios)


def model_html(parity: ModelParity, *, command: str) -> str:
    """Return the whole report as a page.

    Args:
      parity: what to show.
      command: the shell command that repeats it.
    """
    return template("model.html.jinja", of_bound=of_bound).render(
        case=case(parity),
        verdict=parity.verdict,
        meaning=summary(parity),
        fix=fix(parity),
        code="",
        parity=parity,
        remarks=remarks(parity),
        chart=growth_chart(parity.layers),
        environment=environment(),
        command=command,
        **heading(),
    )


@dataclasses.dataclass(frozen=True)
class Dot:
    """A layer in the chart."""

    x: float
    y: float
    verdict: Verdict
    note: str


@dataclasses.dataclass(frozen=True)
class GrowthChart:
    """The relative difference of each layer, from left to right, on a scale of powers of ten.

    Attributes:
      dots: one per layer whose results differ, with its isolated verdict.
      ticks: `(y, power of ten)`.
      summary: the picture in words.
    """

    dots: Sequence[Dot]
    ticks: Sequence[tuple[float, int]]
    summary: str

    width, height = 720.0, 316.0
    left, right, top, bottom = 66.0, 708.0, 44.0, 272.0

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts of the dots, the strongest first."""
        return sorted({dot.verdict for dot in self.dots}, key=Verdict.rank)


def growth_chart(layers: Sequence[LayerParity]) -> GrowthChart | None:
    """Return the chart, or None where nothing differs."""
    grown = [(number, layer, layer.growth) for number, layer in enumerate(layers) if layer.growth]
    if not grown:
        return None
    powers = [math.log10(growth) for _, _, growth in grown]
    low = math.floor(min(powers))
    high = max(math.ceil(max(powers)), low + 1)
    step = (GrowthChart.right - GrowthChart.left) / len(layers)

    def y(power: float) -> float:
        return GrowthChart.bottom - (GrowthChart.bottom - GrowthChart.top) * (power - low) / (high - low)

    dots = [
        Dot(
            GrowthChart.left + step * (number + 0.5),
            y(power),
            layer.verdict,
            f"{layer.name}: {growth:.2g}, isolated {layer.verdict}",
        )
        for power, (number, layer, growth) in zip(powers, grown)
    ]
    _, last, growth = grown[-1]
    return GrowthChart(
        dots,
        [(y(power), power) for power in range(low, high + 1)],
        f"The relative difference of both networks, layer by layer: from {10 ** min(powers):.2g} to "
        f"{10 ** max(powers):.2g}, {growth:.2g} at {last.name}.",
    )


def _percent(share: float) -> str:
    """Return a share in percent; 100 only for all.

    >>> _percent(1), _percent(0.99999)
    ('100%', '99.99%')
    """
    return "100%" if share == 1 else f"{math.floor(share * 1e4) / 100:.4g}%"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
