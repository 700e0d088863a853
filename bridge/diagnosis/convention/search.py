"""CONVENTION: search for the named mistake whose fix makes the rest hold.

A hypothesis says what was computed instead. It is kept if y lies within the bound of its *declared* arithmetic of the
exact result of that. It is tested on a sample of elements first, half of them from outside the bound, then on all.
Before that, `Screen` drops most hypotheses at little cost. One mistake is preferred to two.

A few wrong elements may agree with some mistake by accident. So a mistake also needs evidence (`Output.is_proved_by`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from bridge.diagnosis.convention.affine import affine, scaled
from bridge.diagnosis.convention.catalogue import mistakes, pairs
from bridge.diagnosis.convention.functions import FUNCTIONS, applied_after, applied_before, followed_by_bias, leaky
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.convention.permutations import permutations
from bridge.diagnosis.convention.prediction import is_seen, predicted, unexplained
from bridge.diagnosis.convention.screening import Screen
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.verdict import Verdict

#: CPU seconds after which no more pairs of mistakes are tried.
_SECONDS = 4.0
#: Screened elements that must be far from the case for a mistake in a lower precision.
_FAR = 8
#: Elements, and at most 1% of all, that may contradict a mistake for it to be a near miss.
_FEW = 4


class Search:
    """Search for the mistakes that explain one output.

    Attributes:
      output: the output.
      near_misses: the mistakes that explain all but a few elements, and where these are, from the searches so far.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self.near_misses: list[tuple[Mistake, np.ndarray]] = []
        self._case = output.target.case
        self._screen = Screen(output)
        self._is_y = output.target.quantity == "y"

    def one_mistake(self) -> Finding | None:
        """Return the first mistake that explains all of y; None if none does."""
        return self._first(self._single())

    def two_mistakes(self) -> Finding | None:
        """Return the first two mistakes that together explain all of y, within the time limit; None if none do."""
        return self._first(self._double()) if self._is_y else None

    def nearly_computed(self) -> Iterator[Mistake]:
        """Yield the mistakes in the call that come as near to y as a lower precision may leave them; the case does not.

        Each of the elements that are far from the case itself is evidence: few numbers are so near by accident.
        """
        if not self._is_y or self._screen.far_from(self._case) < _FAR:
            return
        until = time.process_time() + _SECONDS
        for mistake in mistakes(self._case):
            if time.process_time() > until:
                return
            if mistake.rearrange is None and mistake.is_exact and self._screen.far_from(mistake.case) <= 1:
                yield mistake

    def _first(self, found: Iterator[Mistake]) -> Finding | None:
        for each in found:
            if self._explains(each):
                cause, fix = f"{self.output.name} {each.cause}", each.fix_in(self.output.framework)
                return Finding(Verdict.CONVENTION, each.name, cause, fix, each.place)
        return None

    def _single(self) -> Iterator[Mistake]:
        """Yield mistakes in the call, then those that the numbers suggest.

        Rearrangements of a gradient are matched by their values, not named.
        """
        screen = self._screen
        for mistake in mistakes(self._case):
            if screen.passes(screen.expected(mistake)) if self._is_y else mistake.rearrange is None:
                yield mistake
        yield from permutations(self.output)
        if self._is_y:
            yield from self._with_function(screen, Mistake("", "", "", self._case))
            yield from filter(screen.passes_after, followed_by_bias(self.output))
            yield from applied_before(self.output, screen.reads)
            yield from affine(self.output)

    def _with_function(self, screen: Screen, first: Mistake) -> Iterator[Mistake]:
        """Yield each function that may follow a mistake, or follow none."""
        output = self.output
        expected = screen.expected(first)
        u = output.arithmetic.output.unit_roundoff
        functions = [*FUNCTIONS, *(leaky(output) if first.case is self._case else ())]
        near = [function for function in functions if screen.passes(function.after(expected, u))]
        for number, function in enumerate(near):
            others = [o for o in near[number + 1 :] if self._explains(applied_after(first, [o], output))]
            yield applied_after(first, [function, *others], output)

    def _double(self) -> Iterator[Mistake]:
        shape = self._case.geometry.output_shape
        screen = self._screen
        until = time.process_time() + _SECONDS
        for first, seconds in pairs(self._case):
            if first.case.geometry.output_shape == shape:
                yield from self._with_function(screen, first)
                if (factor := screen.factor(first)) is not None:
                    yield from scaled(first, factor, self.output)
            for mistake in seconds():
                if time.process_time() > until:
                    return
                if mistake.case.geometry.output_shape == shape and screen.passes(screen.expected(mistake)):
                    yield mistake

    def _explains(self, mistake: Mistake) -> bool:
        """Test the mistake on the sample, then on all; a near miss is kept in mind, and explains nothing."""
        if np.count_nonzero(unexplained(self.output, mistake, self.output.sample)) > _FEW:
            return False
        expected = predicted(self.output, mistake)
        left = self.output.unexplained_by(expected)
        if np.count_nonzero(left) > min(_FEW, left.size // 100) or not self.output.is_proved_by(expected, ~left):
            return False
        if not left.any():
            return mistake.is_exact or is_seen(self.output, expected)
        self.near_misses.append((mistake, left))
        return False


def named_within(output: Output, inside: np.ndarray) -> Mistake | None:
    """Return the first mistake that explains y at the elements where `inside`, among those that move nothing."""
    flat = np.flatnonzero(inside & np.isfinite(output.y))
    if output.target.quantity != "y" or not output.target.affordable:
        return None
    few = np.random.default_rng(4).permutation(flat)[: len(output.sample)]
    for mistake in mistakes(output.target.case):
        if mistake.rearrange is None and not unexplained(output, mistake, few).any():
            expected = predicted(output, mistake)
            if not output.unexplained_by(expected)[inside].any() and output.is_proved_by(expected, inside):
                return mistake
    return None
