"""Predictions of a mistake for each element of an output."""

from __future__ import annotations

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected, exact_output


def unexplained(output: Output, mistake: Mistake, flat: np.ndarray | None) -> np.ndarray:
    """Elements of y that the mistake does not give, bool; of the elements `flat` only, if given."""
    return output.unexplained_by(predicted(output, mistake, flat), flat)


def is_seen(output: Output, expected: Expected) -> bool:
    """Return whether y contradicts the case, even with all that a mistake allows for roundings of its own."""
    without = Expected(output.expected.reference, expected.allowed)
    return bool(np.count_nonzero(output.unexplained_by(without)) > 0.1 * np.count_nonzero(output.outside))


def predicted(output: Output, mistake: Mistake, flat: np.ndarray | None = None) -> Expected:
    """Return what the mistake gives; at the elements `flat` only, if given."""
    expected = _before_function(output, mistake, flat)
    if mistake.after is None:
        return expected
    channels = np.arange(output.y.shape[-1])
    return mistake.after(expected, np.broadcast_to(channels, output.y.shape) if flat is None else flat % len(channels))


def _before_function(output: Output, mistake: Mistake, flat: np.ndarray | None) -> Expected:
    target, rearrange = output.target, mistake.rearrange
    if mistake.case is target.case:
        expected = output.expected if rearrange is None else output.expected.rearranged(rearrange)
        return expected if flat is None else expected.at(flat)
    source = None if flat is None else mistake.source_of(flat, output.y.shape)
    expected = target.expected(output.arithmetic, mistake.case, flat=source)
    if mistake.error_of_x is not None and target.quantity == "y":
        error = exact_output(_of_errors(mistake.case, mistake.error_of_x), source).reference
        expected = Expected(expected.reference, expected.allowed + error * (1 + 2.0**-40))
    return expected.rearranged(rearrange) if flat is None and rearrange is not None else expected


def _of_errors(case: Case, error_of_x: np.ndarray) -> Case:
    """Case whose output is how far errors of x move that of `case`."""
    return case.replace(x=error_of_x.astype(np.float64), kernel=np.abs(case.kernel.astype(np.float64)), bias=None)
