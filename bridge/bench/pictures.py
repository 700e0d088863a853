"""A benchmark as one SVG, drawn by bench.svg.jinja: times against the bandwidth of copies, and growth of cost.

This file computes coordinates, in units of about a pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bridge.bench.figures import interpolated
from bridge.bench.schema import EAGER, OURS, BenchReport, CopyRecord, RowRecord, ScaleRecord, SuiteRecord
from bridge.report.html import template
from bridge.report.pictures import Tick

_WIDTH, _MARGIN = 860, 24
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """Return an axis with some room beyond the least and the greatest value, and at least a factor of 4 in all."""
        low, high = min(values), max(values)
        room = max(1.15, 2 / math.sqrt(high / low))
        return cls(low / room, high * room, start, end)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, base: int = 10) -> list[tuple[float, float]]:
        """Return values and places: powers of the base, and if these are few, also 2 and 5 times the powers."""
        first, last = (math.floor(math.log(v, base)) for v in (self.low, self.high))
        powers = [float(base) ** k for k in range(first, last + 1)]
        values = powers if base != 10 or self.high / self.low > 100 else [m * p for p in powers for m in (1, 2, 5)]
        return [(value, self.at(value)) for value in values if self.low <= value <= self.high]


@dataclasses.dataclass(frozen=True)
class Mark:
    """One way on one row: a disc for jaxdw with the kernel's size in it, a ring for the best of PyTorch."""

    x: float
    y: float
    kind: str
    label: str
    note: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A path with the CSS class `kind` and a label at its end."""

    path: str
    kind: str
    label: str = ""
    x: float = 0.0
    y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Panel:
    """A chart; x, y, width and height are of the space inside the axes; `keys` explains disc and ring."""

    title: str
    note: str
    x: float
    y: float
    width: float
    height: float
    x_title: str
    y_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    lines: Sequence[Line]
    keys: tuple[str, ...] = ()


def to_svg(report: BenchReport) -> str:
    """Draw a report.

    Raises:
      ValueError: there is nothing to draw.
    """
    panels: list[Panel] = []
    top = 60.0
    for suite in report.suites:
        panel = _roofline(suite, report.copies, top) if suite.rows and suite.rows[0].nbytes else _bars(suite, top)
        if panel is not None and not report.settings.tune:
            panels.append(panel)
            top += panel.height + 108
    if report.scaling:
        small = _growth(report.scaling, report, top)
        panels += small
        top = max(panel.y + panel.height for panel in small) + 60
    if not panels:
        raise ValueError("`--svg` has nothing to draw: `--tune` has no picture, nor has a run without times")
    names = [suite.suite for suite in report.suites] + ["scaling"] * bool(report.scaling)
    info = report.environment
    foot = (
        f"{info['processor']}, {info['logical processors used']} logical processors, float32, torch {info['torch']}, "
        f"jax {info['jax']}, jaxdw {info['jaxdw']}"
    )
    return template("bench.svg.jinja").render(
        panels=panels, width=_WIDTH, height=top + 6, foot=foot, title=f"jaxdw bench: {', '.join(names)}"
    )


def _roofline(suite: SuiteRecord, copies: Sequence[CopyRecord], top: float) -> Panel | None:
    """Draw each row's bandwidth over its bytes, and the bandwidth of copies."""
    points = []
    for row in suite.rows:
        for kind, name in (("ours", OURS), ("theirs", _best(row))):
            ms = row.median(name) if name else None
            if ms is not None and row.nbytes is not None:
                points.append((row, kind, name, ms, row.nbytes / ms / 1e6))
    if not points:
        return None
    left, width, height = 70.0, _WIDTH - 70.0 - _MARGIN, 300.0
    sizes = [float(row.nbytes or 0) for row, *_ in points]
    x = Axis.around(sizes, left, left + width)
    roof = [(float(copy.nbytes), copy.best) for copy in copies]
    roof = _clipped(roof, x.low, x.high)
    y = Axis.around([g for *_, g in points] + [g for _, g in roof], top + height, top)
    marks = [
        Mark(
            x.at(row.nbytes or 0),
            y.at(rate),
            kind,
            row.name.split(":")[1] if kind == "ours" else "",
            f"{row.batch}x{row.name}, {name}: {ms:.3g} ms, {rate:.3g} GB/s",
        )
        for row, kind, name, ms, rate in sorted(points, key=lambda point: point[1], reverse=True)
    ]
    lines = _pairs(marks)
    theirs = any(kind == "theirs" for _, kind, *_ in points)
    eager = any(row.best_eager is not None for row in suite.rows)
    if roof:
        path = "M" + "L".join(f"{x.at(b):.1f} {y.at(g):.1f}" for b, g in roof)
        lines.append(Line(path, "roof", "copies, in this run", left + 4, y.at(roof[0][1]) - 7))
    note = "each mark: bytes of operands and results, once each, over the time; the number is the kernel's size"
    return Panel(
        suite.suite,
        note,
        left,
        top,
        width,
        height,
        "bytes that must move",
        "10⁹ bytes per second",
        [Tick(place, _bytes(value)) for value, place in Axis(x.low, x.high, x.start, x.end).ticks(4)],
        [Tick(place, f"{value:g}") for value, place in y.ticks()],
        marks,
        lines,
        ("jaxdw", *(("PyTorch, the best eager" if eager else "PyTorch",) if theirs else ())),
    )


