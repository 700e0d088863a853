"""compare: two outputs of one case, element by element, and the strongest verdict that can be proved."""

from __future__ import annotations

import dataclasses

import numpy as np

from bridge.case import Case
from bridge.diagnosis.nonfinite import disagreement
from bridge.diagnosis.side import Side
from bridge.diagnosis.target import Target
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import Arithmetic, ExactSum, difference_bound, same_bits, ulp_distance


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two outputs differ by, and what that proves.

    Attributes:
      a, b: the names of the sides.
      verdict: the strongest that was proved.
      elements: how many were compared; different: how many have other bits (two NaN count as equal).
      max_abs: the greatest |a - b| among finite elements.
      max_ulp: the greatest distance in units of the last place, counted through the dtype's numbers.
      max_bound_ratio: the greatest |a - b| / (proved bound of a + proved bound of b).
      side_bound_ratios: for each side the greatest |side - exact result| / its own bound.
      where: the index of the greatest bound ratio; for NONFINITE, of the first element that disagrees; None if no
        element differs.
      explained: how many of the different elements replaying both orders reproduces; None if it was not tried.
      name: a short, stable name of the cause, such as "kernel flipped" or "tf32 inputs"; empty for none.
      cause: why they differ, in plain words; fix: what to change; place: where it is.
    """

    a: str
    b: str
    verdict: Verdict
    elements: int
    different: int
    max_abs: float
    max_ulp: int
    max_bound_ratio: float
    side_bound_ratios: tuple[float, float] = (0.0, 0.0)
    where: tuple[int, ...] | None = None
    explained: int | None = None
    name: str = ""
    cause: str = ""
    fix: str = ""
    place: str = ""


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
    """What the difference of two outputs of one case is.

    Equal bits are IDENTICAL, but INCONCLUSIVE where nothing was compared: an empty output, or products that are all
    zero, which would hide any mistake. Elements that are not finite must agree (any NaN with any NaN); the others are
    judged as if there were no such elements. A difference where overflow is possible, so that no bound holds, is
    INCONCLUSIVE unless other elements prove more.

    Args:
      actual, expected: `(*batch, *output_spatial, C*M)`, NumPy arrays of the case's dtype.
      case: the input, kernel, bias and geometry that both were computed from.
      names: what to call them.
      arithmetics: what each declares to have computed in; None: any order of summation in the accumulator that is
        customary for the dtype, fused or not, subnormals flushed or not.
      reference: the exact result, `bridge.numerics.exact(case)`, if it is at hand.
      quantity: what the arrays are: "y", or a gradient of sum(dy y): "dx", "dkernel" or "dbias", of its own shape.
      dy: the gradient by the output, for a gradient.
      replayed: each array recomputed in its revealed order of addition, if that is at hand.

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
    target = Target.of(case, quantity, dy, reference)
    a, b = (
        Side.of(name, y, target, arithmetic, again)
        for name, y, arithmetic, again in zip(names, (actual, expected), arithmetics, replayed)
    )
    return compare_sides(a, b)


def compare_sides(a: Side, b: Side) -> Comparison:
    """`compare` for checked sides of one target."""
    differs = ~same_bits(a.y, b.y)
    if not differs.any():
        return _equal(a, b)
    unlike = differs & ~(np.isfinite(a.y) & np.isfinite(b.y))
    found, unbounded = _figures(a, b, differs & ~unlike)
    found = dataclasses.replace(
        found, different=int(np.count_nonzero(differs)), explained=_explained(a, b, np.flatnonzero(differs))
    )
    if not unlike.any():
        return _judged(a, b, found, unbounded)
    cause, place = disagreement(a, b, unlike)
    return dataclasses.replace(
        found,
        verdict=Verdict.NONFINITE,
        where=_index(int(np.argmax(unlike)), a.y.shape),
        name="nonfinite",
        cause=cause,
        place=place,
    )


def _figures(a: Side, b: Side, differs: np.ndarray) -> tuple[Comparison, int]:
    """How much finite elements differ, without a verdict, and at how many of them no bound holds."""
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


