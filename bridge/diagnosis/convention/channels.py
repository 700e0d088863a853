"""Mistakes in the order of output channels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake


def channel_orders(case: Case) -> Iterator[Mistake]:
    """Yield output channel m*C+c where c*M+m is meant: in the kernel, the bias, the output, or several of them."""
    g = case.geometry
    if g.multiplier == 1 or g.channels == 1:
        return
    order = channel_order(case)
    inverse = np.argsort(order)
    bias = case.bias
    fix = "output channel c*M+m reads input channel c: order {} as (C, M), not (M, C)"
    for p, q in ((order, inverse), (inverse, order)):
        yield Mistake(
            "channel order",
            "reads input channel o mod C for output channel o, where o div M is meant",
            fix.format("the kernel's channels"),
            case.replace(kernel=case.kernel[..., q], bias=None if bias is None else bias[q]),
            functools.partial(np.take, indices=p, axis=-1),
            "input channels",
        )
    operands = ("output", "kernel") if bias is None else ("output", "kernel", "bias")
    for number in range(1, len(operands) + 1):
        for chosen in itertools.combinations(operands, number):
            if chosen == ("bias",):  # `biases` has it
                continue
            for orders in itertools.product((order, inverse), repeat=number):
                how = dict(zip(chosen, orders))
                changed = {name: getattr(case, name)[..., how[name]] for name in chosen if name != "output"}
                what = " and ".join(f"the {name}'s channels" for name in chosen)
                yield Mistake(
                    "channel order",
                    f"has {what.replace('the ', 'its ')} in the order m*C+c, where c*M+m is meant",
                    fix.format(what),
                    case.replace(**changed) if changed else case,
                    functools.partial(np.take, indices=how["output"], axis=-1) if "output" in how else None,
                    ", ".join(f"{name} channels" for name in chosen),
                )


def channel_order(case: Case) -> np.ndarray:
    """Return the place c*M+m in our order of each channel m*C+c of the other order."""
    g = case.geometry
    return np.arange(g.features).reshape(g.channels, g.multiplier).T.ravel()
