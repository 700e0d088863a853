"""PRECISION: a lower precision that explains an output beyond its bound, and where it entered.

A wider bound alone proves nothing: a tap that is wrong by 2^-10 lies within the bound of bfloat16 too. So each
hypothesis is tested by what it predicts, element by element:

- *inputs rounded to a format*: the exact result of the rounded inputs is computed, and y must lie within the bound of
  the *declared* arithmetic of that. It is as strict as the test that the original inputs failed.
- *inputs split in two parts of bfloat16*: likewise; with three products for each, or with the sum of the parts.
- *what each window gives back rounded to a format*, in a gradient by the input: likewise, with the sum over the
  multiplier rounded wherever it may lie, since that sum itself was rounded in an unknown order.
- *output rounded to a format*: y must be a number of the format, and lie between the roundings of both ends of
  [exact - bound, exact + bound], since rounding is monotone.
- *sum rounded to a format before the bias is added*: likewise for the sum without the bias; y is such a number plus the
  bias, rounded as y's dtype rounds, or to the format again.
- *accumulated in a format*: y must be a number of the format, or such a number plus the bias, within the bound of that
  accumulator, and what remains must look like rounding: spread over the elements, uncorrelated with any tap
  (`randomness.systematic`) and with what errors of the input would do (`randomness.follows_inputs`). These last tests
  are statistical. So this hypothesis is tried last, and is called consistent, not proved.

Formats are tried from the finest, so the smallest bound that holds is the one named.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis import emulation
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.randomness import follows_inputs, systematic
from bridge.diagnosis.target import OPERANDS, WORDS, Expected, products, sampled_terms
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
    round_to,
    truncate_to,
)

#: From the finest to the coarsest.
_FORMATS = (FLOAT32, TF32, FLOAT16, BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What may have been rounded to a format.

    Attributes:
      format: which.
      operands: which of x, kernel, bias and dy, before the products; truncated: towards zero.
      output: the result.
      accumulator: every product and partial sum.
      before_bias: the sum without the bias, which is added after: in y's own dtype, or with the output rounded again.
      parts: how many numbers of the format stand for what is rounded, 1 or 2.
      products: what stands for the product of two operands: 1, or the 3 greatest of two parts of each.
      windows: what each element of each window gives back to the input, before these are added up.
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
        """The format's, with the number of products that stand for one, or of parts."""
        number = max(self.parts, self.products)
        return f"{self.format.name}_{number}x" if number > 1 else self.format.name

    def round(self, name: str, array: np.ndarray) -> np.ndarray:
        """An operand as the products see it, in its own dtype."""
        return cast(self.nearest(array.astype(np.float64)), array.dtype) if name in self.operands else array

    def nearest(self, wide: np.ndarray) -> np.ndarray:
        rounding = truncate_to if self.truncated else round_to
        first = rounding(wide, self.format)
        return first if self.parts == 1 else first + rounding(wide - first, self.format)

    def factors(self, names: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The operands of the products that stand for those of a and b, the greatest last."""
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
        """Cases, and dy for each, whose results add up to what rounded operands must give; the bias is in the last."""
        target = output.target
        case, names = target.case, tuple(name for name in OPERANDS[target.quantity] if name != "bias")
        if len(names) == 1:
            return [(case, None if target.dy is None else self.round("dy", target.dy))]
        pairs = self.factors(names, *(_operand(output, name) for name in names))
        bias = None if case.bias is None or self.before_bias else self.round("bias", case.bias)
        found = []
        for number, pair in enumerate(pairs, start=1):
            given = {"x": case.x, "kernel": case.kernel, "dy": target.dy} | dict(zip(names, pair))
            dy = given.pop("dy")
            found.append((case.replace(**given, bias=bias if number == len(pairs) else None), dy))
        return found

    def expected(self, output: Output, flat: np.ndarray | None) -> Expected:
        """What rounded operands must give in the declared arithmetic, but for another accumulator."""
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
        """The bias that is added to each element after the sum; float64."""
        case = output.target.case
        bias = self.round("bias", _operand(output, "bias")).astype(np.float64)
        return np.broadcast_to(bias, case.geometry.output_shape) if flat is None else bias[flat % len(bias)]

    def _of_windows(self, sums: list[Products]) -> Expected:
        """A gradient by the input from what windows give back: a sum over the multiplier in float32, rounded."""
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


def _operand(output: Output, name: str) -> np.ndarray:
    array = output.target.operand(name)
    assert array is not None, name
    return array


def lower_precision(output: Output) -> Finding | None:
    """The finest rounding of inputs or output that predicts y, an emulated platform's own first; None if none does."""
    return next((_finding(output, each) for each in _candidates(output) if _predicts(output, each)), None)


def _candidates(output: Output) -> list[Rounded]:
    given = format_of(output.target.case.dtype)
    found: list[Rounded] = []
    for fmt in _FORMATS:
        if fmt.precision < given.precision:
            found += _splits(output) if fmt is TF32 and given is FLOAT32 else ()
            found += _hypotheses(output, fmt)
        elif fmt == given and given.precision < output.arithmetic.accumulator.precision:
            found.append(Rounded(fmt, truncated=True, output=True))
            if _has_bias(output) and output.arithmetic.output_roundings == 1:
                found.append(Rounded(fmt, output=True, before_bias=True))
    own = emulation.formats(output.emulated)
    return sorted(found, key=lambda hypothesis: hypothesis.name not in own)


def lower_accumulator(output: Output) -> Finding | None:
    """A lower accumulator that is consistent with y; None if none is.

    It is lower than the declared one, and y shows it: by lying on its coarser grid, or because y has that format. The
    coarsest comes first, since its grid is part of the others.
    """
    given = format_of(output.target.case.dtype)
    for fmt in (BFLOAT16, FLOAT16, FLOAT32):
        if fmt.precision >= output.arithmetic.accumulator.precision or fmt.precision > given.precision:
            continue
        operands = ((), OPERANDS[output.target.quantity]) if fmt.precision < given.precision else ((),)
        hypotheses = [Rounded(fmt, rounded, accumulator=True) for rounded in operands]
        if fmt.precision < given.precision and _has_bias(output):
            hypotheses += [
                Rounded(fmt, rounded, accumulator=True, before_bias=True) for rounded in ((), _factors(output))
            ]
        for hypothesis in hypotheses:
            if _accumulates(output, hypothesis):
                return _finding(output, hypothesis)
    return None


def _hypotheses(output: Output, fmt: Format) -> Iterator[Rounded]:
    """What rounding to one format may have happened to: the output alone, operands, and both."""
    if fmt is not TF32:
        yield Rounded(fmt, output=True)
        yield Rounded(fmt, truncated=True, output=True)
    factors = _factors(output)
    bias = [(), ("bias",)] if _has_bias(output) else [()]
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
        if _has_bias(output):
            for operands, extra, again in itertools.product(((), factors), bias, (True, False)):
                yield Rounded(fmt, (*operands, *extra), output=again, before_bias=True)


def _splits(output: Output) -> Iterator[Rounded]:
    """Operands, or what windows give back, as two parts of bfloat16."""
    both = _factors(output)
    for subset in _subsets(output):
        yield Rounded(BFLOAT16, subset, parts=2)
    if len(both) == 2:
        yield Rounded(BFLOAT16, products=3)
    if "x" in both:  # windows by a convolution are two parts already, whose sum may split another way
        yield Rounded(BFLOAT16, ("x",), parts=2, products=3)
    if output.target.quantity == "dx":
        yield Rounded(BFLOAT16, parts=2, windows=True)
        yield Rounded(BFLOAT16, parts=2, products=3, windows=True)


def _has_bias(output: Output) -> bool:
    return output.target.quantity == "y" and output.target.case.bias is not None


def _factors(output: Output) -> tuple[str, ...]:
    """The operands that are multiplied."""
    return tuple(name for name in OPERANDS[output.target.quantity] if name != "bias")


def _subsets(output: Output) -> list[tuple[str, ...]]:
    names = _factors(output)
    return [chosen for number in range(len(names), 0, -1) for chosen in itertools.combinations(names, number)]


def _predicts(output: Output, hypothesis: Rounded) -> bool:
    """On the sample first, then on all."""
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


def _on_grid(y: np.ndarray, fmt: Format) -> bool:
    """Whether every number is one of the format."""
    finite = y[np.isfinite(y)].astype(np.float64)
    return bool((round_to(finite, fmt) == finite).all())


def _on_grid_before(y: np.ndarray, bias: np.ndarray, fmt: Format, output: Output) -> bool:
    """Whether every y is a number of the format plus the bias, rounded once to y's own dtype."""
    own = format_of(output.y.dtype)
    with np.errstate(all="ignore"):
        again = round_to(y - bias, fmt) + bias
        near = np.abs(again - y) <= own.unit_roundoff * np.abs(y) * (1 + 2.0**-40) + own.smallest_normal
    return bool(near[np.isfinite(y)].all())


def _rounded_between(output: Output, hypothesis: Rounded, bias: np.ndarray | None, flat: np.ndarray | None) -> bool:
    """Whether y lies between the roundings of both ends of what the declared arithmetic allows."""
    expected, fmt = hypothesis.expected(output, flat), hypothesis.format
    y, outside = (output.y, output.outside) if flat is None else (output.y.ravel()[flat], output.outside.ravel()[flat])
    y, finite = y.astype(np.float64), np.isfinite(y)
    with np.errstate(all="ignore"):
        ends = [
            hypothesis.nearest(end)
            for end in (expected.reference - expected.allowed, expected.reference + expected.allowed)
        ]
        if bias is not None:
            last = fmt if hypothesis.output else format_of(output.y.dtype)
            ends = [round_to(end + bias, last) for end in ends]
    between = (ends[0] <= y) & (y <= ends[1])
    return bool(between[finite].all() and np.isfinite(expected.allowed[outside & finite]).all())


def _together(parts: list[Products]) -> Products:
    """The sum of several sums, as one; the bias is the last one's."""
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[-1],
        count=np.sum([part.count for part in parts], axis=0),
        x=np.concatenate([part.x.ravel() for part in parts]),
        w=np.concatenate([part.w.ravel() for part in parts]),
        terms=lambda block: itertools.chain.from_iterable(part.terms(block) for part in parts),
    )


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
    ratio = np.where(np.isfinite(output.y), expected.ratio(output.y), 0.0)
    spread = ratio.max() <= 10 * np.sqrt(np.mean(ratio**2)) and np.count_nonzero(output.outside) >= 0.01 * output.y.size
    return bool(spread) and not systematic(output, expected) and not follows_inputs(output, expected)


