"""Probes of an implementation's arithmetic: one run each, if its answer is the expected one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from bridge.accumulation.order import Rounding
from bridge.accumulation.probe import Subject
from bridge.accumulation.tree import BIAS, Leaf, Tree
from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32, Format, round_to

#: What stands for 1 in probes of small parts of 1, so that those are normal numbers in float16 too.
_ONE = 2.0**14
#: Products that tell roundings of inputs from those of the result: each exposes a wrong guess half of the time or more.
_PAIRS = 12


class Inputs(NamedTuple):
    """The roundings of x and of the weights before they are multiplied, and of the result."""

    x: Rounding | None
    kernel: Rounding | None
    output: Rounding | None

    def full(self, fmt: Format) -> bool:
        """Return whether operands and results keep all the bits of `fmt`."""
        return all(rounding == Rounding(fmt) for rounding in self)


def most_read_term(subject: Subject) -> int:
    return int(subject.sums.reads.reshape(-1, subject.sums.terms).sum(axis=0).argmax())


def agreed(subject: Subject, x: float, weights: Mapping[Leaf, float], where: np.ndarray) -> float | None:
    """Return the value of the elements `where`, other weights being 0; None where there are none, or they differ."""
    values = subject.probe(x, _weights(subject, weights))[where].astype(np.float64)
    return float(values[0]) if len(values) and (values == values[0]).all() else None


def _weights(subject: Subject, given: Mapping[Leaf, float]) -> np.ndarray:
    return np.array([given.get(leaf, 0.0) for leaf in subject.names])


def input_rounding(subject: Subject) -> Inputs:
    """Return the fewest roundings that give what comes out for single products of numbers with every bit in use.

    One product shows that nothing but the result is rounded. Several show which other numbers are.
    """
    term, fmt = most_read_term(subject), subject.format
    where = subject.readers(term)
    narrower = [f for f in (FLOAT32, TF32, BFLOAT16) if f.precision < fmt.precision]
    if fmt is FLOAT32:
        narrower.append(FLOAT16)
    roundings = [Rounding(fmt), *(Rounding(f, truncated) for truncated in (False, True) for f in narrower)]
    candidates = list(itertools.product(roundings, repeat=3))
    candidates.sort(key=lambda choice: sum(rounding != Rounding(fmt) for rounding in choice))
    pairs = np.random.default_rng(0).uniform(1, 2, (_PAIRS, 2))
    if fmt is not FLOAT16:
        # Of numbers near 2^-18, float16 holds 7 bits and TF32 11: as x, as the weight, and as the product.
        for first, scales in enumerate(((2.0**-18, 2.0**8), (2.0**8, 2.0**-18), (2.0**-9, 2.0**-9)), start=1):
            pairs[first::4] *= scales
    for x, w in round_to(pairs, fmt).tolist():
        x = x if subject.sums.multiplies else 1.0
        y = agreed(subject, x, {term: w}, where)
        # Products of two float64 numbers are rounded here by float64 itself, of all others not at all.
        candidates = [(of_x, of_w, of_y) for of_x, of_w, of_y in candidates if y == of_y(of_x(x) * of_w(w))]
        if not candidates:
            return Inputs(None, None, None)
        if Inputs(*candidates[0]).full(fmt):
            break
    return Inputs(*candidates[0])


def flushed_subnormals(subject: Subject, inputs: Inputs) -> tuple[str, ...]:
    """Return which of "x", "kernel" and "output" lose a subnormal number: a quarter of the smallest normal one."""
    term = most_read_term(subject)
    where = subject.readers(term)

    def product(x: float, w: float) -> float | None:
        return agreed(subject, x, {term: w}, where)

    tiny = {
        name: (rounding.format if rounding else subject.format).smallest_normal / 4
        for name, rounding in zip(Inputs._fields, inputs)
    }
    if not subject.sums.multiplies:
        return ("output",) if product(1.0, tiny["output"]) == 0 else ()
    root = 2.0 ** (np.log2(tiny["output"]) // 2)
    answers = {
        "x": product(tiny["x"], 2.0**10),
        "kernel": product(2.0**10, tiny["kernel"]),
        "output": product(root, tiny["output"] / root),
    }
    return tuple(name for name, y in answers.items() if y == 0)


def accumulator(subject: Subject, tree: Tree, where: np.ndarray, inputs: Inputs) -> Rounding | None:
    """Return the accumulator of the elements `where`, which add in the order `tree`; None where it does not show.

    (1 + v) - 1 with v = 1.25 2^-p is 2^(1-p) in a p-bit accumulator that rounds to nearest, 0 in a narrower one
    and in one that truncates, and v in a wider one. v = 2^(1-p) is the least that a p-bit accumulator holds beside 1.
    """
    triple = next(absorbing_triples(tree), None)
    aligned = triple is None
    if triple is None:
        wide = next((node for node in tree.nodes() if node.kind == "add" and len(node.children) > 2), None)
        if wide is None:
            return None
        triple = wide.children[0].leaves[0], wide.children[1].leaves[0], wide.children[2].leaves[0]
    eleven = FLOAT16 if FLOAT16 in (subject.format, inputs.kernel.format if inputs.kernel else None) else TF32
    formats = [BFLOAT16, eleven, FLOAT32, FLOAT64]
    at = formats.index(FLOAT64 if subject.format is FLOAT64 else FLOAT32)
    seen = set()
    while 0 <= at < len(formats) and at not in seen:
        seen.add(at)
        fmt = formats[at]
        if fmt is FLOAT64 and eleven is FLOAT16:
            return Rounding(FLOAT64)  # 2^-53 is beyond float16: wider than float32 is all that shows
        y = remainder(subject, triple, where, 1.25 * 2.0**-fmt.precision)
        least = 2.0 ** (1 - fmt.precision)
        if y == least:
            return Rounding(fmt)
        if y == 0 and remainder(subject, triple, where, least) == least:
            # A multi-way addition drops what lies below its last bit before it adds, however it rounds after.
            return Rounding(fmt, toward_zero=not aligned)
        at += 1 if y else -1
    return None


def rounds_before_bias(
    subject: Subject, tree: Tree, where: np.ndarray, output: Rounding, accumulator: Rounding | None
) -> bool:
    """Return whether the bias is added to a sum that was first rounded to the output's format."""
    if accumulator is None or output.format.precision >= accumulator.format.precision:
        return False
    pairs = ((i, k) for i, k, j in absorbing_triples(tree) if j == BIAS)
    pair = next(pairs, None)
    if pair is None:
        return False
    p = output.format.precision
    return remainder(subject, (*pair, BIAS), where, 1.25 * 2.0**-p) == 2.0 ** (1 - p)


