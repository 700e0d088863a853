"""Search for an operand that was rounded to multiples of a step that no customary rule gives, as by a calibration.

With the right integers n = round(v / s) of the values v, y - bias = s sum n w for every element, so each element gives
the step. Steps are tried one after the other. If most elements of a sample give one and the same step, it is refined.
The case of the rounded operand is then a hypothesis like the others: y must lie within its bound, element by element.

*The steps that are tried.* A kernel with a step of its own has few values. Their integers change only where one of them
is at a tie, so one step between each two ties gives all integers that there are. An input has many values. Let a step
be wrong by a factor 1 + e. A value v then has another integer with a probability of |v / s| |e|, and one of the T
values under a window with T rms(v) |e| / s at most, on average. Neighbours are so near that this is at most 1/4 for the
nearer one.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np

from bridge.case import Case
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.precision.quantised import KERNEL_RULES, X_RULES, QuantisationRule, with_rule
from bridge.diagnosis.target import WORDS, Expected, exact_output, sampled_terms
from bridge.diagnosis.verdict import Verdict

#: Least and greatest number of steps from zero to the greatest value: 3-bit to 9-bit integers.
_LEVELS = 3, 260
#: Least and greatest integers that are kept; all others become these.
_LIMITS = ((-127.0, 127.0), (-128.0, 127.0), (-np.inf, np.inf))
#: Elements on which steps are tried for each part of an operand with its own step; in half precision each tells less.
_SAMPLE, _HALF_SAMPLE = 48, 128
#: Most elements by which a step is refined, and most parts.
_REFINED, _PARTS = 4096, 64
#: CPU seconds after which no more is tried.
_SECONDS = 2.0
#: How near v / s may be to a tie, in units roundoff of v / s, for its integer to depend on how it is computed.
_TIE = 8


def rounded_to_steps(output: Output) -> Finding | None:
    """Return the step to whose multiples an operand was rounded; the other may follow a customary rule."""
    case = output.target.case
    if output.target.quantity != "y" or not np.isfinite(case.x.astype(np.float64)).all():
        return None
    until = time.process_time() + _SECONDS
    plans: list[tuple[str, QuantisationRule | None]] = [(name, None) for name in ("x", "kernel")]
    plans += [("x", rule) for rule in KERNEL_RULES] + [("kernel", rule) for rule in X_RULES]
    for name, rule in plans:
        other = "kernel" if name == "x" else "x"
        known = case if rule is None else with_rule(case, other, rule)
        for axis, limits in itertools.product(_axes(case, name), _LIMITS):
            if time.process_time() > until:
                return None
            found = _Search(output, known, name, limits, until).steps(axis)
            if found is None:
                continue
            integers = np.clip(np.rint(getattr(case, name).astype(np.float64) / found[0]), *limits)
            if _predicts(output, known, name, integers, *found):
                return _finding(output, name, integers, found[0], other, rule)
    return None


def _axes(case: Case, name: str) -> tuple[int | None, ...]:
    """Return the axes of an operand of which each index may have its own step; None for one step."""
    every = (None, -1) if name == "kernel" or not case.geometry.batch else (None, -1, 0)
    array = getattr(case, name)
    return tuple(axis for axis in every if axis is None or 1 < array.shape[axis] <= _PARTS)


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    """Search for the steps of one operand.

    Attributes:
      output: the output.
      case: its case, perhaps with the other operand quantised.
      name: "x" or "kernel".
      limits: the least and the greatest integer.
      until: the CPU time at which to give up.
    """

    output: Output
    case: Case
    name: str
    limits: tuple[float, float]
    until: float

    def steps(self, axis: int | None) -> tuple[np.ndarray, float] | None:
        """Return the steps, of a shape to multiply the operand by, and the greatest relative doubt about one of them.

        None if the elements of a part do not agree on one step.
        """
        output, case, name = self.output, self.case, self.name
        at = np.unravel_index(np.flatnonzero(np.isfinite(output.y)), output.y.shape)
        if axis is None:
            part = np.zeros(len(at[0]), int)
        elif name == "x":
            part = at[-1] // case.geometry.multiplier if axis == -1 else at[0]
        else:
            part = at[-1]
        array = getattr(case, name)
        found = []
        rng = np.random.default_rng(5)
        for index in range(1 if axis is None else array.shape[axis]):
            mine = rng.permutation(np.flatnonzero(part == index))[:_REFINED]
            step = self._step(tuple(a[mine] for a in at)) if len(mine) >= _SAMPLE // 2 else None
            if step is None:
                return None
            found.append(step)
        steps, doubts = map(np.array, zip(*found))
        shape = [-1 if axis is not None and a == axis % array.ndim else 1 for a in range(array.ndim)]
        return steps.reshape(shape), float(doubts.max())

    def _step(self, at: tuple[np.ndarray, ...]) -> tuple[float, float] | None:
        """Return the step on which most elements agree, and the relative doubt about it."""
        output, case = self.output, self.case
        x, w, valid = (np.stack(a, axis=1) for a in zip(*sampled_terms(case, at)))
        x, w = (np.where(valid, a.astype(np.float64), 0) for a in (x, w))
        v, other = (x, w) if self.name == "x" else (w, x)
        bias = 0.0 if case.bias is None else case.bias.astype(np.float64)[at[-1]]
        wanted = output.y[at].astype(np.float64) - bias
        half = output.y.dtype.itemsize == 2
        # in half precision the multiples may be rounded too
        rounding = output.arithmetic.output.unit_roundoff * np.sqrt(((v * other) ** 2).sum(axis=1)) if half else 0.0
        allowed = output.expected.allowed[at] + rounding
        told = allowed > 0  # windows of padding alone tell nothing
        v, other, wanted, allowed = v[told], other[told], wanted[told], allowed[told]
        few = slice(_HALF_SAMPLE if half else _SAMPLE)
        top = np.abs(v).max(initial=0)
        if not top or not np.isfinite(allowed).all():
            return None
        tried = _levels(v, top)
        least, found = 1.0, None
        for block in np.array_split(tried, 1 + len(tried) * v[few].size // (1 << 22)):
            if time.process_time() > self.until:
                return None
            sums = np.einsum(
                "snt,nt->sn", np.clip(np.rint(v[few] * (block / top)[:, None, None]), *self.limits), other[few]
            )
            steps, errors = _agreement(sums, wanted[few], allowed[few])
            if errors.min() < least:
                least, found = errors.min(), float(steps[errors.argmin()])
        if found is None:
            return None
        for _ in range(4):  # with the step more integers are right, and with these the step
            sums = (np.clip(np.rint(v / found), *self.limits) * other).sum(axis=1)
            agree = np.abs(wanted - found * sums) <= allowed
            power = ((sums / allowed)[agree] ** 2).sum()
            if not power:
                return None
            found = float((wanted * sums / allowed**2)[agree].sum() / power)
            if found <= 0:
                return None
        return found, float(1 / (found * np.sqrt(power)))


def _levels(v: np.ndarray, top: float) -> np.ndarray:
    """Return the numbers of steps up to the greatest value `top` that are tried for values `(elements, taps)`."""
    values, (least, most) = np.unique(np.abs(v)), _LEVELS
    values = values[values > 0]
    if len(values) > 2 * v.shape[1]:
        return np.arange(least, most, top / (2 * v.shape[1] * np.sqrt(np.mean(v**2))))
    ties = np.concatenate([(np.arange(most * value / top) + 0.5) * top / value for value in values])
    ties = np.unique(np.clip(ties, least, most))
    return (ties[1:] + ties[:-1]) / 2


def _agreement(sums: np.ndarray, wanted: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of sums the median step of its larger half, and the median error in units of what is allowed.

    If the median error is below 1, more than half of the elements agree on the step.
    """
    with np.errstate(all="ignore"):
        each = np.where(np.abs(sums) < np.median(np.abs(sums), axis=1, keepdims=True), np.nan, wanted / sums)
        each[~np.isfinite(each)] = np.nan
        each[np.isnan(each).all(axis=1)] = -1
        steps = np.nanmedian(each, axis=1)
    errors = np.median(np.abs(wanted - steps[:, None] * sums) / allowed, axis=1)
    return steps, np.where(steps > 0, errors, np.inf)


