"""NONFINITE: NaN or infinity on one side only, and what brought it in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side


def disagreement(a: Side, b: Side, wrong: np.ndarray) -> tuple[str, str]:
    """`(cause, place)` of the elements `wrong`, where one side is not finite and the other has another value."""
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    count = int(np.count_nonzero(wrong))
    elements = "1 element" if count == 1 else f"{count} elements"
    values = f"{a.name} has {a.y[index]}, {b.name} has {b.y[index]} at {index}"
    return f"{elements}: {values}; {_reason(a, b, index)}", f"{elements}, the first at {index}"


def _reason(a: Side, b: Side, index: tuple[int, ...]) -> str:
    exact = a.target.exact
    if not np.isfinite(exact.magnitude[index]):
        return f"an operand there is NaN or infinite, and the exact result is {exact.value[index]}"
    if not np.isfinite(exact.value[index]):
        return f"the exact result overflows {exact.value.dtype}"
    promised = [side for side in (a, b) if np.isfinite(side.bound[index]) and not np.isfinite(side.y[index])]
    if promised:
        names = " and ".join(side.name for side in promised)
        return f"{names} cannot overflow there{_padded(a)}: the exact result is {exact.value[index]}"
    return f"a partial sum may overflow there: the exact result is {exact.value[index]}"


def _padded(side: Side) -> str:
    """An infinite weight over padding is skipped by some and multiplied by zero, which is NaN, by others."""
    kernel_is_finite = np.isfinite(side.target.case.kernel.astype(np.float64)).all()
    if kernel_is_finite:
        return ""
    return ", unless it multiplies a weight that is not finite by the zeros of the padding, which gives NaN"
