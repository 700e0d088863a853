"""An assertion for test suites, whose failure message is the diagnosis."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from bridge.case import Case
from bridge.diagnosis import Comparison, compare


def assert_parity(actual: np.ndarray, expected: np.ndarray, case: Case, **options: Any) -> Comparison:
    """Assert that two outputs of the case differ by no more than rounding.

    Args:
      actual, expected: `(*batch, *output_spatial, C*M)`, NumPy arrays of the case's dtype.
      case: the input, kernel, bias and geometry that both were computed from.
      **options: as `bridge.compare` takes them: names, arithmetics, quantity and dy for gradients, and so on.

    Returns:
      The comparison: IDENTICAL, EXPLAINED or ROUNDING.

    Raises:
      AssertionError: any weaker verdict; the message is the diagnosis.
      ValueError, TypeError: an array of another shape or dtype than the case's output.

    >>> x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((2, 2, 1, 2), np.float32)
    >>> y = np.full((1, 3, 3, 2), 4, np.float32)
    >>> assert_parity(y, y, Case(x, kernel, padding="VALID")).verdict.name
    'IDENTICAL'
    """
    __tracebackhide__ = True
    comparison = compare(actual, expected, case, **options)
    if not comparison.verdict.passes:
        raise AssertionError(explanation(comparison, case))
    return comparison


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
