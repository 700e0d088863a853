"""Mistakes in what is added: the bias missing, doubled, subtracted or in another order; the input, as a residual."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.channels import channel_order
from bridge.diagnosis.convention.mistake import Mistake
from bridge.numerics import cast, format_of


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


def residuals(case: Case) -> Iterator[Mistake]:
    """Yield the input added to the output: a kernel with 1 more at the tap that reads an output's own position."""
    g = case.geometry
    taps = [low // d if low % d == 0 else -1 for (low, _), d in zip(g.padding, g.kernel_dilation)]
    is_inside = all(0 <= tap < size for tap, size in zip(taps, g.kernel_size))
    if not is_inside or g.output_shape != g.x_shape or {*g.strides, *g.input_dilation} != {1}:
        return
    kernel = case.kernel.astype(np.float64)
    kernel[(*taps, 0)] += 1
    yield Mistake(
        "residual added",
        "has the input added to the result, as a residual connection adds it",
        "leave out the residual connection, or add the input in both implementations",
        case.replace(kernel=cast(kernel, case.dtype)),
        place="output",
        error_of_x=4 * format_of(case.dtype).unit_roundoff * np.abs(case.x.astype(np.float64)),
    )
