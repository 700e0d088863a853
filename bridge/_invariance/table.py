"""Compute one sample under each condition, compare its bits with the reference, and explain each change."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from bridge._implementations import Implementation, ImplementationError, implementation, is_exact
from bridge._invariance.cells import Job, Outcome, Placed, compute, compute_elsewhere, order_of, results, samples
from bridge._invariance.conditions import ALONE, Condition, Placement, Setting, conditions, variables
from bridge._invariance.record import Cell, Change, Invariance, Row, SettingRecord
from bridge.accumulation import MOST_TAPS, AccumulationOrder, divergence
from bridge.case import Case
from bridge.diagnosis import DEFAULT
from bridge.diagnosis.runs import digest
from bridge.environment import environment
from bridge.numerics import same_bits, ulp_distance
from bridge.records import CaseRecord

_log = logging.getLogger("bridge")

#: Most output elements times taps for which a change is explained by default.
EXPLAINED_UNASKED = 1_000_000

_FACTS = {
    "x": "rounding of the input",
    "kernel": "rounding of the weights",
    "accumulator": "accumulator",
    "output": "rounding of the output",
    "products": "products",
    "flushed": "subnormals flushed in",
    "padding_taps": "padding taps",
    "bias": "place of the bias",
    "zero_start": "start from zero",
}


def invariance(
    case: Case,
    implementations: Sequence[str | Implementation] | None = None,
    *,
    conditions: Sequence[str] | None = None,
    batches: Sequence[int] = (2, 3, 8),
    explain: bool | None = None,
) -> Invariance:
    """Compute one sample under each condition, and count the elements whose bits change.

    A small sample is computed again with other random numbers, until 1000 elements are compared.

    Args:
      case: input, kernel, bias and geometry; the first sample of its batch is the sample.
      implementations: names or Implementations; None takes those of `parity`, but for the exact result.
      conditions: kinds of conditions, of "run", "batch", "position", "others", "threads", "layout", "isa", "jit",
        "compile" and "sharding"; None is all. "isa", "compile", "sharding", and for JAX "threads", run in processes of
        their own, some seconds each.
      batches: the batch sizes of "batch".
      explain: reveal the accumulation order before and after each change; None does so if the output is small.

    Returns:
      The table. It has a row per condition and a cell per implementation; `changes` has one entry per implementation
      and other bits.

    Raises:
      ValueError: an unknown name or kind, a name given twice, or a case without a sample.
      ImplementationError: an implementation cannot compute the sample alone.

    >>> x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((2, 2, 1, 2), np.float32)
    >>> table = invariance(Case(x, kernel), ["torch.conv2d", "jax.taps"], conditions=["batch", "position", "layout"])
    >>> [[cell.symbol for cell in row.cells] for row in table.rows]
    [['=', '='], ['=', '='], ['=', '='], ['=', '='], ['=', '='], ['=', '-']]
    """
    chosen = _chosen(implementations)
    sample = _sample(case)
    rows = _conditions(sample, conditions, batches)
    if explain is None:
        size = math.prod(sample.geometry.output_shape) * sample.geometry.taps
        explain = sample.geometry.taps <= MOST_TAPS and size <= EXPLAINED_UNASKED
    table = _Table(sample, chosen, rows, explain)
    table.fill()
    return table.record()


#: The argument `conditions` hides the function in `invariance`.
_conditions = conditions


class _Table:
    """The outcomes of all cells, by the numbers of row and column."""

    def __init__(self, sample: Case, chosen: Sequence[Implementation], rows: Sequence[Condition], explain: bool):
        self.sample, self.chosen, self.rows, self.explain = sample, chosen, rows, explain
        self.stopped = threading.Event()
        self.names = [_name_elsewhere(each) for each in chosen]
        self.references: dict[tuple[int, Placement], np.ndarray] = {}
        self.outcomes: dict[tuple[int, int], Outcome] = {}
        self.orders: dict[tuple[int, str], Outcome] = {}
        for column, each in enumerate(chosen):
            for placement in {ALONE, *(row.reference for row in rows)}:
                _log.info("running %s", each.name)
                self.references[column, placement] = results(Placed(each, placement), sample)

    def fill(self) -> None:
        """Compute the cells: those with variables in processes of their own, beside those that run here."""
        apart: dict[tuple[tuple[str, str], ...], list[tuple[int, int]]] = {}
        here: list[tuple[int, int]] = []
        for at, column in itertools.product(range(len(self.rows)), range(len(self.chosen))):
            setting = self.setting(at, column)
            if setting is not None and not setting.environment:
                here.append((at, column))
            elif setting is not None and self.names[column]:
                apart.setdefault(tuple(sorted(setting.environment.items())), []).append((at, column))
        slowest_first = sorted(apart.items(), key=lambda each: self.rows[each[1][0][0]].kind != "compile")
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
            try:
                waiting = [(keys, pool.submit(self._elsewhere, keys, dict(added))) for added, keys in slowest_first]
                for key in here:
                    self.outcomes[key] = self._here(*key)
                self._collect(waiting)
            except BaseException:  # an interrupt too: nothing more is started
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def setting(self, at: int, column: int) -> Setting | None:
        return self.rows[at].setting(getattr(self.chosen[column], "framework", ""))

    def _changed(self, at: int, column: int) -> Implementation:
        """Return the implementation of a column with the knobs of a row."""
        setting, each = self.setting(at, column), self.chosen[column]
        return each.changed(**setting.knobs) if setting is not None and setting.knobs else each

    def _here(self, at: int, column: int) -> Outcome:
        row, each = self.rows[at], self._changed(at, column)
        _log.info("%s: %s", each.name, row.label)
        reference = self.references[column, row.reference]
        outcome = compute(Placed(each, row.placement), self.sample, reference, explain=False)
        return self._with_order(column, outcome, reference, Placed(each, row.placement))

    def _with_order(self, column: int, outcome: Outcome, reference: np.ndarray, each: Placed) -> Outcome:
        """Return an outcome with its accumulation order if its bits are other ones; equal bits are revealed once."""
        if not self.explain or outcome.y is None or same_bits(outcome.y, reference).all():
            return outcome
        return dataclasses.replace(self._order(column, outcome.y, each), y=outcome.y)

    def _order(self, column: int, y: np.ndarray, each: Placed) -> Outcome:
        key = column, digest(y)
        if key not in self.orders:
            _log.info("revealing the accumulation order of %s", each.name)
            self.orders[key] = order_of(each, self.sample)
        return self.orders[key]

    def _elsewhere(self, keys: Sequence[tuple[int, int]], environment: Mapping[str, str]) -> list[Outcome]:
        references = [self.references[column, self.rows[at].reference] for at, column in keys]
        jobs = []
        for number, (at, column) in enumerate(keys):
            jobs.append(Job(self._changed(at, column).name, self.rows[at].placement, number))
        return compute_elsewhere(jobs, self.sample, references, self.explain, variables(environment), self.stopped)

    def _collect(self, waiting: Sequence[tuple[Sequence[tuple[int, int]], Future[list[Outcome]]]]) -> None:
        for number, (keys, future) in enumerate(waiting, start=1):
            _log.info("process %d of %d: %s", number, len(waiting), self.rows[keys[0][0]].label)
            self.outcomes.update(zip(keys, future.result()))

    def record(self) -> Invariance:
        """Return the table as a record, with each distinct change explained once."""
        changes: dict[tuple[int, Placement, str], Change] = {}
        rows = []
        for at, row in enumerate(self.rows):
            cells = [self._cell(at, column, changes) for column in range(len(self.chosen))]
            rows.append(
                Row(
                    kind=row.kind,
                    label=row.label,
                    against=row.against,
                    batch=row.placement.size,
                    position=row.placement.position,
                    settings={name: SettingRecord.model_validate(each) for name, each in row.settings.items()},
                    cells=cells,
                )
            )
        return Invariance(
            environment=environment(),
            case=CaseRecord.of_case(self.sample),
            samples=len(samples(self.sample)),
            implementations=[each.name for each in self.chosen],
            rows=rows,
            changes=list(changes.values()),
        )

    def _cell(self, at: int, column: int, changes: dict[tuple[int, Placement, str], Change]) -> Cell:
        row, name = self.rows[at], self.chosen[column].name
        setting = self.setting(at, column)
        if setting is None:
            return Cell(implementation=name, applies=False, reason=row.reason)
        if (at, column) not in self.outcomes:
            reason = "it has no name by which another process could import it"
            return Cell(implementation=name, applies=False, reason=reason)
        outcome = self.outcomes[at, column]
        if outcome.y is None:
            return Cell(implementation=name, reason=outcome.error)
        reference = self.references[column, row.reference]
        differs = ~same_bits(outcome.y, reference)
        if not differs.any():
            return Cell(implementation=name, different=0)
        key = column, row.reference, digest(outcome.y)
        if key not in changes:
            explained, explanation = self._explanation(column, row, outcome)
            changes[key] = Change(
                implementation=name,
                conditions=[],
                different=int(differs.sum()),
                elements=differs.size,
                explained=explained,
                explanation=explanation,
            )
        changes[key].conditions.append(row.label)
        finite = differs & np.isfinite(outcome.y) & np.isfinite(reference)
        left, right = outcome.y[finite], reference[finite]
        return Cell(
            implementation=name,
            different=int(differs.sum()),
            max_abs=float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max(initial=0.0)),
            max_ulp=int(ulp_distance(left, right).max(initial=0)),
            change=list(changes).index(key),
        )

    def _explanation(self, column: int, row: Condition, outcome: Outcome) -> tuple[bool, str]:
        """Return whether both orders give every bit, and where they diverge."""
        if not self.explain:
            return False, "Not explained: the output is large (--explain reveals its orders)."
        each = Placed(self.chosen[column], row.reference)
        before = self._order(column, self.references[column, row.reference], each)
        if before.order is None or outcome.order is None:
            return False, f"Not explained: {before.error or outcome.error}."
        orders = [
            dataclasses.replace(order, implementation=label)
            for order, label in ((before.order, row.against), (outcome.order, row.label))
        ]
        sentence = _compared(*orders)
        return all(order.revealed == 1 for order in orders), sentence[0].upper() + sentence[1:]


def _compared(a: AccumulationOrder, b: AccumulationOrder) -> str:
    """Return where two orders diverge; if nowhere, in which measured property of the arithmetic they differ."""
    if any(a.outcome(int(i)) != b.outcome(int(j)) for i, j in {*zip(a.labels.ravel(), b.labels.ravel())}):
        return divergence(a, b)
    left, right = a.fingerprint.to_json(), b.fingerprint.to_json()
    facts = [
        f"{words} {left[name]} against {right[name]}" for name, words in _FACTS.items() if left[name] != right[name]
    ]
    if facts:
        return f"{a.implementation} and {b.implementation} add in the same order, with {', '.join(facts)}."
    return f"{a.implementation} and {b.implementation} add in the same order: the order does not explain the change."


def _chosen(implementations: Sequence[str | Implementation] | None) -> list[Implementation]:
    if isinstance(implementations, str):
        implementations = [implementations]
    asked = [name for name in DEFAULT if not is_exact(name)] if implementations is None else implementations
    chosen = [implementation(each) if isinstance(each, str) else each for each in asked]
    for each in chosen:
        if not all(hasattr(each, member) for member in ("name", "run")):
            raise TypeError(f"`implementations` has {each!r}, expected names, or objects with a name and run")
    names = [each.name for each in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`implementations` is {names}, expected at least one, each once")
    return chosen


def _sample(case: Case) -> Case:
    """Return the case of the first sample."""
    g = case.geometry
    if 0 in g.output_shape or 0 in g.x_shape:
        raise ValueError(f"`case` has input {g.x_shape} and output {g.output_shape}, expected at least one element")
    return case.replace(x=case.x.reshape(-1, *g.x_shape[len(g.batch) :])[:1])


def _name_elsewhere(each: Implementation) -> str:
    """Return the name by which another process finds an implementation; empty if there is none."""
    if not isinstance(each, Implementation):
        return ""
    try:
        return each.name if implementation(each.name).name == each.name else ""
    except (ValueError, ImplementationError):
        return ""
