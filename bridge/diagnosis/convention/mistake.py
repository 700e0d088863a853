"""Mistake: a hypothesis on what was computed instead of the case."""

from __future__ import annotations

import dataclasses
import math
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
      name: a short, stable name, such as "kernel flipped".
      cause: a sentence without its subject, which is the name of the output.
      fix: what to change, in channels last and the words of JAX.
      case: the case that was computed instead.
      rearrange: how its output was rearranged; None if it was not.
      place: the part of the computation that it concerns.
      after: returns the expected output after a function of each element, given its channels; None for no function.
      error_of_x: how far each element of the case's x may be from the x that was read, of x's shape; None for nowhere.
      torch_fix: the fix in PyTorch's layout and words; empty if it is the same.
    """

    name: str
    cause: str
    fix: str
    case: Case
    rearrange: Rearrange | None = None
    place: str = ""
    after: Callable[[Expected, np.ndarray], Expected] | None = None
    error_of_x: np.ndarray | None = None
    torch_fix: str = ""

    @property
    def is_exact(self) -> bool:
        """True if nothing is allowed beyond the declared arithmetic of the mistaken case."""
        return self.after is None and self.error_of_x is None

    def fix_in(self, framework: str) -> str:
        """Return the fix for a user of a framework."""
        return self.torch_fix if framework == "torch" and self.torch_fix else self.fix

    def source_of(self, flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return the flat indices, before the rearrangement, of elements of an output of some shape."""
        if self.rearrange is None:
            return flat
        return self.rearrange(np.arange(math.prod(shape)).reshape(shape)).ravel()[flat]

    def then(self, second: Mistake) -> Mistake:
        """Return both mistakes; the second was made in this one's case."""
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
            self._errors_with(second),
            "; and ".join(each.fix_in("torch") for each in (self, second)),
        )

    def _errors_with(self, second: Mistake) -> np.ndarray | None:
        """Return the errors of the second mistake's x; where that moved the elements of x, the greatest is for all."""
        if self.error_of_x is None:
            return second.error_of_x
        x = second.case.x
        own = self.error_of_x if x is self.case.x else np.full(x.shape, self.error_of_x.max(initial=0))
        return own if second.error_of_x is None else own + second.error_of_x


def of_options(case: Case, other: Case, name: str, *options: str) -> Mistake:
    """Return the mistake that options of the call were those of another case."""
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
        torch_fix="`{}` instead of `{}`".format(
            *(", ".join(_as_in_torch(c, o) for o in options) for c in (case, other))
        ),
    )


def _as_called(case: Case, option: str) -> str:
    """Return the word that the user gave, or the numbers per axis."""
    given = getattr(case, option)
    return spelled(given if isinstance(given, str) else getattr(case.geometry, option))


def _as_in_torch(case: Case, option: str) -> str:
    """Return the option as code of PyTorch."""
    g = case.geometry
    if option != "padding":
        name = {"strides": "stride", "kernel_dilation": "dilation"}.get(option, option)
        return f"{name}={spelled(getattr(g, option))}"
    if g.padding_mode == "zeros" and g.symmetric_padding is not None:
        return f"padding={spelled(g.symmetric_padding)}"
    mode = "" if g.padding_mode == "zeros" else f', mode="{g.padding_mode}"'
    return f"padding=0 after F.pad(x, {tuple(n for pair in reversed(g.padding) for n in pair)}{mode})"
