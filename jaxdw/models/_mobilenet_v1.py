"""MobileNet V1 (Howard et al., MobileNets: efficient convolutional neural networks for mobile vision, 2017)."""

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
    "timm": Conventions("SYMMETRIC", bn_epsilon=1e-5, bn_momentum=0.9),
    # It took TensorFlow's weight of the old statistics for the momentum, and the keep probability for dropout.
    "transformers": Conventions("SAME", bn_epsilon=1e-3, bn_momentum=1 - 0.9997, dropout=0.999),
}

#: Channels and stride of each block: table 1 of the paper.
_TABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


def mobilenet_v1(
    num_classes: int = 1000,
    *,
    like: str = "timm",
    width: float = 1.0,
    output_stride: int = 32,
    in_channels: int = 3,
    rngs: nnx.Rngs,
    **changes: Any,
) -> MobileNet:
    """Return MobileNet V1, from `(*batch, H, W, in_channels)` to `(*batch, num_classes)`.

    Args:
      num_classes: 0 leaves the classifier out.
      like: "timm" (`mobilenetv1_100`, `mobilenetv1_125`) or "transformers" (`MobileNetV1ForImageClassification`, with
        TensorFlow's padding unless `padding="SYMMETRIC"`).
      width: factor of all numbers of channels; `depth_multiplier` in transformers.
      output_stride: 2, 4, 8, 16 or 32; below 32, strides become dilation.
      in_channels: channels of the images.
      rngs: `params` for the parameters.
      changes: fields of `jaxdw.models.Conventions` to differ from the original in, such as `arithmetic="jaxdw"`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> import jax.numpy as jnp
    >>> model = nnx.eval_shape(lambda: mobilenet_v1(10, width=0.5, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda model, x: model.features(x), model, jnp.ones((8, 224, 224, 3))).shape
    (8, 7, 7, 512)
    """
    check_width(width)
    conventions = conventions_like(like, ORIGINALS, changes)

    def scaled(channels: int) -> int:
        return round_channels(channels * width) if like == "timm" else max(int(channels * width), 8)

    blocks, channels = [], scaled(32)
    for out, stride in _TABLE:
        inputs, channels = channels, scaled(out)
        blocks.append(Block(inputs, inputs, channels, relu6, stride=stride, last_activation=relu6, residual=False))
    architecture = Architecture(with_output_stride(blocks, output_stride, conventions), relu6)
    return MobileNet(architecture, conventions, num_classes=num_classes, in_channels=in_channels, rngs=rngs)
