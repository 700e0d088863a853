"""An audit in a terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Mapping

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge.audit import AuditFinding
from bridge.report.audit_schema import AuditReport
from bridge.report.census import geometry

#: Shown with every estimate.
ESTIMATES = (
    "Time and cycles are two estimates by the compiler. Time is its optimal_seconds for the whole program. Cycles are "
    "its estimated_cycles, summed over the steps: from a model of costs, and for hand-written kernels from their "
    "instructions. They do not agree with each other, and neither is a measurement."
)

#: The meaning of a question mark.
OPEN = "A question mark: hardware, a library or a hand-written kernel decides, and the program does not say what."

#: The two counts of bytes.
BYTES = (
    "Temporaries are what the compiler allocates in the main memory, over the padded input without tiles. Bytes moved "
    "are our count: the operands and results of each step that lie there, once, in whole tiles."
)

#: The compiler's own count.
ACCESSED = "Bytes accessed are the compiler's count, which includes what is read again and what stays on the chip."


def print_audit(report: AuditReport, console: Console) -> None:
    """Print the convolution, the figures, and each method with its hazards."""
    console.print(f"[bold]{escape(describe(report))}[/]", highlight=False)
    console.print(escape(compiled_for(report)), highlight=False)
    if any(not each.error for each in report.findings):
        console.print(_table(report))
    for each in report.findings:
        told, style = (each.error, "red") if each.error else (in_words(each, report), "default")
        line = f"[bold]{escape(each.label)}[/] [{style}]{escape(told)}[/]"
        console.print(Padding(line, (0, 0, 0, 2), expand=False), highlight=False)
        for hazard in [] if repeats(each, report) else each.hazards:
            bullet = Table.grid(padding=(0, 1))
            bullet.add_row("-", escape(hazard))
            console.print(Padding(bullet, (0, 0, 0, 4), expand=False), highlight=False)
    console.print(f"\n{escape(summary(report))}", highlight=False)
    console.print(f"\n[dim]{notes(report)}[/]", highlight=False)


def notes(report: AuditReport) -> str:
    """Explain the figures that are shown."""
    said = {
        BYTES: True,
        ACCESSED: _is_counted(report),
        ESTIMATES: _is_estimated(report),
        OPEN: any(each.is_open for each in report.findings),
    }
    return " ".join(note for note, applies in said.items() if applies)


def describe(report: AuditReport) -> str:
    """Describe the convolution in one line."""
    case = report.case
    parts = [
        "gradients of a depthwise convolution" if report.gradient else "depthwise convolution",
        f"input {'x'.join(map(str, case.x))}",
        f"kernel {geometry(case)}",
        "no bias" if case.bias is None else "bias",
        case.dtype,
    ]
    return ", ".join(parts)


def compiled_for(report: AuditReport) -> str:
    """Name the platform and the compiler, and say that nothing ran."""
    compiler = {"tpu": ["libtpu"], "gpu": ["jax-cuda13-plugin", "jax-cuda12-plugin"]}.get(report.platform.backend, [])
    used = [f"{name} {report.environment[name]}" for name in ["jaxlib", *compiler] if name in report.environment]
    return (
        f"Compiled for {report.platform.about}, at precision {report.precision}, by {', '.join(used)}; nothing was run."
    )


def summary(report: AuditReport) -> str:
    """Group the methods in sentences: which keep the given type, which round, and which are not known."""
    groups: dict[str, list[str]] = {}
    for each in report.findings:
        if each.error:
            said = "not compiled"
        elif each.roundings:
            said = f"{'may round' if each.is_open else 'rounded'} to {each.narrowest}"
        elif each.kernels:
            said = f"{report.case.dtype} kept outside of hand-written kernels, which are not read"
        else:
            said = f"{report.case.dtype} kept"
        groups.setdefault(said, []).append(each.label)
    return " ".join(f"{', '.join(names)}: {said}." for said, names in groups.items())


def in_words(finding: AuditFinding, report: AuditReport) -> str:
    """Describe the program by its passes over arrays as large as the output."""
    if repeats(finding, report):
        return f"the same as {finding.method}"
    return finding.form or "no pass over an array as large as the output"


def repeats(finding: AuditFinding, report: AuditReport) -> bool:
    """Return true for "auto" if the report also has the method that it stands for."""
    return bool(finding.method) and any(each.way == finding.method for each in report.findings)


def size(number: float | None) -> str:
    """Bytes in decimal units.

    >>> size(28906560.0), size(0), size(None)
    ('28.9 MB', '0 B', '')
    """
    return _in_units(number, {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 0})


def count(number: float | None) -> str:
    """A count in thousands or millions.

    >>> count(3655860), count(990), count(None)
    ('3.66 M', '990', '')
    """
    return _in_units(number, {"M": 1e6, "k": 1e3, "": 0})


def seconds(number: float | None) -> str:
    """Seconds in milliseconds or microseconds.

    >>> seconds(6.97e-05), seconds(0.0015), seconds(None)
    ('69.7 us', '1.5 ms', '')
    """
    return _in_units(None if number is None else number * 1e6, {"ms": 1e3, "us": 0})


def _in_units(number: float | None, units: Mapping[str, float]) -> str:
    """Return a number in its largest unit, with three digits; the last unit is 1."""
    if number is None:
        return ""
    name, unit = next((name, unit) for name, unit in units.items() if number >= unit)
    return f"{number / (unit or 1):.3g} {name}".strip()


def _table(report: AuditReport) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    widest = max(len(each.label) for each in report.findings)
    table.add_column("method", overflow="fold", min_width=min(widest, 16))
    table.add_column("narrowest\ntype", no_wrap=True)
    accessed = ["bytes\naccessed"] if _is_counted(report) else []
    estimates = ["time,\nest.", "cycles,\nest."] if _is_estimated(report) else []
    for name in ("tempo-\nraries", "over\ninput", *accessed, "bytes\nmoved", *estimates):
        table.add_column(name, justify="right", no_wrap=True)
    for each in report.findings:
        if each.error:
            table.add_row(escape(each.label), "[red]failed[/]")
            continue
        figures = [size(each.temporary_bytes), f"{each.temporaries:.2f}"]
        figures += [size(each.bytes_accessed)] * len(accessed) + [size(each.memory_bytes)]
        figures += [seconds(each.optimal_seconds), count(each.estimated_cycles)] if estimates else []
        style = "yellow" if each.roundings else "green" if not each.kernels else "default"
        table.add_row(escape(each.label), f"[{style}]{each.type_seen}[/]", *figures)
    return table


def _is_counted(report: AuditReport) -> bool:
    return any(each.bytes_accessed is not None for each in report.findings)


def _is_estimated(report: AuditReport) -> bool:
    return any(each.optimal_seconds is not None or each.estimated_cycles is not None for each in report.findings)
