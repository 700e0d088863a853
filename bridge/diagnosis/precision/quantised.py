"""Search for operands that were quantised to 8-bit integers by one of the customary rules.

A rule gives the scale and the zero point of an array. The operands are quantised by it, and the exact result of that is
computed. y must lie within the bound of the declared arithmetic, plus the four roundings of scaling and rescaling.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import WORDS, Expected, exact_output
from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class QuantisationRule:
    """A rule for the integers of an array.

    Attributes:
      words: the rule in words.
      levels: the greatest integer: 127 for signed integers, 255 for unsigned ones with a zero point.
      axis: the axis of which each index has its own scale; None for one scale for all.
    """

    words: str
    levels: int
    axis: int | None = None

    def quantise(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the values of the array's integers, computed in `dtype`."""
        wide = array.astype(dtype)
        over = None if self.axis is None else tuple(a for a in range(array.ndim) if a != self.axis % array.ndim)
        top, bottom = (reduce(wide, axis=over, keepdims=True, initial=0).astype(dtype) for reduce in (np.max, np.min))
        levels = dtype.type(self.levels)
        if self.levels < 255:
            scale = np.maximum(top, -bottom) / levels
            scale = np.where(scale > 0, scale, dtype.type(1)).astype(dtype)
            return (np.clip(np.rint(wide / scale), -levels, levels) * scale).astype(dtype)
        scale = (top - bottom) / levels
        scale = np.where(scale > 0, scale, dtype.type(1)).astype(dtype)
        zero = np.rint(-bottom / scale)
        return ((np.clip(np.rint(wide / scale) + zero, 0, levels) - zero) * scale).astype(dtype)


_ONE = (
    QuantisationRule("one scale, max|{0}|/127", 127),
    QuantisationRule("one scale and a zero point, from its least to its greatest", 255),
)
X_RULES = (
    *_ONE,
    QuantisationRule("a scale for each channel", 127, -1),
    QuantisationRule("a scale for each batch entry", 127, 0),
)
KERNEL_RULES = (*_ONE[:1], QuantisationRule("a scale for each output channel", 127, -1), *_ONE[1:])


def with_rule(case: Case, name: str, rule: QuantisationRule) -> Case:
    """Return the case with one operand quantised, in float32 for half precision."""
    wide = np.dtype(np.float32) if case.dtype.itemsize == 2 else case.dtype
    operands = {each: getattr(case, each) for each in ("x", "kernel", "bias")}
    operands[name] = rule.quantise(operands[name], wide)
    return case.replace(**{each: None if a is None else a.astype(wide) for each, a in operands.items()})


def quantised(output: Output) -> Finding | None:
    """Return the rule by which quantised operands predict y; None if none does."""
    if output.target.quantity != "y" or not np.isfinite(output.target.case.x.astype(np.float64)).all():
        return None
    known: dict[tuple[str, QuantisationRule, np.dtype], np.ndarray] = {}
    for of_x, of_kernel in itertools.product((None, *X_RULES), (None, *KERNEL_RULES)):
        rules = {name: rule for name, rule in (("x", of_x), ("kernel", of_kernel)) if rule is not None}
        for case in _cases(output, rules, known):
            if _predicts(output, case, output.sample) and _predicts(output, case, None, proved=True):
                return _finding(output, rules)
    return None


def _cases(
    output: Output, rules: dict[str, QuantisationRule], known: dict[tuple[str, QuantisationRule, np.dtype], np.ndarray]
) -> Iterator[Case]:
    """Yield the case with quantised operands; for half precision in float32, rounded from it, and in it throughout."""
    case = output.target.case
    if not rules:
        return
    half = case.dtype.itemsize == 2
    wide = np.dtype(np.float32) if half else case.dtype
    for work, kept in ((wide, wide), (wide, case.dtype), (case.dtype, case.dtype)) if half else ((wide, wide),):
        operands = {name: getattr(case, name) for name in ("x", "kernel", "bias")}
        for name, rule in rules.items():
            if (name, rule, work) not in known:
                known[name, rule, work] = rule.quantise(operands[name], work)
            operands[name] = known[name, rule, work]
        yield case.replace(**{name: None if a is None else a.astype(kept) for name, a in operands.items()})


def _predicts(output: Output, case: Case, flat: np.ndarray | None, proved: bool = False) -> bool:
    """Return whether y, or its elements `flat`, is that of the case; if `proved`, also by no accident."""
    total = exact_output(case, flat)
    expected = Expected.of(total, output.arithmetic)
    u = output.arithmetic.accumulator.unit_roundoff
    expected = Expected(expected.reference, expected.allowed + 4 * u * total.magnitude)
    return output.explained_by(expected, flat) and (not proved or output.is_proved_by(expected))


def _finding(output: Output, rules: dict[str, QuantisationRule]) -> Finding:
    words = " and ".join(
        f"{WORDS[name]} quantised to int8 with {rule.words.format(name)}" for name, rule in rules.items()
    )
    return Finding(
        Verdict.PRECISION,
        "int8 inputs",
        f"{output.name} was computed with {words}; "
        f"the rest is within the bound of {output.arithmetic.accumulator.name}",
        f"compute {output.name} without quantisation, or quantise both implementations by the same rule",
        f"inputs: {', '.join(rules)}",
    )
