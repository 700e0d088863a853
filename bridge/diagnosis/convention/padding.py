"""Mistakes in padding: another word, another amount, or another mode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.mistake import Mistake, of_options
from jaxdw.geometry import Geometry, Padding


def padding_words(case: Case) -> Iterator[Mistake]:
    """Yield other words for padding, and axes or ends swapped. A word and its numbers are the same padding."""
    g = case.geometry
    against = "SAME against symmetric padding"
    if_symmetric = against if g.symmetric_padding is not None else "padding"
    if_same = against if _numbers(case, "SAME") == g.padding else "padding"
    span_half = tuple((k // 2, k // 2) for k in g.spans)
    named: list[tuple[str, Padding]] = [
        (if_symmetric, "SAME"),
        (if_same, half(g)),
        (if_same, span_half),
        (if_symmetric, "SAME_LOWER"),
        ("padding missing", "VALID"),
        ("padding swapped between axes", g.padding[::-1]),
        ("padding low and high swapped", tuple((high, low) for low, high in g.padding)),
    ]
    if g.rank == 1:
        named.insert(5, ("causal padding", "CAUSAL"))
    if g.rank == 1 and _numbers(case, "CAUSAL") == g.padding:
        named = [("causal padding", padding) for _, padding in named]
    yield from _of_paddings(case, named)


def shifts(case: Case) -> Iterator[Mistake]:
    """Yield other amounts of zeros: off by one or two, or by a stride, which shifts the output by a row."""
    g = case.geometry

    def moved(shift: tuple[int, ...]) -> Padding:
        return tuple(_pair(case, axis, low + d) for axis, ((low, _), d) in enumerate(zip(g.padding, shift)))

    far = 2 if g.rank < 3 else 1
    along_several = itertools.product(range(-far, far + 1), repeat=g.rank)
    along_one = ((axis, d) for axis, s in enumerate(g.strides) for d in (-2, -1, 1, 2, -s, s, -2 * s, 2 * s))
    changes = {*along_several, *(tuple(d * (a == axis) for a in range(g.rank)) for axis, d in along_one)}
    named: list[tuple[str, Padding]] = []
    for shift in sorted(changes, key=lambda d: (np.count_nonzero(d), sum(map(abs, d)), d)):
        name = "padding"
        if np.count_nonzero(shift) == 1:
            rows = any(abs(d) == s for d, s in zip(shift, g.strides))
            name = "padding off by one" if sum(map(abs, shift)) == 1 else "row or column shifted" if rows else "padding"
        named.append((name, moved(shift)))
    yield from _of_paddings(case, named)


def padding_modes(case: Case) -> Iterator[Mistake]:
    """Yield zero, periodic, reflecting and replicating padding mistaken for each other, on all borders or on one."""
    g = case.geometry
    modes: dict[str, Literal["constant", "wrap", "reflect", "edge"]]
    modes = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    if max(g.input_dilation) > 1 or 0 in g.spatial or min(min(pair) for pair in g.padding) < 0:
        return
    batch = len(g.batch)

    def padded(x: np.ndarray, pads: Sequence[Sequence[int]], mode: str) -> Case:
        x = np.pad(x, [(0, 0)] * batch + [(low, high) for low, high in pads] + [(0, 0)], mode=modes[mode])
        return case.replace(x=x, padding="VALID")

    def one_border(axis: int, end: int, mode: str) -> Case:
        """Return the case with another mode at one end of one axis: that border reads x, not the other padding."""
        parts, along = [case.x], batch + axis
        for side, n in enumerate(g.padding[axis]):
            pads = [(0, 0)] * g.rank
            pads[axis] = (0, n) if side else (n, 0)
            x = padded(case.x, pads, mode if side == end else g.padding_mode).x
            border = x.take(range(x.shape[along] - n, x.shape[along]) if side else range(n), along)
            parts.insert(len(parts) * side, border)
        others = [(0, 0) if a == axis else pair for a, pair in enumerate(g.padding)]
        return padded(np.concatenate(parts, axis=along), others, g.padding_mode)

    shifts = [(0,) * g.rank] if g.padding_mode == "zeros" else list(itertools.product((0, -1, 1), repeat=g.rank))
    for mode, shift in itertools.product(modes, shifts):
        pads = tuple((low + d, high - d) for (low, high), d in zip(g.padding, shift))
        same_mode = mode == g.padding_mode
        if same_mode == (not any(shift)) or min(min(pair) for pair in pads) < 0:
            continue
        wrong = f"padding={pads}" if same_mode else f"padding mode {mode!r}"
        right = f"padding={g.padding}" if same_mode else f"padding mode {g.padding_mode!r}"
        yield Mistake(
            "padding off by one" if same_mode else "padding mode",
            f"was computed with {wrong}, where the case has {right}",
            f"{right} instead of {wrong}",
            padded(case.x, pads, mode),
            place="padding",
        )
    borders = [(axis, end) for axis in range(g.rank) for end in (0, 1) if g.padding[axis][end]]
    for (axis, end), mode in itertools.product(borders if len(borders) > 1 else (), modes):
        if mode == g.padding_mode:
            continue
        where = f"{'after the end' if end else 'before the start'} of axis {batch + axis} of x"
        yield Mistake(
            "padding mode of one border",
            f"was computed with padding mode {mode!r} {where}, where the case has {g.padding_mode!r}",
            f"padding mode {g.padding_mode!r} {where} too",
            one_border(axis, end, mode),
            place=f"padding {where}: the output's {'last' if end else 'first'} positions of axis {batch + axis}",
        )


def _of_paddings(case: Case, named: list[tuple[str, Padding]]) -> Iterator[Mistake]:
    """Yield those that differ. The size of the output is fixed, so only the zeros in front matter."""
    g = case.geometry
    if g.padding_mode != "zeros" or 0 in g.output_shape:
        return
    seen = {tuple(low for low, _ in g.padding)}
    for name, padding in named:
        try:
            other = case.replace(padding=padding)
        except ValueError:
            continue
        lows = tuple(low for low, _ in other.geometry.padding)
        if other.geometry.output_shape == g.output_shape and lows not in seen:
            seen.add(lows)
            yield of_options(case, other, name, "padding")


def _pair(case: Case, axis: int, low: int) -> tuple[int, int]:
    """Return (low, high) that keeps the output's size; high is low if possible, else the case's own, else least."""
    g = case.geometry
    dilated = (g.spatial[axis] - 1) * g.input_dilation[axis] + 1 if g.spatial[axis] else 0
    least = (g.output_spatial[axis] - 1) * g.strides[axis] + g.spans[axis] - dilated - low
    possible = range(least, least + g.strides[axis])
    return low, next((high for high in (low, g.padding[axis][1]) if high in possible), least)


def half(g: Geometry) -> tuple[tuple[int, int], ...]:
    """Return k // 2 at both ends of each axis."""
    return tuple((k // 2, k // 2) for k in g.kernel_size)


def _numbers(case: Case, word: str) -> tuple[tuple[int, int], ...] | None:
    """Return the numbers of a word for padding, for this case; None if it does not fit."""
    try:
        return case.replace(padding=word).geometry.padding
    except ValueError:
        return None
