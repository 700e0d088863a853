"""MobileNet V2 (Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018)."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jaxdw.models.blocks import Block, Conventions, relu6
from jaxdw.models.mobilenet import (
    Architecture,
    MobileNet,
    check_width,
    conventions_like,
    round_channels,
    with_output_stride,
)

ORIGINALS = {
    "torchvision": Conventions("SYMMETRIC", bn_epsilon=1e-5, bn_momentum=0.9, dropout=0.2),
    "timm": Conventions("SYMMETRIC", bn_epsilon=1e-5, bn_momentum=0.9),
    # It took TensorFlow's weight of the old statistics for the momentum, and the keep probability for dropout.
    "transformers": Conventions("SAME", bn_epsilon=1e-3, bn_momentum=1 - 0.997, dropout=0.8),
}

#: Expansion, channels, repetitions and first stride of each stage: table 2 of the paper.
_TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    num_classes: int = 1000,
    *,
    like: str = "torchvision",
    width: float = 1.0,
    output_stride: int = 32,
    finegrained_output: bool = True,
    in_channels: int = 3,
    rngs: nnx.Rngs,
    **changes: Any,
) -> MobileNet:
    """Return MobileNet V2, from `(*batch, H, W, in_channels)` to `(*batch, num_classes)`.

    Args:
      num_classes: 0 leaves the classifier out.
      like: "torchvision" (`mobilenet_v2`), "timm" (`mobilenetv2_100` and its widths) or "transformers"
        (`MobileNetV2ForImageClassification`, with TensorFlow's padding unless `padding="SYMMETRIC"`).
      width: factor of all numbers of channels; `width_mult` in torchvision, `depth_multiplier` in transformers.
      output_stride: 2, 4, 8, 16 or 32; below 32, strides become dilation.
      finegrained_output: below width 1 the features stay 1280.
      in_channels: channels of the images.
      rngs: `params` for the parameters.
      changes: fields of `jaxdw.models.Conventions` to differ from the original in, such as `arithmetic="jaxdw"`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> import jax.numpy as jnp
    >>> model = nnx.eval_shape(lambda: mobilenet_v2(10, width=0.35, output_stride=16, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda model, x: model.features(x), model, jnp.ones((8, 224, 224, 3))).shape
    (8, 14, 14, 1280)
    """
    check_width(width)
    conventions = conventions_like(like, ORIGINALS, changes)

    def scaled(channels: int) -> int:
        return round_channels(round(channels * width) if like == "transformers" else channels * width)

    blocks, channels = [], scaled(32)
    for expansion, out, repetitions, first_stride in _TABLE:
        for stride in (first_stride, *(1,) * (repetitions - 1)):
            # the first block is part of the stem in transformers, without a residual at any width
            residual = expansion > 1 or like != "transformers"
            blocks.append(
                Block(channels, channels * expansion, channels := scaled(out), relu6, stride=stride, residual=residual)
            )
    architecture = Architecture(
        with_output_stride(blocks, output_stride, conventions),
        relu6,
        head=1280 if finegrained_output and width < 1 else scaled(1280),
    )
    return MobileNet(architecture, conventions, num_classes=num_classes, in_channels=in_channels, rngs=rngs)
