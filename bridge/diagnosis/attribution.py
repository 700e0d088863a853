"""Attribute the difference of two implementations to their settings, by running every combination of these.

**Factors** are the settings in which a and b differ: the framework, the algorithm (by its family, so that each
framework has a counterpart) and every knob. A configuration is a subset S of the factors: those in S are as b has them,
the others as a has them. If the framework of a or b lacks a knob, the knob counts as having its default; it has no
effect if the configuration's framework lacks it.

**Value.** v(S) is the root mean square of the difference between the configuration's output and a's, in float64, over
that of the exact result. Two other measures were not chosen: the number of differing elements cannot grow once all
differ (every pair of float32 orders would weigh as much as bfloat16), and the greatest difference is decided by one
element. Elements that are not finite in one output are left out of v, and counted as different.

**Shares** are Shapley's (L. S. Shapley, A value for n-person games, 1953): with n factors N,

    share_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)),

the difference that changing i adds, averaged over all orders of changing one factor after another. Shares do not depend
on an order, are equal if two factors do the same, zero if one does nothing, and sum to v(N). A share is negative if the
factor on average brings the outputs closer.

**Unexplained.** If S or S + i does not exist or fails, that term is left out of every share. `unexplained` is the whole
less all shares: on average over the orders, the steps that could not be taken one factor at a time. It includes the
difference of given outputs beyond that of running a and b again. All is computed in rationals from the float64 values
v(S), so shares and `unexplained` sum to the total exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from fractions import Fraction

import numpy as np

from bridge._implementations import Implementation, counterpart, implementation, knobs
from bridge.case import Case
from bridge.diagnosis.diagnosis import Diagnosis
from bridge.diagnosis.runs import CaseRuns, Unrunnable, neighbours
from bridge.numerics import exact, same_bits

#: Most factors that are tried: the number of configurations is 2 to that power.
MOST_FACTORS = 8

_TOGETHER = "framework and algorithm"


@dataclasses.dataclass(frozen=True)
class Factor:
    """A setting in which the two implementations differ.

    Attributes:
      name: "framework", "algorithm", both together where neither has the other's counterpart, or a knob.
      kind: "framework", "algorithm", "precision", "layout", "threads" or "flag".
      a, b: its value in each of them.
    """

    name: str
    kind: str
    a: str
    b: str

    @property
    def label(self) -> str:
        """The setting in words, such as `precision: dtype same -> bfloat16`."""
        name = "" if self.kind in self.name else f"{self.name} "
        return f"{self.kind if name else self.name}: {name}{self.a} \N{RIGHTWARDS ARROW} {self.b}"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One combination of settings.

    Attributes:
      changed: names of the factors that are as b has them.
      name: the implementation; empty if there is none.
      value: v; None if it did not run.
      different: elements whose bits are not a's; None if it did not run.
      reason: why it did not run.
    """

    changed: tuple[str, ...]
    name: str
    value: float | None = None
    different: int | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Flip:
    """One setting of one implementation changed alone.

    Attributes:
      before: the implementation before; setting: the name of the setting; name: the implementation after.
      different: elements whose bits changed; None if it did not run.
      max_abs: the greatest change among finite elements.
      error: the greatest |output - exact| among finite elements, after the change.
      reason: why it did not run.
    """

    before: str
    setting: str
    name: str
    different: int | None = None
    max_abs: float = 0.0
    error: float = 0.0
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Attribution:
    """A difference split into the shares of named factors.

    Attributes:
      a, b: the names of the implementations.
      elements, different: the number of elements, and of those that differ.
      factors: the settings in which they differ.
      rows: each factor's share, a rational.
      whole: v of the difference, a rational.
      configurations: every combination of the settings.
      errors: the greatest |output - exact| of a and of b among finite elements.
      flips: every setting that exists on this machine changed alone, in a and in b.
    """

    a: str
    b: str
    elements: int
    different: int
    factors: Sequence[Factor]
    rows: Sequence[Fraction]
    whole: Fraction
    configurations: Sequence[Configuration]
    errors: tuple[float, float]
    flips: Sequence[Flip]

    @property
    def shares(self) -> list[tuple[str, float]]:
        """`(label, share)` of each factor; with `unexplained` they sum to `total`."""
        return [(factor.label, float(share)) for factor, share in zip(self.factors, self.rows)]

    @property
    def unexplained(self) -> float:
        return float(self.remainder)

    @property
    def remainder(self) -> Fraction:
        """The whole less all shares, a rational."""
        return self.whole - sum(self.rows)

    @property
    def total(self) -> float:
        return float(self.whole)

    @property
    def unit(self) -> str:
        return "RMS of the difference / RMS of the exact result"


