"""Parameters and settings of a layer in both frameworks: equal in every bit, or the first that differs is named.

A wrong parameter may change a result by less than rounding may, and a wrong momentum changes none in inference.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bridge.diagnosis import Comparison, Verdict
from bridge.numerics import same_bits, ulp_distance


def of_other_bits(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """Say where a parameter differs from PyTorch's, both in PyTorch's layout; nothing where no bit does."""
    differs = ~same_bits(ours, theirs)
    if not differs.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    ulp = int(ulp_distance(ours[differs], theirs[differs]).max())
    return (
        f"{name} has other bits in {np.count_nonzero(differs)} of {differs.size} elements, by at most {ulp} ULP; "
        f"the first is {at} in PyTorch's layout: {ours[at]!s} in JAX, {theirs[at]!s} in PyTorch"
    )


def with_momentum(found: Comparison, ours: float, theirs: float) -> Comparison:
    """Return CONVENTION where the weights of the new statistics differ; else `found`."""
    if _is_near(ours, theirs):
        return found
    turned = _is_near(1 - ours, theirs)
    return dataclasses.replace(
        found,
        verdict=Verdict.CONVENTION,
        name="momentum",
        cause=f"in training JAX gives new statistics the weight {ours:.6g}, PyTorch {theirs:.6g}"
        + ("; Flax's momentum is the weight of the old ones, 1 minus PyTorch's" if turned else ""),
        fix=f"momentum={1 - theirs:.6g} in JAX",
    )


def _is_near(a: float, b: float) -> bool:
    """Return whether two numbers are the same in float32, as both frameworks use them, but for 1 - m rounded twice."""
    return abs(np.float32(a) - np.float32(b)) <= np.spacing(np.float32(1)) / 2
