"""The diagnosis in a terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bridge._implementations import is_exact
from bridge.case import Case
from bridge.diagnosis import Diagnosis, Verdict
from bridge.report.answer import fix, reasons

#: Width that the figures of the table leave for a name at 80 columns.
NAME_WIDTH = 26

_STYLES = {
    Verdict.IDENTICAL: "green",
    Verdict.EXPLAINED: "green",
    Verdict.ROUNDING: "green",
    Verdict.PRECISION: "yellow",
    Verdict.INCONCLUSIVE: "yellow",
}


def print_diagnosis(
    diagnosis: Diagnosis, console: Console, compiler: Sequence[str] = (), *, verbose: bool = False
) -> None:
    """Print the question, the verdict, each implementation against the first, the cause and the fix: one screen.

    Args:
      diagnosis: what to print.
      console: where to print it.
      compiler: what is wrong with JAX's compiler, in sentences.
      verbose: also print the comparisons with the exact result, the matrix of equal bits and the test on integers.
    """
    what = "" if diagnosis.quantity == "y" else "Gradient by the input. "
    console.print(f"[bold]{what}{escape(describe(diagnosis.case))}[/]", highlight=False)
    if compiler:  # above the verdict, which may be wrong for that
        console.print("\n" + "\n".join(compiler), style="yellow", highlight=False, markup=False)
    console.print(f"\n[bold]Verdict: {styled(diagnosis.verdict)}[/]: {diagnosis.verdict.meaning}\n", highlight=False)
    exact = [name for name in diagnosis.names[1:] if is_exact(name)]
    for reference in [diagnosis.names[0], *(exact if verbose else ())]:
        console.print(_table(diagnosis, reference))
    if verbose:
        console.print(_matrix(diagnosis))
    if verbose and diagnosis.integer_tests:
        console.print(_integers(diagnosis), highlight=False, markup=False)
    for called in diagnosis.calls.values():
        console.print(f"Called as {called}.\n", highlight=False, markup=False)
    for sentence in reasons(diagnosis):
        console.print(Padding(escape(sentence), (0, 0, 1, 0)), highlight=False)
    _print_fix(diagnosis, console)


def _print_fix(diagnosis: Diagnosis, console: Console) -> None:
    """Print what to change, and the lines to copy."""
    if diagnosis.verdict is Verdict.IDENTICAL:
        return
    console.print(f"Fix: {fix(diagnosis)}", highlight=False, markup=False)
    for remedy in diagnosis.remedies:
        console.print()
        for line in remedy.code.splitlines():
            console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)


def describe(case: Case) -> str:
    """Return the case in one line."""
    g = case.geometry
    pads = g.padding_mode if g.padding_mode != "zeros" else f"padding {_short(g.padding)}"
    parts = [
        case.name or "depthwise convolution",
        f"input {_by(g.x_shape)}",
        f"kernel {_by(g.kernel_size)}",
        f"stride {_short(g.strides)}",
        pads,
        f"dilation {_short(g.kernel_dilation)}" if max(g.kernel_dilation) > 1 else "",
        f"input dilation {_short(g.input_dilation)}" if max(g.input_dilation) > 1 else "",
        f"multiplier {g.multiplier}" if g.multiplier > 1 else "",
        "bias" if case.bias is not None else "no bias",
        case.dtype.name,
    ]
    return ", ".join(filter(None, parts))


def styled(verdict: Verdict) -> str:
    """Return a verdict with its colour."""
    return f"[{_STYLES.get(verdict, 'bold red')}]{verdict}[/]"


def table(title: str | None, *columns: str) -> Table:
    """Return an empty table; the first column folds long names, and those whose heading begins with ">" stand right."""
    made = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for number, heading in enumerate(columns):
        made.add_column(
            heading.removeprefix(">"),
            justify="right" if heading.startswith(">") else "left",
            overflow="fold" if number == 0 else "ellipsis",
        )
    return made


def _table(diagnosis: Diagnosis, reference: str) -> Table:
    exact = " (the exact sum, rounded once)" if is_exact(reference) else ""
    elements = diagnosis.outputs[reference].size
    title = f"Against {escape(reference)}{exact}, {elements} elements"
    made = table(title, "implementation", "verdict", ">differ", ">max abs", ">max ULP", ">of bound")
    for name in diagnosis.names:
        if name == reference:
            continue
        c = diagnosis.between(reference, name)
        figures = (str(c.different), f"{c.max_abs:.2g}", str(c.max_ulp), f"{c.max_bound_ratio:.2g}")
        made.add_row(
            escape(_on_two_lines(name)), styled(c.verdict), *(figures if c.different else ("0", "0", "0", "0"))
        )
    return made


def _on_two_lines(name: str) -> str:
    """Break a name that is too long for its column before its settings, and after the module of a user's function."""
    return name if len(name) <= NAME_WIDTH else name.replace("[", "\n[", 1).replace(":", ":\n", 1)


def _integers(diagnosis: Diagnosis) -> str:
    """Return the result of the tests on small integers in a line."""
    wrong = [test for test in diagnosis.integer_tests if not test.passed]
    if not wrong:
        return "On small integers, where every sum is exact, all results are exact.\n"
    listed = ", ".join(f"{t.implementation} ({t.comparison.different} of {t.comparison.elements})" for t in wrong)
    return f"On small integers, where every sum is exact, these are wrong: {listed}.\n"


def _matrix(diagnosis: Diagnosis) -> Table:
    made = table("The same bits: = yes, . no", "implementation")
    for number in range(1, len(diagnosis.names) + 1):
        made.add_column(str(number), justify="center")
    for number, name in enumerate(diagnosis.names, start=1):
        same = {name, *diagnosis.identical_to(name)}
        made.add_row(escape(f"{number} {name}"), *("=" if other in same else "." for other in diagnosis.names))
    return made


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _short(values: tuple) -> str:
    """Return one value where all are the same."""
    flat = [v[0] if isinstance(v, tuple) and v[0] == v[1] else v for v in values]
    return str(flat[0]) if len(set(flat)) == 1 else str(tuple(flat)).replace(" ", "")
