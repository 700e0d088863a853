"""NumPy: the correctly rounded result."""

from __future__ import annotations

import numpy as np

from bridge import numerics
from bridge._implementations.algorithm import Algorithm, Knob, time_calls
from bridge.case import Case
from bridge.numerics import FLOAT64, Arithmetic

KNOBS: dict[str, Knob] = {}


def exact(case: Case) -> np.ndarray:
    return numerics.exact(case).value


def input_gradient(case: Case, dy: np.ndarray) -> np.ndarray:
    return numerics.exact_input_gradient(case, dy).value


def rounded_once(case: Case) -> Arithmetic:
    return Arithmetic.of(case.dtype, product=FLOAT64, accumulator=FLOAT64)


ALGORITHMS = {
    "exact": Algorithm(
        exact,
        rounded_once,
        "exact",
        "bridge.numerics.exact(case).value",
        lambda case, repetitions: time_calls(lambda: exact(case), repetitions),
        input_gradient,
    )
}
