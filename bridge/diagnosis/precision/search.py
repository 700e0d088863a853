"""Search for a lower precision that explains an output outside its bound, and for where it entered.

A wider bound alone proves nothing: a tap that is wrong by 2^-10 lies within the bound of bfloat16 too. So each
hypothesis is tested by its predictions, element by element:

1. *Inputs rounded to a format.* The exact result of the rounded inputs is computed, and y must lie within the bound of
   the *declared* arithmetic of that. This is as strict as the test that the original inputs failed.
2. *Inputs split into two parts of bfloat16.* As in 1; with three products for each, or with the sum of the parts.
3. *Each window's contribution to a gradient by the input rounded to a format.* As in 1. The sum over the multiplier was
   itself rounded in an unknown order, so its rounding may lie anywhere within its bound.
4. *Output rounded to a format.* y must be a number of the format, and lie between the roundings of both ends of
   [exact - bound, exact + bound], since rounding is monotone.
5. *Sum rounded to a format before the bias is added.* As in 4 for the sum without the bias. y is such a number plus the
   bias, rounded to y's dtype, or to the format again.
6. *Accumulated in a format.* y must be a number of the format, or such a number plus the bias, within the bound of that
   accumulator. The rest must look like rounding: distributed over the elements, uncorrelated with any tap
   (`randomness.systematic`) and with the effect of errors of the input (`randomness.follows_inputs`). With errors r_i,
   in units of the bound, the error is carried by (sum r_i^2)^2 / sum r_i^4 elements: by n of N, if those n have all
   of it, and by N/3, if it is normal. One element has little weight there, however large its error by chance. These
   last tests are statistical. So this hypothesis is tried last, and is called consistent, not proved.

Formats are tried from the finest, so the smallest bound that holds is the one named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.precision import emulation
from bridge.diagnosis.precision.rounded import Rounded
from bridge.diagnosis.precision.words import finding
from bridge.diagnosis.randomness import follows_inputs, systematic
from bridge.diagnosis.target import OPERANDS, Expected
from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, TF32, Format, format_of, round_to

#: From the finest to the coarsest.
_FORMATS = (FLOAT32, TF32, FLOAT16, BFLOAT16)
#: Least number of elements, and least share, outside the bound, and carrying the error, for it to be an accumulator's.
#: Fewer elements may each be wrong for themselves.
_LEAST, _LEAST_SHARE = 5, 0.01


def lower_precision(output: Output) -> Finding | None:
    """Return the finest rounding that predicts y, an emulated platform's own before others; None if none does."""
    return next((finding(output, each) for each in _candidates(output) if _predicts(output, each)), None)


def _candidates(output: Output) -> list[Rounded]:
    given = format_of(output.target.case.dtype)
    found: list[Rounded] = []
    for fmt in _FORMATS:
        if fmt.precision < given.precision:
            found += _splits(output) if fmt is TF32 and given is FLOAT32 else ()
            found += _hypotheses(output, fmt)
        elif fmt == given and given.precision < output.arithmetic.accumulator.precision:
            found.append(Rounded(fmt, truncated=True, output=True))
            if output.target.has_bias and output.arithmetic.output_roundings == 1:
                found.append(Rounded(fmt, output=True, before_bias=True))
    own = emulation.formats(output.emulated)
    return sorted(found, key=lambda hypothesis: hypothesis.name not in own)


def _hypotheses(output: Output, fmt: Format) -> Iterator[Rounded]:
    """Yield what may have been rounded to one format: the output alone, operands, and both."""
    if fmt is not TF32:
        yield Rounded(fmt, output=True)
        yield Rounded(fmt, truncated=True, output=True)
    factors = output.target.factors
    bias = [(), ("bias",)] if output.target.has_bias else [()]
    for truncated, subset, extra in itertools.product((False, True), _subsets(output), bias):
        yield Rounded(fmt, (*subset, *extra), truncated)
    yield from (Rounded(fmt, extra, truncated) for truncated in (False, True) for extra in bias if extra)
    if fmt in (TF32, BFLOAT16) and output.target.quantity == "dx":
        yield Rounded(fmt, windows=True)
        yield Rounded(fmt, factors, windows=True)
    if fmt is not TF32:
        for extra in bias:
            # a dtype as wide as the customary accumulator is the accumulator too
            for accumulator in (False, True) if fmt is FLOAT32 else (False,):
                yield Rounded(fmt, (*factors, *extra), output=True, accumulator=accumulator)
        if output.target.has_bias:
            for operands, extra, again in itertools.product(((), factors), bias, (True, False)):
                yield Rounded(fmt, (*operands, *extra), output=again, before_bias=True)


def _splits(output: Output) -> Iterator[Rounded]:
    """Yield operands, or contributions of windows, that are split into two parts of bfloat16."""
    both = output.target.factors
    for subset in _subsets(output):
        yield Rounded(BFLOAT16, subset, parts=2)
    if len(both) == 2:
        yield Rounded(BFLOAT16, products=3)
    if "x" in both:  # windows by a convolution are two parts already, whose sum may split another way
        yield Rounded(BFLOAT16, ("x",), parts=2, products=3)
    if output.target.quantity == "dx":
        yield Rounded(BFLOAT16, parts=2, windows=True)
        yield Rounded(BFLOAT16, parts=2, products=3, windows=True)


