"""The rules of the MobileNets of torchvision, timm and transformers, and the architecture that a set of names shows.

The paths in Flax are those of `jaxdw.models.MobileNet`, the same for every original.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bridge.weights.rules import Rule, RuleBook

#: The parts of a block, in the order in which data passes them.
PARTS = ("expand", "depthwise", "squeeze_excite", "project")

#: For each block of a network, its parts.
Blocks = Sequence[tuple[str, ...]]

_PLAIN, _WIDE, _SQUEEZED = ("depthwise", "project"), ("expand", "depthwise", "project"), PARTS


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One library's version of one network.

    Attributes:
      library: "torchvision", "timm" or "transformers"; `like` of the function in `jaxdw.models`.
      model: that function's name.
      blocks: the parts of its blocks at width 1.
      table: its rules, given the parts of the blocks.
    """

    library: str
    model: str
    blocks: Blocks
    table: Callable[[Blocks], Iterator[Rule]]

    @property
    def name(self) -> str:
        return f"{self.library}.{self.model}"

    def rules(self, flax: Iterable[str] = ()) -> tuple[Rule, ...]:
        """Return its rules, for the parts in the blocks of these Flax parameters: small widths drop some parts."""
        blocks = _blocks_of(flax)
        return tuple(self.table(blocks if len(blocks) == len(self.blocks) else self.blocks))


def _blocks_of(flax: Iterable[str]) -> Blocks:
    """
    >>> _blocks_of(["stem.conv.kernel", "blocks.0.depthwise.conv.kernel", "blocks.0.project.conv.kernel"])
    [('depthwise', 'project')]
    """
    found: dict[int, set[str]] = {}
    for name in flax:
        if match := re.match(r"blocks\.(\d+)\.(\w+)\.", name):
            found.setdefault(int(match[1]), set()).add(match[2])
    return [tuple(part for part in PARTS if part in found.get(i, ())) for i in range(max(found, default=-1) + 1)]


def _norm_act(conv: str, norm: str, flax: str, kind: str = "pointwise") -> Iterator[Rule]:
    yield Rule(conv, f"{flax}.conv", kind)
    yield Rule(norm, f"{flax}.norm", "batch_norm")


def _block_part(conv: str, norm: str, block: int, part: str) -> Iterator[Rule]:
    yield from _norm_act(conv, norm, f"blocks.{block}.{part}", "conv" if part == "depthwise" else "pointwise")


def _squeeze_excite(reduce: str, expand: str, block: int) -> Iterator[Rule]:
    yield Rule(reduce, f"blocks.{block}.squeeze_excite.reduce", "pointwise")
    yield Rule(expand, f"blocks.{block}.squeeze_excite.expand", "pointwise")


def _torchvision(inside: str, *classifier: Rule) -> Callable[[Blocks], Iterator[Rule]]:
    """Return torchvision's rules for blocks whose parts are in a Sequential named `inside`."""

    def rules(blocks: Blocks) -> Iterator[Rule]:
        yield from _norm_act("features.0.0", "features.0.1", "stem", "conv")
        for i, parts in enumerate(blocks):
            for position, part in enumerate(parts):
                at = f"features.{i + 1}.{inside}.{position}"
                if part == "squeeze_excite":
                    yield from _squeeze_excite(f"{at}.fc1", f"{at}.fc2", i)
                elif part == "project" and inside == "conv":  # V2 has no Sequential here: the next is the normalization
                    yield from _block_part(at, f"features.{i + 1}.conv.{position + 1}", i, part)
                else:
                    yield from _block_part(f"{at}.0", f"{at}.1", i, part)
        yield from _norm_act(f"features.{len(blocks) + 1}.0", f"features.{len(blocks) + 1}.1", "head")
        yield from classifier

    return rules


def _timm(stages: Sequence[int], head: Callable[[int], Iterator[Rule]]) -> Callable[[Blocks], Iterator[Rule]]:
    """Return timm's rules. It counts blocks within stages, and names convolutions by their place in a type of block."""
    places = [f"blocks.{stage}.{b}" for stage, count in enumerate(stages) for b in range(count)]

    def rules(blocks: Blocks) -> Iterator[Rule]:
        yield from _norm_act("conv_stem", "bn1", "stem", "conv")
        for i, (at, parts) in enumerate(zip(places, blocks)):
            separable = "expand" not in parts
            convolutions = {
                "expand": "conv_pw",
                "depthwise": "conv_dw",
                "project": "conv_pw" if separable else "conv_pwl",
            }
            if "squeeze_excite" in parts:
                yield from _squeeze_excite(f"{at}.se.conv_reduce", f"{at}.se.conv_expand", i)
            for number, part in enumerate((part for part in parts if part in convolutions), 1):
                yield from _block_part(f"{at}.{convolutions[part]}", f"{at}.bn{number}", i, part)
        yield from head(len(stages))
        yield Rule("classifier", "classifier", "linear")

    return rules


def _timm_v2_head(_: int) -> Iterator[Rule]:
    yield from _norm_act("conv_head", "bn2", "head")


def _timm_v3_head(stages: int) -> Iterator[Rule]:
    yield from _norm_act(f"blocks.{stages}.0.conv", f"blocks.{stages}.0.bn1", "head")
    yield Rule("conv_head", "hidden", "pointwise")


def _unit(at: str, flax: str, kind: str = "pointwise") -> Iterator[Rule]:
    yield from _norm_act(f"{at}.convolution", f"{at}.normalization", flax, kind)


