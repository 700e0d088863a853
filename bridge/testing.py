"""Assertions for test suites, whose failure message is the diagnosis."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.case import Case
from bridge.diagnosis import Comparison, Diagnosis, compare

if TYPE_CHECKING:  # loaded when it is used
    from bridge._invariance.record import Invariance

#: The conditions of `assert_invariant` by default: a user of a library expects that none of them changes a bit.
EXPECTED = ("run", "batch", "position", "others", "threads")


class Failure(AssertionError):
    """A failed assertion with its reports, which the options of the pytest plugin collect.

    Attributes:
      verdict, meaning, cause, fix: the finding in words; empty where there is none.
    """

    verdict = meaning = cause = fix = ""

    def documents(self, command: str) -> dict[str, str]:
        """Return the text of each report by its file's ending; `command` repeats the test."""
        raise NotImplementedError

    def save_bundle(self, folder: Path) -> str:
        """Save the data for `jaxdw replay` in place of an older bundle; return why not, or an empty string."""
        return "the assertion compares no two arrays"


class ParityFailure(Failure):
    """Two outputs differ by more than rounding.

    Attributes:
      diagnosis: the case, both arrays and their comparison.
    """

    def __init__(self, message: str, diagnosis: Diagnosis, *, has_defaults: bool = True) -> None:
        super().__init__(message)
        self.diagnosis, self.has_defaults = diagnosis, has_defaults
        comparison = diagnosis.comparisons[0]
        self.verdict, self.meaning = str(comparison.verdict), comparison.verdict.meaning
        self.cause, self.fix = comparison.cause, comparison.fix

    def documents(self, command: str) -> dict[str, str]:
        from bridge.report import Report
        from bridge.report.html import to_html

        documents = {"json": Report.of(self.diagnosis).to_json()}
        if self.diagnosis.quantity == "y":  # the page draws outputs
            documents["html"] = to_html(self.diagnosis, command=command)
        return documents

    def save_bundle(self, folder: Path) -> str:
        from bridge.report.bundle import save_bundle

        if self.diagnosis.quantity != "y":
            return "a bundle holds outputs, not gradients"
        if not self.has_defaults:
            return "a bundle holds no `arithmetics`, `reference` or `replayed`"
        save_bundle(self.diagnosis, folder, replace=True)
        return ""


class InvarianceFailure(Failure):
    """Bits of one sample change, or a condition could not be tried.

    Attributes:
      table: the table of conditions.
    """

    verdict, meaning = "CHANGED", "the result of one sample changes with a condition"

    def __init__(self, message: str, table: Invariance) -> None:
        super().__init__(message)
        self.table = table
        self.cause = " ".join(each.explanation for each in table.changes) or "; ".join(table.undecided)

    def documents(self, command: str) -> dict[str, str]:
        return {"json": self.table.to_json()}


def assert_parity(actual: np.ndarray, expected: np.ndarray, case: Case, **options: Any) -> Comparison:
    """Assert that two outputs of the case differ by no more than rounding.

    Args:
      actual, expected: `(*batch, *output_spatial, C*M)`, NumPy arrays of the case's dtype.
      case: the input, kernel, bias and geometry that both were computed from.
      **options: as `bridge.compare` takes them: names, arithmetics, quantity and dy for gradients, and so on.

    Returns:
      The comparison: IDENTICAL, EXPLAINED or ROUNDING.

    Raises:
      ParityFailure: an AssertionError, for any weaker verdict; the message is the diagnosis.
      ValueError, TypeError: an array of another shape or dtype than the case's output.

    >>> x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((2, 2, 1, 2), np.float32)
    >>> y = np.full((1, 3, 3, 2), 4, np.float32)
    >>> assert_parity(y, y, Case(x, kernel, padding="VALID")).verdict.name
    'IDENTICAL'
    """
    __tracebackhide__ = True
    comparison = compare(actual, expected, case, **options)
    if comparison.verdict.passes:
        return comparison
    a, b = comparison.a, comparison.b
    b = f"{b} (expected)" if a == b else b
    diagnosis = Diagnosis(
        case,
        {a: actual, b: expected},
        [dataclasses.replace(comparison, b=b)],
        quantity=options.get("quantity", "y"),
        dy=options.get("dy"),
    )
    raise ParityFailure(
        explanation(comparison, case),
        diagnosis,
        has_defaults=not options.keys() & {"arithmetics", "reference", "replayed"},
    )


def assert_invariant(
    implementations: Any, case: Case, *, conditions: Sequence[str] | None = EXPECTED, **options: Any
) -> Invariance:
    """Assert that no condition changes a bit of one sample.

    Args:
      implementations: a name, an Implementation, or a list of them.
      case: its first sample is computed.
      conditions: as `bridge.invariance` takes them; None is all of them, also those that are known to change bits.
      **options: `batches` and `explain`, as `bridge.invariance` takes them.

    Returns:
      The table.

    Raises:
      InvarianceFailure: an AssertionError; the message has one line per change, with the reason.
      ValueError: an unknown name or condition.

    >>> x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((2, 2, 1, 2), np.float32)
    >>> assert_invariant("torch.conv2d", Case(x, kernel)).changes
    []
    """
    __tracebackhide__ = True
    from bridge._invariance.table import invariance
    from bridge.report.invariance import changes, describe, summary

    several = list(implementations) if isinstance(implementations, (list, tuple)) else [implementations]
    table = invariance(case, several, conditions=conditions, **options)
    if table.exit_code:
        lines = [describe(table), *changes(table), *(f"? {each}" for each in table.undecided), summary(table)]
        raise InvarianceFailure("\n".join(lines), table)
    return table


def explanation(comparison: Comparison, case: Case) -> str:
    """Return the whole diagnosis as plain text, at most some 20 lines."""
    c, g = comparison, case.geometry
    geometry = (
        f"{case.name or 'case'}: x {g.x_shape}, kernel {g.kernel_shape}, {case.dtype}, strides {g.strides}, "
        f"padding {g.padding} ({g.padding_mode}), dilation {g.kernel_dilation}"
    )
    a, b = c.own_bound_ratios
    replayed = "" if c.explained is None else f"{c.explained} of {c.different} by replaying the accumulation order"
    figures = {
        "differ": f"{c.different} of {c.elements} elements",
        "greatest": f"{c.max_abs:.3g}, {c.max_ulp} ULP, {c.max_bound_ratio:.3g} of the bound, at {c.where}",
        "of bound": f"{c.a} {a:.3g}, {c.b} {b:.3g}, each from the exact result",
        "explained": replayed,
        "cause": c.cause,
        "place": c.place,
        "fix": c.fix,
        "case": geometry,
    }
    lines = [f"{c.a} and {c.b}: {c.verdict}{f' ({c.name})' if c.name else ''}: {c.verdict.meaning}"]
    for label, text in figures.items():
        if text:
            lines += textwrap.wrap(
                textwrap.shorten(text, 330, placeholder=" ..."),
                108,
                initial_indent=f"  {label:<10}",
                subsequent_indent=" " * 12,
            )
    return "\n".join(lines)
