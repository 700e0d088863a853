"""A census in a terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from bridge._census.record import CensusLayerRecord, CensusRecord
from bridge._implementations import implementation
from bridge.diagnosis import Verdict
from bridge.records import CaseRecord
from bridge.report.answer import emulates
from bridge.report.html import heading, template
from bridge.report.terminal import styled, table


def print_census(records: Sequence[CensusRecord], implementations: Sequence[str], console: Console) -> None:
    """Print one row per model, then every layer that is weaker than ROUNDING, then the totals."""
    reference, *others = implementations
    title = f"Depthwise layers by verdict, and how many match {reference} bit for bit"
    names = (escape(each.replace(".", ".\n", 1)) for each in others)
    made = table(title, "model", ">layers", "verdict", *(f">{name}" for name in (*names, "of\nbound", "s per\nlayer")))
    made.columns[2].no_wrap = True
    for column in made.columns[3:]:
        column.overflow = "fold"
    for record in records:
        made.add_row(escape(record.model), *_row(record))
    console.print(made)
    for record in records:
        for line in _remarks(record):
            console.print(Padding(f"[bold]{escape(record.model)}[/] {line}", (0, 0, 1, 2)), highlight=False)
    console.print(escape(summary(records)), highlight=False)


def summary(records: Sequence[CensusRecord]) -> str:
    """Return the counts in one sentence."""
    ran = [record for record in records if record.layers]
    layers = [layer for record in ran for layer in record.layers]
    verdicts: Counter[Verdict] = Counter()
    for record in ran:
        verdicts.update(record.counts())
    found = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in Verdict if verdicts[verdict])
    windows = len({_window(layer.case) for layer in layers})
    without = sum(not record.error and not record.layers for record in records)
    failed = sum(bool(record.error) for record in records)
    return (
        f"{_plural(len(ran), 'model')}, {_plural(len(layers), 'depthwise layer')} in "
        f"{_plural(windows, 'kernel geometry', 'kernel geometries')}: {found or 'none'}"
        + (f"; {_plural(without, 'model')} without depthwise layers" if without else "")
        + (f"; {_plural(failed, 'model')} could not be run" if failed else "")
        + "."
    )


def census_html(records: Sequence[CensusRecord], implementations: Sequence[str], *, command: str) -> str:
    """Return the whole census as a page.

    Args:
      records: what to show.
      implementations: their names; the first is the reference.
      command: the shell command that repeats it.
    """
    weakest = max((record.verdict for record in records if record.verdict), key=Verdict.rank, default=None)
    told, code = fix(records, implementations)
    return template("census.html.jinja", geometry=geometry).render(
        records=records,
        reference=implementations[0],
        others=implementations[1:],
        case="Census of depthwise layers",
        verdict=weakest or Verdict.INCONCLUSIVE,
        meaning=summary(records),
        fix=told,
        code=code,
        environment=records[-1].environment if records else {},
        command=command,
        **heading(),
    )


def fix(records: Sequence[CensusRecord], implementations: Sequence[str]) -> tuple[str, str]:
    """Return what to change, and the lines to copy; these are empty where no implementation has all bits."""
    reference, *others = implementations
    failed = [(record, layer) for record in records for layer in record.layers if not layer.verdict.passes]
    if failed:
        record, layer = max(failed, key=lambda each: each[1].verdict.rank())
        c = layer.weakest
        told = c.fix or f"no fix is known; the cause: {c.cause or c.verdict.meaning}"
        return f"{record.model}, {layer.layer}: {told}.", ""
    layers = [layer for record in records for layer in record.layers]
    equal = [
        name
        for at, name in enumerate(others)
        if not emulates(name) and sum(record.identical()[at] for record in records) == len(layers)
    ]
    if len(equal) == len(others):
        return (
            f"Nothing to change: all results have the bits of {reference}." if layers else "No layer was compared.",
            "",
        )
    if not equal:
        return f"None is needed: every difference is rounding. None of {', '.join(others)} matches all layers.", ""
    said = f"it has every bit of {reference} on all {_plural(len(layers), 'layer')}."
    code = implementation(equal[0]).algorithm.code if ":" not in equal[0] else ""
    return f"Use {equal[0]}: {said}", code


def geometry(case: CaseRecord) -> str:
    """Return kernel, stride, padding, dilation and multiplier in a few words.

    >>> window = {"strides": (2, 2), "padding": ((1, 1), (1, 1)), "padding_mode": "zeros", "kernel_dilation": (1, 1)}
    >>> sizes = {"x": (1, 9, 9, 4), "kernel": (3, 3, 1, 8), "bias": None, "output": (1, 5, 5, 8)}
    >>> geometry(CaseRecord(name="", dtype="float32", input_dilation=(1, 1), **window, **sizes))
    '3x3, stride 2, padding 1, multiplier 2'
    """
    multiplier = case.kernel[-1] // case.x[-1]
    parts = ["x".join(map(str, case.kernel[:-2]))]
    if max(case.input_dilation) > 1:
        parts.append(f"input dilation {_short(case.input_dilation)}")
    if max(case.strides) > 1:
        parts.append(f"stride {_short(case.strides)}")
    pads = [low if low == high else f"{low}:{high}" for low, high in case.padding]
    mode = "" if case.padding_mode == "zeros" else f" {case.padding_mode}"
    parts.append(f"padding {_short(pads)}{mode}")
    if max(case.kernel_dilation) > 1:
        parts.append(f"dilation {_short(case.kernel_dilation)}")
    if multiplier > 1:
        parts.append(f"multiplier {multiplier}")
    return ", ".join(parts)


def _row(record: CensusRecord) -> list[str]:
    if not record.layers:
        return ["0", "[red]failed[/]" if record.error else "none", *[""] * (len(record.settings.implementations) + 1)]
    return [
        str(len(record.layers)),
        styled(record.verdict or Verdict.INCONCLUSIVE),
        *map(str, record.identical()),
        f"{record.max_bound_ratio:.2g}",
        f"{record.seconds_per_layer:.2f}",
    ]


def _remarks(record: CensusRecord) -> list[str]:
    """Return errors, verdicts that do not pass, and layers that did not run or were passed over."""
    remarks = [f"could not be run: {escape(record.error)}"] if record.error else []
    for layer in record.layers:
        if not layer.verdict.passes:
            remarks.append(f"{escape(layer.layer)} ({geometry(layer.case)}): {styled(layer.verdict)} {_why(layer)}")
    if record.idle:
        remarks.append(f"did not run: {escape(', '.join(record.idle))}")
    if record.passed_over:
        remarks.append(f"passed over: {escape('; '.join(record.passed_over))}")
    return remarks


def _why(layer: CensusLayerRecord) -> str:
    c = layer.weakest
    told = [f"{c.a} and {c.b}", c.cause or c.verdict.meaning, c.place, f"fix: {c.fix}" if c.fix else ""]
    return escape("; ".join(filter(None, told)))


def _window(case: CaseRecord) -> tuple:
    """Return the geometry without the sizes of the data."""
    return case.kernel[:-2], case.kernel[-1] // case.x[-1], case.strides, case.kernel_dilation, case.padding_mode


def _short(values: Sequence[object]) -> str:
    return str(values[0]) if len(set(values)) == 1 else ",".join(map(str, values))


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
