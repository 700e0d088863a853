"""Times of several ways to compute one thing: checked first, then interleaved round by round.

In every round each way runs once, in an order shuffled anew, on inputs in rotation. A machine that slows down for a
while then slows all ways equally, and no way always runs after the same other way. Times are whole calls as a user
makes them, dispatch included. The call waits for its result.

With `alone`, each way is measured as in a loop of its own. Before a timed call comes a pause, in which the threads of
the previous way come to rest, and then calls on the other inputs, which are not timed.

With `fill`, a round enqueues as many calls as take so many milliseconds, and waits for the last. This is for devices
that compute while Python goes on.
"""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from bridge.bench.problems import Problem, Way
from bridge.bench.reference import Check
from bridge.bench.schema import EAGER, OURS, WayRecord

#: These ways take part in every round, unless that takes more than so many seconds in all; then in nine rounds.
RIVALS = (OURS, *EAGER, "torch.compile")
RIVAL_SECONDS, RIVAL_ROUNDS = 2.0, 9
#: The other ways are many times slower, and take part in fewer rounds.
SLOW_SECONDS, SLOW_ROUNDS = 0.2, 3

#: The pause of `alone`; OpenMP's threads spin for less, unless they are told otherwise.
PAUSE_SECONDS = 0.02

#: The most calls that a round enqueues.
MOST_ENQUEUED = 1000


def measure(
    problem: Problem,
    ways: Sequence[Way],
    rounds: int,
    seed: int,
    *,
    alone: bool = False,
    fill: float | None = None,
    time_wrong: bool = False,
) -> list[WayRecord]:
    """Return the record of each way, in their order.

    A way that fails is not timed, nor is a way whose result is wrong, unless `time_wrong`. The record says why.
    """
    first_calls: dict[str, float] = {}
    wrong: dict[str, str] = {}
    failed: dict[str, str] = {}
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    counts: dict[str, int] = {}
    checks = problem.checks()
    for way in ways:
        try:
            wrong[way.name], first_calls[way.name] = _checked(way, checks)
            if time_wrong or not wrong[way.name]:
                calls[way.name], counts[way.name] = started(way, problem.inputs, fill)
        except Exception as error:  # a compiler or a framework raises any kind, and the other ways still count
            failed[way.name] = first_line(error)
    times = interleaved(calls, rounds, seed, counts=counts, alone=alone)
    return [
        WayRecord.of(
            way.name,
            times.get(way.name, []),
            first_calls[way.name] if way.name in times else None,
            wrong=wrong.get(way.name, ""),
            failed=failed.get(way.name, ""),
        )
        for way in ways
    ]


def started(
    way: Way, inputs: Sequence[Mapping[str, Any]], fill: float | None = None
) -> tuple[Sequence[Callable[[], Any]], int]:
    """Return the calls of a round in rotation, one per input, and how many calls of the way each of them makes."""
    calls = [way.start(arrays) for arrays in inputs]
    if fill is None:
        return calls, 1

    def enqueue(count: int) -> None:
        for turn in range(count):
            result = calls[turn % len(calls)]()
        way.wait(result)

    enqueue(len(calls))
    start = time.perf_counter()
    enqueue(len(calls))
    seconds = (time.perf_counter() - start) / len(calls)
    count = max(1, min(MOST_ENQUEUED, round(fill / 1e3 / seconds)))
    return [functools.partial(enqueue, count)], count


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], Any]]],
    rounds: int,
    seed: int,
    *,
    counts: Mapping[str, int] = MappingProxyType({}),
    alone: bool = False,
) -> dict[str, list[float | None]]:
    """Return the milliseconds of each name in each round, None for rounds without it.

    `calls` has one call per input, in rotation. Its time is divided by the name's count, by default 1.
    """
    turns = {name: _turns(name, _warmed_up(each), rounds) for name, each in calls.items()}
    times: dict[str, list[float | None]] = {name: [None] * rounds for name in calls}
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # evenly distributed: a way with n turns has had turn * n // rounds of them so far
            due = [name for name, n in turns.items() if (turn + 1) * n // rounds > turn * n // rounds]
            order.shuffle(due)
            for name in due:
                *before, call = (calls[name][(turn + k) % len(calls[name])] for k in range(1, len(calls[name]) + 1))
                if alone:
                    time.sleep(PAUSE_SECONDS)
                    for other in before:
                        other()
                start = time.perf_counter()
                call()
                times[name][turn] = (time.perf_counter() - start) * 1e3 / counts.get(name, 1)
    finally:
        if collecting:
            gc.enable()
    return times


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _checked(way: Way, checks: Sequence[Check]) -> tuple[str, float]:
    """Return the mistake in a way's results, empty if there is none, and the seconds of its first call."""
    first = 0.0
    for number, check in enumerate(checks):
        call = way.start(check.arrays)
        start = time.perf_counter()
        result = call()
        way.wait(result)
        first = first if number else time.perf_counter() - start
        if wrong := check.misfit(way.fetch(result)):
            return wrong, first
    return "", first


def _warmed_up(calls: Sequence[Callable[[], Any]]) -> float:
    """Run every call; return the seconds of the quickest."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _turns(name: str, seconds: float, rounds: int) -> int:
    """Return the number of rounds for a way that takes these seconds."""
    budget, least = (RIVAL_SECONDS, RIVAL_ROUNDS) if name in RIVALS else (SLOW_SECONDS, SLOW_ROUNDS)
    return min(rounds, max(least, int(budget / seconds)))