def _predicts(output: Output, case: Case, name: str, integers: np.ndarray, steps: np.ndarray, doubt: float) -> bool:
    """Return whether y is that of the multiples, kept in float32 or rounded to the dtype of the case."""
    given = getattr(output.target.case, name).astype(np.float64)
    wide = np.dtype(np.float32) if output.y.dtype.itemsize == 2 else output.y.dtype
    u = output.arithmetic.accumulator.unit_roundoff
    ratio = given / steps
    near = np.abs(ratio - np.floor(ratio) - 0.5) <= (_TIE * u + doubt) * (1 + np.abs(ratio))
    unsure = np.where(near, np.broadcast_to(steps, given.shape), 0.0)
    other = {"x": "kernel", "kernel": "x"}[name]
    sizes = np.abs(getattr(case, other).astype(np.float64))
    of_unsure = output.target.case.replace(**{name: unsure, other: sizes}, bias=None)
    for dtype in dict.fromkeys((wide, output.y.dtype)):
        operands = {each: getattr(case, each) for each in ("x", "kernel", "bias")} | {name: integers * steps}
        rounded = case.replace(**{each: None if a is None else a.astype(dtype) for each, a in operands.items()})
        for flat in (output.sample, None):
            total = exact_output(rounded, flat)
            expected = Expected.of(total, output.arithmetic)
            allowed = expected.allowed + (4 * u + doubt) * total.magnitude
            if near.any():
                allowed = allowed + exact_output(of_unsure, flat).reference * (1 + 2.0**-40)
            expected = Expected(expected.reference, allowed)
            if not output.explained_by(expected, flat):
                break
        else:
            return _is_proved(output, expected, steps)
    return False


