"""What the ports share: layers, random weights for a PyTorch network, and the same weights in its port."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import bridge
from bridge.libraries import import_library
from jaxdw.nnx import DepthwiseConv


def timm() -> Any:
    """Return timm, whose import may need torchvision."""
    return import_library("timm")


def conv(
    given: int, channels: int, kernel: int, rngs: nnx.Rngs, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> Any:
    """Return a convolution that pads like PyTorch's `padding=kernel // 2`; a depthwise one where `groups == given`."""
    shared = {"padding": kernel // 2, "use_bias": bias, "rngs": rngs}
    if groups == given == channels:
        return DepthwiseConv(channels, (kernel, kernel), stride, **shared)
    return nnx.Conv(given, channels, (kernel, kernel), stride, feature_group_count=groups, **shared)


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a batch normalization with PyTorch's settings: Flax's momentum is 1 minus PyTorch's."""
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


class ConvNorm(nnx.Module):
    """Convolution and batch normalization, as timm names them."""

    def __init__(
        self, given: int, channels: int, kernel: int, rngs: nnx.Rngs, *, stride: int = 1, groups: int = 1
    ) -> None:
        self.conv = conv(given, channels, kernel, rngs, stride=stride, groups=groups)
        self.bn = batch_norm(channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class Mlp(nnx.Module):
    """Two layers with a GELU between, over the last axis."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class PatchEmbed(nnx.Module):
    """A convolution whose stride is its kernel, then tokens."""

    def __init__(self, patch: int, width: int, rngs: nnx.Rngs):
        self.proj = nnx.Conv(3, width, (patch, patch), patch, padding="VALID", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class NormHead(nnx.Module):
    """Average, layer norm, classifier."""

    def __init__(self, channels: int, classes: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(channels, epsilon=1e-6, rngs=rngs)
        self.fc = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(self.norm(x.mean((1, 2))))


def pair(theirs: torch.nn.Module, port: Callable[[], nnx.Module], inputs: np.ndarray, seed: int) -> Any:
    """Draw weights for a PyTorch network, and give them to its port.

    Returns:
      What `jaxdw model` takes: both networks, the inputs, and the manifest of the conversion.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(np.asarray(_drawn(name, tuple(tensor.shape), rng), np.float32)))
    theirs.eval()
    ours = nnx.eval_shape(port)
    converted = bridge.to_flax(theirs, ours)
    nnx.update(ours, converted.weights)
    return theirs, ours, inputs, converted.manifest


def _drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if name.endswith("running_var"):
        return rng.uniform(0.5, 2, shape)
    if len(shape) < 2:
        return rng.uniform(-1, 1, shape)
    return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))


def image(size: int, seed: int) -> np.ndarray:
    """Draw one image of noise, `(1, size, size, 3)`."""
    return np.random.default_rng((seed, 1)).standard_normal((1, size, size, 3), np.float32)
