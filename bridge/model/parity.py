"""model_parity: a PyTorch MobileNet and its Flax twin on the same images, layer by layer and as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bridge.diagnosis import Comparison, Verdict
from bridge.model.isolated import judge
from bridge.model.matching import described, match
from bridge.model.operations import Operation
from bridge.model.steps import IMAGES, Step, steps
from bridge.weights.manifest import Manifest
from jaxdw.models import MobileNet

Track = Callable[[Sequence[Step]], Iterable[Step]]


@dataclasses.dataclass(frozen=True)
class LayerParity:
    """One operation in both frameworks.

    Attributes:
      name: its path in the Flax model; torch: the path of its layer in PyTorch, or of the module that ran it.
      kind: "depthwise", "pointwise", "convolution", "linear", "batch norm", an activation, "mean", "add", "multiply".
      shape: of its result in the Flax model.
      isolated: the JAX operation fed what PyTorch's received, against PyTorch's result; None if not compared.
      reason: why it was not compared; empty where it was.
      growth: ||JAX - PyTorch|| / ||PyTorch|| of its results where both networks run free; None if not compared.
      amplification: `growth` divided by the greatest of its inputs; None where they do not differ.
    """

    name: str
    torch: str
    kind: str
    shape: tuple[int, ...]
    isolated: Comparison | None
    reason: str
    growth: float | None
    amplification: float | None

    @property
    def verdict(self) -> Verdict:
        return Verdict.INCONCLUSIVE if self.isolated is None else self.isolated.verdict

    @property
    def is_wrong(self) -> bool:
        """Whether it was compared and does not pass."""
        return self.isolated is not None and not self.verdict.passes

    @property
    def cause(self) -> str:
        """Why it does not pass or was not compared."""
        return self.reason if self.isolated is None else self.isolated.cause or self.isolated.verdict.meaning


@dataclasses.dataclass(frozen=True)
class Logits:
    """The outputs of both models, each run as its framework's users run it: JAX's compiled as one program.

    Attributes:
      classes: how many.
      max_abs: the greatest |JAX - PyTorch|; scale: the greatest |PyTorch|.
      top: how many classes are compared, 5 or all; same_top: the share of images whose top classes are the same ones;
        same_order: in the same order too; same_first: with the same first.
    """

    classes: int
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
      logits: of both.
    """

    name: str
    images: tuple[int, ...]
    layers: Sequence[LayerParity]
    left: Sequence[str]
    logits: Logits

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of any operation; INCONCLUSIVE at best where one was not compared."""
        verdicts = [layer.verdict for layer in self.layers] + [Verdict.INCONCLUSIVE] * bool(self.left)
        wrong = [verdict for verdict in verdicts if not verdict.passes and verdict is not Verdict.INCONCLUSIVE]
        return max(wrong or verdicts, key=Verdict.rank)

    @property
    def first_wrong(self) -> LayerParity | None:
        """The first operation whose isolated verdict does not pass, those that were not compared aside."""
        return next((layer for layer in self.layers if layer.is_wrong), None)

    @property
    def not_compared(self) -> Sequence[LayerParity]:
        return [layer for layer in self.layers if layer.isolated is None]


def model_parity(
    module: Any, model: MobileNet, images: np.ndarray, manifest: Manifest, *, name: str = "", track: Track = iter
) -> ModelParity:
    """Two comparisons of every operation of a MobileNet, in eval mode and float32.

    *Isolated*: the JAX operation is fed what PyTorch's received, and the two results are held to the bound of that one
    operation. *Running*: both networks run free on the same images; their difference grows from layer to layer. Where
    every isolated verdict is ROUNDING or stronger, each operation adds no more than its own rounding on the data that
    really flows through the network, and all growth is those roundings, carried on.

    Args:
      module: the PyTorch model, an `nn.Module`.
      model: the Flax model with its weights.
      images: `(N, H, W, C)`, float32, what the models take: already normalized.
      manifest: of the weights' way, `bridge.to_flax(module, model).manifest`.
      name: what to call the network.
      track: wraps the loop over the steps, for a progress bar.

    Raises:
      ValueError, TypeError: images of another dtype or shape, a model of another kind; the message says which.
    """
    from bridge.model.capture import operations

    if not isinstance(model, MobileNet):
        raise TypeError(f"`model` is a {type(model).__name__}, expected a MobileNet of `jaxdw.models`")
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4 or not images.size:
        given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"`images` is {given}, expected a NumPy array (N, H, W, C) of float32 that is not empty")
    model = nnx.view(model, use_running_average=True, deterministic=True)
    done, theirs = operations(module, images)
    every = steps(model)
    matching = match(every, done, manifest)
    running = {IMAGES: jnp.asarray(images)}
    growth = {IMAGES: 0.0}
    layers: list[LayerParity] = []
    for step in track(every):
        try:
            running[step.name] = step.compiled(*(running[name] for name in step.inputs))
        except (TypeError, ValueError) as error:
            wrong = [f"{layer.name}: {layer.cause}" for layer in layers if layer.is_wrong]
            raise ValueError(
                f"`model` fails in {step.name} on `images` of shape {images.shape}: {error}"
                + (f"; wrong before it: {'; '.join(wrong)}" if wrong else "")
            ) from error
        place = matching.operation.get(step.name)
        if place is None:
            shape = running[step.name].shape
            layers.append(LayerParity(step.name, "", step.kind, shape, None, matching.reasons[step.name], None, None))
            continue
        received = [images if n == IMAGES else done[matching.operation[n]].output for n in step.inputs]
        layer = _layer(step, done[place], received, running, growth)
        if layer.growth is not None:
            growth[step.name] = layer.growth
        layers.append(layer)
    ours = np.asarray(nnx.jit(lambda model, x: model(x))(model, running[IMAGES]))
    left = [described(done[place]) for place in matching.left]
    return ModelParity(name, images.shape, layers, left, Logits.of(ours, theirs))


def _layer(
    step: Step,
    operation: Operation,
    received: Sequence[np.ndarray],
    running: Mapping[str, Any],
    growth: Mapping[str, float],
) -> LayerParity:
    """One step; `received` is what its inputs are in PyTorch, `running` what they are in Flax, as its own result."""
    y = np.asarray(running[step.name])
    try:
        fed = step.compiled(*(jnp.asarray(_as_rank(x, running[n].ndim)) for x, n in zip(received, step.inputs)))
    except (TypeError, ValueError) as error:
        isolated: Comparison | str = f"it does not take what PyTorch's received: {error}"
    else:
        isolated = judge(operation, np.asarray(fed))
    grown = _relative(y, operation.output)
    before = [growth[name] for name in step.inputs if name in growth]
    amplification = grown / max(before) if grown is not None and before and max(before) > 0 else None
    return LayerParity(
        step.name,
        operation.layer or operation.module,
        step.kind,
        y.shape,
        isolated if isinstance(isolated, Comparison) else None,
        isolated if isinstance(isolated, str) else "",
        grown,
        amplification,
    )


def _as_rank(x: np.ndarray, rank: int) -> np.ndarray:
    """Without the axes of size one that PyTorch keeps of a mean over an image."""
    return x if x.ndim == rank else x.reshape(x.shape[0], *(n for n in x.shape[1:] if n > 1))


def _relative(y: np.ndarray, expected: np.ndarray) -> float | None:
    """||y - expected|| / ||expected||; None where the shapes differ or the expected is zero or not finite."""
    if y.size != expected.size:
        return None
    wide = expected.astype(np.float64).ravel()
    norm = float(np.linalg.norm(wide))
    distance = float(np.linalg.norm(y.astype(np.float64).ravel() - wide))
    return distance / norm if norm > 0 and np.isfinite(norm) and np.isfinite(distance) else None