def _transformers_v1(blocks: Blocks) -> Iterator[Rule]:
    yield from _unit("mobilenet_v1.conv_stem", "stem", "conv")
    for i in range(len(blocks)):
        yield from _unit(f"mobilenet_v1.layer.{2 * i}", f"blocks.{i}.depthwise", "conv")
        yield from _unit(f"mobilenet_v1.layer.{2 * i + 1}", f"blocks.{i}.project")
    yield Rule("classifier", "classifier", "linear")


def _transformers_v2(blocks: Blocks) -> Iterator[Rule]:
    yield from _unit("mobilenet_v2.conv_stem.first_conv", "stem", "conv")
    for i, parts in enumerate(blocks):
        at = f"mobilenet_v2.layer.{i - 1}" if i else "mobilenet_v2.conv_stem"  # the first block is part of the stem
        for part, name in (("expand", "expand_1x1"), ("depthwise", "conv_3x3"), ("project", "reduce_1x1")):
            if part in parts:
                yield from _unit(f"{at}.{name}", f"blocks.{i}.{part}", "conv" if part == "depthwise" else "pointwise")
    yield from _unit("mobilenet_v2.conv_1x1", "head")
    yield Rule("classifier", "classifier", "linear")


_TORCHVISION_V2 = _torchvision("conv", Rule("classifier.1", "classifier", "linear"))
_TORCHVISION_V3 = _torchvision(
    "block", Rule("classifier.0", "hidden", "linear"), Rule("classifier.3", "classifier", "linear")
)

_V1 = (_PLAIN,) * 13
_V2 = (_PLAIN,) + (_WIDE,) * 16
_V3_SMALL = (("depthwise", "squeeze_excite", "project"), _WIDE, _WIDE) + (_SQUEEZED,) * 8
_V3_LARGE = (_PLAIN, _WIDE, _WIDE) + (_SQUEEZED,) * 3 + (_WIDE,) * 4 + (_SQUEEZED,) * 5

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("torchvision", "mobilenet_v2", _V2, _TORCHVISION_V2),
        Architecture("torchvision", "mobilenet_v3_small", _V3_SMALL, _TORCHVISION_V3),
        Architecture("torchvision", "mobilenet_v3_large", _V3_LARGE, _TORCHVISION_V3),
        Architecture("timm", "mobilenet_v1", _V1, _timm((1, 2, 2, 6, 2), lambda _: iter(()))),
        Architecture("timm", "mobilenet_v2", _V2, _timm((1, 2, 3, 4, 3, 3, 1), _timm_v2_head)),
        Architecture("timm", "mobilenet_v3_small", _V3_SMALL, _timm((1, 2, 3, 2, 3), _timm_v3_head)),
        Architecture("timm", "mobilenet_v3_large", _V3_LARGE, _timm((1, 2, 3, 4, 2, 3), _timm_v3_head)),
        Architecture("transformers", "mobilenet_v1", _V1, _transformers_v1),
        Architecture("transformers", "mobilenet_v2", _V2, _transformers_v2),
    )
}

#: Names that only one family of networks has, to say of which network a foreign checkpoint is.
_TELLTALES = {
    "a ResNet": r"(^|\.)layer[1-4]\.\d+\.conv[12]\.weight$",
    "a DenseNet": r"denseblock\d+\.denselayer\d+\.",
    "an EfficientNet (lukemelas)": r"^_blocks\.\d+\._depthwise_conv\.",
    "an EfficientNet or another network of timm's blocks": r"^blocks\.\d+\.\d+\.conv_dw\.weight$",
    "a ConvNeXt": r"stages\.\d+\.blocks\.\d+\.(conv_dw|gamma|mlp\.fc1)\b",
    "a vision transformer": r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$",
    "a text transformer": r"(^|\.)(encoder\.layer|layers|h)\.\d+\.(attention|self_attn|attn)\.",
    "an Inception network": r"^Mixed_\d",
    "a VGG or AlexNet": r"^features\.\d+\.weight$",
    "a diffusion model": r"^model\.diffusion_model\.",
    "a checkpoint of Flax": r"(^|\.)kernel$",
}


#: More names than any network has whose rules are known here.
_MOST_NAMES = 10_000


def coverage(book: RuleBook, torch: Sequence[str]) -> float:
    """Return how well rules fit names, 0 to 1: the share of placed names, times the share of rules that place one."""
    if len(torch) > _MOST_NAMES:
        return 0.0
    used: set[Rule] = set()
    placed = 0
    for name in torch:
        if places := book.from_torch(name):
            placed += 1
            used.update(place.rule for place in places)
    return placed / max(1, len(torch)) * len(used) / max(1, len(book.rules))


def rank_architectures(torch: Sequence[str]) -> list[tuple[float, Architecture]]:
    """Return every known architecture with its coverage of these names, best first."""
    scored = [(coverage(book, torch), ARCHITECTURES[name]) for name, book in _books().items()]
    return sorted(scored, key=lambda pair: -pair[0])


@functools.cache
def _books() -> Mapping[str, RuleBook]:
    return {name: RuleBook(architecture.rules()) for name, architecture in ARCHITECTURES.items()}


def looks_like(torch: Sequence[str]) -> str | None:
    """Name the network that these names are of; None where it is not known.

    >>> looks_like(["layer1.0.conv1.weight", "fc.weight"])
    'a ResNet'
    """
    share, best = rank_architectures(torch)[0]
    if share > 0.9:
        return best.name
    for family, pattern in _TELLTALES.items():
        if any(map(re.compile(pattern).search, torch)):
            return family
    return f"{best.name} (in part)" if share > 0.5 else None
