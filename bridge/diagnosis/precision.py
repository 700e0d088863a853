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
    """What may have been rounded to a format.

    Attributes:
      format: which.
      operands: which of x, kernel, bias and dy, before the products; truncated: towards zero.
      output: the result.
      accumulator: every product and partial sum.
    """

    format: Format
    operands: tuple[str, ...] = ()
    truncated: bool = False
    output: bool = False
    accumulator: bool = False

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """An operand as the products see it, in its own dtype."""
        if name not in self.operands:
            return array
        rounding = truncate_to if self.truncated else round_to
        return cast(rounding(array.astype(np.float64), self.format), array.dtype)

    def apply(self, side: Side) -> tuple[Case, np.ndarray | None]:
        """The case and dy with their operands rounded."""
        case = side.target.case
        bias = None if case.bias is None else self.round("bias", case.bias)
        dy = None if side.target.dy is None else self.round("dy", side.target.dy)
        return case.replace(x=self.round("x", case.x), kernel=self.round("kernel", case.kernel), bias=bias), dy

    def expected(self, side: Side, flat: np.ndarray | None) -> Expected:
        """What rounded operands must give in the declared arithmetic, but for another accumulator."""
        arithmetic = side.arithmetic
        if self.accumulator:
            arithmetic = dataclasses.replace(arithmetic, product=self.format, accumulator=self.format)
        if flat is None or side.target.quantity != "y":
            return side.target.expected(arithmetic, *self.apply(side), flat)
        case = side.target.case
        at = np.unravel_index(flat, side.y.shape)
        terms = [(self.round("x", x), self.round("kernel", w), valid) for x, w, valid in sampled_terms(case, at)]
        bias = None if case.bias is None else self.round("bias", case.bias[at[-1]])
        return Expected.of(exact_sum(Products.of(terms, flat.shape, bias)), arithmetic)


def lower_precision(side: Side) -> Finding | None:
    """The finest rounding of inputs or output that predicts y; None if none does."""
    given = format_of(side.target.case.dtype)
    for fmt in _FORMATS:
        if fmt.precision >= given.precision:
            continue
        for hypothesis in _hypotheses(side, fmt):
            if _predicts(side, hypothesis):
                return _finding(side, hypothesis)
        if fmt is TF32 and given is FLOAT32 and side.target.quantity == "y" and _three_passes(side):
            return _split(side)
    return None


def lower_accumulator(side: Side) -> Finding | None:
    """A lower accumulator that is consistent with y; None if none is.

    It is lower than the declared one, and y shows it: by lying on its coarser grid, or because y has that format. The
    coarsest comes first, since its grid is part of the others.
    """
    given = format_of(side.target.case.dtype)
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        if fmt.precision >= side.arithmetic.accumulator.precision or fmt.precision > given.precision:
            continue
        hypotheses = [Rounded(fmt, accumulator=True)]
        if fmt.precision < given.precision:
            hypotheses.append(Rounded(fmt, OPERANDS[side.target.quantity], accumulator=True))
        for hypothesis in hypotheses:
            if _accumulates(side, hypothesis):
                return _finding(side, hypothesis)
    return None


def _hypotheses(side: Side, fmt: Format) -> Iterator[Rounded]:
    """What rounding to one format may have happened to: the output alone, operands, and both."""
    if fmt is not TF32:
        yield Rounded(fmt, output=True)
    names = OPERANDS[side.target.quantity]
    products = tuple(name for name in names if name != "bias")
    bias = [(), ("bias",)] if "bias" in names and side.target.case.bias is not None else [()]
    subsets = [c for n in range(len(products), 0, -1) for c in itertools.combinations(products, n)]
    for truncated, subset, extra in itertools.product((False, True), subsets, bias):
        yield Rounded(fmt, (*subset, *extra), truncated)
    if fmt is not TF32:
        for extra in bias:
            # a dtype as wide as the customary accumulator is the accumulator too
            for accumulator in (False, True) if fmt is FLOAT32 else (False,):
                yield Rounded(fmt, (*products, *extra), output=True, accumulator=accumulator)


