"""CONVENTION: the named mistake whose fix makes the rest hold.

A hypothesis says what was computed instead. It is kept if y lies within the bound of its *declared* arithmetic of the
exact result of that: first on a sample of elements, half of them from outside the bound, then on all. Before that,
`Screen` drops most hypotheses at little cost. One mistake is preferred to two.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.diagnosis import pointwise
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.matching import matched
from bridge.diagnosis.mistakes import Mistake, mistakes, pairs
from bridge.diagnosis.screening import Screen
from bridge.diagnosis.target import Expected, products, sampled_products
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import exact_sum

if TYPE_CHECKING:
    from bridge.case import Case
    from bridge.diagnosis.side import Side

#: CPU seconds after which no more pairs of mistakes are tried.
_SECONDS = 4.0
#: Elements, and at most 1% of all, that may contradict a mistake for it to be told beside them.
_FEW = 4


def convention(side: Side) -> Finding | None:
    """The first mistake that explains all of y; None if none does."""
    return next((_finding(side, mistake) for mistake in _single(side) if _explains(side, mistake)), None)


def conventions(side: Side) -> Finding | None:
    """The first two mistakes that together explain all of y, within the time limit; None if none do."""
    if side.target.quantity != "y":
        return None
    return next((_finding(side, mistake) for mistake in _double(side) if _explains(side, mistake)), None)


def named_within(side: Side, inside: np.ndarray) -> Mistake | None:
    """The first mistake that explains y at the elements where `inside`, among those that move nothing."""
    flat = np.flatnonzero(inside & np.isfinite(side.y))
    if side.target.quantity != "y" or not side.target.affordable:
        return None
    few = np.random.default_rng(4).permutation(flat)[: len(side.sample)]
    for mistake in mistakes(side.target.case):
        if mistake.rearrange is None and not any(_unexplained(side, mistake, chosen).any() for chosen in (few, flat)):
            return mistake
    return None


def _finding(side: Side, mistake: Mistake) -> Finding:
    return Finding(Verdict.CONVENTION, mistake.name, f"{side.name} {mistake.cause}", mistake.fix, mistake.place)


def _single(side: Side) -> Iterator[Mistake]:
    """Those of the call, then those that the numbers suggest. Rearrangements of a gradient are matched, not named."""
    is_output = side.target.quantity == "y"
    screen = Screen.of(side)
    for mistake in mistakes(side.target.case):
        if screen.passes(screen.expected(mistake)) if is_output else mistake.rearrange is None:
            yield mistake
    yield from matched(side)
    if is_output:
        yield from _functions(side, screen, Mistake("", "", "", side.target.case))
        yield from pointwise.applied_before(side, screen.reads)
        yield from pointwise.affine(side)


def _functions(side: Side, screen: Screen, first: Mistake) -> Iterator[Mistake]:
    """A function after a mistake, or after none."""
    expected = screen.expected(first)
    u = side.arithmetic.output.unit_roundoff
    functions = [*pointwise.FUNCTIONS, *(pointwise.leaky(side) if first.case is side.target.case else ())]
    near = [function for function in functions if screen.passes(function.after(expected, u))]
    for number, function in enumerate(near):
        mistake = pointwise.applied_after(first, [function], side)
        others = [
            other for other in near[number + 1 :] if _explains(side, pointwise.applied_after(first, [other], side))
        ]
        yield pointwise.applied_after(first, [function, *others], side) if others else mistake


def _double(side: Side) -> Iterator[Mistake]:
    shape = side.target.case.geometry.output_shape
    screen = Screen.of(side)
    until = time.process_time() + _SECONDS
    for first, seconds in pairs(side.target.case):
        if first.case.geometry.output_shape == shape:
            yield from _functions(side, screen, first)
            yield from screen.scaled(first)
        for mistake in seconds():
            if time.process_time() > until:
                return
            if mistake.case.geometry.output_shape == shape and screen.passes(screen.expected(mistake)):
                yield mistake


def _explains(side: Side, mistake: Mistake) -> bool:
    """On the sample first, then on all. One that a few elements contradict is kept in mind, and explains nothing."""
    if np.count_nonzero(_unexplained(side, mistake, side.sample)) > _FEW:
        return False
    left = _unexplained(side, mistake, None)
    if not left.any():
        return mistake.is_exact or _is_seen(side, mistake)
    if np.count_nonzero(left) <= min(_FEW, left.size // 100):
        side.nearly.append((mistake, left))
    return False


def _is_seen(side: Side, mistake: Mistake) -> bool:
    """Whether what the mistake allows, for roundings of its own, would not explain y without the mistake as well."""
    without = Expected(side.expected.reference, _allowing(side, mistake, None).allowed)
    return bool(np.count_nonzero(side.unexplained_by(without)) > 0.1 * np.count_nonzero(side.outside))


def _unexplained(side: Side, mistake: Mistake, flat: np.ndarray | None) -> np.ndarray:
    return side.unexplained_by(_allowing(side, mistake, flat), flat)


def _allowing(side: Side, mistake: Mistake, flat: np.ndarray | None) -> Expected:
    """What the mistake gives."""
    expected = _expected(side, mistake, flat)
    if mistake.after is not None:
        channels = np.arange(side.y.shape[-1])
        here = np.broadcast_to(channels, side.y.shape) if flat is None else flat % len(channels)
        expected = mistake.after(expected, here)
    return expected


def _expected(side: Side, mistake: Mistake, flat: np.ndarray | None) -> Expected:
    """What the mistake gives, before a function of each element."""
    target, rearrange = side.target, mistake.rearrange
    if mistake.case is target.case:
        expected = side.expected if rearrange is None else side.expected.rearranged(rearrange)
        return expected if flat is None else expected.at(flat)
    if flat is None:
        expected = target.expected(side.arithmetic, mistake.case)
        if mistake.error_of_x is not None:
            expected = _with_error(expected, exact_sum(products(_of_errors(mistake), "y", None)).reference)
        return expected if rearrange is None else expected.rearranged(rearrange)
    source = flat
    if rearrange is not None:
        source = rearrange(np.arange(side.y.size).reshape(side.y.shape)).ravel()[flat]
    expected = target.expected(side.arithmetic, mistake.case, flat=source)
    if mistake.error_of_x is not None:
        at = np.unravel_index(source, side.y.shape)
        expected = _with_error(expected, exact_sum(sampled_products(_of_errors(mistake), at)).reference)
    return expected


def _of_errors(mistake: Mistake) -> Case:
    """The case whose output is how far errors of x move that of the mistake."""
    assert mistake.error_of_x is not None
    case = mistake.case
    return case.replace(
        x=mistake.error_of_x.astype(np.float64), kernel=np.abs(case.kernel.astype(np.float64)), bias=None
    )


def _with_error(expected: Expected, error: np.ndarray) -> Expected:
    return Expected(expected.reference, expected.allowed + error * (1 + 2.0**-40))
