"""Tests of whether what an output differs by looks random, as rounding does.

They are statistical: an alarm has a probability below 1e-11 if errors are random.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bridge.diagnosis.faults import designs
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected

#: Elements that are carried back to the input, and random signs to compare with.
_BACK = 1 << 14
_DRAWS = 33


def systematic(output: Output, expected: Expected) -> bool:
    """Whether what y differs from `expected` by correlates with a tap or is offset, in some channel: not rounding.

    A regression's t-statistic beyond 7 has a chance below 1e-11 if errors are random, whatever their size. Windows that
    lie mostly in the padding are left out: many are the same but for one number, and so are their errors.
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
        spread = np.sqrt(np.maximum(np.diag(np.linalg.pinv(design.T @ design)) * variance, 0))
        if (np.abs(beta) > 7 * spread).any():
            return True
    return False


def follows_inputs(output: Output, expected: Expected) -> bool:
    """Whether what y differs from `expected` by is what errors of the input would do: not rounding of the sum.

    Errors d of the input make r = K d, so that K' r is greater than for errors that are independent from output to
    output. Those keep their distribution when their signs are drawn anew: K' r is compared with that of random signs,
    and is beyond 7 standard deviations by chance with a probability below 1e-11.
    """
    g = output.target.case.geometry
    if output.target.quantity != "y" or g.taps == 1 or not output.y.size:
        return False
    batch = tuple(slice(1) for _ in g.batch)
    features = slice(min(g.channels, max(1, _BACK // math.prod(g.output_spatial) // g.multiplier)) * g.multiplier)
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
