"""Attribution and elimination in a terminal, readable at 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge.diagnosis.attribution import Attribution
from bridge.diagnosis.elimination import Elimination
from bridge.report.terminal import table


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
    """Print the least change that makes the bits equal, what to write for it, and the other changes that work."""
    console.print("[bold]How to make the bits equal[/]", highlight=False)
    for sentence in elimination.sentences():
        console.print(Padding(escape(sentence), (0, 0, 0, 2)), highlight=False)
    if elimination.best is not None:
        console.print("  Checked on this case and on another draw of random numbers.", highlight=False)


def _shares(attribution: Attribution) -> Table:
    made = table(None, "factor", ">share", ">%")
    rows = [*attribution.shares, ("unexplained", attribution.unexplained)]
    for label, share in rows:
        part = f"{100 * share / attribution.total:.1f}" if attribution.total else ""
        made.add_row(escape(label), f"{share:.3g}", part)
    made.add_section()
    made.add_row("total", f"{attribution.total:.3g}", "")
    return made


def _alone(attribution: Attribution, name: str, error: float) -> Table:
    made = table(None, "becomes", ">differ", ">max abs", ">error")
    made.add_row("as it is", "", "", f"{error:.2g}")
    for flip in attribution.flips:
        if flip.before != name:
            continue
        if flip.different is None:
            made.add_row(escape(f"{flip.name}: {flip.reason}"), "", "", "")
        elif flip.different:
            made.add_row(
                escape(flip.name),
                f"{flip.different}/{attribution.elements}",
                f"{flip.max_abs:.2g}",
                f"{flip.error:.2g}",
            )
    return made