def lower_accumulator(output: Output) -> Finding | None:
    """Return a lower accumulator that is consistent with y; None if none is.

    It is lower than the declared one, and y shows it: every element is a number of its format. The coarsest comes
    first, since its numbers are numbers of the others too.
    """
    given = format_of(output.target.case.dtype)
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        if fmt.precision >= output.arithmetic.accumulator.precision or fmt.precision > given.precision:
            continue
        operands = ((), OPERANDS[output.target.quantity]) if fmt.precision < given.precision else ((),)
        hypotheses = [Rounded(fmt, rounded, accumulator=True) for rounded in operands]
        if fmt.precision < given.precision and output.target.has_bias:
            hypotheses += [
                Rounded(fmt, rounded, accumulator=True, before_bias=True) for rounded in ((), output.target.factors)
            ]
        for hypothesis in hypotheses:
            if _accumulates(output, hypothesis):
                return finding(output, hypothesis)
    return None


def _subsets(output: Output) -> list[tuple[str, ...]]:
    names = output.target.factors
    return [chosen for number in range(len(names), 0, -1) for chosen in itertools.combinations(names, number)]


def _predicts(output: Output, hypothesis: Rounded) -> bool:
    """Test on the sample first, then on all elements."""
    return all(_predicts_at(output, hypothesis, flat) for flat in (output.sample, None))


def _predicts_at(output: Output, hypothesis: Rounded, flat: np.ndarray | None) -> bool:
    if not hypothesis.output and not hypothesis.before_bias:
        return output.explained_by(hypothesis.expected(output, flat), flat)
    y = (output.y if flat is None else output.y.ravel()[flat]).astype(np.float64)
    if hypothesis.output and not _on_grid(y, hypothesis.format):
        return False
    bias = hypothesis.late_bias(output, flat) if hypothesis.before_bias else None
    if bias is not None and not hypothesis.output and not _on_grid_before(y, bias, hypothesis.format, output):
        return False
    return _rounded_between(output, hypothesis, bias, flat)


def _rounded_between(output: Output, hypothesis: Rounded, bias: np.ndarray | None, flat: np.ndarray | None) -> bool:
    """Return whether y lies between the roundings of both ends of what the declared arithmetic allows."""
    expected, fmt = hypothesis.expected(output, flat), hypothesis.format
    y, outside = (output.y, output.outside) if flat is None else (output.y.ravel()[flat], output.outside.ravel()[flat])
    y, finite = y.astype(np.float64), np.isfinite(y)
    with np.errstate(all="ignore"):
        ends = [hypothesis.nearest(expected.reference + sign * expected.allowed) for sign in (-1, 1)]
        if bias is not None:
            last = fmt if hypothesis.output else format_of(output.y.dtype)
            ends = [round_to(end + bias, last) for end in ends]
    between = (ends[0] <= y) & (y <= ends[1])
    return bool(between[finite].all() and np.isfinite(expected.allowed[outside & finite]).all())


def _accumulates(output: Output, hypothesis: Rounded) -> bool:
    fmt, own = hypothesis.format, format_of(output.y.dtype)
    for flat in (output.sample, None):
        y = output.y if flat is None else output.y.ravel()[flat]
        expected = hypothesis.expected(output, flat)
        if hypothesis.before_bias:
            bias = hypothesis.late_bias(output, flat)
            total = expected.reference + bias
            expected = Expected(total, expected.allowed + own.unit_roundoff * (np.abs(total) + expected.allowed))
            on_grid = _on_grid_before(y.astype(np.float64), bias, fmt, output)
        else:
            on_grid = fmt.precision >= own.precision or _on_grid(y, fmt)
        if not on_grid or not output.explained_by(expected, flat):
            return False
    least = max(_LEAST, _LEAST_SHARE * output.y.size)
    squares = np.where(np.isfinite(output.y), expected.ratio(output.y), 0.0) ** 2
    if np.count_nonzero(output.outside) < least or squares.sum() ** 2 < least * (squares**2).sum():
        return False
    return not systematic(output, expected) and not follows_inputs(output, expected)


def _on_grid(y: np.ndarray, fmt: Format) -> bool:
    """Return whether every number is one of the format."""
    finite = y[np.isfinite(y)].astype(np.float64)
    return bool((round_to(finite, fmt) == finite).all())


def _on_grid_before(y: np.ndarray, bias: np.ndarray, fmt: Format, output: Output) -> bool:
    """Return whether every y is a number of the format plus the bias, rounded once to y's own dtype."""
    own = format_of(output.y.dtype)
    with np.errstate(all="ignore"):
        again = round_to(y - bias, fmt) + bias
        near = np.abs(again - y) <= own.unit_roundoff * np.abs(y) * (1 + 2.0**-40) + own.smallest_normal
    return bool(near[np.isfinite(y)].all())