def _finding(output: Output, hypothesis: Rounded) -> Finding:
    split = _factors(output) if hypothesis.products > 1 else ()
    operands = split or [name for name in hypothesis.operands if output.target.operand(name) is not None]
    words = " and ".join(WORDS[name] for name in operands)
    parts, causes = [], []
    if split:
        parts.append("inputs")
        causes.append(f"{words} split into two bfloat16 parts, three products for each one")
    elif operands:
        how = "truncated" if hypothesis.truncated else "rounded"
        parts.append("inputs")
        causes.append(f"{words} {how} to {_formats(output, hypothesis)}")
    if hypothesis.windows:
        parts.append("windows")
        causes.append(f"what each window gives back rounded to {_formats(output, hypothesis)}")
    name, own = hypothesis.format.name, output.y.dtype.name
    if hypothesis.output:
        parts.append("output")
        again = "the sum rounded to {0} before the bias is added, and again after"
        how = "truncated" if hypothesis.truncated and not operands else "rounded"
        causes.append((again if hypothesis.before_bias else f"the result {how} to {{0}}").format(name))
    elif hypothesis.accumulator:
        parts.append("accumulator")
        after = f", and a {own} bias added after" if hypothesis.before_bias else ""
        causes.append(f"the products accumulated in {name}{after}")
    elif hypothesis.before_bias:
        parts.append("sum")
        causes.append(f"the sum rounded to {name} before the bias is added in {own}")
    return Finding(
        Verdict.PRECISION,
        f"{hypothesis.name} {' and '.join(parts)}",
        f"{output.name} {_as_if(hypothesis)} computed with {', and '.join(causes)}; {_rest(output, hypothesis)}",
        _fix(output, hypothesis),
        "; ".join(f"inputs: {', '.join(operands)}" if part == "inputs" else part for part in parts),
    )


