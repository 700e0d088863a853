"""Find the least change that gives the second of two implementations the bits of the first, by running it.

The first implementation is the reference: it changes only if no change of the second one works. Changes are tried in
five steps:

1. one change of the second: its method, a flag, a layout, a number of threads or a dtype;
2. a method at the framework's default settings in place of the second;
3. and 4. the same of the first;
5. one change of each.

The answer is the first step in which any change works. Of its changes those that keep the windows come first, then the
least intrusive. A change works if both implementations then have the same bits on the case, and on another draw of
random numbers of the same shapes. Changes that round inputs more coarsely than the implementation did are not tried:
nearly everything is equal in bfloat16.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from bridge._implementations import Implementation, implementation, implementations, knobs
from bridge.case import Case
from bridge.diagnosis.runs import CaseRuns, Unrunnable, another_draw, neighbours

#: Rounds in which the times are measured, after one that is not counted.
ROUNDS = 5

#: Least products of a case whose times are told: below, a time is that of the call and not of the arithmetic.
LEAST_PRODUCTS = 10**6

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
      changes: the changes that work: those that keep the windows first, then the least intrusive.
      tried: how many implementations were run.
      failed: `(name, reason)` of those that could not be.
      measured: True if the case is large enough for the times to mean anything.
    """

    a: str
    b: str
    identical: bool
    changes: Sequence[Change]
    tried: int
    failed: Sequence[tuple[str, str]]
    measured: bool = False

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
        first = f"Use {_change(self, self.best)}: write {'; '.join(self.best.code)}.{self._time(self.best)}"
        others = [_change(self, each) for each in self.changes[1:]]
        return [first, f"These changes work too: {'; '.join(others)}."] if others else [first]

    def _time(self, change: Change) -> str:
        """Return a sentence on the time of a change; empty where the case is too small for it, or is emulated."""
        if self.emulated or not self.measured:
            return ""
        before, after = (f"{seconds * 1e3:.3g} ms" for seconds in (change.before, change.after))
        return f" Time: {after} instead of {before}."


def eliminate(
    case: Case, a: str | Implementation, b: str | Implementation, *, isolated: bool = True, runs: CaseRuns | None = None
) -> Elimination:
    """Return the least verified changes that give two implementations the same bits on this case.

    Args:
      case: input, kernel, bias and geometry.
      a, b: implementations, or their names; a is the reference, and b the one to change.
      isolated: also try settings that need a process of their own, such as XLA's flags (one or two seconds each).
      runs: the runs of this case, to share with `attribute`.

    Raises:
      ValueError: an unknown name.
      bridge.diagnosis.runs.Unrunnable: a or b itself fails.

    >>> import numpy as np
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
    another = CaseRuns(another_draw(case))
    found: list[Pair] = []
    for step in _steps(left, right, around, case, runs):
        equal = (pair for pair in step if _same(runs, *pair) and _same(another, *pair))
        if found := list(itertools.islice(equal, MOST_CHANGES)):
            break
    changes = _timed(case, (left, right), found)
    measured = math.prod(case.geometry.output_shape) * case.geometry.taps >= LEAST_PRODUCTS
    return Elimination(left.name, right.name, False, changes, runs.tried, sorted(runs.failures.items()), measured)


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


def _steps(
    a: Implementation, b: Implementation, around: Sequence[Sequence[Implementation]], case: Case, runs: CaseRuns
) -> Iterator[Iterator[Pair]]:
    """Yield the pairs to try, step by step; within each those that keep b's windows come first."""
    yield ((a, after) for after in _windows_first(b, around[1]))
    yield ((a, after) for after in _windows_first(b, _plain(b, case)))
    yield ((after, b) for after in around[0])
    yield ((after, b) for after in _plain(a, case))
    yield _change_both(around, runs)


def _windows_first(before: Implementation, after: Sequence[Implementation]) -> list[Implementation]:
    """Return the implementations, last those that are the framework's own convolution in place of something else."""
    own = "convolution"
    return sorted(after, key=lambda each: each.algorithm.family == own != before.algorithm.family)


def _plain(each: Implementation, case: Case) -> list[Implementation]:
    """Return the framework's methods without settings, on the platform that it emulates; none with coarser inputs."""
    own = [name for name in implementations(untried=False) if name.partition(".")[0] == each.framework]
    plain = (implementation(name).on(each.emulation.platform if each.emulation else "") for name in own)
    return [after for after in plain if _input_bits(after, case) >= _input_bits(each, case)]


def _change_both(around: Sequence[Sequence[Implementation]], runs: CaseRuns) -> Iterator[Pair]:
    """Yield the pairs of changes whose digests agree, the least intrusive first."""
    orders = [{each.name: order for order, each in enumerate(changed)} for changed in around]
    equal = [(a, b) for a, b in itertools.product(around[0], around[1]) if _same(runs, a, b)]
    yield from sorted(equal, key=lambda pair: sum(order[each.name] for order, each in zip(orders, pair)))


def _same(runs: CaseRuns, a: Implementation, b: Implementation) -> bool:
    digest = runs.digest(a)
    return digest is not None and digest == runs.digest(b)


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
    """Return the changes with their times."""
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
    return changes


def _change(before: Elimination, change: Change) -> str:
    pairs = ((before.a, change.a), (before.b, change.b))
    return " and ".join(f"{new} instead of {old}" for old, new in pairs if old != new)
