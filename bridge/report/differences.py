"""The numbers behind the pictures: groups of equal bits, and where and by how much two results differ."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Iterator, Sequence

import numpy as np

from bridge._implementations import implementation
from bridge.case import Case
from bridge.diagnosis import Comparison, Diagnosis, Output
from bridge.diagnosis.target import Target
from bridge.numerics import Arithmetic, difference_bound, same_bits, ulp_distance

#: Bins per decade of the ratio to the bound.
_BINS_PER_DECADE = 4
#: Ratios below 10 to this power share the lowest bin.
_LOWEST_DECADE = -6
#: A map is reduced, by maxima of blocks, to at most this many cells per axis.
_CELLS = 96


@dataclasses.dataclass(frozen=True)
class BitClass:
    """Implementations with the same bits.

    Attributes:
      letter: what the report calls the class.
      names: its implementations, in the order of the diagnosis.
    """

    letter: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Bin:
    """The number of elements in a range.

    Attributes:
      low, high: the range; `ulp_bins` includes both ends, `ratio_bins` only the upper one.
    """

    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """The greatest |a - b| at each position, over the batch and all other axes.

    Attributes:
      title: which channel, or "all channels".
      cells: float64 (rows, columns); 0 where the bits are equal, infinite where only one result is finite.
      shape: rows and columns before reduction to `_CELLS`.
      axes: what the rows and columns are.
    """

    title: str
    cells: np.ndarray
    shape: tuple[int, int]
    axes: tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
    """The numbers in the pictures of one pair.

    Attributes:
      comparison: the pair, and its figures.
      classes: the two classes of equal bits that it stands for.
      ulp: elements by distance in ULP.
      ratio: different elements by |a - b| / bound.
      not_finite: elements that neither histogram counts, since only one result is finite.
      maps: all channels together, then the worst.
      by_channel: float64 (C*M,), the greatest |a - b| of each channel.
    """

    comparison: Comparison
    classes: tuple[BitClass, BitClass]
    ulp: list[Bin]
    ratio: list[Bin]
    not_finite: int
    maps: list[Map]
    by_channel: np.ndarray

    @property
    def scale(self) -> float:
        """The greatest finite |a - b|."""
        return self.comparison.max_abs


def bit_classes(diagnosis: Diagnosis) -> list[BitClass]:
    """Return the implementations in groups of equal bits, in the order of the diagnosis."""
    groups: list[list[str]] = []
    for name in diagnosis.names:
        group = next((g for g in groups if diagnosis.between(g[0], name).different == 0), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return [BitClass(_letter(number), tuple(group)) for number, group in enumerate(groups)]


def class_pairs(diagnosis: Diagnosis, classes: Sequence[BitClass]) -> list[tuple[BitClass, BitClass, Comparison]]:
    """Return every two classes, and the worst comparison of their members (their bounds may differ).

    Sorted by verdict, weakest first; then pairs with the class of the reference; then by the ratio to the bound.
    """
    pairs = [
        (a, b, max((diagnosis.between(*both) for both in itertools.product(a.names, b.names)), key=_badness))
        for a, b in itertools.combinations(classes, 2)
    ]
    return sorted(
        pairs, key=lambda pair: (-pair[2].verdict.rank(), pair[0] is not classes[0], -pair[2].max_bound_ratio)
    )


def differences(diagnosis: Diagnosis, *, pairs: int, channels: int) -> Iterator[Difference]:
    """Yield the worst pairs of classes, up to `pairs`, each with maps of its worst channels, up to `channels`."""
    chosen = class_pairs(diagnosis, bit_classes(diagnosis))[:pairs]
    if not chosen:
        return
    case = diagnosis.case
    target = Target(case)

    def output(name: str) -> Output:
        return Output(name, diagnosis.outputs[name], target, _declared(name, case))

    for class_a, class_b, comparison in chosen:
        both = (class_a, class_b) if comparison.a in class_a.names else (class_b, class_a)
        yield _difference(comparison, both, output(comparison.a), output(comparison.b), channels)


def ulp_bins(distance: np.ndarray, same: int) -> list[Bin]:
    """Return `same` elements at 0, then those at 1, 2 to 3, 4 to 7 and so on: each bin is twice as wide as the last.

    >>> [(int(b.low), int(b.high), b.count) for b in ulp_bins(np.array([1, 1, 3, 4], np.uint64), 5)]
    [(0, 0, 5), (1, 1, 2), (2, 3, 1), (4, 7, 1)]
    """
    powers = np.uint64(1) << np.arange(64, dtype=np.uint64)
    counts = np.bincount(np.searchsorted(powers, distance, side="right"), minlength=1)
    counts[0] += same
    return [Bin(float(2**k // 2), float(max(2**k - 1, 0)), int(count)) for k, count in enumerate(counts)]


def ratio_bins(ratio: np.ndarray) -> list[Bin]:
    """Count ratios by quarters of a decade, from at most 0.1 to at least 10; an edge belongs to the bin below it.

    >>> [(b.low, b.high) for b in ratio_bins(np.array([0.2, 1.0])) if b.count]
    [(0.1778279410038923, 0.31622776601683794), (0.5623413251903491, 1.0)]
    """
    finite = ratio[(ratio > 0) & np.isfinite(ratio)]
    exponents = np.log10(finite)
    least = min(-1, max(_LOWEST_DECADE, int(np.floor(exponents.min())))) if finite.size else -1
    greatest = max(1, int(np.ceil(exponents.max()))) if finite.size else 1
    edges = 10.0 ** (np.arange(least * _BINS_PER_DECADE, greatest * _BINS_PER_DECADE + 1) / _BINS_PER_DECADE)
    place = np.clip(np.searchsorted(edges, ratio, side="left") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    return [Bin(float(low), float(high), int(n)) for low, high, n in zip(edges, edges[1:], counts)]


def _badness(comparison: Comparison) -> tuple[int, float]:
    return comparison.verdict.rank(), comparison.max_bound_ratio


def _letter(number: int) -> str:
    letters = string.ascii_uppercase
    return letters[number] if number < len(letters) else str(number + 1)


def _declared(name: str, case: Case) -> Arithmetic | None:
    """Return the arithmetic that an implementation declares; None, the weakest conventional one, for unknown names."""
    try:
        return implementation(name).arithmetic(case)
    except (ValueError, ModuleNotFoundError):
        return None


def _difference(
    comparison: Comparison, classes: tuple[BitClass, BitClass], output_a: Output, output_b: Output, channels: int
) -> Difference:
    a, b = output_a.y, output_b.y
    place = np.flatnonzero(~same_bits(a, b))
    left, right = a.ravel()[place], b.ravel()[place]
    finite = np.isfinite(left) & np.isfinite(right)
    with np.errstate(all="ignore"):
        distance = np.abs(left.astype(np.float64) - right.astype(np.float64))
        distance[~finite] = np.inf
        ratio = distance / difference_bound(output_a.bound.ravel()[place], output_b.bound.ravel()[place])
    axes = output_a.target.case.geometry.rank + 1
    field = np.zeros(a.size)
    field[place] = distance
    field = field.reshape(-1, *a.shape[-axes:]).max(axis=0, initial=0.0)
    return Difference(
        comparison,
        classes,
        ulp_bins(ulp_distance(left[finite], right[finite]), same=a.size - len(left)),
        ratio_bins(ratio[finite]),
        int(np.count_nonzero(~finite)),
        _maps(field, channels),
        field.reshape(-1, field.shape[-1]).max(axis=0, initial=0.0),
    )


def _maps(field: np.ndarray, channels: int) -> list[Map]:
    """Return maps of `(*spatial, channels)`: of one axis, position by channel; of three, the maximum over the first."""
    if 0 in field.shape:
        return []
    if field.ndim == 2:
        return [_map("all channels", field.T, ("channel", "position"))]
    axes = ("row", "column")
    if field.ndim == 4:
        field, axes = field.max(axis=0), ("second axis", "third axis")
    greatest = field.max(axis=(0, 1))
    worst = [int(c) for c in np.argsort(-greatest, kind="stable")[:channels] if greatest[c] > 0]
    together = [_map("all channels", field.max(axis=-1), axes)] if field.shape[-1] > 1 else []
    return together + [_map(f"channel {c}", field[..., c], axes) for c in worst]


def _map(title: str, cells: np.ndarray, axes: tuple[str, str]) -> Map:
    shape = cells.shape
    for axis, size in enumerate(shape):
        block = -(-size // _CELLS)
        cells = np.maximum.reduceat(cells, np.arange(0, size, block), axis=axis)
    return Map(title, cells, shape, axes)
