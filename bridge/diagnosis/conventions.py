"""CONVENTION: the named mistake whose mend makes the rest hold.

A hypothesis says what was computed instead. It is kept if y lies within the bound of its *declared* arithmetic of the
exact result of that: first on a sample of elements, half of them from outside the bound, then on all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.diagnosis.finding import Finding
from bridge.diagnosis.matching import matched
from bridge.diagnosis.mistakes import Mistake, mistakes
from bridge.diagnosis.target import Expected
from bridge.diagnosis.verdict import Verdict

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side


def convention(side: Side) -> Finding | None:
    """The first mistake that explains all of y; None if none does."""
    for mistake in _hypotheses(side):
        if _explains(side, mistake, side.sample) and _explains(side, mistake, None):
            return Finding(
                Verdict.CONVENTION, mistake.name, f"{side.name} {mistake.cause}", mistake.mend, mistake.place
            )
    return None


def _hypotheses(side: Side) -> Iterator[Mistake]:
    """Those of the call, then those that the numbers suggest. Rearrangements of a gradient are matched, not named."""
    for mistake in mistakes(side.target.case):
        if side.target.quantity == "y" or mistake.rearrange is None:
            yield mistake
    yield from matched(side)


def _explains(side: Side, mistake: Mistake, flat: np.ndarray | None) -> bool:
    target = side.target
    if mistake.case is target.case:
        whole = side.expected
        expected = Expected(*(mistake.rearrange(a) if mistake.rearrange else a for a in whole))
        return side.explained_by(expected if flat is None else expected.at(flat), flat)
    if flat is None:
        expected = target.expected(side.arithmetic, mistake.case)
        return side.explained_by(expected.rearranged(mistake.rearrange) if mistake.rearrange else expected)
    source = flat
    if mistake.rearrange is not None:
        source = mistake.rearrange(np.arange(side.y.size).reshape(side.y.shape)).ravel()[flat]
    return side.explained_by(target.expected(side.arithmetic, mistake.case, flat=source), flat)