def _as_if(hypothesis: Rounded) -> str:
    """What is proved is stated; a lower accumulator is only consistent with y."""
    return "is as" if hypothesis.accumulator and not hypothesis.output else "was"


def _rest(output: Output, hypothesis: Rounded) -> str:
    if hypothesis.accumulator and not hypothesis.output:
        return "the difference is within the bound of that and looks random: no tap and no input correlates with it"
    return f"the rest is within the bound of {output.arithmetic.accumulator.name}"


def _formats(output: Output, hypothesis: Rounded) -> str:
    """The format's name; TF32 and float16 have the same digits, and where no value is small or large, both."""
    if hypothesis.parts == 2:
        return f"two parts of {hypothesis.format.name}"
    if hypothesis.format is not TF32 or hypothesis.windows:
        return hypothesis.format.name
    half = dataclasses.replace(hypothesis, format=FLOAT16)
    given = {name: output.target.operand(name) for name in hypothesis.operands}
    if output.emulated is not None:
        return "tf32"
    same = all(a is None or np.array_equal(half.round(n, a), hypothesis.round(n, a)) for n, a in given.items())
    return "tf32 (or float16: these values do not tell them apart)" if same else "tf32"


def _fix(output: Output, hypothesis: Rounded) -> str:
    if hypothesis.accumulator and not hypothesis.output:
        return f"accumulate {output.name} in float32 or wider: JAX: preferred_element_type=jnp.float32"
    if hypothesis.output or hypothesis.before_bias:
        dtype = output.target.case.dtype.name
        return f"compute {output.name} with dtype={dtype} throughout, without autocast or a cast of its result"
    if hypothesis.products > 1:
        return (
            f'{output.name} in JAX: precision="highest" (three passes are "high"); '
            'in PyTorch: torch.set_float32_matmul_precision("highest")'
        )
    if hypothesis.format is TF32:
        torch_fix = (
            "torch.backends.cudnn.allow_tf32 = False, and for matmul torch.backends.cuda.matmul.allow_tf32 = False"
        )
    else:
        torch_fix = 'torch.set_float32_matmul_precision("highest"), and no autocast'
    return f'{output.name} in JAX: precision="highest"; in PyTorch: {torch_fix}'
