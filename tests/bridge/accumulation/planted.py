"""Implementations whose order and arithmetic are known, computed with rational numbers, one element at a time."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np

from bridge.accumulation import BIAS, Tree
from bridge.case import Case
from bridge.numerics import FLOAT32, Format, cast, format_of, round_integer


def rounded(x, fmt: Format, flushes=False) -> float:
    """A rational number in a format, to nearest, ties to even."""
    y = round_integer(x.numerator, 1 - x.denominator.bit_length(), fmt)
    return 0.0 if flushes and abs(y) < fmt.smallest_normal else y


def restricted(tree: Tree, leaves) -> Tree:
    """The tree that is left of `tree` when only `leaves` are added."""
    built = {}
    for node in tree.nodes():
        below = [built[child] for child in node.children if built[child].leaves]
        if node.kind == "leaf":
            built[node] = node if node.leaf in leaves else Tree.empty()
        elif node.kind == "fma" and node.leaf in leaves:
            built[node] = Tree.fma(node.leaf, below[0]) if below else Tree.of(node.leaf)
        else:
            built[node] = Tree.add(*below) if len(below) > 1 else below[0] if below else Tree.empty()
    return built[tree]


@dataclasses.dataclass
class Planted:
    """An implementation that adds in the order `tree`.

    Attributes:
      tree: over all taps, and the bias where cases have one; at the borders, what is left of it.
      accumulator: format of every result but the last.
      inputs: format of x and weights; None: the case's own.
      flushes: whether subnormal operands and results become zero.
      trees: other trees, by output index.
    """

    tree: Tree
    accumulator: Format = FLOAT32
    inputs: Format | None = None
    flushes: bool = False
    trees: dict = dataclasses.field(default_factory=dict)
    name: str = "planted"

    def run(self, case: Case) -> np.ndarray:
        g = case.geometry
        y = np.zeros(g.output_shape)
        terms = [
            tuple(
                np.broadcast_to(a, (*g.output_shape[:-1], g.channels, g.multiplier)).reshape(g.output_shape) for a in t
            )
            for t in case.tap_terms()
        ]
        for index in np.ndindex(*g.output_shape):
            values = {tap: (float(x[index]), float(w[index])) for tap, (x, w, ok) in enumerate(terms) if ok[index]}
            if case.bias is not None:
                values[BIAS] = (float(case.bias[index[-1]]), 1.0)
            values = {leaf: tuple(map(self._input(case), value)) for leaf, value in values.items()}
            y[index] = self._sum(restricted(self.trees.get(index, self.tree), values), values)
        out = cast(y, case.dtype)
        tiny = np.abs(out.astype(np.float64)) < format_of(case.dtype).smallest_normal
        return np.where(tiny & self.flushes, out.dtype.type(0), out)

    def _input(self, case):
        fmt = self.inputs or format_of(case.dtype)
        return lambda value: rounded(Fraction(value), fmt, self.flushes) if np.isfinite(value) else value

    def _sum(self, tree, values) -> float:
        def result(*exact, plain):
            if not np.isfinite(plain):
                return plain
            total = sum(exact, Fraction(0))
            return rounded(total, self.accumulator, self.flushes) if total else plain

        def fused(leaf, c):
            x, w = values[leaf]
            finite = np.isfinite(x * w + c)
            return result(*([Fraction(x) * Fraction(w), Fraction(c)] if finite else []), plain=x * w + c)

        value = {}
        for node in tree.nodes():
            below = [value[child] for child in node.children]
            if node.kind == "leaf":
                value[node] = fused(node.leaf, 0.0)
            elif node.kind == "fma":
                value[node] = fused(node.leaf, below[0])
            elif node.kind == "empty":
                value[node] = 0.0
            elif len(below) == 2:
                value[node] = (
                    result(*map(Fraction, below), plain=sum(below)) if np.isfinite(below).all() else sum(below)
                )
            else:
                value[node] = self._aligned(below)
        return value[tree]

    def _aligned(self, operands) -> float:
        """All operands in fixed point, at the exponent of the largest: the bits below its last one are dropped."""
        if not np.isfinite(operands).all():
            return sum(operands)
        exponent = max(np.frexp(operand)[1] for operand in operands)
        quantum = Fraction(2) ** int(exponent - self.accumulator.precision)
        return rounded(sum((int(Fraction(a) / quantum) for a in operands), 0) * quantum, self.accumulator, self.flushes)


def random_tree(rng, leaves, fused=True, most_operands=2) -> Tree:
    """Random operands combined until one is left; a product that meets a sum is sometimes fused."""
    parts = [Tree.of(leaf) for leaf in leaves]
    while len(parts) > 1:
        rng.shuffle(parts)
        several = [parts.pop() for _ in range(min(len(parts), int(rng.integers(2, most_operands + 1))))]
        products = [part for part in several if part.kind == "leaf" and part.leaf != BIAS]
        if fused and len(several) == 2 and products and rng.random() < 0.5:
            several.remove(products[0])
            parts.append(Tree.fma(products[0].leaf, several[0]))
        else:
            parts.append(Tree.add(*several))
    return parts[0]


def a_case(rng, *, taps=(3,), spatial=(7,), channels=2, bias=False, dtype=np.float32, **options) -> Case:
    """Normal random numbers on a small geometry."""
    x, kernel, b = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((1, *spatial, channels), (*taps, 1, channels), (channels,))
    )
    return Case(x, kernel, b if bias else None, **options)


def in_halves(leaves) -> Tree:
    """Pairwise summation."""
    if len(leaves) == 1:
        return Tree.of(leaves[0])
    half = len(leaves) // 2
    return Tree.add(in_halves(leaves[:half]), in_halves(leaves[half:]))


def in_lanes(leaves, lanes, fused=False) -> Tree:
    """One chain a lane, as vector registers add, and the lanes one after another."""
    chains = [Tree.chain(leaves[lane::lanes], fused=fused) for lane in range(lanes)]
    return list(itertools.accumulate(chains, Tree.add))[-1]
