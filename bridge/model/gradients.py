"""gradient_parity: the gradients of every convolution, each on PyTorch's own activation and incoming gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bridge.diagnosis import Comparison, Verdict, compare
from bridge.model.operation_bounds import MatrixSum, windows
from bridge.model.operation_verdicts import NAMES, compared, depthwise_case
from bridge.model.operations import Gradient
from bridge.weights.layouts import CONVOLUTION
from bridge.weights.manifest import WeightsManifest
from jaxdw.models import MobileNet
from jaxdw.nnx import DepthwiseConv


@dataclasses.dataclass(frozen=True)
class LayerGradients:
    """The gradients of one convolution in both frameworks.

    Attributes:
      name: its path in the Flax model; torch: in PyTorch.
      kind: "depthwise", "pointwise" or "convolution".
      dx: the comparison of the gradients by its input; None for the first layer, whose input needs none.
      dkernel: the comparison of the gradients by its kernel.
    """

    name: str
    torch: str
    kind: str
    dx: Comparison | None
    dkernel: Comparison

    @property
    def verdict(self) -> Verdict:
        return max((c.verdict for c in (self.dx, self.dkernel) if c is not None), key=Verdict.rank)


def gradient_parity(
    module: Any, model: MobileNet, images: np.ndarray, labels: np.ndarray, manifest: WeightsManifest
) -> list[LayerGradients]:
    """Return one result per convolution, in the order of the backward pass.

    PyTorch runs forward and backward with the mean cross-entropy as the loss. Each convolution's input and incoming
    gradient then go through the JAX layer's own backward pass. Both results are compared within the bound of the sums.

    Args:
      module: the PyTorch model, in the mode it is to be compared in; float32, with symmetric padding.
      model: the Flax model with its weights.
      images: `(N, H, W, C)`; labels: `(N,)`, the classes.
      manifest: of the conversion, `bridge.to_flax(module, model).manifest`.
    """
    from bridge.model.capture import gradients

    paths = {moved.torch.name.rpartition(".")[0]: moved.flax.name.rpartition(".")[0] for moved in manifest.moved}
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(model)}
    return [_layer(paths[each.layer], layers[paths[each.layer]], each) for each in gradients(module, images, labels)]


def _layer(name: str, layer: Any, gradient: Gradient) -> LayerGradients:
    dx, dkernel = (np.asarray(each) for each in _back(layer, jnp.asarray(gradient.x), jnp.asarray(gradient.dy)))
    theirs = np.ascontiguousarray(CONVOLUTION.to_flax(gradient.dweight).reshape(dkernel.shape))
    of_x = None
    if isinstance(layer, DepthwiseConv):
        case = depthwise_case(gradient.x, gradient.weight, None, gradient.settings, name)
        of_kernel = compare(dkernel, theirs, case, names=NAMES, quantity="dkernel", dy=gradient.dy)
        if gradient.dx is not None:
            of_x = compare(dx, gradient.dx, case, names=NAMES, quantity="dx", dy=gradient.dy)
        return LayerGradients(name, gradient.layer, "depthwise", of_x, of_kernel)
    kernel = gradient.weight.shape[2:]
    dy = gradient.dy.reshape(-1, gradient.dy.shape[-1])
    seen = windows(gradient.x, kernel, *(gradient.settings[key] for key in ("stride", "padding", "dilation")))
    sums = MatrixSum.of(np.ascontiguousarray(seen.reshape(len(dy), -1).T), dy, None, dkernel.shape)
    of_kernel = compared(dkernel, theirs, sums.expected())
    if gradient.dx is not None:
        if kernel != (1, 1):
            raise ValueError(f"`module` has the convolution {gradient.layer} of kernel {kernel} inside, expected 1x1")
        matrix = np.ascontiguousarray(gradient.weight[:, :, 0, 0])
        of_x = compared(dx, gradient.dx, MatrixSum.of(dy, matrix, None, gradient.dx.shape).expected())
    kind = "pointwise" if kernel == (1, 1) else "convolution"
    return LayerGradients(name, gradient.layer, kind, of_x, of_kernel)


@nnx.jit
def _back(layer: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return dx and dkernel of a layer."""
    graph, state = nnx.split(layer)
    _, back = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
    of_state, dx = back(dy)
    return dx, of_state["kernel"][...]
