"""PRECISION: a lower precision that explains an output beyond its bound, and where it entered.

A wider bound alone proves nothing: a tap that is wrong by 2^-10 lies within the bound of bfloat16 too. So each
hypothesis is tested by what it predicts, element by element:

- *inputs rounded to a format*: the exact result of the rounded inputs is computed, and y must lie within the bound of
  the *declared* arithmetic of that. It is as strict as the test that the original inputs failed.
- *inputs split in two parts of bfloat16, three products*: likewise, with 3 n products.
- *output rounded to a format*: y must be a number of the format, and lie between the roundings of both ends of
  [exact - bound, exact + bound], since rounding is monotone. So with the sum rounded before the bias is added, and
  again after.
- *accumulated in a format*: y must be a number of the format, within the bound of that accumulator, and what remains
  must look like rounding: spread over the elements, and uncorrelated with any tap (`localise.systematic`). This last
  test is statistical; so it is the last tried.

Formats are tried from the finest, so the smallest bound that holds is the one named.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.case import Case
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.localise import systematic
from bridge.diagnosis.target import OPERANDS, Expected, sampled_terms
from bridge.diagnosis.verdict import Verdict
from bridge.numerics import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    TF32,
    Arithmetic,
    Format,
    Products,
    cast,
    exact_sum,
    format_of,
    output_products,
    round_to,
    truncate_to,
)

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side

#: From the finest to the coarsest.
_FORMATS = (FLOAT32, TF32, FLOAT16, BFLOAT16)

_WORDS = {"x": "the input", "kernel": "the kernel", "bias": "the bias", "dy": "the gradient"}


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Operands rounded to a format before the products, and the result after them.

    Attributes:
      operands: which of x, kernel, bias and dy.
      input, truncated: the format, and whether towards zero; None leaves operands as they are.
      output: a format to which the result is rounded; None: as declared.
      accumulator: a format in which the sum is taken; None: as declared.
    """

    operands: tuple[str, ...] = ()
    input: Format | None = None
    truncated: bool = False
    output: Format | None = None
    accumulator: Format | None = None

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """An operand as the products see it, in its own dtype."""
        if name not in self.operands:
            return array
        rounding = truncate_to if self.truncated else round_to
        return cast(rounding(array.astype(np.float64), self.input), array.dtype)

    def apply(self, side: Side) -> tuple[Case, np.ndarray | None]:
        """The case and dy with their operands rounded."""
        case = side.target.case
        bias = None if case.bias is None else self.round("bias", case.bias)
        dy = None if side.target.dy is None else self.round("dy", side.target.dy)
        return case.replace(x=self.round("x", case.x), kernel=self.round("kernel", case.kernel), bias=bias), dy

    def expected(self, side: Side, flat: np.ndarray | None) -> Expected:
        """What rounded operands must give in the declared arithmetic, but for another accumulator."""
        arithmetic = side.arithmetic
        if self.accumulator is not None:
            arithmetic = dataclasses.replace(arithmetic, product=self.accumulator, accumulator=self.accumulator)
        if flat is None or side.target.quantity != "y":
            return side.target.expected(arithmetic, *self.apply(side), flat)
        case = side.target.case
        at = np.unravel_index(flat, side.y.shape)
        terms = [(self.round("x", x), self.round("kernel", w), valid) for x, w, valid in sampled_terms(case, at)]
        bias = None if case.bias is None else self.round("bias", case.bias[at[-1]])
        return Expected.of(exact_sum(Products.of(terms, flat.shape, bias)), arithmetic)


def lower_precision(side: Side) -> Finding | None:
    """The finest arithmetic below the declared one that predicts y; None if none does."""
    given = format_of(side.target.case.dtype)
    formats = [fmt for fmt in _FORMATS if fmt.precision < given.precision]
    for fmt in formats:
        for hypothesis in _hypotheses(side, fmt):
            if _predicts(side, hypothesis):
                return _finding(side, hypothesis)
        if fmt is TF32 and side.target.quantity == "y" and given is FLOAT32 and _three_passes(side):
            return _split(side)
    return None


def lower_accumulator(side: Side) -> Finding | None:
    """A lower accumulator that is consistent with y; None if none is."""
    finest = side.arithmetic.accumulator
    for fmt in (FLOAT32, FLOAT16, BFLOAT16):
        if fmt.precision >= finest.precision:
            continue
        plain = Rounded(accumulator=fmt)
        rounded = Rounded(OPERANDS[side.target.quantity], fmt, accumulator=fmt)
        for hypothesis in (plain, rounded) if fmt.precision < format_of(side.target.case.dtype).precision else (plain,):
            if _accumulates(side, hypothesis):
                return _finding(side, hypothesis)
    return None


