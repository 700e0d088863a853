"""Mistake: a hypothesis on what was computed instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from bridge.case import Case
from bridge.diagnosis.shape_hints import spelled
from bridge.diagnosis.target import Expected

Rearrange = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Mistake:
    """A hypothesis on what was computed.

    Attributes:
      name: short and stable, such as "kernel flipped".
      cause: what was done, to follow the name of the output.
      fix: what to change.
      case: what was computed instead.
      rearrange: what happened to its output; None for nothing.
      place: what part of the computation it concerns.
      after: what a function of each element makes of the expected output, given its channels; None for nothing.
      error_of_x: how far each element of the case's x may be from what was computed, of x's shape; None for nothing.
    """

    name: str
    cause: str
    fix: str
    case: Case
    rearrange: Rearrange | None = None
    place: str = ""
    after: Callable[[Expected, np.ndarray], Expected] | None = None
    error_of_x: np.ndarray | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing is allowed but what the declared arithmetic of the mistaken case is."""
        return self.after is None and self.error_of_x is None

    def then(self, second: Mistake) -> Mistake:
        """Both mistakes, where the second was made in this one's case."""
        first = self.rearrange
        rearrange = second.rearrange or first
        if first is not None and second.rearrange is not None:
            later = second.rearrange

            def rearrange(y: np.ndarray) -> np.ndarray:
                return later(first(y))

        return Mistake(
            f"{self.name} and {second.name}",
            f"{self.cause}, and {second.cause}",
            f"{self.fix}; and {second.fix}",
            second.case,
            rearrange,
            "; ".join(dict.fromkeys(filter(None, (self.place, second.place)))),
            second.after or self.after,
            second.error_of_x,
        )


def of_options(case: Case, other: Case, name: str, *options: str) -> Mistake:
    """A mistake in options of the call."""
    right, wrong = ([f"{o}={_as_called(c, o)}" for o in options] for c in (case, other))
    meant = [f"{o}={getattr(case.geometry, o)}" for o in options if isinstance(getattr(case, o), str)]
    got = [f"{o}={getattr(other.geometry, o)}" for o in options if isinstance(getattr(other, o), str)]
    there, here = (f", here {', '.join(p)}," if p else "" for p in (got, meant))
    return Mistake(
        name,
        f"was computed with {', '.join(wrong)}{there} where the case has {', '.join(right)}{here}".rstrip(","),
        f"`{', '.join(right)}` instead of `{', '.join(wrong)}`",
        other,
        place=", ".join(options),
    )


def _as_called(case: Case, option: str) -> str:
    """The word that the user gave, or the numbers an axis."""
    given = getattr(case, option)
    return spelled(given if isinstance(given, str) else getattr(case.geometry, option))
