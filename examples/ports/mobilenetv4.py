"""MobileNetV4-Conv-Small (Qin et al., 2024) in Flax NNX, with the names of timm's parameters.

jaxdw model examples.ports.mobilenetv4:conv_small
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from examples.ports.common import ConvNorm, batch_norm, conv, image, pair, timm


class Plain(NamedTuple):
    """A convolution with normalization and ReLU: channels, kernel and stride."""

    channels: int
    kernel: int
    stride: int = 1


class Inverted(NamedTuple):
    """A universal inverted bottleneck: channels, kernels before and inside the expansion (0: none), expansion."""

    channels: int
    start: int
    middle: int
    expansion: int
    stride: int = 1


#: The five stages of Conv-Small.
CONV_SMALL = (
    (Plain(32, 3, 2), Plain(32, 1)),
    (Plain(96, 3, 2), Plain(64, 1)),
    (Inverted(96, 5, 5, 3, 2), *[Inverted(96, 0, 3, 2)] * 4, Inverted(96, 3, 0, 4)),
    (
        Inverted(128, 3, 3, 6, 2),
        Inverted(128, 5, 5, 4),
        Inverted(128, 0, 5, 4),
        Inverted(128, 0, 5, 3),
        *[Inverted(128, 0, 3, 4)] * 2,
    ),
    (Plain(960, 1),),
)


class PlainBlock(nnx.Module):
    """Convolution, normalization, ReLU."""

    def __init__(self, given: int, row: Plain, rngs: nnx.Rngs):
        self.conv = conv(given, row.channels, row.kernel, rngs, stride=row.stride)
        self.bn1 = batch_norm(row.channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.bn1(self.conv(x)))


class InvertedBlock(nnx.Module):
    """The universal inverted bottleneck: each depthwise convolution may be absent."""

    def __init__(self, given: int, row: Inverted, rngs: nnx.Rngs):
        wide = given * row.expansion
        self.has_residual = row.stride == 1 and given == row.channels
        at_start, inside = (1, row.stride) if row.middle else (row.stride, 1)
        self.dw_start = ConvNorm(given, given, row.start, rngs, stride=at_start, groups=given) if row.start else None
        self.pw_exp = ConvNorm(given, wide, 1, rngs)
        self.dw_mid = ConvNorm(wide, wide, row.middle, rngs, stride=inside, groups=wide) if row.middle else None
        self.pw_proj = ConvNorm(wide, row.channels, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.dw_start is None else self.dw_start(x)
        y = nnx.relu(self.pw_exp(y))
        if self.dw_mid is not None:
            y = nnx.relu(self.dw_mid(y))
        y = self.pw_proj(y)
        return x + y if self.has_residual else y


class MobileNetV4(nnx.Module):
    """Map images `(N, H, W, 3)` to logits `(N, classes)`."""

    def __init__(
        self, stages: Sequence[Sequence[Plain | Inverted]], stem: int, head: int, classes: int, *, rngs: nnx.Rngs
    ):
        self.conv_stem, self.bn1 = conv(3, stem, 3, rngs, stride=2), batch_norm(stem, rngs)
        built, given = [], stem
        for stage in stages:
            blocks: list[nnx.Module] = []
            for row in stage:
                make: Any = PlainBlock if isinstance(row, Plain) else InvertedBlock
                blocks.append(make(given, row, rngs))
                given = row.channels
            built.append(nnx.List(blocks))
        self.blocks = nnx.List(built)
        self.conv_head, self.norm_head = conv(given, head, 1, rngs), batch_norm(head, rngs)
        self.classifier = nnx.Linear(head, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv_stem(x)))
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        x = x.mean((1, 2), keepdims=True)
        x = nnx.relu(self.norm_head(self.conv_head(x)))
        return self.classifier(x.reshape(x.shape[0], -1))


def conv_small(seed: int = 0, size: int = 64) -> Any:
    """Return timm's MobileNetV4-Conv-Small, its port with the same weights, an image, and the manifest."""
    theirs = timm().create_model("mobilenetv4_conv_small", num_classes=7)
    return pair(theirs, lambda: MobileNetV4(CONV_SMALL, 32, 1280, 7, rngs=nnx.Rngs(0)), image(size, seed), seed)


def mini(seed: int = 0) -> Any:
    """Return timm's MobileNetV4 with seven small blocks, its port with the same weights, an image, and the manifest."""
    rows = [["cn_r1_k3_s2_c8"], ["uir_r1_a5_k5_s2_e3_c16", "uir_r2_a0_k3_s1_e2_c16", "uir_r1_a3_k0_s1_e4_c16"]]
    rows += [["uir_r1_a3_k3_s2_e2_c24"], ["cn_r1_k1_s1_c32"]]
    decoded = timm().models._efficientnet_builder.decode_arch_def(rows)
    sizes = {"num_classes": 7, "stem_size": 8, "fix_stem": True, "num_features": 32}
    theirs = timm().models.mobilenetv3.MobileNetV3(decoded, head_bias=False, head_norm=True, **sizes)
    stages = (
        (Plain(8, 3, 2),),
        (Inverted(16, 5, 5, 3, 2), *[Inverted(16, 0, 3, 2)] * 2, Inverted(16, 3, 0, 4)),
        (Inverted(24, 3, 3, 2, 2),),
        (Plain(32, 1),),
    )
    return pair(theirs, lambda: MobileNetV4(stages, 8, 32, 7, rngs=nnx.Rngs(0)), image(64, seed), seed)
