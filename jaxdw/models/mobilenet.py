"""The network that the three versions share: a table of blocks between a stem and a classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from jaxdw._arrays import is_sharded
from jaxdw.models.arithmetic import Arithmetic, set_arithmetic, with_arithmetic
from jaxdw.models.blocks import (
    Activation,
    Block,
    Conventions,
    ConvNormAct,
    InvertedResidual,
    activated,
    linear,
)
from jaxdw.models.layers import GlobalAveragePool


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A MobileNet's table, with every width already multiplied and every stride already decided.

    Attributes:
      blocks: the rows, top to bottom. The stem, a 3x3 convolution of stride 2, has the channels that the first expects.
      activation: of stem, head and hidden layer.
      head: channels of the 1x1 convolution after the blocks, or None (V1).
      hidden: features of the fully connected layer before the classifier, or None (V1, V2).
    """

    blocks: tuple[Block, ...]
    activation: Activation
    head: int | None = None
    hidden: int | None = None


#: Pixels of images that a CPU computes together in inference: two images of 224x224.
PIXELS_AT_ONCE = 2 * 224 * 224

#: The possible products of all strides.
OUTPUT_STRIDES: Sequence[int] = (2, 4, 8, 16, 32)


class MobileNet(nnx.Module):
    """MobileNet V1, V2 or V3, by its architecture. A new one is in training mode, as any Flax module.

    Made by `jaxdw.models.mobilenet_v1`, `mobilenet_v2`, `mobilenet_v3_small` and `mobilenet_v3_large`.
    `model.train()` and `model.eval()` switch batch normalization and dropout. In inference on a CPU a batch is computed
    a few images at a time, which are in the caches from one layer to the next.

    The parameters have these paths, the same for every original; i counts the blocks of the whole network from 0:

        stem.{conv,norm}
        blocks.{i}.expand.{conv,norm}                absent where a block does not widen
        blocks.{i}.depthwise.{conv,norm}
        blocks.{i}.squeeze_excite.{reduce,expand}    V3, where its table says so
        blocks.{i}.project.{conv,norm}               the pointwise convolution of V1
        head.{conv,norm}                             V2, V3
        hidden                                       V3
        classifier

    Below each `conv` is `kernel`: (3, 3, in, out) in the stem, (k, k, 1, channels) in `depthwise`, (in, out) for the
    1x1 convolutions. Below each `norm` are `scale`, `bias`, `mean` and `var`. `reduce`, `expand`, `hidden` and
    `classifier` are fully connected: `kernel` (in, out) and `bias`. There is no other state: `nnx.eval_shape` makes
    the model without drawing parameters, and a checkpoint fills it.

    Args:
      architecture: the table.
      conventions: padding, normalization, dropout, and how to compute.
      num_classes: outputs of the classifier; 0 leaves it out, and the model returns the classifier's input.
      in_channels: channels of the images.
      rngs: `params` for the parameters.
    """

    def __init__(
        self,
        architecture: Architecture,
        conventions: Conventions,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        rngs: nnx.Rngs,
    ):
        if num_classes < 0:
            raise ValueError(f"`num_classes` is {num_classes!r}, expected 0 or more")
        self.architecture, self.conventions = architecture, conventions
        self.num_classes, self.in_channels = num_classes, in_channels
        blocks, activation = architecture.blocks, architecture.activation
        self.stem = ConvNormAct(
            in_channels, blocks[0].in_channels, conventions, kernel=3, stride=2, activation=activation, rngs=rngs
        )
        self.blocks = nnx.List([InvertedResidual(block, conventions, rngs=rngs) for block in blocks])
        features, head, hidden = blocks[-1].out_channels, architecture.head, architecture.hidden
        self.head = None if head is None else ConvNormAct(features, head, conventions, activation=activation, rngs=rngs)
        features = features if head is None else head
        self.hidden = None if hidden is None else linear(features, hidden, conventions, rngs=rngs)
        features = features if hidden is None else hidden
        self.mean = GlobalAveragePool()
        self.dropout = nnx.Dropout(conventions.dropout)
        self.classifier = linear(features, num_classes, conventions, rngs=rngs) if num_classes else None
        if conventions.arithmetic is not None:
            set_arithmetic(self, conventions.arithmetic)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return logits `(*batch, num_classes)` of images x `(*batch, H, W, in_channels)`.

        In training, dropout draws from `rngs`.
        """
        return self.classify(self.features(x), rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Map `(*batch, H, W, in_channels)` to `(*batch, H / output_stride, W / output_stride, features)`, rounded up.

        Raises:
          ValueError: images of another rank or number of channels.
        """
        if x.ndim < 3 or x.shape[-1] != self.in_channels:
            raise ValueError(f"`x` has shape {x.shape}, expected (*batch, H, W, {self.in_channels})")
        if 0 in x.shape[-3:-1]:
            raise ValueError(f"`x` has shape {x.shape}, expected images of one pixel or more")
        batch = x.shape[:-3]
        groups = 1 if is_sharded(x) else _groups(*x.shape)
        if groups == 1 or self._is_training:
            return self._features(x)
        y = lax.map(self._features, x.reshape(groups, -1, *x.shape[-3:]))
        return y.reshape(*batch, *y.shape[-3:])

    def with_arithmetic(self, arithmetic: str | Arithmetic | None) -> MobileNet:
        """Return a view of the model with its parameters, in another arithmetic; see `jaxdw.models.with_arithmetic`."""
        return with_arithmetic(self, arithmetic)

    @property
    def _is_training(self) -> bool:
        norms = (module for _, module in nnx.iter_modules(self) if isinstance(module, nnx.BatchNorm))
        return any(not norm.use_running_average for norm in norms)

    def _features(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)

    def classify(self, features: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Map `(*batch, h, w, features)` to `(*batch, num_classes)`."""
        x = self.mean(features)
        if self.hidden is not None:
            x = activated(self.hidden, x, self.architecture.activation)
        x = self.dropout(x, rngs=rngs)
        return x if self.classifier is None else self.classifier(x)


def _groups(*shape: Any) -> int:
    """Return into how many equal groups images `(*batch, H, W, C)` are cut, which are computed one after the other.

    On a CPU a whole batch leaves the caches between two layers. Elsewhere, and where the batch may be shared out over
    devices, there is one group.
    """
    if not all(isinstance(size, int) for size in shape) or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    *batch, height, width, _ = shape
    images, most = math.prod(batch), max(1, PIXELS_AT_ONCE // max(1, height * width))
    return next((images // size for size in range(min(images, most), 0, -1) if images % size == 0), 1)


def conventions_like(like: str, originals: Mapping[str, Conventions], changes: Mapping[str, Any]) -> Conventions:
    """Return the conventions of the original named `like`, with changes."""
    if like not in originals:
        raise ValueError(f"`like` is {like!r}, expected one of {', '.join(originals)}")
    return dataclasses.replace(originals[like], **changes)


def round_channels(channels: float) -> int:
    """Return the nearest positive multiple of 8, or the next one if the nearest is more than a tenth smaller.

    Every MobileNet but V1 rounds so, since the TensorFlow originals do.

    >>> [round_channels(c) for c in (3, 8.4, 11.2, 33.6)]
    [8, 8, 16, 32]
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def check_width(width: float) -> None:
    if not width > 0:
        raise ValueError(f"`width` is {width!r}, expected a positive factor of all numbers of channels")


def with_output_stride(blocks: Iterable[Block], output_stride: int, conventions: Conventions) -> tuple[Block, ...]:
    """Return the blocks, with strides turned into dilation once the blocks before have reached `output_stride`.

    If dilation starts at the "next" block, features keep their receptive fields, on a denser grid (Chen et al., 2017).
    If it starts "here", the blocks that lose their stride have larger receptive fields.

    >>> from jaxdw.models._mobilenet_v3 import ORIGINALS
    >>> rows = [Block(8, 48, 8, nnx.relu, stride=2) for _ in range(4)]
    >>> [(b.stride, b.dilation) for b in with_output_stride(rows, 8, ORIGINALS["timm"])]
    [(2, 1), (2, 1), (1, 1), (1, 2)]
    >>> [(b.stride, b.dilation) for b in with_output_stride(rows, 8, ORIGINALS["torchvision"])]
    [(2, 1), (2, 1), (1, 2), (1, 4)]
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"`output_stride` is {output_stride!r}, expected one of {', '.join(map(str, OUTPUT_STRIDES))}")
    reached, dilation, result = 2, 1, []
    for block in blocks:
        if reached * block.stride <= output_stride:
            reached *= block.stride
            result.append(dataclasses.replace(block, dilation=dilation))
        elif conventions.dilation_starts == "here":
            dilation *= block.stride  # torchvision decides on the residual by the stride before
            result.append(dataclasses.replace(block, stride=1, dilation=dilation, residual=False))
        else:
            result.append(dataclasses.replace(block, stride=1, dilation=dilation))
            dilation *= block.stride
    return tuple(result)
