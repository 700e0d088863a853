"""Mistakes in layouts: axes in another order, or a row or column cropped."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake


def layouts(case: Case) -> Iterator[Mistake]:
    """Yield images that were read in another order of axes."""
    g = case.geometry
    batch = len(g.batch)
    first, last = ("NCHW", "NHWC") if g.rank == 2 else ("channels-first", "channels-last")

    def from_first(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a, -1, batch).reshape(a.shape)

    def from_last(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(np.moveaxis(a, -1, batch).shape), batch, -1)

    for read, source, seen, fix in (
        (from_first, first, last, f"np.moveaxis({{}}, {batch}, -1) instead of a reshape"),
        (from_last, last, first, f"np.moveaxis({{}}, -1, {batch}) instead of a reshape"),
    ):
        how = f"in {source} read as {seen}: reshaped, where a transpose is needed"
        yield Mistake("input layout", f"has its input {how}", fix.format("x"), case.replace(x=read(case.x)), place="x")
        yield Mistake("output layout", f"has its output {how}", fix.format("y"), case, read, "y")
    for i, j in itertools.combinations(range(batch, batch + g.rank), 2):
        if g.x_shape[i] == g.x_shape[j]:
            yield Mistake(
                "spatial axes swapped",
                f"has axes {i} and {j} of its input swapped",
                f"np.swapaxes(x, {i}, {j})",
                case.replace(x=np.swapaxes(case.x, i, j)),
                place="x",
            )
        if g.output_shape[i] == g.output_shape[j]:
            yield Mistake(
                "spatial axes swapped",
                f"has axes {i} and {j} of its output swapped",
                f"np.swapaxes(y, {i}, {j})",
                case,
                functools.partial(np.swapaxes, axis1=i, axis2=j),
                "y",
            )


def edges(case: Case) -> Iterator[Mistake]:
    """Yield the first or last row or column left at zero, or a copy of its neighbour."""
    g = case.geometry
    batch = len(g.batch)
    for axis in range(batch, batch + g.rank):
        n = g.output_shape[axis]
        if n < 2:
            continue
        for edge, neighbour, word in ((0, 1, "first"), (n - 1, n - 2, "last")):
            for source, done in ((None, "left at zero"), (neighbour, "a copy of the one beside it")):
                yield Mistake(
                    "row or column cropped",
                    f"has the {word} position along axis {axis} of the output {done}",
                    f"compute all {n} positions of axis {axis}: the output was cropped by one",
                    case,
                    functools.partial(_with_edge, axis=axis, edge=edge, source=source),
                    f"output axis {axis}, {word} position",
                )


def _with_edge(y: np.ndarray, axis: int, edge: int, source: int | None) -> np.ndarray:
    """Return y with one index of an axis copied from another, or zero."""
    y = y.copy()
    slices = np.moveaxis(y, axis, 0)
    slices[edge] = 0 if source is None else slices[source]
    return y
