"""Medians, quartiles and means of measured times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Quartiles(NamedTuple):
    """The quartiles of some times, in their own unit. Half of the times lie from `low` to `high`."""

    low: float
    median: float
    high: float


def quartiles(times: Sequence[float]) -> Quartiles:
    """Return the quartiles, with linear interpolation between the ordered times (Hyndman & Fan's type 7).

    >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
    Quartiles(low=2.0, median=3.0, high=4.0)
    """
    if not times:
        raise ValueError("`times` is empty, expected at least one")
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Quartiles(low, median, high)


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the mean of ratios. The mean of b / a is one over the mean of a / b.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def interpolated(line: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at `at` of a line through points (size, value): straight in logarithms, level beyond its ends.

    >>> round(interpolated([(1.0, 10.0), (100.0, 1000.0)], 10.0), 6)
    100.0
    """
    sizes, values = (np.log(each) for each in zip(*line))
    return float(np.exp(np.interp(math.log(at), sizes, values)))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the p of the best fit cost = c * size**p: the slope of the least-squares line through the logarithms.

    >>> round(exponent([1, 10, 100], [3, 30, 300]), 6)
    1.0
    """
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(c) for c in costs]).slope
