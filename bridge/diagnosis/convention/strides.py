"""Mistakes in strides and dilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake, of_options
from bridge.diagnosis.convention.padding import half
from jaxdw.geometry import Padding


def steps(case: Case) -> Iterator[Mistake]:
    """Yield mistaken strides and dilations, with the case's own padding and with others."""
    g = case.geometry
    s, d = g.strides, g.kernel_dilation
    ones = (1,) * g.rank
    changes: list[tuple[str, dict[str, Any]]] = [
        ("stride and dilation swapped", {"strides": d, "kernel_dilation": s}),
        ("strides swapped between axes", {"strides": s[::-1]}),
        ("dilation swapped between axes", {"kernel_dilation": d[::-1]}),
        ("dilation ignored", {"kernel_dilation": ones}),
        ("stride ignored", {"strides": ones}),
        ("input dilation ignored", {"input_dilation": ones}),
        ("input and kernel dilation swapped", {"input_dilation": d, "kernel_dilation": g.input_dilation}),
    ]
    if max(d) == 1:
        changes += [("dilation", {"kernel_dilation": (n,) * g.rank}) for n in (2, 3)]
    for name, change in changes:
        if all(getattr(g, option) == value for option, value in change.items()):
            continue
        seen = set()
        for padding in _paddings_beside(case):
            try:
                other = case.replace(**change, padding=padding)
            except ValueError:
                continue
            if other.geometry not in seen:
                seen.add(other.geometry)
                yield of_options(case, other, name, *change, *(["padding"] if padding != case.padding else []))


def _paddings_beside(case: Case) -> Iterator[Padding]:
    """Yield the case's padding as it was given and in numbers, then other words and the numbers of symmetric padding.

    A user who writes numbers may have meant a word, and the other way round.
    """
    g = case.geometry
    yield case.padding
    if g.padding_mode != "zeros":
        return
    yield from (g.padding, "SAME", half(g), "VALID", "SAME_LOWER")
    if g.rank == 1:
        yield "CAUSAL"
