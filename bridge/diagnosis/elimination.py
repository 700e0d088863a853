"""eliminate: the cheapest change that gives two implementations the same bits, found by running it.

Changes are tried in the order of how much they ask of the user: first one change on one side, being a method, a flag,
a layout, a number of threads or a dtype; then a method at the framework's default settings; then one change on each
side. The first of these steps in which any change works is the answer, and among the changes of that step the one that
costs least time. A change works if both sides then have the same bits on the case, and on another draw of random
numbers of the same shapes. Changes that round inputs more coarsely than the side did are not tried: nearly everything
is equal in bfloat16.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from bridge.case import Case
from bridge.diagnosis.runs import CaseRuns, Unrunnable, digest, neighbours
from bridge.implementations import Implementation, implementation, implementations, knobs

#: Rounds in which the times are measured, after one that is not counted.
ROUNDS = 5

#: Changes that are verified and timed at most.
MOST_CHANGES = 6

#: From the least intrusive to the most.
_KINDS = ("method", "flag", "layout", "threads", "precision")

Pair = tuple[Implementation, Implementation]


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that makes the two sides identical.

    Attributes:
      a, b: the implementations after it.
      kinds: of its parts: "method", "flag", "layout", "threads", "precision".
      code: what to write, a line for each part.
      before, after: median seconds of the sides that change.
    """

    a: str
    b: str
    kinds: tuple[str, ...]
    code: tuple[str, ...]
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Time after / time before, of the sides that change."""
        return self.after / self.before


@dataclasses.dataclass(frozen=True)
class Elimination:
    """How to make two sides identical.

    Attributes:
      a, b: the names of the sides.
      identical: whether they are without any change.
      changes: what was found, the cheapest first.
      tried: how many implementations were run.
      failed: `(name, reason)` of those that could not be.
    """

    a: str
    b: str
    identical: bool
    changes: Sequence[Change]
    tried: int
    failed: Sequence[tuple[str, str]]

    @property
    def best(self) -> Change | None:
        return self.changes[0] if self.changes else None

    @property
    def emulated(self) -> bool:
        """Whether a side emulates a platform, of whose speed times here say nothing."""
        return any(implementation(name).emulation for name in (self.a, self.b))

    def sentences(self) -> list[str]:
        """The answer, in the user's words."""
        if self.identical:
            return [f"Nothing to change: {self.a} and {self.b} have the same bits."]
        if self.best is None:
            return [f"No change was found, among {self.tried} tried, that gives {self.a} and {self.b} the same bits."]
        others = "; ".join(
            _becomes(self, change) + ("" if self.emulated else f" ({change.ratio:.2g}x)") for change in self.changes[1:]
        )
        return [_sentence(self, self.best)] + ([f"Also: {others}."] if others else [])


def eliminate(
    case: Case, a: str | Implementation, b: str | Implementation, *, isolated: bool = True, runs: CaseRuns | None = None
) -> Elimination:
    """The cheapest verified change that makes two implementations identical on this case.

    Args:
      case: input, kernel, bias and geometry.
      a, b: implementations, or their names.
      isolated: also try settings that need a process of their own, such as XLA's flags (a second or two each).
      runs: of this case, to share with `attribute`.

    Raises:
      ValueError: an unknown name.
      bridge.diagnosis.runs.Unrunnable: a or b itself fails.

    >>> rng = np.random.default_rng(0)
    >>> case = Case(rng.standard_normal((1, 6, 6, 2), np.float32), rng.standard_normal((3, 3, 1, 2), np.float32))
    >>> eliminate(case, "jax.taps", "jax.taps[dtype=bfloat16]", isolated=False).best.b
    'jax.taps'
    """
    left, right = (implementation(each) if isinstance(each, str) else each for each in (a, b))
    runs = CaseRuns(case) if runs is None else runs
    for side in (left, right):
        if runs.digest(side) is None:
            raise Unrunnable(f"{side.name} failed: {runs.failures[side.name]}")
    if runs.digest(left) == runs.digest(right):
        return Elimination(left.name, right.name, True, (), runs.tried, ())
    around = [_one_change(side, case, isolated=isolated) for side in (left, right)]
    another = CaseRuns(_another_draw(case))
    found: list[Pair] = []
    for step in (_on_one_side(left, right, around), _defaults(left, right), _on_both_sides(around, runs)):
        equal = (pair for pair in step if _same(runs, *pair) and _same(another, *pair))
        if found := list(itertools.islice(equal, MOST_CHANGES)):
            break
    changes = _timed(case, (left, right), found)
    return Elimination(left.name, right.name, False, changes, runs.tried, sorted(runs.failures.items()))