def _is_proved(output: Output, expected: Expected, steps: np.ndarray) -> bool:
    """Return whether each step has evidence of its own."""
    if steps.size == 1:
        return output.is_proved_by(expected)
    axis = 0 if steps.shape[0] > 1 else output.y.ndim - 1
    n = output.y.shape[axis]
    part = np.arange(n) * steps.size // n  # an input channel has several of the output
    part = part.reshape([-1 if a == axis else 1 for a in range(output.y.ndim)])
    return all(output.is_proved_by(expected, part == number) for number in range(steps.size))


def _finding(
    output: Output, name: str, integers: np.ndarray, steps: np.ndarray, other: str, rule: QuantisationRule | None
) -> Finding:
    ends = dict.fromkeys(f"{step:.6g}" for step in (steps.min(), steps.max()))
    each = "" if steps.size == 1 else f", a step for each index of axis {int(np.argmax(steps.shape))}"
    beside = "" if rule is None else f", and {WORDS[other]} quantised to int8 with {rule.words.format(other)}"
    low, high = int(integers.min()), int(integers.max())
    return Finding(
        Verdict.PRECISION,
        "quantised inputs",
        f"{output.name} was computed with {WORDS[name]} rounded to multiples of {' to '.join(ends)}{each}, "
        f"the {low}-fold to the {high}-fold, as by a calibrated quantisation{beside}; "
        f"the rest is within the bound of {output.arithmetic.accumulator.name}",
        f"compute {output.name} without quantisation, or quantise both implementations with the same step",
        f"inputs: {name}{'' if rule is None else f', {other}'}",
    )