def _judged(a: Side, b: Side, found: Comparison, unbounded: int) -> Comparison:
    """The verdict on finite elements that differ."""
    findings = [side.finding for side in (a, b) if side.finding is not None]
    if findings:
        weakest = max(findings, key=lambda finding: finding.verdict.rank())

        def told(field: str) -> str:
            return "; ".join(dict.fromkeys(filter(None, (getattr(finding, field) for finding in findings))))

        return dataclasses.replace(
            found,
            verdict=weakest.verdict,
            name=weakest.name,
            cause=told("cause"),
            fix=told("fix"),
            place=told("place"),
        )
    if unbounded:
        cause = f"{unbounded} of the elements that differ have no bound: a partial sum may overflow there"
        return dataclasses.replace(found, verdict=Verdict.INCONCLUSIVE, name="overflow possible", cause=cause)
    declared = _declared_difference(a, b)
    if found.explained == found.different:
        cause = "order of addition, and fused or separate multiply and add: replaying both reproduces every bit"
        cause = f"{declared}; and {cause}" if declared else cause
        return dataclasses.replace(found, verdict=Verdict.EXPLAINED, name="order", cause=cause)
    cause = "every element is within the proved bound of rounding, which holds for any order of addition, fused or not"
    one_sided = "; ".join(filter(None, (a.one_sided, b.one_sided)))
    cause = "; ".join(filter(None, (declared, cause, one_sided)))
    name = "one-sided rounding" if one_sided else "rounding"
    return dataclasses.replace(found, verdict=Verdict.ROUNDING, name=name, cause=cause)


def _declared_difference(a: Side, b: Side) -> str:
    """The formats in which the two sides declare to compute, where they are not the same."""
    parts = []
    for field in ("input", "accumulator", "output"):
        of_a, of_b = getattr(a.arithmetic, field), getattr(b.arithmetic, field)
        if of_a != of_b:
            names = (fmt.name if fmt else a.y.dtype.name for fmt in (of_a, of_b))
            parts.append("{} {} against {}".format(field, *names))
    return "declared formats: " + ", ".join(parts) if parts else ""


def _equal(a: Side, b: Side) -> Comparison:
    """Every bit equal: IDENTICAL, unless the case could not have shown a difference."""
    equal = Comparison(a.name, b.name, Verdict.IDENTICAL, a.y.size, 0, 0.0, 0, 0.0, (a.worst_ratio, b.worst_ratio))
    wild = ~np.isfinite(a.y) & np.isfinite(a.bound) & np.isfinite(a.target.exact.reference)
    if wild.any():
        where = _index(int(np.argmax(wild)), a.y.shape)
        cause = f"both have {a.y[where]} at {where}, where the exact result is {a.target.exact.reference[where]:.6g}"
        return dataclasses.replace(
            equal,
            verdict=Verdict.INCONCLUSIVE,
            name="both not finite",
            cause=cause,
            fix="look at both sides",
            where=where,
        )
    if a.target.decides:
        return equal
    cause = (
        "every product is zero: any kernel, padding or stride gives these bits"
        if a.y.size
        else "the output is empty: there is nothing to compare"
    )
    fix = "compare on inputs that are not zero" if a.y.size else "compare on an input that has an output"
    return dataclasses.replace(equal, verdict=Verdict.INCONCLUSIVE, name="nothing to decide", cause=cause, fix=fix)


def _explained(a: Side, b: Side, flat: np.ndarray) -> int | None:
    """How many of the elements that differ both replays reproduce."""
    if a.replayed is None or b.replayed is None:
        return None
    again = zip((a.replayed, b.replayed), (a.y, b.y))
    reproduced = [same_bits(replayed.ravel()[flat], y.ravel()[flat]) for replayed, y in again]
    return int(np.count_nonzero(np.logical_and(*reproduced)))


def _ratio(distance: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """distance / bound, rounded up so that a ratio of at most 1 is a proof; 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(distance > 0, distance / bound, 0.0)
    return np.where((distance > bound) & (ratio <= 1), np.nextafter(1.0, 2.0), ratio)