def _best(row: RowRecord) -> str | None:
    """Return the faster of PyTorch's eager ways; if there is none, the fastest of PyTorch's ways."""
    timed = {way.name: way.median for way in row.ways if way.median is not None and way.name.startswith("torch")}
    names = [name for name in EAGER if name in timed] or list(timed)
    return min(names, key=lambda name: timed[name] or 0.0, default=None)


def _clipped(roof: Sequence[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """Return the part of a line through logarithmic points between low and high; it is level beyond its ends."""
    if not roof:
        return []
    inner = ((b, g) for b, g in roof if low < b < high)
    return [(low, interpolated(roof, low)), *inner, (high, interpolated(roof, high))]


def _pairs(marks: Sequence[Mark]) -> list[Line]:
    """Return a thin line between the two marks of each row."""
    by_row: dict[str, list[Mark]] = {}
    for mark in marks:
        by_row.setdefault(mark.note.partition(",")[0], []).append(mark)
    return [
        Line(f"M{a.x:.1f} {a.y:.1f}L{b.x:.1f} {b.y:.1f}", "pair")
        for a, b in (pair for pair in by_row.values() if len(pair) == 2)
    ]


def _bars(suite: SuiteRecord, top: float) -> Panel | None:
    """Draw every way's time on every row, next to each other."""
    times = [(row, way) for row in suite.rows for way in row.ways if way.median is not None]
    if not times:
        return None
    left, width, height = 70.0, _WIDTH - 70.0 - _MARGIN, 220.0
    y = Axis.around([way.median or 0.0 for _, way in times], top + height, top)
    step = width / len(suite.rows)
    marks, lines, ticks = [], [], []
    for number, row in enumerate(suite.rows):
        ticks.append(Tick(left + step * (number + 0.5), row.name))
        timed = [way for way in row.ways if way.median is not None]
        for place, way in enumerate(timed):
            at = left + step * (number + (place + 0.7) / (len(timed) + 0.4))
            height_at = y.at(way.median or 0.0)
            kind = "ours" if way.name == OURS else "theirs"
            marks.append(Mark(at, height_at, kind, "", f"{row.name}, {way.name}: {way.median:.4g} ms"))
            # names are wider than their places, so they stand above and below in turn
            lines.append(Line("", "label", way.name, at, height_at + (19 if place % 2 else -11)))
    return Panel(
        suite.suite,
        "milliseconds, on a logarithmic scale",
        left,
        top,
        width,
        height,
        "",
        "ms",
        ticks,
        [Tick(place, f"{value:g}") for value, place in y.ticks()],
        marks,
        lines,
    )


def _growth(scales: Sequence[ScaleRecord], report: BenchReport, top: float) -> list[Panel]:
    """Draw a panel per quantity for time, and one below it for memory; forward and gradients in each."""
    quantities = list(dict.fromkeys(scale.quantity for scale in scales))
    step = (_WIDTH - _MARGIN - 20.0) / len(quantities)
    panels = []
    for row, (measure, unit) in enumerate((("time", "ms"), ("memory", "MiB"))):
        costs = {id(scale): _costs(scale, measure) for scale in scales}
        positive = [cost for each in costs.values() for _, cost in each]
        if not positive:
            continue
        height = 150.0
        place = top + row * (height + 100)
        y = Axis.around(positive, place + height, place)
        for column, quantity in enumerate(quantities):
            left, width = 62.0 + column * step, step - 56
            own = [scale for scale in scales if scale.quantity == quantity]
            x = Axis.around([point.value for point in own[0].points], left, left + width)
            marks, lines = [], []
            for scale in own:
                kind = "ours" if scale.work == "forward" else "theirs"
                found = [(x.at(value), y.at(cost), value, cost) for value, cost in costs[id(scale)]]
                marks += [Mark(a, b, kind, "", f"{scale.work}, {quantity} {v}: {c:.3g} {unit}") for a, b, v, c in found]
                if found:
                    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b, *_ in found)
                    lines.append(Line(path, f"growth {kind}"))
            panels.append(
                Panel(
                    f"{measure.capitalize()} by {quantity}",
                    _exponents(own, measure),
                    left,
                    place,
                    width,
                    height,
                    quantity if row else "",
                    unit if not column else "",
                    [Tick(at, _count(value)) for value, at in x.ticks()],
                    [Tick(at, f"{value:g}" if not column else "") for value, at in y.ticks()],
                    marks,
                    lines,
                    () if row or column else ("forward", "forward and gradients"),
                )
            )
    return panels


def _costs(scale: ScaleRecord, measure: str) -> list[tuple[int, float]]:
    if measure == "time":
        return [(point.value, point.median) for point in scale.points]
    return [(point.value, point.temporary_bytes / 2**20) for point in scale.points if point.temporary_bytes]


def _exponents(scales: Sequence[ScaleRecord], measure: str) -> str:
    """Return the exponents in words, in the order of the scales."""
    found = [scale.time_exponent if measure == "time" else scale.memory_exponent for scale in scales]
    return "power " + " and ".join("none" if p is None else f"{p:.2f}" for p in found)


def _bytes(value: float) -> str:
    return f"{value / 2**20:g} MiB" if value >= 2**20 else f"{value / 2**10:g} KiB"


def _count(value: float) -> str:
    """Return a number as text; powers of ten from 1000 on as powers."""
    power = math.log10(value)
    return f"10{str(round(power)).translate(_POWERS)}" if power >= 3 and power == round(power) else f"{value:g}"
