"""Catalogue of the named mistakes, in the order in which they are tried.

A mistake is another case, a rearrangement of its output, a function of each element of it, or several of these. So its
exact result and its bound can be computed like those of the case itself. If two mistakes compute the same, such as SAME
and symmetric padding at stride 1, the first one here is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from bridge.case import Case
from bridge.diagnosis.convention.bias import biases, residuals
from bridge.diagnosis.convention.channels import channel_orders
from bridge.diagnosis.convention.kernel import kernels
from bridge.diagnosis.convention.layouts import edges, layouts
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.convention.padding import padding_modes, padding_words, shifts
from bridge.diagnosis.convention.strides import steps


def mistakes(case: Case) -> Iterator[Mistake]:
    """Yield every mistake that leaves the output's shape as it is, the likeliest first."""
    shape = case.geometry.output_shape
    families = (padding_words, kernels, biases, residuals, steps, padding_modes, layouts, channel_orders, shifts, edges)
    for family in families:
        for mistake in family(case):
            if mistake.case.geometry.output_shape == shape:
                yield mistake


def pairs(case: Case) -> Iterator[tuple[Mistake, Callable[[], Iterator[Mistake]]]]:
    """Yield each mistake, with the mistakes of later families, or of its own, that may have been made beside it.

    The shape of the output needs to be right only after both.
    """
    families = (channel_orders, kernels, biases, steps, padding_words, padding_modes, layouts, shifts, residuals)
    for number, family in enumerate(families):
        for first in family(case):
            yield first, functools.partial(_second, first, families[number + (family in (biases, shifts)) :])


def _second(first: Mistake, families: Sequence[Callable[[Case], Iterator[Mistake]]]) -> Iterator[Mistake]:
    for family in families:
        for second in family(first.case):
            if first.name != second.name:
                yield first.then(second)
