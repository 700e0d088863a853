"""Comparison: how much two outputs differ, the verdict, and its cause."""

from __future__ import annotations

import dataclasses

from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The difference of two outputs, and what it proves.

    Attributes:
      a, b: the names of the outputs.
      verdict: the strongest that was proved.
      elements: how many were compared; different: how many have other bits (two NaN count as equal).
      max_abs: the greatest |a - b| among finite elements.
      max_ulp: the greatest distance in units of the last place, counted through the dtype's numbers.
      max_bound_ratio: the greatest |a - b| / (proved bound of a + proved bound of b).
      own_bound_ratios: of each output the greatest |output - exact result| / its own bound.
      where: the index of the greatest bound ratio; for NONFINITE, of the first element that disagrees; None if no
        element differs.
      explained: how many of the different elements are reproduced by replaying both orders; None if it was not tried.
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
    own_bound_ratios: tuple[float, float] = (0.0, 0.0)
    where: tuple[int, ...] | None = None
    explained: int | None = None
    name: str = ""
    cause: str = ""
    fix: str = ""
    place: str = ""
