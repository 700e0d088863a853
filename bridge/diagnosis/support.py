"""Support: the indices of each axis, and the borders, to which the wrong elements of an output are confined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bridge.diagnosis.output import Output

#: Violations expected in an index along an axis that has none, for its absence to mean something.
_EXPECTED = 4.0


class Restriction(NamedTuple):
    """One way in which the wrong elements are confined.

    Attributes:
      name: "border", "interior", "batch", "positions", "taps" or "channels".
      words: the same, with its indices.
      axis: the axis that it restricts, None for borders and interior.
      indices: those of the axis that are affected.
    """

    name: str
    words: str
    axis: int | None = None
    indices: tuple[int, ...] = ()


class Support(NamedTuple):
    """Where the wrong elements are confined; no restriction means everywhere."""

    restrictions: tuple[Restriction, ...]

    @property
    def name(self) -> str:
        return self.restrictions[0].name if self.restrictions else ""

    @property
    def words(self) -> str:
        return "only " + ", ".join(r.words for r in self.restrictions) if self.restrictions else ""

    @property
    def is_by_position(self) -> bool:
        """Whether only some positions of the output are affected."""
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
    """The indices of each axis, and the borders, to which the wrong elements are confined."""
    outside = output.outside
    count = np.count_nonzero(outside)
    found = list(_border_or_interior(output))
    for axis, n in enumerate(outside.shape):
        hit = np.flatnonzero(outside.any(axis=tuple(a for a in range(outside.ndim) if a != axis)))
        # an index without wrong elements says something only where some were to be expected
        if len(hit) < n and count / len(hit) >= _EXPECTED:
            name, words = _axis_words(output, axis)
            found.append(Restriction(name, f"in {words} {indices(hit, n)}", axis, tuple(hit.tolist())))
    return Support(tuple(found))


def border(output: Output) -> np.ndarray:
    """Whether an output's window reaches into the padding: bool `(*output_spatial, 1)`."""
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
    """What an axis of the output or of a gradient is: `(name, words)`."""
    last, batch = output.y.ndim - 1, len(output.target.case.geometry.batch)
    if axis == last:
        return "channels", "channels"
    if output.target.quantity == "dkernel":
        return "taps", f"taps of axis {axis}"
    if axis < batch:
        return "batch", "batch entries" if batch == 1 else f"batch axis {axis},"
    return "positions", {1: ["positions"], 2: ["rows", "columns"], 3: ["planes", "rows", "columns"]}[last - batch][
        axis - batch
    ]


def indices(hit: np.ndarray, n: int) -> str:
    if len(hit) == 1:
        return f"{hit[0]}{' (the last)' if hit[0] == n - 1 else ''}"
    if len(hit) > 2 and (np.diff(hit) == 1).all():
        return f"{hit[0]} to {hit[-1]} of {n}"
    steps = np.diff(hit)
    if len(hit) > 2 and (steps == steps[0]).all():
        return f"{hit[0]} to {hit[-1]} in steps of {steps[0]}, of {n}"
    shown = ", ".join(map(str, hit[:8]))
    return f"{shown}{f', ... ({len(hit)} of {n})' if len(hit) > 8 else ''}"
