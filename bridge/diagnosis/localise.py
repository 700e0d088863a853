"""BUG: where an output that nothing explains is wrong.

The residual of an output channel is regressed on what each tap reads. If tap t is off by d_t,

    y - exact = sum_t d_t x_t + d_b + rounding,

which is linear in d with noise no greater than the bound. Taps enter one at a time, the most correlated first
(orthogonal matching pursuit; Pati, Rezaiifar & Krishnaprasad 1993), until what remains is rounding: so the fewest are
named. Rows are weighted by 1 / (bound + n u |y - exact|), which makes the noise uniform. d_t over the tap's weight is
its scale less one; d_b is the bias. Where no taps explain it, the support of what is outside the bound says it:
elements, channels, batch entries, borders.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bridge.diagnosis.conventions import named_within
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.target import Expected, sampled_terms
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import ulp_distance

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side

#: Channels that are regressed; of more, these many, spread evenly.
_CHANNELS = 48
#: Taps that are named; with more, the whole kernel of a channel is.
_TAPS = 4
#: A fitted residual above this many bounds is not rounding. The fit adds its own error to that of y.
_FITS = 2.0
#: Elements that are carried back to the input, and random signs to compare with.
_BACK = 1 << 14
_DRAWS = 33
#: Units in the last place up to which an error that lies to one side is told as that.
_ULPS = 2
#: Fewer elements than this are listed one by one.
_LISTED = 8
#: Violations expected in an index along an axis that has none, for its absence to mean something.
_EXPECTED = 4.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with one output channel.

    Attributes:
      channel: which.
      taps: the taps that are off, with the factor by which each is scaled (None where its weight is zero) and the
        amount it is off by.
      bias: what is added to every output, or 0.
      scale: the factor of the whole channel, or None.
    """

    channel: int
    taps: tuple[tuple[tuple[int, ...], float | None, float], ...] = ()
    bias: float = 0.0
    scale: float | None = None