def attribute(
    case: Case,
    a: str | Implementation,
    b: str | Implementation,
    *,
    outputs: tuple[np.ndarray, np.ndarray] | None = None,
    isolated: bool = True,
    runs: CaseRuns | None = None,
) -> Attribution:
    """Return the share of each setting in the difference of two implementations.

    Args:
      case: input, kernel, bias and geometry.
      a, b: implementations, or their names.
      outputs: outputs of a and b from elsewhere or before; None runs them.
      isolated: also change settings that need a process of their own, such as XLA's flags (one or two seconds each).
      runs: the runs of this case, to share with `eliminate`.

    Raises:
      ValueError: an unknown name, more than `MOST_FACTORS` settings that differ, or outputs that do not fit the case.
      bridge.diagnosis.runs.Unrunnable: a or b itself fails.

    >>> rng = np.random.default_rng(0)
    >>> case = Case(rng.standard_normal((1, 6, 6, 2), np.float32), rng.standard_normal((3, 3, 1, 2), np.float32))
    >>> result = attribute(case, "torch.conv2d", "torch.conv2d[dtype=bfloat16]", isolated=False)
    >>> [label for label, _ in result.shares], result.unexplained
    (['precision: dtype same → bfloat16'], 0.0)
    """
    left, right = (implementation(each) if isinstance(each, str) else each for each in (a, b))
    chosen = factors(left, right)
    if len(chosen) > MOST_FACTORS:
        named = ", ".join(factor.name for factor in chosen)
        raise ValueError(f"`a` and `b` differ in {len(chosen)} settings ({named}), expected at most {MOST_FACTORS}")
    runs = CaseRuns(case) if runs is None else runs
    reference = exact(case).reference
    scale = _rms(reference[np.isfinite(reference)]) or 1.0
    y_a, y_b = runs.output(left), runs.output(right)
    given_a, given_b = outputs or (y_a, y_b)
    for name, y in (("outputs[0]", given_a), ("outputs[1]", given_b)):
        if y.shape != y_a.shape or y.dtype != y_a.dtype:
            raise ValueError(f"`{name}` is {y.dtype} {y.shape}, expected {y_a.dtype} {y_a.shape}")

    names = [factor.name for factor in chosen]
    cells = [_cell(left, right, chosen, changed, y_a, scale, runs) for changed in _subsets(names)]
    known = {frozenset(cell.changed): Fraction(cell.value) for cell in cells if cell.value is not None}
    rows = shapley(names, known.get)
    return Attribution(
        left.name,
        right.name,
        y_a.size,
        int(np.count_nonzero(~same_bits(given_a, given_b))),
        chosen,
        rows,
        Fraction(_value(given_b, given_a, scale)),
        cells,
        (_greatest_difference(y_a, reference), _greatest_difference(y_b, reference)),
        [
            flip
            for each, y in {left: y_a, right: y_b}.items()
            for flip in _flips(each, y, reference, runs, isolated=isolated)
        ],
    )


def most_different(diagnosis: Diagnosis) -> tuple[str, str] | None:
    """Return the first implementation and the one that differs most from it: with the weakest verdict, then the
    greatest share of its bound. A user's own function comes before all others, then another framework. None if fewer
    than two implementations round as they go."""
    chosen = [each for each in map(implementation, diagnosis.names) if not each.is_exact]
    if len(chosen) < 2:
        return None
    first, *others = chosen
    own = [each for each in others if each.algorithm.function]
    across = [
        each
        for each in others
        if each.framework != first.framework and diagnosis.between(first.name, each.name).different
    ]

    def badness(each: Implementation) -> tuple[int, float]:
        comparison = diagnosis.between(first.name, each.name)
        return comparison.verdict.rank(), comparison.max_bound_ratio

    return first.name, max(own or across or others, key=badness).name


def factors(a: Implementation, b: Implementation) -> list[Factor]:
    """Return the settings in which two implementations differ."""
    found = []
    if a.framework != b.framework:
        found.append(Factor("framework", "framework", a.framework, b.framework))
    if a.algorithm.family != b.algorithm.family or (a.framework == b.framework and a.base != b.base):
        found.append(Factor("algorithm", "algorithm", _word(a, b), _word(b, a)))
    if len(found) == 2 and not (
        counterpart(a.framework, b.algorithm.family) or counterpart(b.framework, a.algorithm.family)
    ):
        found = [Factor(_TOGETHER, _TOGETHER, a.base, b.base)]
    specs = {**knobs(a.framework), **knobs(b.framework)}
    for name, spec in sorted(specs.items()):
        levels = tuple(each.knobs.get(name, spec.default) for each in (a, b))
        if levels[0] != levels[1]:
            found.append(Factor(name, spec.kind, *levels))
    return found


