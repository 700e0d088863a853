"""Compare two outputs of one case, element by element, and return the strongest verdict that can be proved."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bridge.case import Case
from bridge.diagnosis.comparison import Comparison
from bridge.diagnosis.judgement import Judgement
from bridge.diagnosis.nonfinite import disagreement
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Target
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import Arithmetic, ExactSum, difference_bound, same_bits, ulp_distance


def compare(
    actual: np.ndarray,
    expected: np.ndarray,
    case: Case,
    *,
    names: tuple[str, str] = ("actual", "expected"),
    arithmetics: tuple[Arithmetic | None, Arithmetic | None] = (None, None),
    reference: ExactSum | None = None,
    quantity: str = "y",
    dy: np.ndarray | None = None,
    replayed: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> Comparison:
    """Return the difference of two outputs of one case, and the strongest verdict on it.

    Equal bits are IDENTICAL. They are INCONCLUSIVE if nothing was compared: the output is empty, or all products are
    zero, which would hide any mistake. Elements that are not finite must agree (any NaN with any NaN); the others are
    judged as if there were no such elements. A difference where overflow is possible has no bound; it is INCONCLUSIVE
    unless other elements prove more.

    Args:
      actual, expected: `(*batch, *output_spatial, C*M)`, NumPy arrays of the case's dtype.
      case: the input, kernel, bias and geometry that both were computed from.
      names: what to call them.
      arithmetics: the arithmetic that each declares; None: any order of summation in the accumulator that is
        customary for the dtype, fused or not, subnormals flushed or not.
      reference: the exact result, `bridge.numerics.exact(case)`; None computes it.
      quantity: what the arrays are: "y", or a gradient of sum(dy y): "dx", "dkernel" or "dbias", of its own shape.
      dy: the gradient by the output, for a gradient.
      replayed: each array recomputed in its revealed accumulation order; None if that was not tried.

    Raises:
      ValueError, TypeError: an array of another shape or dtype than the case's output; the message says which axes
        look swapped, or which padding or stride gives that shape.

    >>> x, kernel = np.ones((1, 5, 5, 2), np.float32), np.ones((3, 3, 1, 2), np.float32)
    >>> case = Case(x, kernel, padding="VALID")
    >>> y = np.full((1, 3, 3, 2), 9, np.float32)
    >>> wrong = y.copy()
    >>> wrong[0, 1, 1, 0] = 8
    >>> compare(y, y, case).verdict, compare(y, wrong, case).verdict
    (<Verdict.IDENTICAL: 'IDENTICAL'>, <Verdict.BUG: 'BUG'>)
    """
    target = Target(case, quantity, dy, reference)
    a, b = (
        Judgement(Output(name, y, target, arithmetic, again))
        for name, y, arithmetic, again in zip(names, (actual, expected), arithmetics, replayed)
    )
    return compare_outputs(a, b)


def compare_outputs(judged_a: Judgement, judged_b: Judgement) -> Comparison:
    """Compare two checked outputs of one target, as `compare` does."""
    a, b = judged_a.output, judged_b.output
    differs = ~same_bits(a.y, b.y)
    if not differs.any():
        return _equal(a, b)
    nonfinite = differs & ~(np.isfinite(a.y) & np.isfinite(b.y))
    found, unbounded = _figures(a, b, differs & ~nonfinite)
    found = dataclasses.replace(
        found, different=int(np.count_nonzero(differs)), explained=_explained(a, b, np.flatnonzero(differs))
    )
    if not nonfinite.any():
        return dataclasses.replace(found, **_verdict(judged_a, judged_b, found, unbounded))
    where = _index(int(np.argmax(nonfinite)), a.y.shape)
    cause, place = disagreement(a, b, where, int(np.count_nonzero(nonfinite)))
    return dataclasses.replace(
        found, verdict=Verdict.NONFINITE, where=where, name="nonfinite", cause=cause, place=place
    )


def _figures(a: Output, b: Output, differs: np.ndarray) -> tuple[Comparison, int]:
    """Return the figures of the finite elements that differ, without a verdict, and how many of these have no bound."""
    flat = np.flatnonzero(differs)
    left, right = a.y.ravel()[flat], b.y.ravel()[flat]
    distance = np.abs(left.astype(np.float64) - right.astype(np.float64))
    bound = difference_bound(a.bound.ravel()[flat], b.bound.ravel()[flat])
    ratio = _ratio(distance, bound)
    found = Comparison(
        a.name,
        b.name,
        Verdict.INCONCLUSIVE,
        a.y.size,
        len(flat),
        float(distance.max(initial=0.0)),
        int(ulp_distance(left, right).max(initial=0)),
        float(ratio.max(initial=0.0)),
        (a.worst_ratio, b.worst_ratio),
        where=_index(int(flat[np.argmax(ratio)]), a.y.shape) if len(flat) else None,
    )
    return found, int(np.count_nonzero(np.isinf(bound) & (distance > 0)))


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _verdict(a: Judgement, b: Judgement, found: Comparison, unbounded: int) -> dict[str, Any]:
    """Return the verdict on finite elements that differ, its name, cause, fix and place."""
    findings = [each.finding for each in (a, b) if each.finding is not None]
    if findings:
        weakest = max(findings, key=lambda finding: finding.verdict.rank())
        told = {
            field: "; ".join(dict.fromkeys(filter(None, (getattr(finding, field) for finding in findings))))
            for field in ("cause", "fix", "place")
        }
        return {"verdict": weakest.verdict, "name": weakest.name, **told}
    if unbounded:
        cause = f"{unbounded} of the elements that differ have no bound: a partial sum may overflow there"
        return {"verdict": Verdict.INCONCLUSIVE, "name": "overflow possible", "cause": cause}
    declared = _declared_difference(a.output, b.output)
    if found.explained == found.different:
        cause = "accumulation order, and fused or separate multiply and add: replaying both orders reproduces every bit"
        cause = f"{declared}; and {cause}" if declared else cause
        return {"verdict": Verdict.EXPLAINED, "name": "order", "cause": cause}
    cause = "every element is within the proved bound of rounding, which holds for any accumulation order, fused or not"
    one_sided = "; ".join(filter(None, (a.one_sided, b.one_sided)))
    cause = "; ".join(filter(None, (declared, cause, one_sided)))
    return {"verdict": Verdict.ROUNDING, "name": "one-sided rounding" if one_sided else "rounding", "cause": cause}


def _declared_difference(a: Output, b: Output) -> str:
    """Return the formats that the two outputs declare, where these differ, in words."""
    parts = []
    for field in ("input", "accumulator", "output"):
        of_a, of_b = getattr(a.arithmetic, field), getattr(b.arithmetic, field)
        if of_a != of_b:
            names = (fmt.name if fmt else a.y.dtype.name for fmt in (of_a, of_b))
            parts.append("{} {} against {}".format(field, *names))
    return "declared formats: " + ", ".join(parts) if parts else ""


def _equal(a: Output, b: Output) -> Comparison:
    """Return IDENTICAL for equal bits, unless the case could not have shown a difference."""
    equal = Comparison(a.name, b.name, Verdict.IDENTICAL, a.y.size, 0, 0.0, 0, 0.0, (a.worst_ratio, b.worst_ratio))
    strange = ~np.isfinite(a.y) & np.isfinite(a.bound) & np.isfinite(a.target.exact.reference)
    if strange.any():
        where = _index(int(np.argmax(strange)), a.y.shape)
        cause = f"both have {a.y[where]} at {where}, where the exact result is {a.target.exact.reference[where]:.6g}"
        fix = "check both implementations"
        return dataclasses.replace(
            equal, verdict=Verdict.INCONCLUSIVE, name="both not finite", cause=cause, fix=fix, where=where
        )
    if a.target.decides:
        return equal
    cause, fix = "the output is empty: there is nothing to compare", "compare on an input that has an output"
    if a.y.size:
        cause = "every product is zero: any kernel, padding or stride gives these bits"
        fix = "compare on inputs that are not zero"
    return dataclasses.replace(equal, verdict=Verdict.INCONCLUSIVE, name="nothing to decide", cause=cause, fix=fix)


def _explained(a: Output, b: Output, flat: np.ndarray) -> int | None:
    """Return how many of the elements that differ both replays reproduce."""
    if a.replayed is None or b.replayed is None:
        return None
    again = zip((a.replayed, b.replayed), (a.y, b.y))
    reproduced = [same_bits(replayed.ravel()[flat], y.ravel()[flat]) for replayed, y in again]
    return int(np.count_nonzero(np.logical_and(*reproduced)))


def _ratio(distance: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Return distance / bound, rounded up so that a ratio of at most 1 is a proof; 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(distance > 0, distance / bound, 0.0)
    return np.where((distance > bound) & (ratio <= 1), np.nextafter(1.0, 2.0), ratio)
