"""The ladder for one side that is outside its bound: PRECISION, CONVENTION or BUG, the first that can be shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bridge.diagnosis.conventions import convention, conventions
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.localise import localise
from bridge.diagnosis.precision import lower_accumulator, lower_precision
from bridge.diagnosis.quantised import quantised

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side


def explain(side: Side) -> Finding:
    """Why y is outside its bound.

    A lower precision of inputs or output, a mistaken convention or two, and quantised inputs each predict y element by
    element, as strictly as the declared arithmetic would; a lower accumulator only shows in the character of what
    remains, so it comes after.
    """
    with np.errstate(all="ignore"):  # operands and outputs may be infinite, and what is tried may overflow
        if side.target.affordable:
            for search in (lower_precision, convention, quantised, conventions, lower_accumulator):
                if (finding := search(side)) is not None:
                    return finding
        return localise(side)
