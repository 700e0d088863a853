"""The result of the conformance kit in a terminal, readable at 80 columns."""

from __future__ import annotations

import io

import rich.box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bridge._conformance.result import CheckResult, Conformance, Failure
from bridge.console import Console

_STYLES = {"passed": "green", "failed": "red", "skipped": "dim"}


def rendered(result: Conformance) -> RenderableType:
    """Return the header, the table, the failures and the summary."""
    parts: list[RenderableType] = [Text(describe(result), style="bold")]
    if result.refused:
        parts.append(
            Text(f"Not tested, since the function does not take it: {', '.join(result.refused)}.", style="dim")
        )
    parts.append(_table(result))
    for number, failure in enumerate(result.failures, start=1):
        first, *others = failure_lines(failure)
        parts.append(Text())
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(f"{number}."), Text(first, style="red"))
        for line in others:
            grid.add_row("", Text(line))
        parts.append(grid)
    parts.append(Text(f"\n{summary(result)}", style="bold"))
    return Group(*parts)


def print_conformance(result: Conformance, console: Console) -> None:
    """Print the result."""
    console.print(rendered(result), highlight=False)


def as_text(result: Conformance) -> str:
    """Return the result as plain text."""
    console = Console(file=io.StringIO(), width=100, no_color=True, highlight=False)
    console.print(rendered(result), highlight=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def describe(result: Conformance) -> str:
    """Return what was tested, in one line."""
    counts = "full counts" if result.full else "a sample"
    return f"{result.function}: {result.kind} convolution in {result.framework}, seed {result.seed}, {counts}"


def summary(result: Conformance) -> str:
    """Return the verdict in one line."""
    failed = [each.name for each in result.checks if each.status == "failed"]
    passed = sum(each.status == "passed" for each in result.checks)
    counts = f"{passed} of {len(result.checks)} checks passed"
    skipped = len(result.checks) - passed - len(failed)
    counts += f", {skipped} skipped" if skipped else ""
    return f"{counts}; {result.verdict} in {', '.join(failed)}" if failed else f"{counts}; no check failed"


def failure_lines(failure: Failure) -> list[str]:
    """Return the failure in words: the check with its verdict, then what is wrong, and the smallest case."""
    case, g = failure.case, failure.case.geometry
    lines = [f"{failure.check}: {failure.sentence}"]
    if failure.actual is not None and failure.expected is not None and failure.where is not None:
        at = failure.where
        lines.append(
            f"{failure.different} of {failure.actual.size} elements of {failure.quantity} are wrong: "
            f"{failure.actual[at]} instead of {failure.expected[at]} at {at}"
        )
    lines += [f"fix: {failure.fix}"] if failure.fix else []
    lines += [f"called as {failure.called}"] if failure.called else []
    lines.append(
        f"smallest case: x {g.x_shape}, kernel {g.kernel_shape}, {case.dtype}, strides {g.strides}, "
        f"padding {g.padding}, dilation {g.kernel_dilation}"
        + (f", input dilation {g.input_dilation}" if max(g.input_dilation) > 1 else "")
        + (", with bias" if case.bias is not None else "")
    )
    return lines


def _table(result: Conformance) -> Table:
    made = Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    made.add_column("check", no_wrap=True)
    made.add_column("result", no_wrap=True)
    made.add_column("problems", justify="right", no_wrap=True)
    made.add_column("note", overflow="fold")
    for check in result.checks:
        style = _STYLES[check.status]
        made.add_row(check.name, f"[{style}]{check.status}[/]", _problems(check), escape(_note(check)))
    return made


def _problems(check: CheckResult) -> str:
    """Return how many problems were solved, and how many of them wrongly."""
    outcome = check.outcome
    failed = f"{outcome.failed} of " if outcome.failed else ""
    return f"{failed}{outcome.tried}" if outcome.tried else "-"


def _note(check: CheckResult) -> str:
    """Return why a check was skipped, or what else is to be known."""
    outcome = check.outcome
    told = [outcome.reason] if outcome.reason else []
    told += [outcome.note] if outcome.note else []
    told += [f"{outcome.refused} problems refused"] if outcome.refused > 1 else []
    return "; ".join(told)
