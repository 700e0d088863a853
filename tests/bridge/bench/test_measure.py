"""Ways are checked before they are timed, and take turns."""

import numpy as np
import pytest

from bridge.bench import measure
from bridge.bench.problems import Problem, Way, problem
from bridge.bench.reference import convolve
from bridge.bench.suites import DepthwiseLayer

NAME = "6x5x4:3:2"


@pytest.fixture
def layers(seed) -> Problem:
    return problem("layers", NAME, (), 2, seed)


def numpy_way(name, compute=convolve, log=None):
    layer = DepthwiseLayer.parse(NAME)

    def start(arrays):
        def call():
            if log is not None:
                log.append((name, arrays["x"].flat[0]))
            return compute(arrays["x"], arrays["w"], layer)

        return call

    return Way(name, start, lambda y: {"y": y})


def shifted(x, w, layer):
    return convolve(np.roll(x, 1, axis=1), w, layer)


def in_bfloat16(x, w, layer):
    return convolve((x.view(np.uint32) & 0xFFFF0000).view(np.float32), w, layer)


def without_the_last_image(x, w, layer):
    return np.concatenate([convolve(x[:-1], w, layer), np.zeros((1, *convolve(x[-1:], w, layer).shape[1:]), x.dtype)])


@pytest.mark.parametrize("mistake", [shifted, in_bfloat16, without_the_last_image])
def test_a_wrong_way_is_not_timed_and_its_clean_twin_is(mistake, layers):
    log = []
    wrong, right = measure.measure(layers, [numpy_way("wrong", mistake, log), numpy_way("right")], 3, 0)
    assert "y is wrong in" in wrong.wrong and wrong.milliseconds == [] and wrong.median is None
    assert len(log) == 1  # the check, and nothing after it
    assert (
        right.wrong == right.failed == "" and len(right.milliseconds) == 3 and right.low <= right.median <= right.high
    )


def test_a_way_that_fails_says_why_and_the_others_are_timed(layers):
    def fails(x, w, layer):
        raise NotImplementedError("no kernel\nat all")

    failed, right = measure.measure(layers, [numpy_way("bad", fails), numpy_way("right")], 1, 0)
    assert failed.failed == "NotImplementedError: no kernel" and failed.milliseconds == []
    assert right.median is not None


def test_in_every_round_each_way_runs_once_in_changing_order_on_inputs_in_rotation(layers):
    log = []
    names = ("jaxdw", "torch", "other")
    measure.measure(layers, [numpy_way(name, log=log) for name in names], 9, seed=1)
    timed = log[-27:]
    rounds = [timed[k : k + 3] for k in range(0, 27, 3)]
    assert all({name for name, _ in each} == set(names) for each in rounds)
    assert len({tuple(name for name, _ in each) for each in rounds}) > 1
    firsts = [arrays["x"].flat[0] for arrays in layers.inputs]
    assert [{first for _, first in each} for each in rounds] == [{firsts[k % 3]} for k in range(9)]


def test_alone_a_way_runs_on_the_other_inputs_before_it_is_timed(monkeypatch, layers):
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0)
    log = []
    measure.measure(layers, [numpy_way(name, log=log) for name in ("jaxdw", "torch")], 2, 0, alone=True)
    turns = [log[-12:][k : k + 3] for k in range(0, 12, 3)]
    firsts = [arrays["x"].flat[0] for arrays in layers.inputs]
    assert all(len({name for name, _ in turn}) == 1 for turn in turns)
    assert [[first for _, first in turn] for turn in turns] == [[firsts[k] for k in (1, 2, 0)]] * 2 + [
        [firsts[k] for k in (2, 0, 1)]
    ] * 2


def test_a_filled_round_enqueues_calls_and_waits_once(monkeypatch, layers):
    monkeypatch.setattr(measure, "MOST_ENQUEUED", 5)
    log = []
    way = numpy_way("torch", log=log)
    way = Way(way.name, way.start, way.fetch, wait=lambda result: log.append("wait"))
    (record,) = measure.measure(layers, [way], 2, 0, fill=1e4)
    firsts = [arrays["x"].flat[0] for arrays in layers.inputs]
    assert log[-7] == log[-1] == "wait"
    assert [first for _, first in log[-6:-1]] == [firsts[k] for k in (0, 1, 2, 0, 1)]
    assert len(record.milliseconds) == 2


@pytest.mark.parametrize(
    "name, seconds, rounds, expected",
    [
        ("jaxdw", 1e-3, 15, 15),
        ("torch", 1.0, 15, 9),
        ("torch", 1.0, 4, 4),
        ("lax.grouped", 0.1, 15, 3),
        ("lax.grouped", 0.02, 15, 10),
        ("lax.grouped", 1.0, 2, 2),
    ],
)
def test_slow_ways_run_in_fewer_rounds(name, seconds, rounds, expected):
    assert measure._turns(name, seconds, rounds) == expected


def test_rounds_without_a_slow_way_are_evenly_distributed(monkeypatch, layers):
    monkeypatch.setattr(measure, "_turns", lambda name, *_: 3 if name == "slow" else 9)
    slow, fast = measure.measure(layers, [numpy_way("slow"), numpy_way("fast")], 9, 0)
    assert [ms is not None for ms in slow.milliseconds] == [False, False, True] * 3
    assert None not in fast.milliseconds


def test_a_row_has_the_same_data_whatever_is_measured_with_it(seed):
    first, second = (problem("gradients", NAME, (), 2, seed) for _ in range(2))
    for name, array in first.inputs[2].items():
        assert (array == second.inputs[2][name]).all()
    for a, b in zip(first.checks(), second.checks()):
        assert (a.arrays["x"] == b.arrays["x"]).all()
    assert not (problem("layers", NAME, (), 2, seed).inputs[0]["x"] == first.inputs[0]["x"]).all()


@pytest.mark.parametrize("suite, arrays", [("layers", 1), ("gradients", 2), ("windows", 1)])
def test_the_bytes_are_those_of_operands_and_results(suite, arrays, seed):
    each = problem(suite, NAME, (), 2, seed)
    elements = sum(a.size for name, a in each.inputs[0].items() if name != "dy") + 2 * 3 * 3 * 4
    assert each.nbytes == arrays * 4 * elements
    assert each.flops == {"layers": 2 * 9 * 72, "gradients": 6 * 9 * 72, "windows": None}[suite]