def _hypotheses(side: Side, fmt: Format) -> Iterator[Rounded]:
    """What rounding to one format may have happened to: the output alone, operands, and both."""
    if fmt is not TF32:
        yield Rounded(output=fmt)
    names = OPERANDS[side.target.quantity]
    products = [name for name in names if name != "bias"]
    bias = [(), ("bias",)] if "bias" in names and side.target.case.bias is not None else [()]
    subsets = [c for n in range(len(products), 0, -1) for c in itertools.combinations(products, n)]
    for truncated, subset, extra in itertools.product((False, True), subsets, bias):
        yield Rounded((*subset, *extra), fmt, truncated)
    if fmt is not TF32:
        for extra in bias:
            yield Rounded((*products, *extra), fmt, output=fmt)
            yield Rounded((*products, *extra), fmt, output=fmt, accumulator=fmt if fmt is FLOAT32 else None)


def _predicts(side: Side, hypothesis: Rounded) -> bool:
    """On the sample first, then on all."""
    return all(_predicts_at(side, hypothesis, flat) for flat in (side.sample, None))


def _predicts_at(side: Side, hypothesis: Rounded, flat: np.ndarray | None) -> bool:
    if hypothesis.output is None:
        return side.explained_by(hypothesis.expected(side, flat), flat)
    y = side.y if flat is None else side.y.ravel()[flat]
    return _on_grid(y, hypothesis.output) and _rounded_between(
        side, hypothesis.expected(side, flat), hypothesis.output, flat
    )


def _on_grid(y: np.ndarray, fmt: Format) -> bool:
    finite = y[np.isfinite(y)].astype(np.float64)
    return bool((round_to(finite, fmt) == finite).all())


def _rounded_between(side: Side, expected: Expected, fmt: Format, flat: np.ndarray | None) -> bool:
    """Whether y lies between the roundings of both ends of what the declared arithmetic allows."""
    y, outside = (side.y, side.outside) if flat is None else (side.y.ravel()[flat], side.outside.ravel()[flat])
    y, finite = y.astype(np.float64), np.isfinite(y)
    with np.errstate(all="ignore"):
        low, high = expected.reference - expected.allowed, expected.reference + expected.allowed
        once = (round_to(low, fmt) <= y) & (y <= round_to(high, fmt))
        bias = side.target.exact.products.bias
        if bias is not None and not once.all():
            b = np.broadcast_to(bias.astype(np.float64), side.y.shape)
            b = b if flat is None else b.ravel()[flat]
            below, above = round_to(low - b, fmt) + b, round_to(high - b, fmt) + b
            once |= (round_to(below, fmt) <= y) & (y <= round_to(above, fmt))
    return bool(once[finite].all() and np.isfinite(expected.allowed[outside & finite]).all())


def _three_passes(side: Side) -> bool:
    """Whether y is the sum of x1 w1 + x1 w2 + x2 w1 with bfloat16 parts x1 + x2 and w1 + w2."""
    case = side.target.case
    at = np.unravel_index(side.sample, side.y.shape)
    terms = []
    for x, w, valid in sampled_terms(case, at):
        (x1, x2), (w1, w2) = _parts(x), _parts(w)
        terms += [(x1, w2, valid), (x2, w1, valid), (x1, w1, valid)]
    bias = None if case.bias is None else case.bias[at[-1]]
    sample = exact_sum(Products.of(terms, side.sample.shape, bias))
    if not side.explained_by(Expected.of(sample, side.arithmetic), side.sample):
        return False
    (x1, x2), (w1, w2) = _parts(case.x), _parts(case.kernel)
    passes = [(x1, w2, None), (x2, w1, None), (x1, w1, case.bias)]
    whole = _together([output_products(case.replace(x=x, kernel=w, bias=b)) for x, w, b in passes])
    return side.explained_by(Expected.of(exact_sum(whole), side.arithmetic))


