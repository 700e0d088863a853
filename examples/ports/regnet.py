"""RegNetY (Radosavovic et al., 2020) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.regnet:mini
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from examples.ports.common import ConvNorm, conv, image, pair, timm


class SqueezeExcite(nnx.Module):
    """Scale channels by a gate of their means."""

    def __init__(self, channels: int, squeezed: int, rngs: nnx.Rngs):
        self.fc1 = conv(channels, squeezed, 1, rngs, bias=True)
        self.fc2 = conv(squeezed, channels, 1, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.fc2(nnx.relu(self.fc1(x.mean((1, 2), keepdims=True))))
        return x * nnx.sigmoid(gate)


class Bottleneck(nnx.Module):
    """1x1, grouped 3x3 and 1x1 convolutions with a gate before the last, and the input or a 1x1 convolution of it."""

    def __init__(self, given: int, channels: int, stride: int, group: int, rngs: nnx.Rngs):
        self.conv1 = ConvNorm(given, channels, 1, rngs)
        self.conv2 = ConvNorm(channels, channels, 3, rngs, stride=stride, groups=channels // group)
        self.se = SqueezeExcite(channels, round(given / 4), rngs)
        self.conv3 = ConvNorm(channels, channels, 1, rngs)
        is_same = given == channels and stride == 1
        self.downsample = None if is_same else ConvNorm(given, channels, 1, rngs, stride=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.conv1(x))
        y = self.se(nnx.relu(self.conv2(y)))
        y = self.conv3(y)
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class Head(nnx.Module):
    """Average, classifier."""

    def __init__(self, channels: int, classes: int, rngs: nnx.Rngs):
        self.fc = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x.mean((1, 2)))


class RegNet(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int], group: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = ConvNorm(3, 32, 3, rngs, stride=2)
        self.depths, given = tuple(depths), 32
        for stage, (depth, channels) in enumerate(zip(depths, widths), 1):
            blocks = {}
            for number in range(1, depth + 1):
                blocks[f"b{number}"] = Bottleneck(given, channels, 2 if number == 1 else 1, group, rngs)
                given = channels
            setattr(self, f"s{stage}", nnx.Dict(blocks))
        self.head = Head(given, classes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for stage, depth in enumerate(self.depths, 1):
            for number in range(1, depth + 1):
                x = getattr(self, f"s{stage}")[f"b{number}"](x)
        return self.head(x)


def y_200mf(seed: int = 0, size: int = 64) -> Any:
    """Return timm's RegNetY-200MF, its port with the same weights, an image, and the manifest."""
    theirs = timm().create_model("regnety_002", num_classes=7)
    return pair(
        theirs, lambda: RegNet((1, 1, 4, 7), (24, 56, 152, 368), 8, 7, rngs=nnx.Rngs(0)), image(size, seed), seed
    )


def mini(seed: int = 0) -> Any:
    """Return timm's RegNetY with five small blocks, its port with the same weights, an image, and the manifest."""
    theirs = timm().create_model("regnety_002", num_classes=7, depth=5, w0=8, wa=14.0, wm=2.0, group_size=4)
    return pair(theirs, lambda: RegNet((1, 1, 1, 2), (8, 16, 32, 64), 4, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
