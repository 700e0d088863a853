"""Rounded: a hypothesis on what was rounded to a format, and what it predicts for each element of an output."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from bridge.case import Case
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected, products, sampled_terms
from bridge.numerics import FLOAT32, Format, Products, cast, exact_sum, round_to, truncate_to


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A hypothesis on what was rounded to a format.

    Attributes:
      format: the format.
      operands: which of x, kernel, bias and dy are rounded before the products; truncated: towards zero.
      output: True if the result is rounded.
      accumulator: True if every product and partial sum is rounded.
      before_bias: True if the sum is rounded, and the bias is added after: in y's own dtype, or with the output rounded
        again.
      parts: how many numbers of the format stand for one rounded number, 1 or 2.
      products: how many products stand for one: 1, or the 3 greatest of two parts of each operand.
      windows: True if the contribution of each element of each window to a gradient by the input is rounded.
    """

    format: Format
    operands: tuple[str, ...] = ()
    truncated: bool = False
    output: bool = False
    accumulator: bool = False
    before_bias: bool = False
    parts: int = 1
    products: int = 1
    windows: bool = False

    @property
    def name(self) -> str:
        """Name of the format, with the number of products that stand for one, or of parts."""
        number = max(self.parts, self.products)
        return f"{self.format.name}_{number}x" if number > 1 else self.format.name

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return an operand as it enters the products, in its own dtype."""
        return cast(self.nearest(array.astype(np.float64)), array.dtype) if name in self.operands else array

    def nearest(self, wide: np.ndarray) -> np.ndarray:
        rounding = truncate_to if self.truncated else round_to
        first = rounding(wide, self.format)
        return first if self.parts == 1 else first + rounding(wide - first, self.format)

    def factors(self, names: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the operands of the products that stand for the product of a and b, the greatest last."""
        a, b = self.round(names[0], a), self.round(names[1], b)
        if self.products == 1:
            return [(a, b)]
        (a1, a2), (b1, b2) = self._split(a), self._split(b)
        return [(a1, b2), (a2, b1), (a1, b1)]

    def _split(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wide = array.astype(np.float64)
        first = round_to(wide, self.format)
        return cast(first, array.dtype), cast(round_to(wide - first, self.format), array.dtype)

    def apply(self, output: Output) -> list[tuple[Case, np.ndarray | None]]:
        """Return cases, each with its dy, whose results add up to that of rounded operands; the last has the bias."""
        target = output.target
        case, names = target.case, target.factors
        if len(names) == 1:
            return [(case, self.round("dy", target.operand("dy")))]
        pairs = self.factors(names, *(target.operand(name) for name in names))
        bias = None if case.bias is None or self.before_bias else self.round("bias", case.bias)
        found = []
        for number, pair in enumerate(pairs, start=1):
            given = {"x": case.x, "kernel": case.kernel, "dy": target.dy} | dict(zip(names, pair))
            dy = given.pop("dy")
            found.append((case.replace(**given, bias=bias if number == len(pairs) else None), dy))
        return found

    def expected(self, output: Output, flat: np.ndarray | None) -> Expected:
        """Return the result of rounded operands in the declared arithmetic, or with the lower accumulator."""
        arithmetic = output.arithmetic
        if self.accumulator:
            arithmetic = dataclasses.replace(arithmetic, product=self.format, accumulator=self.format)
        if self.output and self.format == arithmetic.output:  # what is rounded is then the sum itself
            arithmetic = dataclasses.replace(arithmetic, output=arithmetic.accumulator)
        if flat is None or output.target.quantity != "y":
            sums = [products(case, output.target.quantity, dy) for case, dy in self.apply(output)]
            whole = self._of_windows(sums) if self.windows else Expected.of(exact_sum(_together(sums)), arithmetic)
            return whole if flat is None else whole.at(flat)
        case = output.target.case
        at = np.unravel_index(flat, output.y.shape)
        terms = [
            (*pair, valid) for x, w, valid in sampled_terms(case, at) for pair in self.factors(("x", "kernel"), x, w)
        ]
        bias = None if case.bias is None or self.before_bias else self.round("bias", case.bias[at[-1]])
        return Expected.of(exact_sum(Products.of(terms, flat.shape, bias)), arithmetic)

    def late_bias(self, output: Output, flat: np.ndarray | None) -> np.ndarray:
        """Return the bias that is added to each element after the sum; float64."""
        case = output.target.case
        bias = self.round("bias", output.target.operand("bias")).astype(np.float64)
        return np.broadcast_to(bias, case.geometry.output_shape) if flat is None else bias[flat % len(bias)]

    def _of_windows(self, sums: list[Products]) -> Expected:
        """Return a gradient by the input from rounded contributions of windows: sums over the multiplier in float32."""
        one, u = sums[0], FLOAT32.unit_roundoff
        reference, allowed, size = (np.zeros(one.shape) for _ in range(3))
        multiplier = one.w.shape[-1] // one.shape[-1]
        for block in one.blocks():
            given = [each.terms(block) for each in sums]
            while group := [term for terms in given for term in itertools.islice(terms, multiplier)]:
                back = np.array([np.where(valid, x * w, 0.0) for x, w, valid in group])
                t, slack = back.sum(axis=0), len(back) * 1.01 * u * np.abs(back).sum(axis=0)
                low, high = self.nearest(t - slack), self.nearest(t + slack)
                reference[block] += (low + high) / 2
                allowed[block] += (high - low) / 2
                size[block] += np.maximum(np.abs(low), np.abs(high))
        n = one.count / multiplier
        # any order, the float64 sums of here, and subnormal numbers that are flushed
        allowed += size * (np.expm1(n * np.log1p(u)) + 2 * n * 2.0**-52) + 2 * n * FLOAT32.smallest_normal
        return Expected(reference, allowed)


def _together(parts: list[Products]) -> Products:
    """Return the sum of several sums, as one; the bias is that of the last."""
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[-1],
        count=np.sum([part.count for part in parts], axis=0),
        x=np.concatenate([part.x.ravel() for part in parts]),
        w=np.concatenate([part.w.ravel() for part in parts]),
        terms=lambda block: itertools.chain.from_iterable(part.terms(block) for part in parts),
    )
