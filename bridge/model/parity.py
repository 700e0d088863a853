"""Two networks compared: every operation by itself, how differences grow, and the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.numerics import same_bits

Track = Callable[[Any], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class LayerParity:
    """One operation in both frameworks.

    Attributes:
      name: its path in the Flax model.
      torch: the path of its layer in PyTorch, or of the module that ran it; "nothing" where PyTorch computes nothing.
      kind: "depthwise", "pointwise", "convolution", "linear", "batch norm", an activation, "mean", "add", "multiply".
      shape: of its result in the Flax model.
      isolated: JAX's result on PyTorch's operands compared with PyTorch's result; None if not compared.
      reason: why it was not compared; empty where it was.
      growth: ||JAX - PyTorch|| / ||PyTorch|| of its results where each network runs on its own; None if not compared.
      amplification: `growth` divided by the greatest growth of its inputs; None where they do not differ.
      orders: by framework, the order or the form in which it computes; empty where both have the same bits.
      trees: by framework, the orders in full, as `bridge.accumulation.Tree` writes them.
    """

    name: str
    torch: str
    kind: str
    shape: tuple[int, ...]
    isolated: Comparison | None
    reason: str
    growth: float | None
    amplification: float | None
    orders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trees: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        return Verdict.INCONCLUSIVE if self.isolated is None else self.isolated.verdict

    @property
    def is_wrong(self) -> bool:
        """True where it was compared and does not pass."""
        return self.isolated is not None and not self.verdict.passes

    @property
    def cause(self) -> str:
        """The reason why it does not pass or was not compared."""
        return self.reason if self.isolated is None else self.isolated.cause or self.isolated.verdict.meaning


@dataclasses.dataclass(frozen=True)
class Logits:
    """The outputs of both models, each run as its framework's users run it: JAX's compiled as one program.

    Attributes:
      classes: the number of classes.
      different: how many have other bits, of all images.
      max_abs: the greatest |JAX - PyTorch|.
      scale: the greatest |PyTorch|.
      top: the number of top classes that are compared, 5 or all.
      same_top, same_order, same_first: the shares of images with the same top classes, with the same order of these,
        and with the same first class.
    """

    classes: int
    different: int
    max_abs: float
    scale: float
    top: int
    same_top: float
    same_order: float
    same_first: float

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Logits:
        top = min(5, theirs.shape[-1])
        a, b = (np.argsort(-each, axis=-1, kind="stable")[:, :top] for each in (ours, theirs))
        return cls(
            theirs.shape[-1],
            int(np.count_nonzero(~same_bits(ours, theirs))),
            float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0)),
            float(np.abs(theirs).max(initial=0.0)),
            top,
            float((np.sort(a) == np.sort(b)).all(axis=-1).mean()),
            float((a == b).all(axis=-1).mean()),
            float((a[:, 0] == b[:, 0]).mean()),
        )


@dataclasses.dataclass(frozen=True)
class ModelParity:
    """Both models.

    Attributes:
      name: of the network.
      images: shape of the input.
      layers: in the order of the Flax model.
      left: operations of PyTorch that have no counterpart.
      logits: the outputs compared; None where they are no floating-point numbers, or of other sizes.
      layout: of PyTorch's weights and images in memory.
      same_bits: whether JAX computed in PyTorch's arithmetic, as one program.
      replaced: the operations after which that program went on from PyTorch's result.
      gradients: whether the operations of the backward pass are among the layers.
    """

    name: str
    images: tuple[int, ...]
    layers: Sequence[LayerParity]
    left: Sequence[str]
    logits: Logits | None
    layout: str = "contiguous"
    same_bits: bool = False
    replaced: Sequence[str] = ()
    gradients: bool = False

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of all operations; INCONCLUSIVE at best where one was not compared."""
        verdicts = [layer.verdict for layer in self.layers] + [Verdict.INCONCLUSIVE] * bool(self.left)
        if not verdicts:  # models without operations: their results are all there is
            verdicts.append(Verdict.BUG if self.logits is not None and self.logits.different else Verdict.IDENTICAL)
        if self.same_bits and self.logits is not None and self.logits.different and not self.replaced:
            verdicts.append(Verdict.BUG)  # the program that returns no results but the logits has other bits
        wrong = [verdict for verdict in verdicts if not verdict.passes and verdict is not Verdict.INCONCLUSIVE]
        return max(wrong or verdicts, key=Verdict.rank)

    @property
    def first_wrong(self) -> LayerParity | None:
        """The first operation that was compared and does not pass."""
        return next((layer for layer in self.layers if layer.is_wrong), None)

    @property
    def different(self) -> int:
        """The number of elements that differ, of all operations that were compared on PyTorch's operands."""
        return sum(layer.isolated.different for layer in self.layers if layer.isolated is not None)

    @property
    def explained(self) -> int:
        """How many of them replays explain: both frameworks' elements follow from their orders, in every bit."""
        return sum(layer.isolated.explained or 0 for layer in self.layers if layer.isolated is not None)

    @property
    def not_compared(self) -> Sequence[LayerParity]:
        return [layer for layer in self.layers if layer.isolated is None]


def relative(y: np.ndarray, expected: np.ndarray) -> float | None:
    """Return ||y - expected|| / ||expected||; None where sizes differ, or a norm is zero or not finite."""
    if y.size != expected.size:
        return None
    wide = expected.astype(np.float64).ravel()
    norm = float(np.linalg.norm(wide))
    with np.errstate(invalid="ignore"):  # masks are infinite
        distance = float(np.linalg.norm(y.astype(np.float64).ravel() - wide))
    return distance / norm if norm > 0 and np.isfinite(norm) and np.isfinite(distance) else None
