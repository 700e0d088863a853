"""Rules: each declares which parameters of PyTorch are which of Flax."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bridge.weights.layouts import KINDS, SAME, Layout

_PLACE = re.compile(r"\{([A-Za-z_]\w*)([+-]\d+)?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A layer, or all layers of one pattern: its path in PyTorch, its path in Flax, its kind.

    `{name}` stands for one part of a path (between dots), the same in both paths; `{i+1}` for a number one greater. The
    root, a single layer, has the path "".

    Attributes:
      torch: pattern of the layer's path in PyTorch, without the parameter's name.
      flax: pattern of its path in Flax.
      kind: one of `bridge.weights.KINDS`, which has its parameters and their layouts.

    >>> rule = Rule("features.{i+1}.conv", "blocks.{i}.conv", "conv")
    >>> rule.to_flax("features.3.conv"), rule.to_torch("blocks.2.conv"), rule.to_flax("features.3.norm")
    ('blocks.2.conv', 'features.3.conv', None)
    """

    torch: str
    flax: str
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` is {self.kind!r}, expected one of {', '.join(KINDS)}")
        names = [{match[1] for match in _PLACE.finditer(pattern)} for pattern in (self.torch, self.flax)]
        if names[0] != names[1]:
            raise ValueError(
                f"`torch` is {self.torch!r} and `flax` is {self.flax!r}, expected the same places in braces in both, "
                "since a rule works both ways"
            )
        for name in names[0]:
            shifts = [m[2] for pattern in (self.torch, self.flax) for m in _PLACE.finditer(pattern) if m[1] == name]
            if len(shifts) != 2:
                raise ValueError(f"`{{{name}}}` occurs {len(shifts)} times in {self}, expected once in each pattern")

    def to_flax(self, path: str) -> str | None:
        """Return the layer's path in Flax, or None where the rule does not match this path."""
        return _translate(path, self.torch, self.flax)

    def to_torch(self, path: str) -> str | None:
        """Return the layer's path in PyTorch, or None where the rule does not match this path."""
        return _translate(path, self.flax, self.torch)


@dataclasses.dataclass(frozen=True)
class Place:
    """One parameter's names in both frameworks; `flax` is None where Flax has no such parameter."""

    torch: str
    flax: str | None
    layout: Layout
    rule: Rule


class RuleBook:
    """Rules, looked up both ways. Where one matches a name or a place, the `others` are not asked.

    >>> book = RuleBook([Rule("conv", "stem", "conv"), Rule("bn", "norm", "batch_norm")])
    >>> [place.flax for place in book.from_torch("conv.weight")], [place.torch for place in book.from_flax("norm.mean")]
    (['stem.kernel'], ['bn.running_mean'])
    """

    def __init__(self, rules: Iterable[Rule], others: RuleBook | None = None):
        own = tuple(rules)
        self.rules: Sequence[Rule] = own if others is None else (*own, *others.rules)
        self._others = others
        self._by_torch, self._by_flax = _Index(own, "torch"), _Index(own, "flax")

    def from_torch(self, name: str) -> list[Place]:
        """Return the places of a parameter of PyTorch: one, none, or several, which is an ambiguity."""
        places: dict[tuple[str | None, str], Place] = {}
        for path, leaf in _splits(name):
            for rule in self._by_torch.near(path):
                target = rule.to_flax(path)
                if target is None or leaf not in KINDS[rule.kind]:
                    continue
                entry = KINDS[rule.kind][leaf]
                flax, layout = (None, SAME) if entry is None else (_join(target, entry[0]), entry[1])
                places.setdefault((flax, layout.name), Place(name, flax, layout, rule))
        if places or self._others is None:
            return list(places.values())
        return [p for p in self._others.from_torch(name) if p.flax is None or not self._own_from_flax(p.flax)]

    def from_flax(self, name: str) -> list[Place]:
        """Return the parameters of PyTorch that the rules put here."""
        own = self._own_from_flax(name)
        return own if own or self._others is None else self._others.from_flax(name)

    def _own_from_flax(self, name: str) -> list[Place]:
        places: dict[tuple[str, str], Place] = {}
        for path, leaf in _splits(name):
            for rule in self._by_flax.near(path):
                source = rule.to_torch(path)
                if source is None:
                    continue
                for torch, entry in KINDS[rule.kind].items():
                    if entry is not None and entry[0] == leaf:
                        place = Place(_join(source, torch), name, entry[1], rule)
                        places.setdefault((place.torch, place.layout.name), place)
        return list(places.values())

    def kept(self, flax: Iterable[str]) -> Iterator[str]:
        """Yield the parameters of PyTorch that belong to these and have no place in Flax: `num_batches_tracked`."""
        seen = set()
        for name in flax:
            if name.rpartition(".")[2] != "mean":
                continue
            for place in self.from_flax(name):
                path = place.torch.rpartition(".")[0]
                for leaf, entry in KINDS[place.rule.kind].items():
                    if entry is None and (path, leaf) not in seen:
                        seen.add((path, leaf))
                        yield _join(path, leaf)


class _Index:
    """Rules by their pattern where it has no `{name}`, as most have none, and a list of the others."""

    def __init__(self, rules: Iterable[Rule], side: str):
        self._literal: Mapping[str, list[Rule]] = collections.defaultdict(list)
        self._patterns: list[Rule] = []
        for rule in rules:
            pattern = getattr(rule, side)
            (self._patterns if _PLACE.search(pattern) else self._literal[pattern]).append(rule)

    def near(self, path: str) -> Iterator[Rule]:
        yield from self._literal.get(path, ())
        yield from self._patterns


def _translate(path: str, pattern: str, into: str) -> str | None:
    match = _compiled(pattern).fullmatch(path)
    if match is None:
        return None
    try:
        bare = {place[1]: _shifted(match[place[1]], place[2], -1) for place in _PLACE.finditer(pattern)}
        return _PLACE.sub(lambda place: _shifted(bare[place[1]], place[2], +1), into)
    except ValueError:  # a shift of what is no number, or below 0
        return None


def _shifted(text: str, shift: str | None, sign: int) -> str:
    if shift is None:
        return text
    number = int(text) + sign * int(shift)
    if number < 0 or not text.isdecimal():
        raise ValueError
    return str(number)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    expression, end = "", 0
    for place in _PLACE.finditer(pattern):
        expression += re.escape(pattern[end : place.start()]) + f"(?P<{place[1]}>[^.]+)"
        end = place.end()
    return re.compile(expression + re.escape(pattern[end:]))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield a parameter's name as layer and leaf, and as a parameter that is in no layer."""
    path, _, leaf = name.rpartition(".")
    yield path, leaf
    yield name, ""


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path and leaf else path or leaf