def remainder(subject: Subject, triple: tuple[Leaf, Leaf, Leaf], where: np.ndarray, part: float) -> float | None:
    """Return (1 + part) - 1, added in this order by leaves i, k and j of the elements `where`."""
    y = agreed(subject, 1.0, dict(zip(triple, (_ONE, part * _ONE, -_ONE))), where)
    return None if y is None else y / _ONE


def absorbing_triples(tree: Tree) -> Iterator[tuple[Leaf, Leaf, Leaf]]:
    """Yield leaves (i, k, j) where i and k meet in an addition of two before j joins."""
    for node in tree.nodes():
        for below in node.children:
            parts = _first_leaves(below)
            if len(parts) == 2:
                for other in _first_leaves(node):
                    if not below.has(other):
                        yield parts[0], parts[1], other


def _first_leaves(node: Tree) -> list[Leaf]:
    """Return the first leaf of each operand of an addition, a fused product included."""
    own = [node.leaf] if node.kind == "fma" and node.leaf is not None else []
    return [child.leaves[0] for child in node.children] + own


def holds_products(subject: Subject, tree: Tree, where: np.ndarray) -> bool:
    """Return whether products reach an accumulator that is wide enough for them unrounded.

    With a + b = p + 1, (1 + 2^-a)(1 + 2^-b) - (1 + 2^-a) is 2^-b + 2^-(p+1), or 2^-b where the product is first
    rounded to the p bits of its operands.
    """
    p = subject.format.precision
    a = p // 2
    b = p + 1 - a
    leaves = [leaf for leaf in tree.leaves if isinstance(leaf, int)]
    if len(leaves) < 2:
        return True
    return agreed(subject, 1 + 2.0**-a, {leaves[0]: 1 + 2.0**-b, leaves[1]: -1.0}, where) != 2.0**-b


def compensates(subject: Subject, tree: Tree, where: np.ndarray, p: int) -> bool:
    """Return whether 1 + 0.75 2^-p + 0.75 2^-p exceeds 1: each part alone is lost, so a dropped one came back."""
    for node in tree.nodes():
        below = node.children[0] if node.children else None
        if below is None or below.size != 2 or node.size != 3:
            continue
        (last,) = set(node.leaves) - set(below.leaves)
        lost = 0.75 * 2.0**-p
        y = agreed(subject, 1.0, {below.leaves[0]: 1.0, below.leaves[1]: lost, last: lost}, where)
        return y is not None and y > 1
    return False


def padding_taps(subject: Subject) -> str | None:
    """Return how taps in the padding are treated, by an infinite weight: NaN where it is multiplied by zero."""
    tap = min(range(subject.sums.terms), key=lambda tap: int(subject.readers(tap).sum()))
    padded = ~subject.readers(tap)
    if not padded.any():
        return None
    multiplied = np.isnan(subject.probe(0.0, _weights(subject, {tap: np.inf}))[padded])
    return "multiplied" if multiplied.all() else "mixed" if multiplied.any() else "skipped"


def starts_from_zero(subject: Subject) -> np.ndarray:
    """Return whether the sum of nothing but -0 is +0: bool, flat."""
    weights = np.full(len(subject.names), -1.0 if subject.sums.multiplies else -0.0)
    if subject.names[-1] == BIAS:
        weights[-1] = -0.0
    return ~np.signbit(subject.probe(0.0 if subject.sums.multiplies else 1.0, weights))
