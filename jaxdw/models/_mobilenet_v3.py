"""MobileNet V3, small and large (Howard et al., Searching for MobileNetV3, ICCV 2019)."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from jaxdw.epilogue import hard_swish
from jaxdw.models.blocks import Block, Conventions
from jaxdw.models.mobilenet import (
    Architecture,
    MobileNet,
    check_width,
    conventions_like,
    round_channels,
    with_output_stride,
)

ORIGINALS = {
    "torchvision": Conventions("SYMMETRIC", bn_epsilon=1e-3, bn_momentum=0.99, dropout=0.2, dilation_starts="here"),
    "timm": Conventions("SYMMETRIC", bn_epsilon=1e-5, bn_momentum=0.9),
}


class _Row(NamedTuple):
    kernel: int
    expanded: int
    out: int
    squeezes: bool
    hard: bool  # hard swish, not ReLU
    stride: int


#: Table 1 of the paper.
_LARGE = (
    _Row(3, 16, 16, False, False, 1),
    _Row(3, 64, 24, False, False, 2),
    _Row(3, 72, 24, False, False, 1),
    _Row(5, 72, 40, True, False, 2),
    _Row(5, 120, 40, True, False, 1),
    _Row(5, 120, 40, True, False, 1),
    _Row(3, 240, 80, False, True, 2),
    _Row(3, 200, 80, False, True, 1),
    _Row(3, 184, 80, False, True, 1),
    _Row(3, 184, 80, False, True, 1),
    _Row(3, 480, 112, True, True, 1),
    _Row(3, 672, 112, True, True, 1),
    _Row(5, 672, 160, True, True, 2),
    _Row(5, 960, 160, True, True, 1),
    _Row(5, 960, 160, True, True, 1),
)

#: Table 2 of the paper.
_SMALL = (
    _Row(3, 16, 16, True, False, 2),
    _Row(3, 72, 24, False, False, 2),
    _Row(3, 88, 24, False, False, 1),
    _Row(5, 96, 40, True, True, 2),
    _Row(5, 240, 40, True, True, 1),
    _Row(5, 240, 40, True, True, 1),
    _Row(5, 120, 48, True, True, 1),
    _Row(5, 144, 48, True, True, 1),
    _Row(5, 288, 96, True, True, 2),
    _Row(5, 576, 96, True, True, 1),
    _Row(5, 576, 96, True, True, 1),
)


def mobilenet_v3_small(
    num_classes: int = 1000,
    *,
    like: str = "torchvision",
    width: float = 1.0,
    output_stride: int = 32,
    reduced_tail: bool = False,
    in_channels: int = 3,
    rngs: nnx.Rngs,
    **changes: Any,
) -> MobileNet:
    """Return MobileNet V3 small, from `(*batch, H, W, in_channels)` to `(*batch, num_classes)`.

    The arguments are those of `mobilenet_v3_large`; in timm it is `mobilenetv3_small_100` and its widths.

    >>> import jax.numpy as jnp
    >>> model = nnx.eval_shape(lambda: mobilenet_v3_small(10, rngs=nnx.Rngs(0)))
    >>> model.eval()
    >>> nnx.eval_shape(lambda model, x: model(x), model, jnp.ones((8, 224, 224, 3))).shape
    (8, 10)
    """
    return _mobilenet_v3(
        _SMALL, 1024, num_classes, like, width, output_stride, reduced_tail, in_channels, rngs, changes
    )


def mobilenet_v3_large(
    num_classes: int = 1000,
    *,
    like: str = "torchvision",
    width: float = 1.0,
    output_stride: int = 32,
    reduced_tail: bool = False,
    in_channels: int = 3,
    rngs: nnx.Rngs,
    **changes: Any,
) -> MobileNet:
    """Return MobileNet V3 large, from `(*batch, H, W, in_channels)` to `(*batch, num_classes)`.

    Args:
      num_classes: 0 leaves the classifier out.
      like: "torchvision" (`mobilenet_v3_large`) or "timm" (`mobilenetv3_large_100` and its widths; with
        `padding="SAME", bn_epsilon=1e-3` its `tf_mobilenetv3_large_100`).
      width: factor of all numbers of channels; `width_mult` in torchvision.
      output_stride: 2, 4, 8, 16 or 32; below 32, strides become dilation. torchvision's `dilated=True` is 16.
      reduced_tail: half the channels in the last three blocks and the classifier, as in torchvision.
      in_channels: channels of the images.
      rngs: `params` for the parameters.
      changes: fields of `jaxdw.models.Conventions` to differ from the original in, such as `arithmetic="jaxdw"`.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> import jax.numpy as jnp
    >>> model = nnx.eval_shape(lambda: mobilenet_v3_large(10, output_stride=16, rngs=nnx.Rngs(0)))
    >>> nnx.eval_shape(lambda model, x: model.features(x), model, jnp.ones((8, 224, 224, 3))).shape
    (8, 14, 14, 960)
    """
    return _mobilenet_v3(
        _LARGE, 1280, num_classes, like, width, output_stride, reduced_tail, in_channels, rngs, changes
    )


def _mobilenet_v3(
    table: tuple[_Row, ...],
    hidden: int,
    num_classes: int,
    like: str,
    width: float,
    output_stride: int,
    reduced_tail: bool,
    in_channels: int,
    rngs: nnx.Rngs,
    changes: dict[str, Any],
) -> MobileNet:
    check_width(width)
    conventions = conventions_like(like, ORIGINALS, changes)
    if reduced_tail:
        table, hidden = _with_half_a_tail(table), hidden // 2
    blocks = _blocks(table, width, like)
    if like == "timm":
        head = round_channels(table[-1].expanded * width)
    else:
        head, hidden = 6 * blocks[-1].out_channels, round_channels(hidden * width)
    architecture = Architecture(
        with_output_stride(blocks, output_stride, conventions), hard_swish, head=head, hidden=hidden
    )
    return MobileNet(architecture, conventions, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def _with_half_a_tail(table: tuple[_Row, ...]) -> tuple[_Row, ...]:
    *rows, first, second, third = table
    halves = (row._replace(expanded=row.expanded // 2, out=row.out // 2) for row in (second, third))
    return (*rows, first._replace(out=first.out // 2), *halves)


def _blocks(table: tuple[_Row, ...], width: float, like: str) -> list[Block]:
    """The rows at a width: torchvision multiplies expanded channels by it, timm the scaled input by their ratio."""
    timm = like == "timm"
    blocks, channels, unscaled = [], 16 if timm and width < 0.75 else round_channels(16 * width), 16
    for row in table:
        expanded = round_channels(channels * row.expanded / unscaled if timm else row.expanded * width)
        blocks.append(
            Block(
                channels,
                expanded,
                channels := round_channels(row.out * width),
                hard_swish if row.hard else nnx.relu,
                kernel=row.kernel,
                stride=row.stride,
                squeeze=round_channels(expanded // 4) if row.squeezes else None,
            )
        )
        unscaled = row.out
    return blocks
