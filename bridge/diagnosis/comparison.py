"""compare: two outputs of one case, element by element, and the strongest verdict that can be proved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bridge.case import Case
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import Arithmetic, ExactSum, difference_bound, error_bound, exact, ulp_distance


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One output, and the arithmetic that its implementation declares.

    Attributes:
      name: what the report calls it.
      y: the output.
      bound: float64, |y - exact sum| at most, per element.
    """

    name: str
    y: np.ndarray
    bound: np.ndarray

    @classmethod
    def of(cls, name: str, y: np.ndarray, case: Case, arithmetic: Arithmetic | None, reference: ExactSum) -> Side:
        """A side whose array is checked against the case; no arithmetic means the weakest conventional one."""
        if not isinstance(y, np.ndarray):
            raise TypeError(f"`{name}` is a {type(y).__name__}, expected a NumPy array")
        if y.shape != case.geometry.output_shape:
            raise ValueError(f"`{name}` has shape {y.shape}, expected {case.geometry.output_shape}{_swapped(y, case)}")
        if y.dtype != case.dtype:
            raise TypeError(f"`{name}` has dtype {y.dtype}, expected {case.dtype}, the dtype of the case")
        declared = arithmetic or Arithmetic.of(
            case.dtype, flushes_subnormals=True, output_roundings=2 if case.bias is not None else 1
        )
        return cls(name, y, error_bound(declared, reference))


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
      where: the index of the greatest bound ratio; for NONFINITE, of the first element that disagrees; None if no
        element differs.
      explained: how many of the different elements replaying both orders reproduces; None if it was not tried.
      cause: why they differ, in plain words; mend: what to change; place: where a bug is.
    """

    a: str
    b: str
    verdict: Verdict
    elements: int
    different: int
    max_abs: float
    max_ulp: int
    max_bound_ratio: float
    where: tuple[int, ...] | None = None
    explained: int | None = None
    cause: str = ""
    mend: str = ""


def compare(
    actual: np.ndarray,
    expected: np.ndarray,
    case: Case,
    *,
    names: tuple[str, str] = ("actual", "expected"),
    arithmetics: tuple[Arithmetic | None, Arithmetic | None] = (None, None),
    reference: ExactSum | None = None,
) -> Comparison:
    """What the difference of two outputs of one case is.

    Args:
      actual, expected: `(*batch, *output_spatial, C*M)`, NumPy arrays of the case's dtype.
      case: the input, kernel, bias and geometry that both were computed from.
      names: what to call them.
      arithmetics: what each declares to have computed in; None: any order of summation in the accumulator that is
        customary for the dtype, fused or not, subnormals flushed or not.
      reference: `bridge.numerics.exact(case)`, if it is at hand.

    Raises:
      ValueError, TypeError: an array of another shape or dtype than the case's output.

    >>> x, kernel = np.ones((1, 5, 5, 2), np.float32), np.ones((3, 3, 1, 2), np.float32)
    >>> case = Case(x, kernel, padding="VALID")
    >>> y = np.full((1, 3, 3, 2), 9, np.float32)
    >>> compare(y, y, case).verdict, compare(y, y + 1, case).verdict
    (<Verdict.IDENTICAL: 'IDENTICAL'>, <Verdict.BUG: 'BUG'>)
    """
    reference = exact(case) if reference is None else reference
    a, b = (
        Side.of(name, y, case, arithmetic, reference)
        for name, y, arithmetic in zip(names, (actual, expected), arithmetics)
    )
    return compare_sides(a, b)


def compare_sides(a: Side, b: Side) -> Comparison:
    """`compare` for checked sides."""
    differs = ~same_bits(a.y, b.y)
    different = int(np.count_nonzero(differs))
    if not different:
        return Comparison(a.name, b.name, Verdict.IDENTICAL, a.y.size, 0, 0.0, 0, 0.0)
    place = np.nonzero(differs)
    left, right = a.y[place], b.y[place]
    finite = np.isfinite(left) & np.isfinite(right)
    left64, right64 = left[finite].astype(np.float64), right[finite].astype(np.float64)
    distance = np.abs(left64 - right64)
    ratio = _ratio(distance, difference_bound(a.bound[place][finite], b.bound[place][finite]))
    if not finite.all():
        verdict, worst, cause = Verdict.NONFINITE, int(np.argmin(finite)), _nonfinite(a, b, place, finite)
    else:
        verdict, worst = (Verdict.ROUNDING if ratio.max() <= 1 else Verdict.BUG), int(np.argmax(ratio))
        cause = "order of addition, and fused or separate multiply and add" if verdict is Verdict.ROUNDING else ""
    return Comparison(
        a.name,
        b.name,
        verdict,
        a.y.size,
        different,
        float(distance.max(initial=0.0)),
        int(ulp_distance(left[finite], right[finite]).max(initial=0)),
        float(ratio.max(initial=0.0)),
        where=tuple(int(axis[worst]) for axis in place),
        cause=cause,
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype hold the same bits; two NaN are the same, +0 and -0 are not."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return (a.view(bits) == b.view(bits)) | (np.isnan(a) & np.isnan(b))


def _ratio(distance: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """distance / bound, rounded up so that a ratio of at most 1 is a proof; 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(distance > 0, distance / bound, 0.0)
    return np.where((distance > bound) & (ratio <= 1), np.nextafter(1.0, 2.0), ratio)


def _nonfinite(a: Side, b: Side, place: Sequence[np.ndarray], finite: np.ndarray) -> str:
    index = tuple(int(axis[np.argmin(finite)]) for axis in place)
    count = int(np.count_nonzero(~finite))
    return f"{count} elements: {a.name} has {a.y[index]}, {b.name} has {b.y[index]} at {index}"


def _swapped(y: np.ndarray, case: Case) -> str:
    """What a wrong shape looks like, in words to add to an error."""
    expected = case.geometry.output_shape
    batch, rank = len(case.geometry.batch), case.geometry.rank
    if y.shape == (*expected[:batch], expected[-1], *expected[batch:-1]) and rank:
        return ": it looks channels-first; move the channels to the last axis"
    if sorted(y.shape) == sorted(expected):
        return ": the same sizes in another order of axes"
    return ""
