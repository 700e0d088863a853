"""Collect everything that keeps weights from fitting, and its likely causes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from bridge.weights.layer_settings import Difference
from bridge.weights.rules import Place, RuleBook

#: Names that are tried without a prefix, of as many as there may be.
_TRIED = 1000

Shape = tuple[int, ...]


class WeightsMismatch(ValueError):
    """Weights that do not fit; the message names every key and likely causes."""


@dataclasses.dataclass
class Misfits:
    """The names that do not fit, by kind. Names are those of the source framework, places those of the other.

    Attributes:
      unexpected: names that no rule places.
      ambiguous: names that rules place in several places.
      collisions: places that several names want.
      unplaced: names whose place the other side lacks.
      missing: places that no name fills, with their shape and the name that should.
      shapes: names with their shape and that of their place, which it does not fit.
      misshapen: names whose shape no layout of their rule has.
      absent: names that a manifest has and the tree lacks.
      settings: layers whose settings differ.
      hints: causes that were found elsewhere; they are no misfit.
    """

    unexpected: list[str] = dataclasses.field(default_factory=list)
    ambiguous: dict[str, list[Place]] = dataclasses.field(default_factory=dict)
    collisions: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unplaced: list[Place] = dataclasses.field(default_factory=list)
    missing: dict[str, tuple[Shape, str | None]] = dataclasses.field(default_factory=dict)
    shapes: list[tuple[Place, Shape, Shape]] = dataclasses.field(default_factory=list)
    misshapen: list[str] = dataclasses.field(default_factory=list)
    absent: list[str] = dataclasses.field(default_factory=list)
    settings: list[Difference] = dataclasses.field(default_factory=list)
    hints: list[str] = dataclasses.field(default_factory=list)

    def named(self) -> set[str | None]:
        """Return the places of Flax that are among the ambiguities."""
        return {place.flax for places in self.ambiguous.values() for place in places}

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "hints")

    def throw(self, label: str, looks: str | None, names: Sequence[str], book: RuleBook) -> NoReturn:
        """Raise WeightsMismatch with all of them, causes first.

        Args:
          label: the rules that were used.
          looks: the network that the names look like, where it is another one.
          names: all names that were to be converted.
          book: the rules.
        """
        causes = list(self._causes(looks, names, book))
        lettered = "; ".join(f"({letter}) {cause}" for letter, cause in zip("abcdefghijklmnopqrstuvwxyz", causes))
        lines = [f"the weights do not fit (rules: {label})." + (f" Likely causes: {lettered}." if causes else "")]
        for title, items in self._lists():
            if items:
                lines += [f"{title} ({len(items)}):", *(f"  {item}" for item in items)]
        raise WeightsMismatch("\n".join(lines))

    def _lists(self) -> Iterator[tuple[str, list[str]]]:
        yield "no rule for", self.unexpected
        several = {name: " or ".join(f"{p.rule}" for p in places) for name, places in self.ambiguous.items()}
        yield "several rules for", [f"{name}: {rules}" for name, rules in several.items()]
        yield "several tensors for", [f"{place}: {', '.join(names)}" for place, names in self.collisions.items()]
        yield "no place in the target for", [f"{place.torch}, which becomes {place.flax}" for place in self.unplaced]
        needed = self.missing.items()
        yield "missing", [f"{place} {shape}, from {name or 'no rule'}" for place, (shape, name) in needed]
        yield (
            "another shape",
            [f"{p.torch} {shape} for {p.flax} {wanted} ({p.layout.name})" for p, shape, wanted in self.shapes],
        )
        yield "of a shape that the layer cannot have", self.misshapen
        yield "in the manifest and not in the tree", self.absent
        yield "another setting", [difference.said for difference in self.settings]

    def _causes(self, looks: str | None, names: Sequence[str], book: RuleBook) -> Iterator[str]:
        yield from self.hints
        if self.ambiguous or self.collisions:
            yield "the rules overlap, and each tensor needs exactly one"
        if self.unexpected or self.missing or self.unplaced:
            if looks is not None:
                yield f"the wrong architecture: the names look like {looks}"
            yield from self._prefix(names, book)
        yield from self._shape_causes()
        if self.missing and not (self.unexpected or self.unplaced or looks or self.hints):
            yield "the checkpoint is incomplete: one shard of several, or a part of the network"
            if all(place.rpartition(".")[2] == "bias" for place in self.missing):
                yield "the target was built with biases"
        if self.unplaced and not self.unexpected:
            layers = dict.fromkeys((place.flax or "").rpartition(".")[0] or "the root" for place in self.unplaced)
            yield f"the target was built without what the weights have in {', '.join([*layers][:4])}"
        fixes: dict[str, dict[str, dict[str, None]]] = collections.defaultdict(lambda: collections.defaultdict(dict))
        for difference in self.settings:
            fixes[difference.flax][difference.fix.partition("=")[0]][difference.fix] = None
        for flax, wanted in fixes.items():
            fix = " and ".join(_some(values) for values in wanted.values())
            yield f"{flax} has other settings than the model, and no checkpoint holds settings: build it with {fix}"

    def _prefix(self, names: Sequence[str], book: RuleBook) -> Iterator[str]:
        """Yield a prefix without which the rules know the names."""
        parts = [name.split(".") for name in self.unexpected]
        heads = collections.Counter(".".join(each[:depth]) for each in parts for depth in range(1, min(len(each), 5)))
        for head, count in heads.most_common(12):
            bare = [name.removeprefix(f"{head}.") for name in names if name.startswith(f"{head}.")]
            if sum(bool(book.from_torch(name)) for name in bare[:_TRIED]) > min(count, _TRIED) / 2:
                yield f'the names have a prefix: pass `prefix="{head}."` (`jaxdw convert --prefix {head}.`)'
                return

    def _shape_causes(self) -> Iterator[str]:
        turned = [place.torch for place, shape, wanted in self.shapes if _is_turned(place, shape, wanted)]
        if turned:
            yield f"weights that are transposed, or in Flax's layout already: {', '.join(turned[:4])}"
            return
        layers = dict.fromkeys(place.torch.rpartition(".")[0] for place, _, _ in self.shapes)
        outputs = {(_outputs(place, shape), wanted[-1]) for place, shape, wanted in self.shapes if shape and wanted}
        if len(layers) == 1 and len(outputs) == 1 and (pair := outputs.pop())[0] != pair[1]:
            layer = next(iter(layers)) or "the layer"
            what = "outputs" if any(max(wanted[:-2], default=1) > 1 for *_, wanted in self.shapes) else "classes"
            yield f"the number of {what} differs: {layer} has {pair[0]} outputs, the target {pair[1]}"
        if len(layers) > 2:
            place, shape, wanted = self.shapes[0]
            yield f"another width: {place.torch} is {shape}, and {place.flax} is {wanted}"


def _some(fixes: Iterable[str]) -> str:
    several = list(fixes)
    return " or ".join(several[:4]) + (" or as the list says" if len(several) > 4 else "")


def _outputs(place: Place, shape: Shape) -> int:
    return shape[0] if place.layout.name.startswith("O") else shape[-1]


def _is_turned(place: Place, shape: Shape, wanted: Shape) -> bool:
    """Return True where a shape that does not fit would fit with its axes moved."""
    return shape == wanted or place.layout.flax_shape(shape[1::-1] + shape[2:]) == wanted
