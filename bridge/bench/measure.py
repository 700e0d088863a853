"""Times of several ways to compute one thing: checked first, then interleaved round by round.

In every round each way runs once, in an order shuffled anew, on inputs in rotation. What slows the machine for a while
then slows all ways alike, and no way always runs behind the same other. Times are whole calls as a user makes them,
dispatch included, with the result waited for.

`alone` measures each way as in a loop of its own: before a timed call comes a pause, in which the threads of the way
before it come to rest, and then calls on the other inputs, which are not timed.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bridge.bench.problems import Problem, Way
from bridge.bench.schema import EAGER, OURS, WayRecord

#: These take part in every round, but for what would take longer than this many seconds each, and then in nine.
RIVALS = (OURS, *EAGER, "torch.compile")
RIVAL_SECONDS, RIVAL_ROUNDS = 2.0, 9
#: The others, many times slower, in fewer.
SLOW_SECONDS, SLOW_ROUNDS = 0.2, 3

#: Of `alone`; OpenMP's threads spin for less unless told otherwise.
PAUSE_SECONDS = 0.02


def measure(problem: Problem, ways: Sequence[Way], rounds: int, seed: int, *, alone: bool = False) -> list[WayRecord]:
    """The record of each way, in their order. A way that is wrong or fails is not timed, and says so."""
    records: dict[str, WayRecord] = {}
    first_calls: dict[str, float] = {}
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    checks = problem.checks()
    for way in ways:
        try:
            wrong, first_calls[way.name] = _checked(way, checks)
            if wrong:
                records[way.name] = WayRecord.without_times(way.name, wrong=wrong)
            else:
                calls[way.name] = [way.start(arrays) for arrays in problem.inputs]
        except Exception as error:  # of a compiler or a framework: any kind, and the other ways still count
            line = next(iter(str(error).splitlines()), "")
            records[way.name] = WayRecord.without_times(way.name, failed=f"{type(error).__name__}: {line}")
    for name, times in interleaved(calls, rounds, seed, alone=alone).items():
        records[name] = WayRecord.of(name, times, first_calls[name])
    return [records[way.name] for way in ways]


def interleaved(
    calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, seed: int, *, alone: bool = False
) -> dict[str, list[float | None]]:
    """Milliseconds of each name in each round, None where it sat out; `calls` has one call an input, in rotation."""
    turns = {name: _turns(name, _warmed_up(each), rounds) for name, each in calls.items()}
    times: dict[str, list[float | None]] = {name: [None] * rounds for name in calls}
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # evenly spread: a way with n turns has had turn * n // rounds of them so far
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
                times[name][turn] = (time.perf_counter() - start) * 1e3
    finally:
        if collecting:
            gc.enable()
    return times


def _checked(way: Way, checks: Sequence[Any]) -> tuple[str, float]:
    """What is wrong with a way's results, and the seconds of its first call."""
    first = 0.0
    for number, check in enumerate(checks):
        call = way.start(check.arrays)
        start = time.perf_counter()
        result = call()
        first = first if number else time.perf_counter() - start
        if wrong := check.misfit(way.fetch(result)):
            return wrong, first
    return "", first


def _warmed_up(calls: Sequence[Callable[[], Any]]) -> float:
    """Runs every call; the seconds of the quickest."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _turns(name: str, seconds: float, rounds: int) -> int:
    """In how many of the rounds a way runs, that takes these seconds."""
    budget, least = (RIVAL_SECONDS, RIVAL_ROUNDS) if name in RIVALS else (SLOW_SECONDS, SLOW_ROUNDS)
    return min(rounds, max(least, int(budget / seconds)))
