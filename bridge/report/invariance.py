"""The table of conditions in a terminal, readable at 80 columns."""

from __future__ import annotations

import math

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge._invariance.record import Cell, Invariance, Row
from bridge.report.census import geometry

#: The meaning of the cells.
LEGEND = (
    "= the bits of the reference. A number counts the elements with other bits, (1) is the line that explains them. "
    "The reference is the sample alone, with every setting at its default; for the position and the other data in a "
    "batch it is the first sample of that batch."
)


def print_invariance(table: Invariance, console: Console) -> None:
    """Print the case, the table, each change with its explanation, and which implementations kept every bit."""
    console.print(f"[bold]{escape(describe(table))}[/]", highlight=False)
    elements = table.samples * math.prod(table.case.output)
    console.print(f"Each cell compares {elements} elements; samples: {table.samples}.\n", highlight=False)
    console.print(_table(table))
    console.print(f"\n[dim]{escape(notes(table))}[/]\n", highlight=False)
    for line in changes(table):
        console.print(Padding(escape(line), (0, 0, 1, 0)), highlight=False)
    for line in table.undecided:
        console.print(escape(f"? {line}"), style="yellow", highlight=False)
    console.print(f"[bold]{escape(summary(table))}[/]", highlight=False)


def describe(table: Invariance) -> str:
    """Return the sample and the layer in one line."""
    case = table.case
    parts = [
        case.name or "depthwise convolution",
        f"one sample of {'x'.join(map(str, case.x[1:]))}",
        f"kernel {geometry(case)}",
        "no bias" if case.bias is None else "bias",
        case.dtype,
    ]
    return ", ".join(parts)


def changes(table: Invariance) -> list[str]:
    """Return one line per change: who changes, when, in how many elements, and why."""
    return [
        f"{number}. {each.implementation} changes with {', '.join(each.conditions)}: {each.different} of "
        f"{each.elements} elements. {each.explanation}"
        f"{' Replaying both orders gives every bit.' if each.explained else ''}"
        for number, each in enumerate(table.changes, start=1)
    ]


def notes(table: Invariance) -> str:
    """Explain the cells, and say why some conditions do not apply."""
    reasons = dict.fromkeys(cell.reason for row in _shown(table) for cell in row.cells if not cell.applies)
    told = [f"- does not apply: {'; '.join(reasons)}."] if reasons else []
    return " ".join([LEGEND, *told, *(["? could not be computed."] if table.undecided else [])])


def summary(table: Invariance) -> str:
    """Return which implementations kept every bit, and which did not."""
    open_ = {cell.implementation for row in table.rows for cell in row.cells if cell.applies and cell.different is None}
    kept = [name for name in table.implementations if name not in table.changed and name not in open_]
    told = []
    if kept:
        told.append(f"No condition changed a bit of {', '.join(kept)}.")
    if table.changed:
        told.append(f"{', '.join(table.changed)} changed.")
    if table.undecided:
        told.append(f"Not every cell could be computed for {', '.join(sorted(open_))}.")
    return " ".join(told)


def _table(table: Invariance) -> Table:
    made = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    made.add_column("condition", no_wrap=True)
    for name in table.implementations:
        made.add_column(escape(name.replace(".", ".\n", 1).replace("_", "_\n", 1)), justify="right", overflow="fold")
    for row in _shown(table):
        made.add_row(escape(row.label), *map(_styled, row.cells))
    return made


def _shown(table: Invariance) -> list[Row]:
    """Return the rows that apply to an implementation; all rows if none does."""
    return [row for row in table.rows if any(cell.applies for cell in row.cells)] or table.rows


def _styled(cell: Cell) -> str:
    style = {"=": "green", "-": "dim", "?": "yellow"}.get(cell.symbol, "red")
    number = f" ({cell.change + 1})" if cell.change is not None else ""
    return f"[{style}]{cell.symbol}{number}[/]"
