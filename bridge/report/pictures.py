"""Pictures of a report as coordinates, in units of about a pixel; pictures.jinja writes them as SVG."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from bridge.diagnosis import Comparison, Diagnosis, Verdict
from bridge.diagnosis.attribution import Attribution
from bridge.report.differences import Bin, BitClass, Map, class_pairs

#: Viridis (Nathaniel Smith, Stefan van der Walt, 2015, CC0) without its dark end, which looks like a dark page.
_RAMP = ((46, 110, 142), (41, 120, 142), (32, 144, 140), (34, 167, 132), (68, 190, 112), (121, 209, 81), (189, 222, 38),
         (253, 231, 36))  # fmt: skip
_NOT_FINITE, _HATCH = (224, 49, 49), (128, 128, 128)
#: Palette places: same bits (hatched), the first and last colour of the ramp, not finite in one result.
_SAME, _HATCHED, _FIRST, _LAST, _BAD = 0, 1, 2, 254, 255
#: Pixels of the longer side of a map, at least, and from one line of the hatch to the next.
_PIXELS, _HATCH_STEP = 128, 5

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a chart. `note` is its tooltip; outside the bound (`beyond`) it has the colour of a failure."""

    x: float
    y: float
    width: float
    height: float
    note: str
    beyond: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Bars over an axis. `mark` is the place of the bound, if it is in the picture."""

    title: str
    x_title: str
    y_title: str
    bars: Sequence[Bar]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    summary: str
    mark: float | None = None

    width = 340
    height = 204
    left = 58
    right = 330
    top = 26
    bottom = 158


@dataclasses.dataclass(frozen=True)
class Heatmap:
    """A map as an image, stretched to `width` by `height`. Cells with the same bits are hatched."""

    title: str
    image: str
    width: float
    height: float
    last_row: int
    last_column: int
    axes: tuple[str, str]
    summary: str


@dataclasses.dataclass(frozen=True)
class Node:
    """An implementation, with its knobs on a second line."""

    y: float
    name: str
    knobs: str


@dataclasses.dataclass(frozen=True)
class Card:
    """A class of equal bits."""

    letter: str
    y: float
    height: float
    nodes: Sequence[Node]


@dataclasses.dataclass(frozen=True)
class Arc:
    """Two classes whose bits differ."""

    path: str
    x: float
    y: float
    label: str
    verdict: Verdict
    note: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """Implementations joined where their bits are equal; arcs between the classes say how many elements differ."""

    width: float
    height: float
    card_width: float
    cards: Sequence[Card]
    arcs: Sequence[Arc]
    summary: str


@dataclasses.dataclass(frozen=True)
class WaterfallBar:
    """A bar of a waterfall, from where the one before ended. `kind`: "more", "less", "unexplained" or "total"."""

    label: str
    y: float
    x: float
    width: float
    value: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Waterfall:
    """Bars between 0 and `right`, with the value zero at `zero`; their values stand at the right edge."""

    width: float
    height: float
    right: float
    zero: float
    steps: Sequence[WaterfallBar]
    summary: str


def graph(diagnosis: Diagnosis, classes: Sequence[BitClass]) -> Graph:
    """Return the classes from top to bottom, with arcs at their right."""
    line, knobs_line, head, gap = 24, 15, 14, 16
    cards: list[Card] = []
    y = 1.0
    for each in classes:
        nodes, inside = [], y + head
        for name in each.names:
            base, bracket, knobs = name.partition("[")
            nodes.append(Node(inside + 10, base, bracket + knobs))
            inside += line + (knobs_line if knobs else 0)
        cards.append(Card(each.letter, y, inside + head - 10 - y, nodes))
        y = inside + head - 10 + gap
    longest = max(len(part) for card in cards for node in card.nodes for part in (node.name, node.knobs))
    card_width = 62 + 7.3 * longest
    middle = {card.letter: card.y + card.height / 2 for card in cards}
    order = {card.letter: number for number, card in enumerate(cards)}
    arcs = [
        _arc(comparison, card_width, middle[a.letter], middle[b.letter], order[b.letter] - order[a.letter], a, b)
        for a, b, comparison in class_pairs(diagnosis, classes)
    ]
    reach = max((arc.x for arc in arcs), default=card_width) + (58 if arcs else 2)
    parts = [f"class {each.letter} with the same bits: {', '.join(each.names)}" for each in classes]
    return Graph(reach, y - gap + 1, card_width, cards, arcs, "; ".join(parts))


def _arc(c: Comparison, left: float, top: float, bottom: float, apart: int, a: BitClass, b: BitClass) -> Arc:
    """Return a half ellipse between two cards. Distant cards have wider arcs; ends are shifted, so that no two meet."""
    reach, shift = 26.0 + 40 * (apart - 1), 3.0 * (apart - 1)
    top, bottom = top + 6 - shift, bottom - 6 + shift
    path = (
        f"M {left:g} {top:g} C {left + reach * 4 / 3:g} {top:g} {left + reach * 4 / 3:g} {bottom:g} {left:g} {bottom:g}"
    )
    note = f"{a.letter} and {b.letter}: {c.verdict}, {c.different} of {c.elements} elements differ"
    return Arc(path, left + reach + 5, (top + bottom) / 2, _share(c.different, c.elements), c.verdict, note)


def ulp_chart(bins: Sequence[Bin]) -> Chart:
    """Chart the elements by distance in ULP, counts on a logarithmic scale."""
    names = [str(int(b.low)) if b.low == b.high else f"{_power(b.low)} to {_power(b.high)}" for b in bins]
    every = -(-len(bins) // 8)
    step = (Chart.right - Chart.left) / len(bins)
    ticks = [
        Tick(Chart.left + step * (k + 0.5), _power(b.low) if k > 1 else f"{b.low:g}")
        for k, b in enumerate(bins)
        if k % every == 0
    ]
    notes = [f"{name} ULP: {b.count:,} elements" for name, b in zip(names, bins)]
    furthest = next((name for name, b in zip(reversed(names), reversed(bins)) if b.count), "0")
    summary = f"Histogram of distances in ULP: {bins[0].count} elements at 0, the furthest at {furthest}"
    return _counts("Distance in ULP", "ULP: 0, 1, 2 to 3, 4 to 7, ...", bins, notes, ticks, summary)


def ratio_chart(bins: Sequence[Bin]) -> Chart:
    """Chart the different elements by their ratio to the bound, both scales logarithmic."""
    step = (Chart.right - Chart.left) / len(bins)
    at = [Chart.left + step * k for k in range(len(bins) + 1)]
    decades = [(x, round(math.log10(edge))) for x, edge in zip(at, [b.low for b in bins] + [bins[-1].high])
               if abs(math.log10(edge) - round(math.log10(edge))) < 1e-6]  # fmt: skip
    every = -(-len(decades) // 9)
    ticks = [Tick(x, "1" if d == 0 else f"10{str(d).translate(_SUPERSCRIPTS)}") for x, d in decades if d % every == 0]
    mark = next(x for x, d in decades if d == 0)
    notes = [f"ratio {b.low:.2g} to {b.high:.2g}: {b.count:,} elements" for b in bins]
    beyond = sum(b.count for b in bins if b.low >= 1)
    summary = f"Histogram of the ratio to the proved bound: {beyond} of {sum(b.count for b in bins)} elements beyond it"
    return _counts("Ratio to the proved bound", "|a - b| / bound", bins, notes, ticks, summary, mark)


def channel_chart(by_channel: np.ndarray) -> Chart:
    """Chart the greatest |a - b| of each channel, or of each run of channels where there are many."""
    channels, most = len(by_channel), 172
    block = -(-channels // most)
    heights = np.maximum.reduceat(by_channel, np.arange(0, channels, block))
    scale = max((h for h in heights if math.isfinite(h)), default=0.0) or 1.0
    step = (Chart.right - Chart.left) / len(heights)
    span = Chart.bottom - Chart.top
    bars = []
    for k, h in enumerate(heights):
        first, last = k * block, min((k + 1) * block, channels) - 1
        name = f"channel {first}" if first == last else f"channels {first} to {last}"
        note = f"{name}: {h:.2g}" if math.isfinite(h) else f"{name}: not finite in one result"
        height = span * min(h / scale, 1.0)
        gap = min(1.0, step / 4)
        bars.append(Bar(Chart.left + step * k, Chart.bottom - height, step - gap, height, note, not math.isfinite(h)))
    every = next(n for d in itertools.count() for n in (10**d, 2 * 10**d, 5 * 10**d) if len(heights) <= 8 * n)
    x_ticks = [Tick(Chart.left + step * (k + 0.5), str(k * block)) for k in range(0, len(heights), every)]
    y_ticks = [Tick(Chart.bottom - span * f, f"{scale * f:.2g}") for f in (0.0, 0.5, 1.0)]
    worst = int(np.argmax(by_channel))
    summary = f"Bars of the greatest difference of each of {channels} channels: the greatest in channel {worst}"
    return Chart("By channel", "output channel", "max |a - b|", bars, x_ticks, y_ticks, summary)


def heatmap(each: Map, scale: float) -> Heatmap:
    """Return the map as an image, with `scale` as the last colour of the ramp."""
    rows, columns = each.shape
    cells = each.cells
    colour = np.full(cells.shape, _SAME, np.uint8)
    finite = np.isfinite(cells)
    differs = finite & (cells > 0)
    colour[differs] = _FIRST + np.round((_LAST - _FIRST) * (cells[differs] / scale))
    colour[~finite] = _BAD
    one_axis = each.axes[0] == "channel"
    width, height = (340.0, min(10.0 * rows, 160.0)) if one_axis else _fitted(rows, columns, 128.0)
    greatest = cells[finite].max(initial=0.0)
    row, column = np.unravel_index(int(np.argmax(cells)), cells.shape)
    block = tuple(-(-size // cut) for size, cut in zip(each.shape, cells.shape))
    summary = (
        f"Map of the greatest difference, {each.title}, {rows} by {columns}: at most {greatest:.2g}, "
        f"the greatest near {each.axes[0]} {row * block[0]}, {each.axes[1]} {column * block[1]}"
    )
    return Heatmap(
        f"{each.title}: {'not finite' if colour.max() == _BAD else f'{greatest:.2g}'}",
        _png(_hatched(colour)),
        width,
        height,
        rows - 1,
        columns - 1,
        each.axes,
        summary,
    )


def _hatched(colour: np.ndarray) -> np.ndarray:
    """Return the cells as squares of pixels, with diagonal lines over those that have the same bits."""
    side = max(1, _PIXELS // max(colour.shape))
    pixels = colour.repeat(side, axis=0).repeat(side, axis=1)
    row, column = np.indices(pixels.shape)
    pixels[(pixels == _SAME) & ((row + column) % _HATCH_STEP == 0)] = _HATCHED
    return pixels


def _fitted(rows: int, columns: int, longest: float) -> tuple[float, float]:
    """Return width and height with square cells, but never too thin to see."""
    unit = longest / max(rows, columns)
    return max(columns * unit, 12.0), max(rows * unit, 12.0)


def ramp_css() -> str:
    """Return the ramp as stops of a CSS gradient."""
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in _RAMP)


def waterfall(attribution: Attribution) -> Waterfall:
    """Return one bar per share, each from the end of the last; then what is unexplained, and the total from zero."""
    rows = [*attribution.shares, ("unexplained", attribution.unexplained)]
    ends = list(itertools.accumulate((value for _, value in rows), initial=0.0))
    lowest, highest = min(0.0, *ends, attribution.total), max(0.0, *ends, attribution.total)
    width, right, height = 390, 312, 40
    unit = right / ((highest - lowest) or 1.0)
    steps = []
    for number, ((label, value), start) in enumerate(zip(rows, ends)):
        kind = "unexplained" if number == len(rows) - 1 else "less" if value < 0 else "more"
        x = (min(start, start + value) - lowest) * unit
        steps.append(WaterfallBar(label, number * height, x, abs(value) * unit, f"{value:+.3g}", kind))
    x = (min(0.0, attribution.total) - lowest) * unit
    total = f"{attribution.total:.3g}"
    steps.append(WaterfallBar("total", len(rows) * height, x, abs(attribution.total) * unit, total, "total"))
    summary = "; ".join(f"{step.label} {step.value}" for step in steps)
    return Waterfall(width, (len(rows) + 1) * height, right, -lowest * unit, steps, f"{summary} ({attribution.unit})")


def _counts(
    title: str,
    x_title: str,
    bins: Sequence[Bin],
    notes: Sequence[str],
    x_ticks: Sequence[Tick],
    summary: str,
    mark: float | None = None,
) -> Chart:
    """Return bars of logarithmic height; a bin of one element still shows."""
    span, foot = Chart.bottom - Chart.top, 0.25
    most = max(max((b.count for b in bins), default=1), 1)
    decades = math.log10(most) + foot

    def height(count: int) -> float:
        return span * (math.log10(count) + foot) / max(decades, 1 + foot) if count else 0.0

    step = (Chart.right - Chart.left) / len(bins)
    bars = [
        Bar(Chart.left + step * k, Chart.bottom - height(b.count), step - 1, height(b.count), note,
            beyond=mark is not None and Chart.left + step * k >= mark - 1e-6)
        for k, (b, note) in enumerate(zip(bins, notes))
        if b.count
    ]  # fmt: skip
    marks = [m * 10**d for d in range(int(math.log10(most)) + 1) for m in ((1, 2, 5) if most < 100 else (1,))]
    y_ticks = [Tick(Chart.bottom - height(n), _count(n)) for n in marks if n <= max(most, 10)]
    return Chart(title, x_title, "elements", bars, x_ticks, y_ticks, summary, mark)


def _count(n: int) -> str:
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n // size}{suffix}"
    return str(n)


def _power(value: float) -> str:
    """Return a small whole number as it is, a larger one as 2^k or 2^k - 1."""
    if value < 1024:
        return f"{value:g}"
    k = str(round(math.log2(value + 1))).translate(_SUPERSCRIPTS)
    return f"2{k}" if value == 2 ** round(math.log2(value)) else f"2{k} - 1"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    if share < 0.1:
        return "<0.1%"
    return (
        f"{share:.1f}%" if share < 10 and share != round(share) else f"{min(share, 99.9) if part < whole else 100:.0f}%"
    )


def _palette() -> bytes:
    ramp = np.array(_RAMP, float)
    at = np.linspace(0, len(_RAMP) - 1, _LAST - _FIRST + 1)
    colours = np.stack([np.interp(at, np.arange(len(_RAMP)), ramp[:, k]) for k in range(3)], axis=1)
    return bytes((0, 0, 0, *_HATCH)) + np.round(colours).astype(np.uint8).tobytes() + bytes(_NOT_FINITE)


def _png(colour: np.ndarray) -> str:
    """Return palette indices (rows, columns) as a data URI of a PNG (ISO/IEC 15948); index 0 is transparent."""
    rows, columns = colour.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    scanlines = b"".join(b"\0" + row.tobytes() for row in colour)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", _palette()),
            chunk(b"tRNS", b"\0"),
            chunk(b"IDAT", zlib.compress(scanlines, 9)),
            chunk(b"IEND", b""),
        )
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
