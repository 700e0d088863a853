"""NumPy: the correctly rounded result."""

from __future__ import annotations

import time

import numpy as np

from bridge import numerics
from bridge.case import Case
from bridge.implementations.algorithm import Algorithm, Knob
from bridge.numerics import FLOAT64, Arithmetic

KNOBS: dict[str, Knob] = {}


def exact(case: Case) -> np.ndarray:
    return numerics.exact(case).value


def input_gradient(case: Case, dy: np.ndarray) -> np.ndarray:
    return numerics.exact_input_gradient(case, dy).value


def seconds(case: Case, repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        exact(case)
        times.append(time.perf_counter() - start)
    return times


def rounded_once(case: Case) -> Arithmetic:
    return Arithmetic.of(case.dtype, product=FLOAT64, accumulator=FLOAT64)


ALGORITHMS = {
    "exact": Algorithm(
        exact,
        rounded_once,
        "the exact sum of products, rounded once",
        "exact",
        "bridge.numerics.exact(case).value",
        seconds,
        input_gradient,
    )
}
