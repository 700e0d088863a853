"""NumPy: the correctly rounded result."""

from __future__ import annotations

import numpy as np

from bridge import numerics
from bridge.case import Case
from bridge.implementations import Algorithm, Knob
from bridge.numerics import FLOAT64, Arithmetic

KNOBS: dict[str, Knob] = {}


def exact(case: Case) -> np.ndarray:
    return numerics.exact(case).value


def rounded_once(case: Case) -> Arithmetic:
    return Arithmetic.of(case.dtype, product=FLOAT64, accumulator=FLOAT64)


ALGORITHMS = {"exact": Algorithm(exact, rounded_once, "the exact sum of products, rounded once")}