def configured(
    a: Implementation, b: Implementation, chosen: Sequence[Factor], changed: Collection[str]
) -> Implementation:
    """Return the implementation that has b's value of the factors in `changed`, and a's of the others.

    Raises:
      Unrunnable: its framework has no algorithm of that family.
    """
    source = {factor.name: b if factor.name in changed else a for factor in chosen}
    together = source.get(_TOGETHER, a)
    framework = source.get("framework", together).framework
    by_algorithm = source.get("algorithm")
    if by_algorithm is None:  # the two have counterparts: take the framework's own
        by_algorithm = together if together.framework == framework else b
    base: Implementation | None = by_algorithm
    if by_algorithm.framework != framework:
        base = counterpart(framework, by_algorithm.algorithm.family)
    if base is None:
        raise Unrunnable(f"{framework} has no counterpart of {by_algorithm.base}")
    levels = {knob: source.get(knob, a).knobs.get(knob, spec.default) for knob, spec in knobs(framework).items()}
    return base.changed(**levels)


def shapley(players: Sequence[Hashable], value: Callable[[frozenset], Fraction | None]) -> list[Fraction]:
    """Return each player's share; terms of which a value is None are left out.

    >>> shapley(["a", "b"], {frozenset(): 0, frozenset("a"): 1, frozenset("b"): 2, frozenset("ab"): 5}.get)
    [Fraction(2, 1), Fraction(3, 1)]
    """
    n = len(players)
    shares = []
    for player in players:
        share = Fraction(0)
        for others in _subsets([p for p in players if p != player]):
            without, having = value(frozenset(others)), value(frozenset((*others, player)))
            if without is not None and having is not None:
                weight = Fraction(math.factorial(len(others)) * math.factorial(n - len(others) - 1), math.factorial(n))
                share += weight * (having - without)
        shares.append(share)
    return shares


def _subsets(names: Sequence) -> list[tuple]:
    return [chosen for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


def _word(each: Implementation, other: Implementation) -> str:
    """Return an algorithm's family, or its name if the other has the same family."""
    return each.algorithm.family if each.algorithm.family != other.algorithm.family else each.base


def _cell(
    a: Implementation,
    b: Implementation,
    chosen: Sequence[Factor],
    changed: tuple[str, ...],
    y_a: np.ndarray,
    scale: float,
    runs: CaseRuns,
) -> Configuration:
    name = ""
    try:
        each = configured(a, b, chosen, changed)
        name = each.name
        y = runs.output(each)
    except Unrunnable as error:
        return Configuration(changed, name, reason=str(error))
    return Configuration(changed, name, _value(y, y_a, scale), int(np.count_nonzero(~same_bits(y, y_a))))


def _flips(
    before: Implementation, y_before: np.ndarray, reference: np.ndarray, runs: CaseRuns, *, isolated: bool
) -> list[Flip]:
    flips = []
    for setting, after in neighbours(before, runs.case):
        if after.isolated and not isolated:
            continue
        flip = Flip(before.name, setting, after.name)
        try:
            y = runs.output(after)
        except Unrunnable as failure:
            flips.append(dataclasses.replace(flip, reason=str(failure)))
            continue
        different, max_abs = int(np.count_nonzero(~same_bits(y, y_before))), _greatest_difference(y, y_before)
        error = _greatest_difference(y, reference)
        flips.append(dataclasses.replace(flip, different=different, max_abs=max_abs, error=error))
    return flips


def _value(y: np.ndarray, before: np.ndarray, scale: float) -> float:
    return min(_rms(_differences(y, before)) / scale, sys.float_info.max)


def _differences(y: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the finite differences, float64."""
    with np.errstate(all="ignore"):
        difference = y.astype(np.float64) - before.astype(np.float64)
    return difference[np.isfinite(difference)]


def _greatest_difference(y: np.ndarray, before: np.ndarray) -> float:
    return float(np.abs(_differences(y, before)).max(initial=0.0))


def _rms(values: np.ndarray) -> float:
    """Return the root mean square; scaled, so that squares neither overflow nor vanish."""
    greatest = float(np.abs(values).max(initial=0.0))
    return greatest * math.sqrt(float(np.mean((values / greatest) ** 2))) if greatest else 0.0
