"""PRECISION: operands that were quantised to 8-bit integers by one of the customary rules.

A rule says what scale, and what zero point, an array gets. The operands are quantised by it and the exact result of
that is computed; y must lie within the bound of the declared arithmetic, and of the four roundings that scaling and
rescaling may add.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.case import Case
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.target import WORDS, Expected, products, sampled_products
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import exact_sum

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side


@dataclasses.dataclass(frozen=True)
class Rule:
    """How an array becomes integers.

    Attributes:
      words: the rule in words.
      levels: the greatest integer: 127 for signed integers, 255 for unsigned ones with a zero point.
      axis: the axis of which each index has its own scale; None for one scale.
    """

    words: str
    levels: int
    axis: int | None = None

    def quantise(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The array as its integers stand for it, computed in `dtype`."""
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


_ONE = (Rule("one scale, max|{0}|/127", 127), Rule("one scale and a zero point, from its least to its greatest", 255))
_OF_X = (*_ONE, Rule("a scale for each channel", 127, -1), Rule("a scale for each batch entry", 127, 0))
_OF_KERNEL = (*_ONE[:1], Rule("a scale for each output channel", 127, -1), *_ONE[1:])


def quantised(side: Side) -> Finding | None:
    """The rule by which quantised operands predict y; None if none does."""
    if side.target.quantity != "y" or not np.isfinite(side.target.case.x.astype(np.float64)).all():
        return None
    known: dict[tuple[str, Rule, np.dtype], np.ndarray] = {}
    for of_x, of_kernel in itertools.product((None, *_OF_X), (None, *_OF_KERNEL)):
        rules = {name: rule for name, rule in (("x", of_x), ("kernel", of_kernel)) if rule is not None}
        for case in _cases(side, rules, known):
            if _predicts(side, case, side.sample) and _predicts(side, case, None):
                return _finding(side, rules)
    return None


def _cases(side: Side, rules: dict[str, Rule], known: dict[tuple[str, Rule, np.dtype], np.ndarray]) -> Iterator[Case]:
    """The case with quantised operands; of half precision as float32, rounded to it again, and in it throughout."""
    case = side.target.case
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


def _predicts(side: Side, case: Case, flat: np.ndarray | None) -> bool:
    shape = case.geometry.output_shape
    terms = products(case, "y", None) if flat is None else sampled_products(case, np.unravel_index(flat, shape))
    total = exact_sum(terms)
    expected = Expected.of(total, side.arithmetic)
    u = side.arithmetic.accumulator.unit_roundoff
    return side.explained_by(Expected(expected.reference, expected.allowed + 4 * u * total.magnitude), flat)


def _finding(side: Side, rules: dict[str, Rule]) -> Finding:
    words = " and ".join(
        f"{WORDS[name]} quantised to int8 with {rule.words.format(name)}" for name, rule in rules.items()
    )
    return Finding(
        Verdict.PRECISION,
        "int8 inputs",
        f"{side.name} was computed with {words}; the rest is within the bound of {side.arithmetic.accumulator.name}",
        f"compute {side.name} without quantisation, or quantise both sides alike",
        f"inputs: {', '.join(rules)}",
    )
