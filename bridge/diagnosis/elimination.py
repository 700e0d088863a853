"""Find the cheapest change that gives two implementations the same bits, by running it.

Changes are tried in three steps, from the least to the most that the user must do:

1. one change of one implementation: its method, a flag, a layout, a number of threads or a dtype;
2. a method at the framework's default settings in place of one implementation;
3. one change of each implementation.

The answer is the first step in which any change works, and of its changes the one that costs least time. A change works
if both implementations then have the same bits on the case, and on another draw of random numbers of the same shapes.
Changes that round inputs more coarsely than the implementation did are not tried: nearly everything is equal in
bfloat16.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from bridge._implementations import Implementation, implementation, implementations, knobs
from bridge.case import Case
from bridge.diagnosis.runs import CaseRuns, Unrunnable, digest, neighbours

#: Rounds in which the times are measured, after one that is not counted.
ROUNDS = 5

#: Most changes that are verified and timed.
MOST_CHANGES = 6

#: From the least intrusive to the most.
_KINDS = ("method", "flag", "layout", "threads", "precision")

Pair = tuple[Implementation, Implementation]


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that gives two implementations the same bits.

    Attributes:
      a, b: the implementations after it.
      kinds: the kinds of its parts: "method", "flag", "layout", "threads", "precision".
      code: what to write, one line per part.
      before, after: median seconds of the implementations that change.
    """

    a: str
    b: str
    kinds: tuple[str, ...]
    code: tuple[str, ...]
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """Time after / time before, of the implementations that change."""
        return self.after / self.before


@dataclasses.dataclass(frozen=True)
class Elimination:
    """The changes that give two implementations the same bits.

    Attributes:
      a, b: the names of the implementations.
      identical: True if their bits are the same without any change.
      changes: the changes that work, the cheapest first.
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
        """True if a or b emulates a platform; times measured here say nothing of its speed."""
        return any(implementation(name).emulation for name in (self.a, self.b))

    def sentences(self) -> list[str]:
        """Return the answer in sentences."""
        if self.identical:
            return [f"Nothing to change: {self.a} and {self.b} have the same bits."]
        if self.best is None:
            return [f"{self.tried} implementations were run; no change gives {self.a} and {self.b} the same bits."]
        before, after = (f"{seconds * 1e3:.3g} ms" for seconds in (self.best.before, self.best.after))
        time = f"Time: {after} instead of {before} (x {self.best.ratio:.2g})."
        others = [f"{_change(self, each)} (time x {each.ratio:.2g})" for each in self.changes[1:]]
        if self.emulated:
            time = "The time that this takes there was not measured."
            others = [_change(self, each) for each in self.changes[1:]]
        first = f"Use {_change(self, self.best)}: write {'; '.join(self.best.code)}. {time}"
        return [first, f"These changes work too: {'; '.join(others)}."] if others else [first]


def eliminate(
    case: Case, a: str | Implementation, b: str | Implementation, *, isolated: bool = True, runs: CaseRuns | None = None
) -> Elimination:
    """Return the cheapest verified changes that give two implementations the same bits on this case.

    Args:
      case: input, kernel, bias and geometry.
      a, b: implementations, or their names.
      isolated: also try settings that need a process of their own, such as XLA's flags (one or two seconds each).
      runs: the runs of this case, to share with `attribute`.

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
    for each in (left, right):
        if runs.digest(each) is None:
            raise Unrunnable(f"{each.name} failed: {runs.failures[each.name]}")
    if runs.digest(left) == runs.digest(right):
        return Elimination(left.name, right.name, True, (), runs.tried, ())
    around = [_one_change(each, case, isolated=isolated) for each in (left, right)]
    another = CaseRuns(_another_draw(case))
    found: list[Pair] = []
    for step in (_change_one(left, right, around), _defaults(left, right), _change_both(around, runs)):
        equal = (pair for pair in step if _same(runs, *pair) and _same(another, *pair))
        if found := list(itertools.islice(equal, MOST_CHANGES)):
            break
    changes = _timed(case, (left, right), found)
    return Elimination(left.name, right.name, False, changes, runs.tried, sorted(runs.failures.items()))


def _one_change(before: Implementation, case: Case, *, isolated: bool) -> list[Implementation]:
    """Return the implementations one change away: the least intrusive first, and last of its kind if isolated."""
    changed = [
        after
        for _, after in neighbours(before, case)
        if (isolated or not after.isolated) and _input_bits(after, case) >= _input_bits(before, case)
    ]
    return sorted(changed, key=lambda after: (_KINDS.index(_parts(before, after)[0][0]), after.isolated))


def _input_bits(each: Implementation, case: Case) -> int:
    """Return the bits of significand that the products keep at least; 0 if a setting does not suit the case."""
    try:
        return each.input_bits(case)
    except ValueError:
        return 0


def _change_one(a: Implementation, b: Implementation, around: Sequence[Sequence[Implementation]]) -> Iterator[Pair]:
    yield from ((a, after) for after in around[1])
    yield from ((after, b) for after in around[0])


def _defaults(a: Implementation, b: Implementation) -> Iterator[Pair]:
    """Yield either implementation replaced by any method without settings, on the platform that it emulates."""
    yield from ((a, each) for each in _plain(b))
    yield from ((each, b) for each in _plain(a))


def _plain(each: Implementation) -> list[Implementation]:
    own = [name for name in implementations(interpreted=False) if name.partition(".")[0] == each.framework]
    return [implementation(name).on(each.emulation.platform if each.emulation else "") for name in own]


def _change_both(around: Sequence[Sequence[Implementation]], runs: CaseRuns) -> Iterator[Pair]:
    """Yield the pairs of changes whose digests agree, the least intrusive first."""
    orders = [{each.name: order for order, each in enumerate(changed)} for changed in around]
    equal = [(a, b) for a, b in itertools.product(around[0], around[1]) if _same(runs, a, b)]
    yield from sorted(equal, key=lambda pair: sum(order[each.name] for order, each in zip(orders, pair)))


def _same(runs: CaseRuns, a: Implementation, b: Implementation) -> bool:
    digest = runs.digest(a)
    return digest is not None and digest == runs.digest(b)


def _another_draw(case: Case) -> Case:
    """Return the case with other normal random numbers, which no case drawn from a seed repeats by accident."""
    rng = np.random.default_rng(int(digest(case.x), 16))

    def draw(array: np.ndarray) -> np.ndarray:
        return np.asarray(rng.standard_normal(array.shape)).astype(array.dtype)

    return case.replace(x=draw(case.x), kernel=draw(case.kernel), bias=None if case.bias is None else draw(case.bias))


def _parts(before: Implementation, after: Implementation) -> list[tuple[str, str]]:
    """Return `(kind, code)` of each setting that differs."""
    parts = []
    if before.base != after.base:
        parts.append(("method", f"{after.algorithm.code} in place of {before.algorithm.code}"))
    for knob, spec in knobs(after.framework).items():
        if before.knobs[knob] != after.knobs[knob]:
            parts.append((spec.kind, spec.how_to(after.knobs[knob])))
    return parts


def _timed(case: Case, before: Pair, found: Sequence[Pair]) -> list[Change]:
    """Return the changes with their times, the cheapest first."""
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


def _change(before: Elimination, change: Change) -> str:
    pairs = ((before.a, change.a), (before.b, change.b))
    return " and ".join(f"{new} instead of {old}" for old, new in pairs if old != new)
