"""The order in which the products of a sum, and its bias, are added: a program over a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

#: Steps that are no terms: add the two sums on top, push the bias, push +0.
ADD, BIAS, ZERO = -1, -2, -3


@dataclasses.dataclass(frozen=True)
class SumOrder:
    """The order in which K products `x[k] * w[k]` and a bias are added.

    It is a program over a stack of numbers, which leaves one number. Every step rounds once.

    | step | what it does |
    | --- | --- |
    | `2 * k` | pushes the product of term k, rounded |
    | `2 * k + 1` | replaces the number s on top by `fma(x[k], w[k], s)` |
    | -1 (`ADD`) | replaces the two numbers on top, a below b, by `a + b` |
    | -2 (`BIAS`) | pushes the bias |
    | -3 (`ZERO`) | pushes +0 |

    Orders are equal where their programs are. They can be hashed, so an order can be a static argument of a program.

    Attributes:
      steps: the program. It has each of the terms 0 to K - 1 once, and the bias at most once.

    Raises:
      ValueError, TypeError: steps that are no such program.

    >>> SumOrder.chain(3)
    SumOrder(steps=(-3, 1, 3, 5))
    >>> SumOrder.blocks((2, 4), bias="last")
    SumOrder(steps=(-3, 1, 3, -3, 5, 7, -1, -2, -1))
    >>> SumOrder((0, 2, -1)).terms  # x[0] * w[0] + x[1] * w[1], with three roundings
    2
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        steps = self.steps
        if not isinstance(steps, tuple) or not all(type(step) is int for step in steps):
            raise TypeError(f"`steps` is {steps!r}, expected a tuple of ints")
        last = sum(step >= 0 for step in steps) - 1
        depth, left, biases = 0, set(range(last + 1)), 0
        for place, step in enumerate(steps):
            if step >= 0:
                if step // 2 not in left:
                    raise ValueError(
                        f"`steps` has term {step // 2} at place {place}, expected each of 0 to {last} once"
                    )
                left.remove(step // 2)
            elif step < ZERO:
                raise ValueError(
                    f"`steps` has {step} at place {place}, expected -1 (ADD), -2 (BIAS), -3 (ZERO) or more"
                )
            needed = 2 if step == ADD else 1 if step > 0 and step % 2 else 0
            if depth < needed:
                raise ValueError(
                    f"`steps` has {step} at place {place}, expected {needed} numbers on the stack before it"
                )
            depth += -1 if step == ADD else 0 if needed else 1
            biases += step == BIAS
        if depth != 1:
            raise ValueError(f"`steps` leaves {depth} numbers on the stack, expected one")
        if biases > 1:
            raise ValueError(f"`steps` has the bias {biases} times, expected at most once")

    @classmethod
    def chain(cls, terms: int | Iterable[int], *, bias_first: bool = False) -> SumOrder:
        """Return one chain of fused multiply-adds, from +0 or from the bias.

        Args:
          terms: how many there are, or their numbers in the order in which they are added.
          bias_first: start from the bias.
        """
        if isinstance(terms, (int, np.integer)) and not isinstance(terms, bool):
            if terms < 0:
                raise ValueError(f"`terms` is {terms}, expected 0 or more, or the numbers of the terms")
            terms = range(terms)
        terms = tuple(terms) if isinstance(terms, Iterable) else terms
        if not isinstance(terms, tuple) or not all(
            isinstance(term, (int, np.integer)) and not isinstance(term, bool) for term in terms
        ):
            raise TypeError(f"`terms` is {terms!r}, expected an int, or the numbers of the terms")
        _check_flag("bias_first", bias_first)
        return cls((BIAS if bias_first else ZERO, *(2 * int(term) + 1 for term in terms)))

    @classmethod
    def blocks(cls, ends: Sequence[int], *, bias: Literal["first", "last"] | None = None) -> SumOrder:
        """Return chains over consecutive blocks of terms, each from +0, whose sums are added in order.

        Args:
          ends: where each block ends, ascending.
          bias: "first" starts the first chain from the bias, "last" adds the bias to the sum.
        """
        given = tuple(ends) if isinstance(ends, Iterable) else ()
        whole = all(isinstance(end, (int, np.integer)) and not isinstance(end, bool) for end in given)
        if not whole or not given or any(a >= b for a, b in zip((-1 if given == (0,) else 0, *given), given)):
            raise ValueError(f"`ends` is {ends!r}, expected ascending numbers from 1, or 0 alone for no terms")
        if bias not in (None, "first", "last"):
            raise ValueError(f"`bias` is {bias!r}, expected None, 'first' or 'last'")
        steps: list[int] = []
        for number, (first, end) in enumerate(zip((0, *given), given)):
            steps += [BIAS if number == 0 and bias == "first" else ZERO, *(2 * term + 1 for term in range(first, end))]
            steps += [ADD] if number else []
        return cls((*map(int, steps), *((BIAS, ADD) if bias == "last" else ())))

    @property
    def terms(self) -> int:
        """The number of terms, K."""
        return sum(step >= 0 for step in self.steps)

    @property
    def has_bias(self) -> bool:
        """Whether the program has the bias."""
        return BIAS in self.steps

    def with_bias(self) -> SumOrder:
        """Return an order with a bias: this one, or this one and then the bias."""
        return self if self.has_bias else SumOrder((*self.steps, BIAS, ADD))

    def without_bias(self) -> SumOrder:
        """Return the same order with +0 for the bias."""
        return SumOrder(tuple(ZERO if step == BIAS else step for step in self.steps)) if self.has_bias else self


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, expected True or False")
