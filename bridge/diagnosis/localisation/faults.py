"""Faults of an output: taps, biases or whole channels that are off, found by regression.

The residual of an output channel is regressed on the inputs x_t of each tap t. If tap t is off by d_t,

    y - exact = sum_t d_t x_t + d_b + rounding,

which is linear in d with noise no greater than the bound. Taps enter one at a time, the most correlated first
(orthogonal matching pursuit; Pati, Rezaiifar & Krishnaprasad 1993), until the rest is rounding. So the fewest are
named. Rows are weighted by 1 / noise, with noise = bound + n u |y - exact| + u |y|: the error is rounded too, before
the sum or after it. d_t over the tap's weight is its scale less one; d_b is the bias.

A fault explains elements if there are amounts d that leave each of them within its own noise. Least squares gives the
amounts that are named. They need not be such amounts, but by them most elements are within their noise; linear
programming over the others decides (`_feasible`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from bridge.diagnosis.localisation.support import index_words
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected, sampled_terms

#: Most channels that are regressed; of more, this many at equal distances.
_CHANNELS = 48
#: Most taps, and most kinds of faults, that are named one by one.
_TAPS = 4
#: Elements that enter a linear program at a time, how often some do, and the solver's own tolerance.
_ROWS, _PROGRAMS, _SOLVED = 64, 30, 1e-6


@dataclasses.dataclass(frozen=True)
class Fault:
    """The error of one output channel.

    Attributes:
      channel: the index of the channel.
      taps: the taps that are off, each with the factor by which it is scaled (None if its weight is zero) and the
        amount by which it is off.
      bias: the number that is added to every output, or 0.
      scale: the factor of the whole channel, or None.
    """

    channel: int
    taps: tuple[tuple[tuple[int, ...], float | None, float], ...] = ()
    bias: float = 0.0
    scale: float | None = None


def regress(output: Output, flat: np.ndarray) -> list[Fault]:
    """Return the faults of taps, bias or scale that explain all of the elements `flat`; empty if none do."""
    if not output.outside.ravel()[flat].any():
        return []
    faults = []
    for channel, design, residual, reference in designs(output, flat, output.expected):
        if np.abs(residual).max(initial=0) <= 1:
            continue
        fault = _scaled(output, channel, residual, reference)
        if fault is None and output.target.quantity == "y":
            fault = _pursue(output, channel, design, residual)
        if fault is None:
            return []
        faults.append(fault)
    return faults


def holds(output: Output, fault: Fault, inside: np.ndarray) -> bool:
    """Return whether the fault, fitted on some elements of its channel, explains all that are `inside`."""
    case, g, channel = output.target.case, output.target.case.geometry, fault.channel
    y, reference, allowed = (a[..., channel] for a in (output.y, *output.expected))
    columns = [np.ones(y.shape)] if fault.bias else [reference] if fault.scale is not None else []
    amounts = [fault.bias] if fault.bias else [fault.scale - 1] if fault.scale is not None else []
    for tap, _, amount in fault.taps:
        taken, valid = case.x[..., channel // g.multiplier].astype(np.float64), np.ones((), bool)
        for axis, (source, t) in enumerate(zip(g.sources, tap)):
            taken = np.take(taken, np.maximum(source[:, t], 0), axis=len(g.batch) + axis)
            valid = np.logical_and.outer(valid, source[:, t] >= 0)
        columns.append(np.where(valid, taken, 0))
        amounts.append(amount)
    usable = inside[..., channel] & np.isfinite(y) & np.isfinite(reference) & np.isfinite(allowed)
    y, reference, allowed, *columns = (a[usable].astype(np.float64) for a in (y, reference, allowed, *columns))
    weight = _weight(output, y, reference, allowed)
    design, start = np.stack(columns, axis=1) * weight[:, None], np.array(amounts)
    return _feasible((y - reference) * weight, design, start, _noise(output, design, start, fault.scale))


def designs(
    output: Output, flat: np.ndarray, expected: Expected
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield `(channel, x under each tap and 1, residual, reference)` of affected channels, each row over its bound."""
    g, case = output.target.case.geometry, output.target.case
    rng = np.random.default_rng(1)
    outside = output.outside.ravel()[flat]
    channels = flat % output.y.shape[-1]
    affected = np.unique(channels[outside])
    if len(affected) > _CHANNELS:
        affected = affected[np.linspace(0, len(affected) - 1, _CHANNELS).astype(int)]
    rows = 16 * (g.taps + 1) + 128
    for channel in affected:
        mine = flat[channels == channel]
        wrong = mine[output.outside.ravel()[mine]]
        chosen = np.unique(
            np.concatenate([rng.choice(a, min(len(a), rows // 2), replace=False) for a in (wrong, mine)])
        )
        at = np.unravel_index(chosen, output.y.shape)
        terms = sampled_terms(case, at) if output.target.quantity == "y" else []
        # NumPy 2.0 crashes in `where` on bfloat16 and a Python number
        columns = [np.where(valid, x.astype(np.float64), 0) for x, _, valid in terms]
        design = np.stack([*columns, np.ones(len(chosen))], axis=1)
        reference, allowed = expected.at(chosen)
        usable = np.isfinite(allowed) & np.isfinite(reference)
        y, reference = output.y.ravel()[chosen].astype(np.float64)[usable], reference[usable]
        weight = _weight(output, y, reference, allowed[usable])
        yield int(channel), design[usable] * weight[:, None], (y - reference) * weight, reference * weight


def _weight(output: Output, y: np.ndarray, reference: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return 1 / noise of each element; not more than 10^4 times the least, since windows of padding have no noise."""
    u = output.arithmetic.output.unit_roundoff
    noise = allowed + u * ((output.target.case.geometry.taps + 1) * np.abs(y - reference) + np.abs(y))
    return 1 / np.maximum(noise, 1e-4 * noise.max(initial=1e-300))


def _noise(output: Output, design: np.ndarray, amounts: np.ndarray, scale: float | None) -> np.ndarray:
    """Return the noise of each residual, in units of that of no fault: more in a channel that is scaled up.

    Products of several taps that are off are rounded, and may cancel.
    """
    u = output.arithmetic.output.unit_roundoff * (output.target.case.geometry.taps + 1)
    return max(1.0, abs(scale or 0.0)) + u * (np.abs(design) @ np.abs(amounts))


def _feasible(residual: np.ndarray, design: np.ndarray, amounts: np.ndarray, noise: np.ndarray) -> bool:
    """Return whether some amounts leave each residual within its noise.

    Args:
      residual, design: y - exact, and one column per amount.
      amounts: where to start.
    """
    from scipy.optimize import linprog  # takes as long to import as all of bridge

    if not np.isfinite(noise).all():
        return False
    size = np.abs(design).max(axis=0, initial=0)
    size[size == 0] = 1
    rows = np.zeros(0, int)
    for _ in range(_PROGRAMS):
        over = np.abs(residual - design @ amounts) / noise
        if over.max(initial=0) <= 1 + _SOLVED:
            return True
        rows = np.union1d(rows, np.argsort(over)[-_ROWS:])
        scaled, left = design[rows] / size, residual[rows]
        found = linprog(  # the least t with |residual - design amounts| <= noise t
            [0.0] * len(size) + [1.0],
            A_ub=np.block([[scaled, -noise[rows, None]], [-scaled, -noise[rows, None]]]),
            b_ub=np.concatenate([left, -left]),
            bounds=[(None, None)] * len(size) + [(0, None)],
        )
        if found.x is None or found.x[-1] > 1 + _SOLVED:
            return False
        amounts = found.x[:-1] / size
    return False


def _scaled(output: Output, channel: int, residual: np.ndarray, reference: np.ndarray) -> Fault | None:
    """Return the fault that the whole channel is scaled; None if that does not explain it."""
    power = reference @ reference
    if not power:
        return None
    factor = residual @ reference / power
    design, start = reference[:, None], np.array([factor])
    fits = _feasible(residual, design, start, _noise(output, design, start, 1 + factor))
    return Fault(channel, scale=1 + factor) if fits else None


def _pursue(output: Output, channel: int, design: np.ndarray, residual: np.ndarray) -> Fault | None:
    """Return the fewest taps, and the bias if needed, that leave no more than rounding; None if none do."""
    size = np.linalg.norm(design, axis=0)
    chosen: list[int] = []
    left = residual
    while not _explain(output, design, residual, chosen):
        score = np.abs(design.T @ left) / np.where(size > 0, size, np.inf)
        score[chosen] = 0
        if len(chosen) == len(size) or score.max() == 0 or len(chosen) + 1 >= len(residual) / 2:
            return None
        chosen.append(int(score.argmax()))
        left = _fit(design, residual, chosen)[1]
    for column in chosen[:-1]:  # what entered early may not be needed beside what came later
        others = [c for c in chosen if c != column]
        if _explain(output, design, residual, others):
            chosen = others
    if not chosen:
        return None
    beta = _fit(design, residual, chosen)[0]
    case = output.target.case
    positions = list(np.ndindex(case.geometry.kernel_size))
    taps, bias = [], 0.0
    for column, amount in sorted(zip(chosen, beta)):
        if column == len(positions):
            bias = float(amount)
            continue
        weight = float(case.kernel[(*positions[column], 0, channel)])
        taps.append((positions[column], 1 + float(amount) / weight if weight else None, float(amount)))
    return Fault(channel, tuple(taps), bias)


def _explain(output: Output, design: np.ndarray, residual: np.ndarray, columns: list[int]) -> bool:
    """Return whether the taps explain each residual. Least squares has the least power of all that is left."""
    if not columns:
        return bool(np.abs(residual).max(initial=0) <= 1)
    beta, left = _fit(design, residual, columns)
    noise = _noise(output, design[:, columns], beta, None)
    return bool(left @ left <= noise @ noise) and _feasible(residual, design[:, columns], beta, noise)


def _fit(design: np.ndarray, residual: np.ndarray, columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return `(coefficients, remainder)` of least squares on some columns."""
    beta = np.linalg.lstsq(design[:, columns], residual, rcond=1e-12)[0]
    return beta, residual - design[:, columns] @ beta


def fault_words(output: Output, faults: list[Fault]) -> str:
    """Return the faults in words; channels with the same fault share one phrase."""
    features = output.y.shape[-1]
    affected = np.count_nonzero(output.outside.any(axis=tuple(range(output.y.ndim - 1))))
    groups = [
        (words, [f.channel for f in group])
        for words, group in itertools.groupby(sorted(faults, key=_one_fault), key=_one_fault)
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
            who = f"channels {index_words(np.array(sorted(channels)), features)}"
        phrases.append(words.replace("{}", who))
    if len(groups) > _TAPS:
        phrases.append(f"and more: {affected} of {features} channels are wrong")
    if affected > len(faults):
        phrases.append(f"looked at: {len(faults)} of the {affected} channels that are wrong")
    return "; ".join(phrases)


def fault_name(faults: list[Fault]) -> str:
    """Return the short name of the faults."""
    scales = [f.scale for f in faults if f.scale is not None]
    if len(scales) == len(faults):
        return "sign" if all(abs(s + 1) < 1e-3 for s in scales) else "channel scaled"
    if any(f.taps for f in faults):
        return (
            "sign of a tap" if all(s is not None and abs(s + 1) < 1e-3 for f in faults for _, s, _ in f.taps) else "tap"
        )
    return "bias"


def _one_fault(fault: Fault) -> str:
    """Return one fault in words, with {} in place of its channels."""
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
