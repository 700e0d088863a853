"""Verdict: the strongest statement that was proved, with its meaning and its exit code."""

from __future__ import annotations

import enum


class Verdict(enum.StrEnum):
    """The strongest statement on a difference that was proved; here from the strongest to the weakest.

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
        """Return 0 for the strongest, 1 for the next, and so on."""
        return list(Verdict).index(self)

    @property
    def passes(self) -> bool:
        """True for ROUNDING or stronger."""
        return self.rank() <= Verdict.ROUNDING.rank()

    @property
    def exit_code(self) -> int:
        """0 ROUNDING or stronger, 3 PRECISION, 4 INCONCLUSIVE, 1 the others."""
        if self.passes:
            return 0
        return {Verdict.PRECISION: 3, Verdict.INCONCLUSIVE: 4}.get(self, 1)

    @property
    def meaning(self) -> str:
        """The statement that was proved, in a few words."""
        return _MEANING[self]


_MEANING = {
    Verdict.IDENTICAL: "every bit equal",
    Verdict.EXPLAINED: "replaying both accumulation orders reproduces both outputs bit for bit",
    Verdict.ROUNDING: "every element within the proved bound of rounding",
    Verdict.PRECISION: "outside the rounding bound, but explained by a named lower precision",
    Verdict.CONVENTION: "a named mistake explains it",
    Verdict.BUG: "more than rounding can explain, and no mistake is recognised",
    Verdict.NONFINITE: "NaN or infinity in one output only, or in different places",
    Verdict.INCONCLUSIVE: "could not be decided",
}
