"""Accumulation orders: the tree by which each output element is summed, and the arithmetic."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bridge.accumulation.tree import BIAS, Tree
from bridge.numerics import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32, Format, round_to, truncate_to

_FORMATS = {each.name: each for each in (FLOAT64, FLOAT32, TF32, BFLOAT16, FLOAT16)}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """A format, and the direction of rounding into it.

    >>> from bridge.numerics import TF32
    >>> str(Rounding(TF32, toward_zero=True))
    'tf32, toward zero'
    """

    format: Format
    toward_zero: bool = False

    def __call__(self, x: ArrayLike) -> np.ndarray:
        """Return float64 x rounded into the format."""
        return (truncate_to if self.toward_zero else round_to)(np.asarray(x), self.format)

    def __str__(self) -> str:
        return self.format.name + (", toward zero" if self.toward_zero else "")

    @classmethod
    def parse(cls, text: str) -> Rounding:
        """Return the rounding that `str` wrote.

        >>> Rounding.parse("tf32, toward zero").format.precision
        11
        """
        name, _, direction = text.partition(", ")
        return cls(_FORMATS[name], toward_zero=bool(direction))


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The arithmetic of an implementation, as measured. None: not visible here, or not the same for all elements.

    Attributes:
      x, kernel: what inputs and weights are rounded to before they are multiplied.
      output: what a result is rounded to.
      accumulator: where sums are kept. Where no element adds three terms, none shows: None.
      products: "fused" where products enter unrounded (the trees say which; one that starts a sum, or one lane of it,
        is rounded either way), "rounded" where none is seen to, "exact" where the accumulator is wide enough for all.
      flushed: which subnormal numbers become zero: any of "x", "kernel", "output".
      padding_taps: "skipped", "multiplied" (by zero), or "mixed".
      bias: where it enters: "first", "last", "inside"; "rounded" is last, after a rounding to the output format.
      zero_start: whether sums start from +0, which only the sign of a zero tells.
      deterministic: whether a second run gave the same bits.
      order_runs: runs that the order (and FMA, where the same runs show it) took.
      runs: runs in all.
    """

    x: Rounding | None
    kernel: Rounding | None
    output: Rounding | None
    accumulator: Rounding | None
    products: str | None
    flushed: tuple[str, ...]
    padding_taps: str | None
    bias: str | None
    zero_start: bool | None
    deterministic: bool
    order_runs: int
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; formats by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: str(value) if isinstance(value, Rounding) else list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Fingerprint:
        """Return the fingerprint that `to_json` wrote."""
        roundings = ("x", "kernel", "output", "accumulator")
        read = {name: Rounding.parse(fields[name]) for name in roundings if fields[name] is not None}
        return cls(**{**fields, **read, "flushed": tuple(fields["flushed"])})


@dataclasses.dataclass(frozen=True)
class NotASum:
    """Why elements have no tree: they are not a conventional sum of products, or not the same one every time."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclasses.dataclass(frozen=True, eq=False)
class AccumulationOrder:
    """The order in which an implementation adds, for every output element of sums of one layout.

    Attributes:
      implementation: its name.
      layout, dtype: of the sums that were probed, of a convolution its geometry; the order is that of this shape alone.
      trees: the distinct trees, the most frequent first.
      labels: int32 of the output's shape: which tree; -1 - k where refusals[k] says why there is none.
      refusals: why some elements have no tree.
      zero_start: bool of the output's shape: whether a sum of nothing but -0 is +0, as one that starts from +0 is.
      fingerprint: the arithmetic.
    """

    implementation: str
    layout: Any
    dtype: np.dtype
    trees: tuple[Tree, ...]
    labels: np.ndarray = dataclasses.field(repr=False)
    refusals: tuple[NotASum, ...]
    zero_start: np.ndarray = dataclasses.field(repr=False)
    fingerprint: Fingerprint

    @property
    def revealed(self) -> float:
        """The share of elements that have a tree; 1 where there are no elements."""
        return float(np.mean(self.labels >= 0)) if self.labels.size else 1.0

    def outcome(self, label: int) -> Tree | NotASum:
        """Return the tree with this label, or the reason why there is none."""
        return self.trees[label] if label >= 0 else self.refusals[-1 - label]

    def tree(self, index: tuple[int, ...]) -> Tree | NotASum:
        """Return the tree of one output element, or why there is none."""
        return self.outcome(int(self.labels[index]))

    def classes(self) -> list[tuple[Tree | NotASum, int, tuple[int, ...]]]:
        """Return `(tree or refusal, elements, index of the first)`, the most frequent first, refusals last."""
        found = zip(*(part.tolist() for part in np.unique(self.labels, return_counts=True, return_index=True)))
        return [
            (self.outcome(label), count, tuple(map(int, np.unravel_index(first, self.labels.shape))))
            for label, first, count in sorted(found, key=lambda each: (each[0] < 0, abs(each[0])))
        ]

    def to_json(self) -> dict[str, Any]:
        """Fingerprint and classes; the labels themselves are left out, since they are as large as the output."""
        return {
            "implementation": self.implementation,
            "dtype": self.dtype.name,
            "revealed": self.revealed,
            "fingerprint": self.fingerprint.to_json(),
            "classes": [
                {"elements": count, "first": list(first)}
                | ({"tree": str(tree), "nodes": tree.to_json()} if isinstance(tree, Tree) else {"refused": tree.reason})
                for tree, count, first in self.classes()
            ],
        }


def where_bias_enters(tree: Tree) -> str | None:
    """ "first", "last" or "inside"; None without a bias beside something else."""
    if not tree.has(BIAS) or tree.size == 1 or tree.kind == "exact":
        return None
    bias = Tree.of(BIAS)
    if bias in tree.children and tree.kind == "add":
        return "last" if tree.size > 2 else "first"
    depth = 0
    node = tree
    while node.has(BIAS) and node is not bias:
        node = next(child for child in node.children if child.has(BIAS))
        depth += 1
    return "first" if depth == tree.height else "inside"
