"""Mistakes in the bias: missing, doubled, subtracted, or in another order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.channels import channel_order
from bridge.diagnosis.convention.mistake import Mistake


def biases(case: Case) -> Iterator[Mistake]:
    """Yield the bias missing, doubled, subtracted, or in another order of channels."""
    if case.bias is None:
        return
    g, b = case.geometry, case.bias
    wide = b.astype(np.float64)
    with np.errstate(over="ignore"):
        changed = [
            ("bias missing", "has no bias", "add the bias", np.zeros_like(b)),
            ("bias doubled", "has the bias added twice", "add the bias once", (2 * wide).astype(b.dtype)),
            ("bias subtracted", "has the bias subtracted", "add the bias", -b),
        ]
    order = channel_order(case)
    if g.multiplier > 1:
        for permutation in (order, np.argsort(order)):
            cause, fix = "has the bias in the order m*C+c", "order the bias as c*M+m"
            changed.append(("bias permuted", cause, fix, b[permutation]))
    for name, cause, fix, bias in changed:
        yield Mistake(name, cause, fix, case.replace(bias=bias), place="bias")
