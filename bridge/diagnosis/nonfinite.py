"""NONFINITE: one output has NaN or infinity where the other has another value, and the reason."""

from __future__ import annotations

import numpy as np

from bridge.diagnosis.output import Output


def disagreement(a: Output, b: Output, index: tuple[int, ...], count: int) -> tuple[str, str]:
    """Return `(cause, place)` of `count` elements, the first at `index`, that are not finite in one output only."""
    elements = "1 element" if count == 1 else f"{count} elements"
    values = f"{a.name} has {a.y[index]}, {b.name} has {b.y[index]} at {index}"
    return f"{elements}: {values}; {_reason(a, b, index)}", f"{elements}, the first at {index}"


def _reason(a: Output, b: Output, index: tuple[int, ...]) -> str:
    exact = a.target.exact
    if not np.isfinite(exact.magnitude[index]):
        return f"an operand there is NaN or infinite, and the exact result is {exact.value[index]}"
    if not np.isfinite(exact.value[index]):
        return f"the exact result overflows {exact.value.dtype}"
    promised = [each for each in (a, b) if np.isfinite(each.bound[index]) and not np.isfinite(each.y[index])]
    if not promised:
        return f"a partial sum may overflow there: the exact result is {exact.value[index]}"
    names = " and ".join(each.name for each in promised)
    # an infinite weight over padding is skipped by some and multiplied by zero, which is NaN, by others
    padded = (
        ""
        if np.isfinite(a.target.case.kernel.astype(np.float64)).all()
        else ", unless it multiplies a weight that is not finite by the zeros of the padding, which gives NaN"
    )
    return f"{names} cannot overflow there{padded}: the exact result is {exact.value[index]}"