def localise(side: Side) -> Finding:
    """The finding BUG, with its place."""
    outside = side.outside
    count = int(np.count_nonzero(outside))
    if count > min(_LISTED, outside.size // 2):
        if side.one_sided and ulp_distance(side.y, side.target.exact.value).max(where=outside, initial=0) <= _ULPS:
            cause = f"{side.one_sided}; {count} of {outside.size} are beyond the bound of rounding"
            return Finding(Verdict.BUG, "one-sided rounding", cause, place="everywhere")
        everywhere = Support(())
        confined = support(side)
        for place in dict.fromkeys((everywhere, confined.only("batch"), confined)):
            inside = place.mask(side)
            if place.restrictions and (mistake := named_within(side, inside)) is not None:
                return _confined(side, place, f"it {mistake.cause}")
            faults = regress(side, np.flatnonzero(inside & np.isfinite(side.y)))
            if faults and all(_holds(side, fault, inside) for fault in faults):
                return _of_faults(side, faults, place)
        if side.nearly:
            return _but_for_a_few(side)
        if _same_values(side):
            return _shuffled(side, confined)
        all_wrong = "everywhere" if count == outside.size else "at elements all over the output"
        return _unexplained(side, confined.name or "everywhere", confined.words or all_wrong, count)
    listed = ", ".join(str(tuple(int(i) for i in index)) for index in np.argwhere(outside))
    if count == 1:
        return _unexplained(side, "single element", f"at element {listed}", count)
    return _unexplained(side, "few elements", f"at {count} elements: {listed}", count)


def _unexplained(side: Side, name: str, place: str, count: int) -> Finding:
    zero = bool((side.y[side.outside] == 0).all())
    ratio = f"up to {side.worst_ratio:.3g} times the bound of {side.arithmetic.accumulator.name}"
    cause = f"{side.name} is {'zero' if zero else 'wrong'} {place}; {count} of {side.y.size} elements, by {ratio}"
    return Finding(Verdict.BUG, name, cause, place=place)


def _but_for_a_few(side: Side) -> Finding:
    """The mistake that explains most, and the elements that contradict it."""
    mistake, left = min(side.nearly, key=lambda found: np.count_nonzero(found[1]))
    listed = ", ".join(str(tuple(int(i) for i in index)) for index in np.argwhere(left))
    return Finding(
        Verdict.BUG,
        "single element" if np.count_nonzero(left) == 1 else "few elements",
        f"{side.name} {mistake.cause}; and beside that it is wrong at {listed}",
        place=f"at {listed}",
    )


def _confined(side: Side, place: Support, what: str) -> Finding:
    count = int(np.count_nonzero(side.outside))
    cause = f"{side.name} is wrong {place.words}, in {count} of {side.y.size} elements: there {what}"
    return Finding(Verdict.BUG, place.name, cause, place=place.words)


def _shuffled(side: Side, confined: Support) -> Finding:
    return Finding(
        Verdict.BUG,
        "outputs permuted",
        f"{side.name} has the right values in wrong places: sorted, they agree",
        "put the outputs in their places: they are permuted within the tensor, along no single axis",
        confined.words or "everywhere",
    )


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

    def mask(self, side: Side) -> np.ndarray:
        inside = np.ones(side.y.shape, bool)
        for restriction in self.restrictions:
            if restriction.axis is None:
                inside &= border(side) == (restriction.name == "border")
            else:
                keep = np.isin(np.arange(side.y.shape[restriction.axis]), restriction.indices)
                inside &= keep.reshape([-1 if a == restriction.axis else 1 for a in range(side.y.ndim)])
        return inside


def border(side: Side) -> np.ndarray:
    """Whether an output's window reaches into the padding: bool `(*output_spatial, 1)`."""
    g = side.target.case.geometry
    full = np.ones((), bool)
    for axis in range(g.rank):
        out = np.arange(g.output_spatial[axis]) * g.strides[axis]
        low = g.padding[axis][0]
        size = (g.spatial[axis] - 1) * g.input_dilation[axis] + 1
        full = np.logical_and.outer(full, (out >= low) & (out + g.spans[axis] <= low + size))
    return ~full[..., None]


def support(side: Side) -> Support:
    """The indices of each axis, and the borders, to which the wrong elements are confined."""
    outside = side.outside
    count = np.count_nonzero(outside)
    found = list(_border_or_interior(side))
    for axis, n in enumerate(outside.shape):
        hit = np.flatnonzero(outside.any(axis=tuple(a for a in range(outside.ndim) if a != axis)))
        # an index without wrong elements says something only where some were to be expected
        if len(hit) < n and count / len(hit) >= _EXPECTED:
            name, words = _axis_words(side, axis)
            found.append(Restriction(name, f"in {words} {_indices(hit, n)}", axis, tuple(hit.tolist())))
    return Support(tuple(found))


def _border_or_interior(side: Side) -> Iterator[Restriction]:
    if side.target.quantity != "y":
        return
    at_border = border(side)
    hits = side.outside.any(axis=tuple(range(len(side.target.case.geometry.batch))))
    on, off = np.count_nonzero(hits & at_border), np.count_nonzero(hits & ~at_border)
    if not off and on >= _EXPECTED and not at_border.all():
        yield Restriction("border", "at the borders (windows that reach into the padding)")
    if not on and off >= _EXPECTED and at_border.any():
        yield Restriction("interior", "in the interior (windows without padding)")


def _axis_words(side: Side, axis: int) -> tuple[str, str]:
    """What an axis of the output or of a gradient is: `(name, words)`."""
    last, batch = side.y.ndim - 1, len(side.target.case.geometry.batch)
    if axis == last:
        return "channels", "channels"
    if side.target.quantity == "dkernel":
        return "taps", f"taps of axis {axis}"
    if axis < batch:
        return "batch", "batch entries" if batch == 1 else f"batch axis {axis},"
    return "positions", {1: ["positions"], 2: ["rows", "columns"], 3: ["planes", "rows", "columns"]}[last - batch][
        axis - batch
    ]


def _indices(hit: np.ndarray, n: int) -> str:
    if len(hit) == 1:
        return f"{hit[0]}{' (the last)' if hit[0] == n - 1 else ''}"
    if len(hit) > 2 and (np.diff(hit) == 1).all():
        return f"{hit[0]} to {hit[-1]} of {n}"
    steps = np.diff(hit)
    if len(hit) > 2 and (steps == steps[0]).all():
        return f"{hit[0]} to {hit[-1]} in steps of {steps[0]}, of {n}"
    shown = ", ".join(map(str, hit[:8]))
    return f"{shown}{f', ... ({len(hit)} of {n})' if len(hit) > 8 else ''}"


def systematic(side: Side, expected: Expected) -> bool:
    """Whether what y differs from `expected` by correlates with a tap or is offset, in some channel: not rounding.

    A regression's t-statistic beyond 7 has a chance below 1e-11 if errors are random, whatever their size. Windows that
    lie mostly in the padding are left out: many are the same but for one number, and so are their errors.
    """
    if side.target.quantity != "y":
        return False
    count = side.target.exact.products.count
    filled = np.broadcast_to(2 * count >= count.max(), side.y.shape)
    for _, design, residual, _ in _designs(side, np.flatnonzero(filled & np.isfinite(side.y)), expected):
        rows, columns = design.shape
        if rows < 4 * columns:
            continue
        beta, _, rank, _ = np.linalg.lstsq(design, residual, rcond=1e-9)
        noise = residual - design @ beta
        variance = noise @ noise / max(1, rows - rank)
        spread = np.sqrt(np.maximum(np.diag(np.linalg.pinv(design.T @ design)) * variance, 0))
        if (np.abs(beta) > 7 * spread).any():
            return True
    return False


def follows_inputs(side: Side, expected: Expected) -> bool:
    """Whether what y differs from `expected` by is what errors of the input would do: not rounding of the sum.

    Errors d of the input make r = K d, so that K' r is greater than for errors that are independent from output to
    output. Those keep their distribution when their signs are drawn anew: K' r is compared with that of random signs,
    and is beyond 7 standard deviations by chance with a probability below 1e-11.
    """
    g = side.target.case.geometry
    if side.target.quantity != "y" or g.taps == 1 or not side.y.size:
        return False
    batch = tuple(slice(1) for _ in g.batch)
    features = slice(min(g.channels, max(1, _BACK // math.prod(g.output_spatial) // g.multiplier)) * g.multiplier)
    residual = (side.y.astype(np.float64) - expected.reference)[batch][..., features].reshape(*g.output_spatial, -1)
    residual[~np.isfinite(residual)] = 0
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (_DRAWS, *residual.shape))
    signs[0] = 1
    kernel = side.target.case.kernel[..., 0, features].astype(np.float64)
    back = np.zeros((_DRAWS, *(n + 1 for n in g.spatial), residual.shape[-1]))  # the last index is padding
    for tap in np.ndindex(g.kernel_size):
        index: tuple[Any, ...] = np.ix_(*(source[:, t] for source, t in zip(g.sources, tap)))
        np.add.at(back, (slice(None), *index), signs * (residual * kernel[tap]))
    inside = (slice(None), *(slice(n) for n in g.spatial))
    by_input = back[inside].reshape(_DRAWS, -1, residual.shape[-1] // g.multiplier, g.multiplier).sum(axis=-1)
    power = (by_input**2).sum(axis=(1, 2))
    return bool(power[0] - power[1:].mean() > 7 * power[1:].std())


def regress(side: Side, flat: np.ndarray) -> list[Fault]:
    """The faults of taps, bias or scale that explain all of the elements `flat`; empty if such faults do not."""
    if not side.outside.ravel()[flat].any():
        return []
    faults = []
    for channel, design, residual, reference in _designs(side, flat, side.expected):
        if np.abs(residual).max(initial=0) <= 1:
            continue
        fault = _scaled(channel, residual, reference)
        if fault is None and side.target.quantity == "y":
            fault = _pursue(side, channel, design, residual)
        if fault is None:
            return []
        faults.append(fault)
    return faults


def _holds(side: Side, fault: Fault, inside: np.ndarray) -> bool:
    """Whether the fault explains its channel at every element that is `inside`: it was fitted on some of them."""
    case, g, channel = side.target.case, side.target.case.geometry, fault.channel
    reference, allowed = (a[..., channel] for a in side.expected)
    difference = side.y[..., channel].astype(np.float64) - reference
    predicted: np.ndarray = (
        np.full(difference.shape, fault.bias) if fault.scale is None else (fault.scale - 1) * reference
    )
    for tap, _, amount in fault.taps:
        taken, valid = case.x[..., channel // g.multiplier].astype(np.float64), np.ones((), bool)
        for axis, (source, t) in enumerate(zip(g.sources, tap)):
            taken = np.take(taken, np.maximum(source[:, t], 0), axis=len(g.batch) + axis)
            valid = np.logical_and.outer(valid, source[:, t] >= 0)
        predicted = predicted + amount * np.where(valid, taken, 0)
    noise = allowed + (g.taps + 1) * side.arithmetic.output.unit_roundoff * np.abs(difference)
    usable = inside[..., channel] & np.isfinite(difference) & np.isfinite(noise)
    least = 1e-4 * noise.max(initial=0, where=usable)
    # a fit from some elements is off by more at others
    return bool((np.abs(difference - predicted) <= 4 * _FITS * np.maximum(noise, least))[usable].all())


def _designs(
    side: Side, flat: np.ndarray, expected: Expected
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """For some affected channels `(channel, x under each tap and 1, residual, reference)`, rows over their bound."""
    g, case = side.target.case.geometry, side.target.case
    rng = np.random.default_rng(1)
    outside = side.outside.ravel()[flat]
    channels = flat % side.y.shape[-1]
    affected = np.unique(channels[outside])
    if len(affected) > _CHANNELS:
        affected = affected[np.linspace(0, len(affected) - 1, _CHANNELS).astype(int)]
    rows = 16 * (g.taps + 1) + 128
    for channel in affected:
        mine = flat[channels == channel]
        wrong = mine[side.outside.ravel()[mine]]
        chosen = np.unique(
            np.concatenate([rng.choice(a, min(len(a), rows // 2), replace=False) for a in (wrong, mine)])
        )
        at = np.unravel_index(chosen, side.y.shape)
        terms = sampled_terms(case, at) if side.target.quantity == "y" else []
        columns = [np.where(valid, x, 0).astype(np.float64) for x, _, valid in terms]
        design = np.stack([*columns, np.ones(len(chosen))], axis=1)
        reference, allowed = expected.at(chosen)
        usable = np.isfinite(allowed) & np.isfinite(reference)
        difference = (side.y.ravel()[chosen].astype(np.float64) - reference)[usable]
        # what is wrongly added is rounded too; and a window of padding alone would outweigh all others
        noise = allowed[usable] + (g.taps + 1) * side.arithmetic.output.unit_roundoff * np.abs(difference)
        weight = 1 / np.maximum(noise, 1e-4 * noise.max(initial=1e-300))
        yield int(channel), design[usable] * weight[:, None], difference * weight, reference[usable] * weight


def _scaled(channel: int, residual: np.ndarray, reference: np.ndarray) -> Fault | None:
    """The whole channel times one factor."""
    power = reference @ reference
    if not power:
        return None
    factor = residual @ reference / power
    return Fault(channel, scale=1 + factor) if np.abs(residual - factor * reference).max() <= _FITS else None


def _pursue(side: Side, channel: int, design: np.ndarray, residual: np.ndarray) -> Fault | None:
    """The fewest taps, and perhaps the bias, that leave no more than rounding."""
    size = np.linalg.norm(design, axis=0)
    chosen: list[int] = []
    left = residual
    while np.abs(left).max(initial=0) > _FITS:
        score = np.abs(design.T @ left) / np.where(size > 0, size, np.inf)
        score[chosen] = 0
        if len(chosen) == len(size) or score.max() == 0 or len(chosen) + 1 >= len(residual) / 2:
            return None
        chosen.append(int(score.argmax()))
        left = _fit(design, residual, chosen)[1]
    for column in chosen[:-1]:  # what entered early may not be needed beside what came later
        others = [c for c in chosen if c != column]
        if np.abs(_fit(design, residual, others)[1]).max() <= _FITS:
            chosen = others
    if not chosen:
        return None
    beta = _fit(design, residual, chosen)[0]
    case = side.target.case
    positions = list(np.ndindex(case.geometry.kernel_size))
    taps, bias = [], 0.0
    for column, amount in sorted(zip(chosen, beta)):
        if column == len(positions):
            bias = float(amount)
            continue
        weight = float(case.kernel[(*positions[column], 0, channel)])
        taps.append((positions[column], 1 + float(amount) / weight if weight else None, float(amount)))
    return Fault(channel, tuple(taps), bias)


def _fit(design: np.ndarray, residual: np.ndarray, columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Least squares on some columns: `(coefficients, what is left)`."""
    beta = np.linalg.lstsq(design[:, columns], residual, rcond=1e-12)[0]
    return beta, residual - design[:, columns] @ beta


def _of_faults(side: Side, faults: list[Fault], where: Support) -> Finding:
    """Channels with the same fault in one phrase."""
    features = side.y.shape[-1]
    affected = np.count_nonzero(side.outside.any(axis=tuple(range(side.y.ndim - 1))))
    groups = [
        (words, [f.channel for f in group])
        for words, group in itertools.groupby(sorted(faults, key=_fault_words), key=_fault_words)
    ]
    phrases = []
    for words, channels in groups[:_TAPS]:
        if len(groups) == 1 and affected == features and features > 1:
            who = "every channel"
        elif len(groups) == 1 and len(channels) < affected:
            who = f"{affected} channels"
        elif len(channels) == 1:
            who = f"channel {channels[0]}"
        else:
            who = f"channels {_indices(np.array(sorted(channels)), features)}"
        phrases.append(words.replace("{}", who))
    if len(groups) > _TAPS:
        phrases.append(f"and more: {affected} of {features} channels are wrong")
    if affected > len(faults):
        phrases.append(f"looked at: {len(faults)} of the {affected} channels that are wrong")
    if where.is_by_position:
        return _confined(side, where, "; ".join(phrases))
    place = ", ".join(filter(None, ["; ".join(phrases), where.words]))
    return Finding(Verdict.BUG, _fault_name(faults), f"{side.name}: {place}", place=place)


def _fault_name(faults: list[Fault]) -> str:
    scales = [f.scale for f in faults if f.scale is not None]
    if len(scales) == len(faults):
        return "sign" if all(abs(s + 1) < 1e-3 for s in scales) else "channel scaled"
    if any(f.taps for f in faults):
        return (
            "sign of a tap" if all(s is not None and abs(s + 1) < 1e-3 for f in faults for _, s, _ in f.taps) else "tap"
        )
    return "bias"


def _fault_words(fault: Fault) -> str:
    """One fault, with a place for its channels."""
    if fault.scale is not None:
        return "{} " + _scale_words(fault.scale)
    parts = []
    if len(fault.taps) > _TAPS:
        scales = [s for _, s, _ in fault.taps if s is not None]
        ends = list(dict.fromkeys(f"{scale:.4g}" for scale in (min(scales), max(scales)))) if scales else []
        by = f", scaled by {' to '.join(ends)}" if ends else ""
        parts.append(f"{len(fault.taps)} taps of {{}} are wrong{by}")
    else:
        for tap, scale, amount in fault.taps:
            tap_words = f"tap {tap} of {{}} "
            parts.append(tap_words + (_scale_words(scale) if scale is not None else f"is off by {amount:.4g}"))
    if fault.bias:
        parts.append(f"the bias of {{}} is off by {fault.bias:.4g}")
    return " and ".join(parts)


def _scale_words(scale: float) -> str:
    for value, words in (
        (0, "is missing (scaled by 0)"),
        (-1, "has the other sign (scaled by -1)"),
        (2, "counts twice (scaled by 2)"),
    ):
        if abs(scale - value) < 1e-3:
            return words
    return f"is scaled by {1 + float(f'{scale - 1:.3g}'):.7g}"


def _same_values(side: Side) -> bool:
    """Whether y and the exact result hold the same values, in any order, to within the greatest bound."""
    y, reference = side.y.astype(np.float64).ravel(), side.expected.reference.ravel()
    if not np.isfinite(y).all() or not np.isfinite(reference).all():
        return False
    allowed = side.expected.allowed.max(initial=0)
    return bool(np.abs(np.sort(y) - np.sort(reference)).max() <= allowed < 1e-2 * np.abs(y - reference).max())