def _predicts(side: Side, hypothesis: Rounded) -> bool:
    """On the sample first, then on all."""
    return all(_predicts_at(side, hypothesis, flat) for flat in (side.sample, None))


def _predicts_at(side: Side, hypothesis: Rounded, flat: np.ndarray | None) -> bool:
    if not hypothesis.output:
        return side.explained_by(hypothesis.expected(side, flat), flat)
    y = side.y if flat is None else side.y.ravel()[flat]
    return _on_grid(y, hypothesis.format) and _rounded_between(
        side, hypothesis.expected(side, flat), hypothesis.format, flat
    )


def _on_grid(y: np.ndarray, fmt: Format) -> bool:
    """Whether every number is one of the format."""
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
        count=np.sum([part.count for part in parts], axis=0),
        x=np.concatenate([part.x.ravel() for part in parts]),
        w=np.concatenate([part.w.ravel() for part in parts]),
        terms=lambda block: itertools.chain.from_iterable(part.terms(block) for part in parts),
    )


def _accumulates(side: Side, hypothesis: Rounded) -> bool:
    fmt = hypothesis.format
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
    operands = [name for name in hypothesis.operands if side.target.operand(name) is not None]
    fmt = hypothesis.format.name
    parts, causes = [], []
    if operands:
        how = "truncated" if hypothesis.truncated else "rounded"
        parts.append("inputs")
        causes.append(f"{' and '.join(_WORDS[name] for name in operands)} {how} to {_formats(side, hypothesis)}")
    if hypothesis.output:
        parts.append("output")
        causes.append(f"the result rounded to {fmt}")
    elif hypothesis.accumulator:
        parts.append("accumulator")
        causes.append(f"the sum taken in {fmt}")
    return Finding(
        Verdict.PRECISION,
        f"{fmt} {' and '.join(parts)}",
        f"{side.name} was computed with {', and '.join(causes)}; {_rest(side, hypothesis)}",
        _mend(side, hypothesis),
        "; ".join(f"inputs: {', '.join(operands)}" if part == "inputs" else part for part in parts),
    )


def _rest(side: Side, hypothesis: Rounded) -> str:
    if hypothesis.accumulator and not hypothesis.output:
        return "the difference is within the bound of that, and no tap correlates with it"
    return f"the rest is within the bound of {side.arithmetic.accumulator.name}"


def _formats(side: Side, hypothesis: Rounded) -> str:
    """The format's name; TF32 and float16 have the same digits, and where no value is small or large, both."""
    if hypothesis.format is not TF32:
        return hypothesis.format.name
    half = dataclasses.replace(hypothesis, format=FLOAT16)
    given = {name: side.target.operand(name) for name in hypothesis.operands}
    same = all(a is None or np.array_equal(half.round(n, a), hypothesis.round(n, a)) for n, a in given.items())
    return "tf32 (or float16: these values do not tell them apart)" if same else "tf32"


def _mend(side: Side, hypothesis: Rounded) -> str:
    if hypothesis.accumulator and not hypothesis.output:
        return f"accumulate {side.name} in float32 or wider: JAX: preferred_element_type=jnp.float32"
    if hypothesis.output:
        dtype = side.target.case.dtype.name
        return f"compute {side.name} with dtype={dtype} throughout, without autocast or a cast of its result"
    if hypothesis.format is TF32:
        torch_mend = (
            "torch.backends.cudnn.allow_tf32 = False, and for matmul torch.backends.cuda.matmul.allow_tf32 = False"
        )
    else:
        torch_mend = 'torch.set_float32_matmul_precision("highest"), and no autocast'
    return f'{side.name} in JAX: precision="highest"; in PyTorch: {torch_mend}'


def _split(side: Side) -> Finding:
    return Finding(
        Verdict.PRECISION,
        "bfloat16_3x inputs",
        f"{side.name} was computed with inputs split into two bfloat16 parts, three products for each one; "
        f"the rest is within the bound of {side.arithmetic.accumulator.name}",
        f'{side.name} in JAX: precision="highest" (three passes are "high"); '
        'in PyTorch: torch.set_float32_matmul_precision("highest")',
        "inputs: x, kernel",
    )
