"""ResNet-18 (He et al., 2016) in Flax NNX, with the names of torchvision's parameters.

jaxdw model examples.ports.resnet:resnet18
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from bridge.libraries import import_library
from examples.ports.common import batch_norm, conv, image, pair


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, and the input where shapes allow; else a 1x1 convolution of it."""

    def __init__(self, given: int, channels: int, stride: int, rngs: nnx.Rngs):
        self.conv1, self.bn1 = conv(given, channels, 3, rngs, stride=stride), batch_norm(channels, rngs)
        self.conv2, self.bn2 = conv(channels, channels, 3, rngs), batch_norm(channels, rngs)
        self.downsample = nnx.List([])
        if stride != 1 or given != channels:
            self.downsample = nnx.List([conv(given, channels, 1, rngs, stride=stride), batch_norm(channels, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(self, depths: Sequence[int], classes: int, *, rngs: nnx.Rngs):
        self.conv1, self.bn1 = conv(3, 64, 7, rngs, stride=2), batch_norm(64, rngs)
        self.stages, given = len(depths), 64
        for stage, depth in enumerate(depths):
            blocks = []
            for number in range(depth):
                blocks.append(BasicBlock(given, 64 << stage, 1 if number or not stage else 2, rngs))
                given = 64 << stage
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = nnx.Linear(given, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(self.stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return self.fc(x.mean((1, 2)))


def resnet18(seed: int = 0, depths: Sequence[int] = (2, 2, 2, 2), size: int = 64) -> Any:
    """Return torchvision's ResNet, its port with the same weights, an image, and the manifest."""
    module = import_library("torchvision.models.resnet")
    theirs = module.ResNet(module.BasicBlock, list(depths), num_classes=7)
    return pair(theirs, lambda: ResNet(depths, 7, rngs=nnx.Rngs(0)), image(size, seed), seed)


def mini(seed: int = 0) -> Any:
    """Return the same with five blocks."""
    return resnet18(seed, (2, 1, 1, 1), 48)
