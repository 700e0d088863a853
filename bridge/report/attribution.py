"""Attribution and elimination in a terminal, readable at 80 columns."""

from __future__ import annotations

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge.diagnosis.attribution import Attribution
from bridge.diagnosis.elimination import Elimination


def print_attribution(attribution: Attribution, console: Console) -> None:
    """Print the share of each setting and what is unexplained; then every setting changed alone."""
    differ = f"{attribution.different} of {attribution.elements} elements"
    console.print(f"{attribution.a} and {attribution.b} differ in {differ}.", markup=False, highlight=False)
    console.print(f"Share of each setting, in {attribution.unit}:", highlight=False)
    console.print(_shares(attribution))
    for cell in attribution.configurations:
        if cell.reason:
            changed = ", ".join(cell.changed)
            console.print(f"  Could not be run ({changed} changed): {cell.reason}", highlight=False, markup=False)
    for name, error in dict(zip((attribution.a, attribution.b), attribution.errors)).items():
        console.print(f"{name} with one setting changed, where that changes a bit:", markup=False, highlight=False)
        console.print(_alone(attribution, name, error))


def print_elimination(elimination: Elimination, console: Console) -> None:
    """Print the cheapest change that makes the bits equal, what to write for it, and the other changes that work."""
    console.print("[bold]How to make the bits equal[/]", highlight=False)
    for sentence in elimination.sentences():
        console.print(Padding(escape(sentence), (0, 0, 0, 2)), highlight=False)
    if elimination.best is not None:
        console.print("  Checked on this case and on another draw of random numbers.", highlight=False)


def _shares(attribution: Attribution) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("factor", overflow="fold")
    for heading in ("share", "%"):
        table.add_column(heading, justify="right")
    rows = [*attribution.shares, ("unexplained", attribution.unexplained)]
    for label, share in rows:
        part = f"{100 * share / attribution.total:.1f}" if attribution.total else ""
        table.add_row(escape(label), f"{share:.3g}", part)
    table.add_section()
    table.add_row("total", f"{attribution.total:.3g}", "")
    return table


def _alone(attribution: Attribution, name: str, error: float) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("becomes", overflow="fold")
    for heading in ("differ", "max abs", "error"):
        table.add_column(heading, justify="right")
    table.add_row("as it is", "", "", f"{error:.2g}")
    for flip in attribution.flips:
        if flip.side != name:
            continue
        if flip.different is None:
            table.add_row(escape(f"{flip.name}: {flip.reason}"), "", "", "")
        elif flip.different:
            table.add_row(
                escape(flip.name),
                f"{flip.different}/{attribution.elements}",
                f"{flip.max_abs:.2g}",
                f"{flip.error:.2g}",
            )
    return table