def _one_change(side: Implementation, case: Case, *, isolated: bool) -> list[Implementation]:
    """What is one change away, the least intrusive first; what needs a process of its own last among its kind."""
    changed = [
        each
        for _, each in neighbours(side, case)
        if (isolated or not each.isolated) and _input_bits(each, case) >= _input_bits(side, case)
    ]
    return sorted(changed, key=lambda each: (_KINDS.index(_parts(side, each)[0][0]), each.isolated))


def _input_bits(each: Implementation, case: Case) -> int:
    """Bits of the significands that the products may be left with; 0 where a setting does not suit the case."""
    try:
        return each.input_bits(case)
    except ValueError:
        return 0


def _on_one_side(a: Implementation, b: Implementation, around: Sequence[Sequence[Implementation]]) -> Iterator[Pair]:
    yield from ((a, after) for after in around[1])
    yield from ((after, b) for after in around[0])


def _defaults(a: Implementation, b: Implementation) -> Iterator[Pair]:
    """Either side with any method and no setting, on the platform that it emulates."""
    yield from ((a, each) for each in _plain(b))
    yield from ((each, b) for each in _plain(a))


def _plain(side: Implementation) -> list[Implementation]:
    own = [name for name in implementations(interpreted=False) if name.partition(".")[0] == side.framework]
    return [implementation(name).on(side.emulation.platform if side.emulation else "") for name in own]


def _on_both_sides(around: Sequence[Sequence[Implementation]], runs: CaseRuns) -> Iterator[Pair]:
    """Pairs of changes whose digests agree, the least intrusive first."""
    orders = [{each.name: order for order, each in enumerate(side)} for side in around]
    equal = [(a, b) for a, b in itertools.product(around[0], around[1]) if _same(runs, a, b)]
    yield from sorted(equal, key=lambda pair: sum(order[each.name] for order, each in zip(orders, pair)))


def _same(runs: CaseRuns, a: Implementation, b: Implementation) -> bool:
    digest = runs.digest(a)
    return digest is not None and digest == runs.digest(b)


def _another_draw(case: Case) -> Case:
    """Normal random numbers of the case's shapes, which no case drawn from a seed repeats by accident."""
    rng = np.random.default_rng(int(digest(case.x), 16))

    def draw(array: np.ndarray) -> np.ndarray:
        return np.asarray(rng.standard_normal(array.shape)).astype(array.dtype)

    return case.replace(x=draw(case.x), kernel=draw(case.kernel), bias=None if case.bias is None else draw(case.bias))


def _parts(before: Implementation, after: Implementation) -> list[tuple[str, str]]:
    """`(kind, code)` of each setting that differs."""
    parts = []
    if before.base != after.base:
        parts.append(("method", f"{after.algorithm.code} in place of {before.algorithm.code}"))
    for knob, spec in knobs(after.framework).items():
        if before.knobs[knob] != after.knobs[knob]:
            parts.append((spec.kind, spec.how_to(after.knobs[knob])))
    return parts


def _timed(case: Case, before: Pair, found: Sequence[Pair]) -> list[Change]:
    """The changes with what they cost, the cheapest first."""
    each = {i.name: i for pair in (before, *found) for i in pair}
    times: dict[str, list[float]] = {name: [] for name in each}
    for turn in range(1 + ROUNDS if found else 0):
        for name, one in each.items():
            if one.isolated:  # a process of its own warms up and repeats by itself
                times[name] = times[name] or one.seconds(case, ROUNDS)
            elif seconds := one.seconds(case)[turn == 0 :]:  # the first round is not counted
                times[name] += seconds
    median = {name: statistics.median(seconds) for name, seconds in times.items() if seconds}
    changes = []
    for after in found:
        changed = [(old, new) for old, new in zip(before, after) if old.name != new.name]
        parts = [part for old, new in changed for part in _parts(old, new)]
        changes.append(
            Change(
                after[0].name,
                after[1].name,
                tuple(kind for kind, _ in parts),
                tuple(code for _, code in parts),
                sum(median[old.name] for old, _ in changed),
                sum(median[new.name] for _, new in changed),
            )
        )
    return sorted(changes, key=lambda change: change.ratio)


def _becomes(before: Elimination, change: Change) -> str:
    sides = ((before.a, change.a), (before.b, change.b))
    return " and ".join(f"{new} for {old}" for old, new in sides if old != new)


def _sentence(before: Elimination, change: Change) -> str:
    take = f"Take {_becomes(before, change)}: write {'; '.join(change.code)}."
    if before.emulated:
        return f"{take} What that costs there is not measured here."
    return (
        f"{take} "
        f"That takes {change.ratio:.2g} times as long: {change.after * 1e3:.3g} ms, not {change.before * 1e3:.3g} ms."
    )
