"""The table of conditions in a terminal, readable at 80 columns."""

from __future__ import annotations

import math

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge._invariance.record import Cell, Invariance
from bridge.report.census import geometry

#: The meaning of the cells.
LEGEND = (
    "= every bit of the reference. A number counts the elements with other bits. - does not apply. ? could not be "
    "computed. The reference is the sample alone, with every setting at its default. The rows `second of 8`, "
    "`last of 8` and `other data in 8` are compared with the first of 8."
)


def print_invariance(table: Invariance, console: Console) -> None:
    """Print the case, the table, each change with its explanation, and which implementations kept every bit."""
    console.print(f"[bold]{escape(describe(table))}[/]", highlight=False)
    console.print(
        f"{table.samples} samples, {table.samples * math.prod(table.case.output)} elements.\n", highlight=False
    )
    console.print(_table(table))
    console.print(f"\n[dim]{LEGEND}[/]\n", highlight=False)
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
        f"samples of {'x'.join(map(str, case.x[1:]))}",
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


def summary(table: Invariance) -> str:
    """Return which implementations kept every bit, and which did not."""
    kept = [name for name in table.implementations if name not in table.changed]
    told = []
    if kept:
        told.append(f"No condition changed a bit of {', '.join(kept)}.")
    if table.changed:
        told.append(f"{', '.join(table.changed)} changed.")
    if table.undecided:
        told.append(f"{len(table.undecided)} cells could not be computed.")
    return " ".join(told)


def _table(table: Invariance) -> Table:
    made = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    made.add_column("condition", no_wrap=True)
    for name in table.implementations:
        made.add_column(escape(name.replace(".", ".\n", 1).replace("_", "_\n", 1)), justify="right", overflow="fold")
    for row in table.rows:
        made.add_row(escape(row.label), *map(_styled, row.cells))
    return made


def _styled(cell: Cell) -> str:
    style = {"=": "green", "-": "dim", "?": "yellow"}.get(cell.symbol, "red")
    number = f" ({cell.change + 1})" if cell.change is not None else ""
    return f"[{style}]{cell.symbol}{number}[/]"
