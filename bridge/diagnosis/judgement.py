"""Judgement: why one output lies outside its bound - PRECISION, CONVENTION or BUG, the first that can be shown."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from bridge.diagnosis.convention.search import Search
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.localisation.locate import locate
from bridge.diagnosis.one_sided import one_sided
from bridge.diagnosis.output import Output
from bridge.diagnosis.precision.emulation import Evidence, on_platform
from bridge.diagnosis.precision.quantised import quantised
from bridge.diagnosis.precision.search import lower_accumulator, lower_precision
from bridge.diagnosis.precision.steps import rounded_to_steps
from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """An output and its faults, which are computed once, when they are first asked for.

    Attributes:
      output: the output.
      evidence: returns what the compiler of an emulated platform says, in words; None to ask no compiler.
    """

    output: Output
    evidence: Evidence | None = None

    @functools.cached_property
    def finding(self) -> Finding | None:
        """Why the output is outside its bound; None if it is not."""
        if not self.output.outside.any():
            return None
        found = _explain(self.output)
        return found if self.output.emulated is None else on_platform(self.output, found, self.evidence)

    @functools.cached_property
    def one_sided(self) -> str:
        """The direction of the errors from the exact result, in words; empty if their signs may be random."""
        return one_sided(self.output)


def _explain(output: Output) -> Finding:
    """Return the first finding that predicts y.

    A lower precision of inputs or output, one or two mistakes, one mistake in a lower precision, and quantised inputs
    each predict y element by element, as strictly as the declared arithmetic would. A lower accumulator only shows in
    the character of what remains, so it is tried after them.
    """
    with np.errstate(all="ignore"):  # operands and outputs may be infinite, and what is tried may overflow
        search = Search(output)
        if output.target.affordable:
            found = lower_precision(output) or search.one_mistake() or quantised(output)
            found = found or search.two_mistakes() or _rounded_mistake(output, search) or rounded_to_steps(output)
            if found := found or lower_accumulator(output):
                return found
        return locate(output, search.near_misses)


def _rounded_mistake(output: Output, search: Search) -> Finding | None:
    """Return a mistake that was computed in a lower precision, too; None if none explains all of y."""
    for mistake in search.nearly_computed():
        mistaken = dataclasses.replace(output, target=dataclasses.replace(output.target, case=mistake.case))
        if (found := lower_precision(mistaken)) is not None:
            return Finding(
                Verdict.CONVENTION,
                f"{mistake.name}, {found.name}",
                f"{output.name} {mistake.cause}; then {found.cause}",
                f"{mistake.fix_in(output.framework)}; and {found.fix}",
                f"{mistake.place}; {found.place}",
            )
    return None
