"""EfficientNet-B0 (Tan and Le, 2019) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.efficientnet:b0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import torch
from flax import nnx

from examples.ports.common import batch_norm, conv, image, pair, timm


class Row(NamedTuple):
    """One stage: expansion, channels, blocks, stride of the first block, and kernel."""

    expansion: int
    channels: int
    blocks: int
    stride: int
    kernel: int


#: The seven stages of B0.
B0 = (
    Row(1, 16, 1, 1, 3),
    Row(6, 24, 2, 2, 3),
    Row(6, 40, 2, 2, 5),
    Row(6, 80, 3, 2, 3),
    Row(6, 112, 3, 1, 5),
    Row(6, 192, 4, 2, 5),
    Row(6, 320, 1, 1, 3),
)


class SqueezeExcite(nnx.Module):
    """Scale channels by a gate of their means."""

    def __init__(self, channels: int, squeezed: int, rngs: nnx.Rngs):
        self.conv_reduce = conv(channels, squeezed, 1, rngs, bias=True)
        self.conv_expand = conv(squeezed, channels, 1, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = self.conv_expand(nnx.silu(self.conv_reduce(x.mean((1, 2), keepdims=True))))
        return x * nnx.sigmoid(gate)


class Block(nnx.Module):
    """The inverted residual; without expansion its first convolution is absent."""

    def __init__(self, given: int, row: Row, stride: int, rngs: nnx.Rngs):
        wide = given * row.expansion
        self.is_expanding, self.has_residual = row.expansion != 1, stride == 1 and given == row.channels
        if self.is_expanding:
            self.conv_pw, self.bn1 = conv(given, wide, 1, rngs), batch_norm(wide, rngs)
        self.conv_dw = conv(wide, wide, row.kernel, rngs, stride=stride, groups=wide)
        self.se = SqueezeExcite(wide, given // 4, rngs)
        if self.is_expanding:
            self.bn2, self.conv_pwl = batch_norm(wide, rngs), conv(wide, row.channels, 1, rngs)
            self.bn3 = batch_norm(row.channels, rngs)
        else:
            self.bn1, self.conv_pw = batch_norm(wide, rngs), conv(wide, row.channels, 1, rngs)
            self.bn2 = batch_norm(row.channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_expanding:
            y = nnx.silu(self.bn1(self.conv_pw(x)))
            y = self.se(nnx.silu(self.bn2(self.conv_dw(y))))
            y = self.bn3(self.conv_pwl(y))
        else:
            y = self.se(nnx.silu(self.bn1(self.conv_dw(x))))
            y = self.bn2(self.conv_pw(y))
        return x + y if self.has_residual else y


class EfficientNet(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(self, rows: Sequence[Row], stem: int, head: int, classes: int, *, rngs: nnx.Rngs):
        self.conv_stem = conv(3, stem, 3, rngs, stride=2)
        self.bn1 = batch_norm(stem, rngs)
        stages, given = [], stem
        for row in rows:
            blocks = []
            for number in range(row.blocks):
                blocks.append(Block(given, row, 1 if number else row.stride, rngs))
                given = row.channels
            stages.append(nnx.List(blocks))
        self.blocks = nnx.List(stages)
        self.conv_head, self.bn2 = conv(given, head, 1, rngs), batch_norm(head, rngs)
        self.classifier = nnx.Linear(head, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.silu(self.bn1(self.conv_stem(x)))
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        x = nnx.silu(self.bn2(self.conv_head(x)))
        return self.classifier(x.mean((1, 2)))


def b0(seed: int = 0, size: int = 64) -> Any:
    """Return timm's EfficientNet-B0, its port with the same weights, an image, and the manifest."""
    theirs = timm().create_model("efficientnet_b0", num_classes=7)
    return pair(theirs, lambda: EfficientNet(B0, 32, 1280, 7, rngs=nnx.Rngs(0)), image(size, seed), seed)


def mini(seed: int = 0) -> Any:
    """Return timm's EfficientNet with four small blocks, its port with the same weights, an image, and the manifest."""
    import_timm = timm()
    decoded = import_timm.models._efficientnet_builder.decode_arch_def(
        [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e3_c16_se0.25"], ["ir_r1_k5_s2_e3_c24_se0.25"]]
    )
    rows = (Row(1, 8, 1, 1, 3), Row(3, 16, 2, 2, 3), Row(3, 24, 1, 2, 5))
    kind, act = import_timm.models.efficientnet.EfficientNet, torch.nn.SiLU
    theirs = kind(decoded, num_classes=7, stem_size=8, fix_stem=True, num_features=32, act_layer=act)
    return pair(theirs, lambda: EfficientNet(rows, 8, 32, 7, rngs=nnx.Rngs(0)), image(32, seed), seed)
