"""Statistical tests of whether the errors of an output look random, as rounding does.

If errors are random, an alarm has a probability below 1e-11.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bridge.diagnosis.localisation.faults import designs
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected

#: Most errors whose gradient by the input is computed, and draws of signs: the real ones and random ones.
_ERRORS = 1 << 14
_DRAWS = 33


def systematic(output: Output, expected: Expected) -> bool:
    """Return whether y - expected correlates with a tap, or has an offset, in some channel. Rounding has neither.

    If errors are random, whatever their size, a regression's t-statistic is beyond 7 with a probability below 1e-11.
    Windows that lie mostly in the padding are left out: many differ in one number only, and so do their errors.
    """
    if output.target.quantity != "y":
        return False
    count = output.target.exact.products.count
    filled = np.broadcast_to(2 * count >= count.max(), output.y.shape)
    for _, design, residual, _ in designs(output, np.flatnonzero(filled & np.isfinite(output.y)), expected):
        rows, columns = design.shape
        if rows < 4 * columns:
            continue
        beta, _, rank, _ = np.linalg.lstsq(design, residual, rcond=1e-9)
        noise = residual - design @ beta
        variance = noise @ noise / max(1, rows - rank)
        standard_error = np.sqrt(np.maximum(np.diag(np.linalg.pinv(design.T @ design)) * variance, 0))
        if (np.abs(beta) > 7 * standard_error).any():
            return True
    return False


def follows_inputs(output: Output, expected: Expected) -> bool:
    """Return whether y - expected looks like the effect of errors of the input, and not like rounding of the sum.

    Errors d of the input make r = K d, so that K' r is greater than for errors that are independent from output to
    output. Independent errors keep their distribution if their signs are drawn anew. So K' r is compared with that of
    random signs; it is beyond 7 standard deviations by chance with a probability below 1e-11.
    """
    g = output.target.case.geometry
    if output.target.quantity != "y" or g.taps == 1 or not output.y.size:
        return False
    batch = tuple(slice(1) for _ in g.batch)
    features = slice(min(g.channels, max(1, _ERRORS // math.prod(g.output_spatial) // g.multiplier)) * g.multiplier)
    residual = (output.y.astype(np.float64) - expected.reference)[batch][..., features].reshape(*g.output_spatial, -1)
    residual[~np.isfinite(residual)] = 0
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (_DRAWS, *residual.shape))
    signs[0] = 1
    kernel = output.target.case.kernel[..., 0, features].astype(np.float64)
    back = np.zeros((_DRAWS, *(n + 1 for n in g.spatial), residual.shape[-1]))  # the last index is padding
    for tap in np.ndindex(g.kernel_size):
        index: tuple[Any, ...] = np.ix_(*(source[:, t] for source, t in zip(g.sources, tap)))
        np.add.at(back, (slice(None), *index), signs * (residual * kernel[tap]))
    inside = (slice(None), *(slice(n) for n in g.spatial))
    by_input = back[inside].reshape(_DRAWS, -1, residual.shape[-1] // g.multiplier, g.multiplier).sum(axis=-1)
    power = (by_input**2).sum(axis=(1, 2))
    return bool(power[0] - power[1:].mean() > 7 * power[1:].std())
