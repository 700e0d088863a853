"""The depthwise layers of known networks at 224x224, and the layers that each suite measures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

from jaxdw import Geometry

#: Every suite. "all" means those before "scaling", which has no peers.
SUITES = (
    *("layers", "gradients", "windows", "blocks", "convnext", "models"),
    *("transposed", "causal", "large"),
    "scaling",
)
ALL = SUITES[:-1]

#: height x width x channels : kernel : stride, in the order of the network.
NETWORKS: Mapping[str, str] = {
    "MobileNetV1": """
        112x112x32:3:1 112x112x64:3:2 56x56x128:3:1 56x56x128:3:2 28x28x256:3:1 28x28x256:3:2 14x14x512:3:1
        14x14x512:3:2 7x7x1024:3:1""",
    "MobileNetV2": """
        112x112x32:3:1 112x112x96:3:2 56x56x144:3:1 56x56x144:3:2 28x28x192:3:1 28x28x192:3:2 14x14x384:3:1
        14x14x576:3:1 14x14x576:3:2 7x7x960:3:1""",
    "MobileNetV3-Large": """
        112x112x16:3:1 112x112x64:3:2 56x56x72:3:1 56x56x72:5:2 28x28x120:5:1 28x28x240:3:2 14x14x200:3:1
        14x14x184:3:1 14x14x480:3:1 14x14x672:3:1 14x14x672:5:2 7x7x960:5:1""",
    "MobileNetV3-Small": """
        112x112x16:3:2 56x56x72:3:2 28x28x88:3:1 28x28x96:5:2 14x14x240:5:1 14x14x120:5:1 14x14x144:5:1
        14x14x288:5:2 7x7x576:5:1""",
    "EfficientNet-B0": """
        112x112x32:3:1 112x112x96:3:2 56x56x144:3:1 56x56x144:5:2 28x28x240:5:1 28x28x240:3:2 14x14x480:3:1
        14x14x480:5:1 14x14x672:5:1 14x14x672:5:2 7x7x1152:5:1 7x7x1152:3:1""",
    "ConvNeXt-T": "56x56x96:7:1 28x28x192:7:1 14x14x384:7:1 7x7x768:7:1",
    "MixNet-S": """
        112x112x16:3:1 112x112x96:3:2 56x56x72:3:1 56x56x48:3:2 56x56x48:5:2 56x56x48:7:2 28x28x120:3:1
        28x28x120:5:1 28x28x80:3:2 28x28x80:5:2 28x28x80:7:2 14x14x240:3:1 14x14x240:5:1 14x14x160:3:1
        14x14x160:5:1 14x14x160:7:1 14x14x90:3:1 14x14x90:5:1 14x14x90:7:1 14x14x90:9:1 14x14x144:3:2
        14x14x144:5:2 14x14x144:7:2 14x14x144:9:2 14x14x144:11:2 7x7x300:3:1 7x7x300:5:1 7x7x300:7:1
        7x7x300:9:1""",
}

#: A few shapes are enough: in PyTorch and `conv_general_dilated_patches`, windows hold every input once per tap.
WINDOWS = """
    112x112x32:3:1 56x56x144:3:1 56x56x144:3:2 28x28x192:3:1 14x14x384:3:1 28x28x120:5:1 14x14x672:5:1
    7x7x960:5:1"""

#: The blocks of this network are convolution, batch normalization and ReLU6.
BLOCKS = NETWORKS["MobileNetV2"]

#: The blocks of this network are convolution, layer norm and two linear layers.
CONVNEXT = NETWORKS["ConvNeXt-T"]

#: The layer from which `scaling` varies one quantity at a time.
BASE = "28x28x96:3:1"

#: The quantities of `scaling`, over two decades each: images, channels, positions (the square of the side) and taps.
SCALES: Mapping[str, Sequence[int]] = {
    "batch": (1, 2, 5, 10, 20, 50, 100),
    "channels": (8, 16, 40, 80, 160, 400, 800),
    "side": (10, 14, 22, 32, 45, 71, 100),
    "kernel": (1, 3, 5, 7, 9, 11),
}

#: The rows of the suites of other layers, with the networks that have them.
SPECIAL: Mapping[str, Mapping[str, str]] = {
    "transposed": {
        "x2 in segmentation and super-resolution": """
            7x7x512:4:2 14x14x256:4:2 28x28x128:4:2 56x56x64:4:2 28x28x96:3:2 56x56x96:3:2 28x28x144:2:2 28x28x96:5:2
            14x14x96:8:4"""
    },
    "causal": {
        "Mamba": """causal:8x512x1536:4 causal:2x2048x1536:4 causal:1x2048x2048:4 causal:1x1024x5120:4
            causal:16x64x2560:4""",
        "Mamba, decoding": "step:1x1536:4 step:8x1536:4 step:64x1536:4 step:1x5120:4 step:16x5120:4",
    },
    "large": {
        "RepLKNet": """1x56x56x128:31 8x56x56x128:31 1x28x28x256:29 1x14x14x512:27 1x7x7x1024:13""",
        "SLaK": "1x56x56x128:51",
        "Hyena": "long:1x1024x768:1024 long:1x2048x768:2048 long:1x4096x768:4096 long:1x16384x64:16384",
    },
}

_SPEC = re.compile(r"(\d+)x(\d+)x(\d+):(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class DepthwiseLayer:
    """A depthwise layer with a square kernel of odd size, padded by kernel // 2 as in PyTorch's networks.

    >>> layer = DepthwiseLayer.parse("56x56x144:3:2")
    >>> layer.stride, str(layer), layer.geometry(8).output_shape
    (2, '56x56x144:3:2', (8, 28, 28, 144))
    """

    height: int
    width: int
    channels: int
    kernel: int
    stride: int

    @classmethod
    def parse(cls, text: str, name: str = "layer") -> DepthwiseLayer:
        """Parse `height x width x channels : kernel : stride`; an error calls the argument `name`.

        Raises:
          ValueError: another form, a size of zero, or an even kernel.
        """
        match = _SPEC.fullmatch(text.strip())
        sizes = [int(part) for part in match.groups()] if match else [0]
        if min(sizes) < 1 or sizes[3] % 2 == 0:
            raise ValueError(
                f"`{name}` is {text!r}, expected height x width x channels:kernel:stride such as 56x56x144:3:2, "
                "with an odd kernel"
            )
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}:{self.kernel}:{self.stride}"

    @property
    def padding(self) -> int:
        """Zeros at each end of both axes."""
        return self.kernel // 2

    def geometry(self, batch: int) -> Geometry:
        return Geometry.of(
            (batch, self.height, self.width, self.channels),
            (self.kernel, self.kernel, 1, self.channels),
            strides=self.stride,
            padding=self.padding,
        )


def layers_of(suite: str) -> dict[DepthwiseLayer, tuple[str, ...]]:
    """Return the layers of a suite, each once, with its networks.

    >>> layers_of("layers")[DepthwiseLayer.parse("112x112x96:3:2")]
    ('MobileNetV2', 'EfficientNet-B0', 'MixNet-S')
    """
    networks: dict[DepthwiseLayer, tuple[str, ...]] = {}
    for network, specs in NETWORKS.items():
        for layer in map(DepthwiseLayer.parse, specs.split()):
            networks[layer] = (*networks.get(layer, ()), network)
    if suite in ("layers", "gradients"):
        return networks
    chosen = {"windows": WINDOWS, "blocks": BLOCKS, "convnext": CONVNEXT}[suite]
    return {layer: networks[layer] for layer in map(DepthwiseLayer.parse, chosen.split())}


def model_rows(batch: int) -> tuple[str, ...]:
    """Return the rows of "models" (MobileNetV2): inference of one image and of a batch, and a step of training.

    >>> model_rows(8)
    ('inference, batch 1', 'inference, batch 8', 'training, batch 8')
    """
    return tuple(dict.fromkeys((*(f"inference, batch {n}" for n in (1, batch)), f"training, batch {batch}")))


def select(suite: str, filters: Sequence[str], batch: int) -> dict[str, tuple[str, ...]]:
    """Return the rows of a suite that the filters select: names, with the networks of each.

    Args:
      suite: one of `SUITES`.
      filters: a whole layer, as "56x56x144:3:2", which need not be in the tables; or a part of a row's name or of a
        network's. A row is selected if any filter matches it. No filters select all rows.
      batch: images per call.

    Returns:
      Names of layers, or the names of `model_rows`; for "scaling", its base.
    """
    own: dict[str, tuple[str, ...]] = dict.fromkeys(_own(filters), ())
    if suite == "convnext":  # x is added to the result
        own = {name: networks for name, networks in own.items() if DepthwiseLayer.parse(name).stride == 1}
    if suite == "scaling":
        if len(own) > 1:
            raise ValueError(f"`--layers` is {', '.join(filters)!r}, expected one layer to start `scaling` from")
        return own or {BASE: ()}
    if suite == "models":
        named: dict[str, tuple[str, ...]] = dict.fromkeys(model_rows(batch), ("MobileNetV2",))
    elif suite in SPECIAL:
        named = {name: (network,) for network, names in SPECIAL[suite].items() for name in names.split()}
    else:
        named = {str(layer): networks for layer, networks in layers_of(suite).items()}
    parts = [part.lower() for part in filters if part not in own]
    if filters:
        named = {
            name: networks
            for name, networks in named.items()
            if any(part in text.lower() for part in parts for text in (name, *networks)) or name in own
        }
    return named if suite in ("models", *SPECIAL) else {**own, **named}


def _own(filters: Sequence[str]) -> Iterator[str]:
    for text in filters:
        if ":" in text and _SPEC.fullmatch(text):
            yield str(DepthwiseLayer.parse(text, "--layers"))
