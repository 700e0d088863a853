"""Support: the indices of each axis, and the borders, to which the wrong elements of an output are confined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bridge.diagnosis.output import Output

#: An index without wrong elements means something only if at least this many were to be expected.
_EXPECTED = 4.0


class Restriction(NamedTuple):
    """A part of the output outside of which no element is wrong.

    Attributes:
      name: "border", "interior", "batch", "positions", "taps" or "channels".
      words: the same, with its indices.
      axis: the axis that it restricts; None for borders and interior.
      indices: the indices of the axis that are affected.
    """

    name: str
    words: str
    axis: int | None = None
    indices: tuple[int, ...] = ()


class Support(NamedTuple):
    """The intersection of restrictions; none means everywhere."""

    restrictions: tuple[Restriction, ...]

    @property
    def name(self) -> str:
        return self.restrictions[0].name if self.restrictions else ""

    @property
    def words(self) -> str:
        return "only " + ", ".join(r.words for r in self.restrictions) if self.restrictions else ""

    @property
    def is_by_position(self) -> bool:
        """True if only some positions of the output are affected."""
        return any(r.name in ("border", "interior", "positions") for r in self.restrictions)

    def only(self, name: str) -> Support:
        return Support(tuple(r for r in self.restrictions if r.name == name))

    def mask(self, output: Output) -> np.ndarray:
        inside = np.ones(output.y.shape, bool)
        for restriction in self.restrictions:
            if restriction.axis is None:
                inside &= border(output) == (restriction.name == "border")
            else:
                keep = np.isin(np.arange(output.y.shape[restriction.axis]), restriction.indices)
                inside &= keep.reshape([-1 if a == restriction.axis else 1 for a in range(output.y.ndim)])
        return inside


def support(output: Output) -> Support:
    """Return the indices of each axis, and the borders, to which the wrong elements are confined."""
    outside = output.outside
    count = np.count_nonzero(outside)
    found = list(_border_or_interior(output))
    for axis, n in enumerate(outside.shape):
        hit = np.flatnonzero(outside.any(axis=tuple(a for a in range(outside.ndim) if a != axis)))
        if len(hit) < n and count / len(hit) >= _EXPECTED:
            name, words = _axis_words(output, axis)
            found.append(Restriction(name, f"in {words} {index_words(hit, n)}", axis, tuple(hit.tolist())))
    return Support(tuple(found))


def border(output: Output) -> np.ndarray:
    """Return which windows reach into the padding: bool `(*output_spatial, 1)`."""
    g = output.target.case.geometry
    full = np.ones((), bool)
    for axis in range(g.rank):
        out = np.arange(g.output_spatial[axis]) * g.strides[axis]
        low = g.padding[axis][0]
        size = (g.spatial[axis] - 1) * g.input_dilation[axis] + 1
        full = np.logical_and.outer(full, (out >= low) & (out + g.spans[axis] <= low + size))
    return ~full[..., None]


def _border_or_interior(output: Output) -> Iterator[Restriction]:
    if output.target.quantity != "y":
        return
    at_border = border(output)
    hits = output.outside.any(axis=tuple(range(len(output.target.case.geometry.batch))))
    on, off = np.count_nonzero(hits & at_border), np.count_nonzero(hits & ~at_border)
    if not off and on >= _EXPECTED and not at_border.all():
        yield Restriction("border", "at the borders (windows that reach into the padding)")
    if not on and off >= _EXPECTED and at_border.any():
        yield Restriction("interior", "in the interior (windows without padding)")


def _axis_words(output: Output, axis: int) -> tuple[str, str]:
    """Return `(name, words)` of an axis of the output or of a gradient."""
    last, batch = output.y.ndim - 1, len(output.target.case.geometry.batch)
    if axis == last:
        return "channels", "channels"
    if output.target.quantity == "dkernel":
        return "taps", f"taps of axis {axis}"
    if axis < batch:
        return "batch", "batch entries" if batch == 1 else f"batch axis {axis},"
    spatial = ["positions"] if last - batch == 1 else ["planes", "rows", "columns"][batch - last :]
    return "positions", spatial[axis - batch]


def index_words(hit: np.ndarray, n: int) -> str:
    """Return some of n indices in words."""
    if len(hit) == 1:
        return f"{hit[0]}{' (the last)' if hit[0] == n - 1 else ''}"
    steps = np.diff(hit)
    if len(hit) > 2 and (steps == steps[0]).all():
        return f"{hit[0]} to {hit[-1]}{'' if steps[0] == 1 else f' in steps of {steps[0]},'} of {n}"
    shown = ", ".join(map(str, hit[:8]))
    return f"{shown}{f', ... ({len(hit)} of {n})' if len(hit) > 8 else ''}"