def _parts(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a rounded to bfloat16, and the rest rounded to bfloat16, in a's dtype."""
    wide = a.astype(np.float64)
    first = round_to(wide, BFLOAT16)
    return cast(first, a.dtype), cast(round_to(wide - first, BFLOAT16), a.dtype)


def _together(parts: list[Products]) -> Products:
    """The sum of several sums, as one; the bias is the last one's."""
    return dataclasses.replace(
        parts[-1],
        count=sum(part.count for part in parts),
        x=np.concatenate([part.x.ravel() for part in parts]),
        w=np.concatenate([part.w.ravel() for part in parts]),
        terms=lambda block: itertools.chain.from_iterable(part.terms(block) for part in parts),
    )


def _accumulates(side: Side, hypothesis: Rounded) -> bool:
    fmt = hypothesis.accumulator
    has_grid = fmt.precision < format_of(side.y.dtype).precision
    for flat in (side.sample, None):
        y = side.y if flat is None else side.y.ravel()[flat]
        expected = hypothesis.expected(side, flat)
        if (has_grid and not _on_grid(y, fmt)) or not side.explained_by(expected, flat):
            return False
    ratio = np.where(np.isfinite(side.y), expected.ratio(side.y), 0.0)
    spread = ratio.max() <= 10 * np.sqrt(np.mean(ratio**2)) and np.count_nonzero(side.outside) >= 0.01 * side.y.size
    return bool(spread) and not systematic(side, expected)


def _finding(side: Side, hypothesis: Rounded) -> Finding:
    case = side.target.case
    what = []
    if hypothesis.input is not None:
        names = [n for n in hypothesis.operands if side.target.operand(n) is not None]
        operands = " and ".join(_WORDS[n] for n in names)
        how = "truncated" if hypothesis.truncated else "rounded"
        what.append((f"{operands} {how} to {_formats(side, hypothesis)}", "inputs: " + ", ".join(names)))
    if hypothesis.output is not None:
        what.append((f"the result rounded to {hypothesis.output.name}", "output"))
    if hypothesis.accumulator is not None:
        what.append((f"the sum taken in {hypothesis.accumulator.name}", "accumulator"))
    causes, places = zip(*what)
    fmt = (hypothesis.input or hypothesis.output or hypothesis.accumulator).name
    parts = [
        part for part, present in (("inputs", hypothesis.input), ("output", hypothesis.output)) if present is not None
    ] + ["accumulator"] * (hypothesis.accumulator is not None and not hypothesis.output)
    return Finding(
        Verdict.PRECISION,
        f"{fmt} {' and '.join(parts)}",
        f"{side.name} was computed with {' and '.join(causes)}; the rest is within the bound of "
        f"{side.arithmetic.accumulator.name}",
        _mend(side, hypothesis, case),
        "; ".join(places),
    )


def _formats(side: Side, hypothesis: Rounded) -> str:
    """The format's name; TF32 and float16 have the same digits, and where no value is small or large, both."""
    fmt = hypothesis.input
    if fmt is not TF32:
        return fmt.name
    half = dataclasses.replace(hypothesis, input=FLOAT16).apply(side)[0]
    tf32 = hypothesis.apply(side)[0]
    same = np.array_equal(half.x, tf32.x) and np.array_equal(half.kernel, tf32.kernel)
    return "tf32 (or float16: these values do not tell them apart)" if same else "tf32"


def _mend(side: Side, hypothesis: Rounded, case: Case) -> str:
    wanted = case.dtype.name
    if hypothesis.input is TF32:
        return (
            'PyTorch: torch.backends.cudnn.allow_tf32 = False (and torch.set_float32_matmul_precision("highest")); '
            'JAX: precision="highest"'
        )
    if hypothesis.input is not None and hypothesis.output is None and hypothesis.accumulator is None:
        return (
            f'compute {side.name} in {wanted}: JAX: precision="highest"; '
            'PyTorch: torch.set_float32_matmul_precision("highest"), and no autocast'
        )
    if hypothesis.accumulator is not None and hypothesis.output is None:
        return f"accumulate {side.name} in float32 or wider: JAX: preferred_element_type=jnp.float32"
    return f"compute {side.name} with dtype={wanted} throughout, without autocast or a cast of its result"


def _split(side: Side) -> Finding:
    return Finding(
        Verdict.PRECISION,
        "bfloat16_3x inputs",
        f"{side.name} was computed with inputs split into two bfloat16 parts, three products for each one; "
        f"the rest is within the bound of {side.arithmetic.accumulator.name}",
        'JAX: precision="highest" (three passes are "high"); PyTorch: torch.set_float32_matmul_precision("highest")',
        "inputs: x, kernel",
    )
