"""Test for one-sided errors: within the bound of rounding, and yet not random.

Rounding to nearest errs up as often as down, by symmetry. The exception is a share of at most u of the cases, because
the numbers that are rounded are not uniformly distributed within a unit in the last place. So of n independent errors
the share of one sign is beyond 1/2 + u + t with probability 2 exp(-2 n t^2) at most (Hoeffding 1963). Elements with the
same exact result count once: equal windows have equal errors.

Reference. W. Hoeffding, Probability inequalities for sums of bounded random variables, JASA 58, 1963.
"""

from __future__ import annotations

import math

import numpy as np

from bridge.diagnosis.output import Output
from bridge.numerics import format_of

#: Probability of a false alarm on one output, divided among the tests of it.
_FALSE_ALARM = 1e-9


def one_sided(output: Output) -> str:
    """Return the direction of the errors, up or away from zero, in all of y or in one channel; empty for none."""
    reference, doubt = output.target.exact.reference, output.target.exact.reference_error
    with np.errstate(all="ignore"):
        error = output.y.astype(np.float64) - reference
        counts = np.isfinite(error) & (np.abs(error) > doubt)
    features = output.y.shape[-1]
    channel = np.broadcast_to(np.arange(features), error.shape)[counts]
    error, reference = error[counts], reference[counts]
    _, once = np.unique(reference, return_index=True)
    error, reference, channel = error[once], reference[once], channel[once]
    everywhere = np.zeros_like(channel)
    signs = (
        (error > 0, ("above", "below")),
        (error * reference > 0, ("farther from zero than", "nearer to zero than")),
    )
    chance = _FALSE_ALARM / (2 * (1 + features))
    for positive, (way, other) in signs:
        up, n, hit = _beyond_chance(channel, positive, features, chance, output)
        if 0 < 2 * len(hit) <= features:
            group, words = channel, f" of channel {hit[0]}{f' (and {len(hit) - 1} more)' if len(hit) > 1 else ''}"
        else:
            group, words = everywhere, ""
            up, n, hit = _beyond_chance(everywhere, positive, 1, chance, output)
        if len(hit):
            first, mine = hit[0], group == hit[0]
            lie = f"{max(up[first], n[first] - up[first])} of the {n[first]} elements{words} with an error lie"
            return (
                f"{output.name} is one-sided: {lie} {way if 2 * up[first] > n[first] else other} the exact result, "
                f"{_mean_ulp(error[mine], reference[mine], output):+.2g} ULP on average. That is a systematic error: "
                f"by rounding to nearest alone its probability is below {_FALSE_ALARM:g}"
            )
    return ""


def _beyond_chance(
    group: np.ndarray, positive: np.ndarray, groups: int, probability: float, output: Output
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(positive errors, errors)` of each group, and the groups with more of one sign than chance gives."""
    n = np.bincount(group, minlength=groups)
    up = np.bincount(group, positive, groups).astype(int)
    with np.errstate(all="ignore"):
        chance = np.sqrt(math.log(2 / probability) / (2 * n))
        share = np.maximum(up, n - up) / n
    return up, n, np.flatnonzero(share > 0.5 + output.arithmetic.output.unit_roundoff + chance)


def _mean_ulp(error: np.ndarray, reference: np.ndarray, output: Output) -> float:
    """Return the mean of the signed error in units in the last place."""
    fmt = format_of(output.y.dtype)
    exponent = np.maximum(np.frexp(reference)[1] - 1, fmt.min_exponent)
    return float(np.mean(error / np.ldexp(1.0, exponent - fmt.precision + 1)))
