"""PoolFormer (Yu et al., 2022) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.poolformer:mini
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx

from examples.ports.common import NormHead, conv, image, pair, timm


class Scale(nnx.Module):
    """A factor per channel."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale.reshape(1, 1, 1, -1)


class Mlp(nnx.Module):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.fc1 = conv(channels, 4 * channels, 1, rngs, bias=True)
        self.fc2 = conv(4 * channels, channels, 1, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Average pooling less the identity, then two layers; each after a group norm, scaled, and added to its input."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(channels, 1, epsilon=1e-5, rngs=rngs)
        self.layer_scale1 = Scale(channels)
        self.norm2 = nnx.GroupNorm(channels, 1, epsilon=1e-5, rngs=rngs)
        self.mlp = Mlp(channels, rngs)
        self.layer_scale2 = Scale(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        y = nnx.avg_pool(y, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False) - y
        x = x + self.layer_scale1(y)
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Down(nnx.Module):
    """A convolution that makes the image smaller."""

    def __init__(self, layer: nnx.Conv):
        self.conv = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Stage(nnx.Module):
    """Halve the image where channels change, then blocks."""

    def __init__(self, given: int, channels: int, depth: int, rngs: nnx.Rngs):
        is_same = given == channels
        self.downsample = None if is_same else Down(conv(given, channels, 3, rngs, stride=2, bias=True))
        self.blocks = nnx.List([Block(channels, rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x if self.downsample is None else self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class PoolFormer(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        self.stem = Down(nnx.Conv(3, widths[0], (7, 7), 4, padding=2, rngs=rngs))
        given = (widths[0], *widths)
        self.stages = nnx.List([Stage(*sizes, rngs) for sizes in zip(given, widths, depths)])
        self.head = NormHead(widths[-1], classes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def mini(seed: int = 0) -> Any:
    """Return timm's PoolFormer with four blocks, its port with the same weights, an image, and the manifest."""
    depths, widths = (1, 2, 1), (8, 16, 24)
    kind = timm().models.metaformer
    settings = {"mlp_act": torch.nn.GELU, "mlp_bias": True, "use_mlp_head": False, "downsample_norm": None}
    settings |= {"norm_layers": kind.GroupNorm1, "layer_scale_init_values": 1e-5, "res_scale_init_values": None}
    theirs = kind.MetaFormer(num_classes=7, depths=depths, dims=widths, **settings)
    return pair(theirs, lambda: PoolFormer(depths, widths, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
