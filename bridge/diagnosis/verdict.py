"""The verdicts, from strongest to weakest, and the exit codes they become."""

from __future__ import annotations

import enum


class Verdict(enum.StrEnum):
    """What was proved; the first that can be is the verdict.

    >>> Verdict.ROUNDING.passes, Verdict.BUG.passes
    (True, False)
    >>> max(Verdict.IDENTICAL, Verdict.ROUNDING, key=Verdict.rank)
    <Verdict.ROUNDING: 'ROUNDING'>
    """

    IDENTICAL = "IDENTICAL"
    EXPLAINED = "EXPLAINED"
    ROUNDING = "ROUNDING"
    PRECISION = "PRECISION"
    CONVENTION = "CONVENTION"
    BUG = "BUG"
    NONFINITE = "NONFINITE"
    INCONCLUSIVE = "INCONCLUSIVE"

    def rank(self) -> int:
        """0 for the strongest."""
        return list(Verdict).index(self)

    @property
    def passes(self) -> bool:
        """Whether it is ROUNDING or stronger."""
        return self.rank() <= Verdict.ROUNDING.rank()

    @property
    def exit_code(self) -> int:
        """0 ROUNDING or stronger, 3 PRECISION, 4 INCONCLUSIVE, 1 the others."""
        if self.passes:
            return 0
        return {Verdict.PRECISION: 3, Verdict.INCONCLUSIVE: 4}.get(self, 1)

    @property
    def meaning(self) -> str:
        """What was proved, in one line."""
        return _MEANING[self]


_MEANING = {
    Verdict.IDENTICAL: "every bit equal",
    Verdict.EXPLAINED: "replaying both orders of addition reproduces both sides bit for bit",
    Verdict.ROUNDING: "every element within the proved bound of rounding",
    Verdict.PRECISION: "outside the rounding bound, but explained by a named lower precision",
    Verdict.CONVENTION: "a named mistake explains it",
    Verdict.BUG: "more than rounding can be",
    Verdict.NONFINITE: "NaN or infinity on one side only, or in different places",
    Verdict.INCONCLUSIVE: "could not be decided",
}
