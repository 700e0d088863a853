"""ConvNeXt (Liu et al., 2022) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.convnext:mini
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.ports.common import NormHead, image, pair, timm
from jaxdw.nnx import DepthwiseConv


class Mlp(nnx.Module):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.fc1 = nnx.Conv(channels, 4 * channels, (1, 1), rngs=rngs)
        self.fc2 = nnx.Conv(4 * channels, channels, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Depthwise 7x7 convolution, layer norm, two pointwise convolutions, layer scale, residual sum."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv_dw = DepthwiseConv(channels, (7, 7), padding=3, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(channels, rngs)
        self.gamma = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(self.conv_dw(x))) * self.gamma.reshape(1, 1, 1, -1)


class Stage(nnx.Module):
    """Halve the image where channels change, then blocks."""

    def __init__(self, given: int, channels: int, depth: int, rngs: nnx.Rngs):
        self.downsample = nnx.List([])
        if given != channels:
            norm = nnx.LayerNorm(given, epsilon=1e-6, rngs=rngs)
            self.downsample = nnx.List([norm, nnx.Conv(given, channels, (2, 2), 2, padding="VALID", rngs=rngs)])
        self.blocks = nnx.List([Block(channels, rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.downsample, *self.blocks):
            x = layer(x)
        return x


class ConvNeXt(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        stem = nnx.Conv(3, widths[0], (4, 4), 4, padding="VALID", rngs=rngs)
        self.stem = nnx.List([stem, nnx.LayerNorm(widths[0], epsilon=1e-6, rngs=rngs)])
        given = (widths[0], *widths)
        self.stages = nnx.List([Stage(*sizes, rngs) for sizes in zip(given, widths, depths)])
        self.head = NormHead(widths[-1], classes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.stem, *self.stages):
            x = layer(x)
        return self.head(x)


def mini(seed: int = 0) -> Any:
    """Return timm's ConvNeXt with few channels, its port with the same weights, an image, and the manifest."""
    depths, widths = (1, 1, 2, 1), (8, 16, 24, 32)
    theirs = timm().create_model("convnext_atto", depths=depths, dims=widths, num_classes=7)
    return pair(theirs, lambda: ConvNeXt(depths, widths, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
