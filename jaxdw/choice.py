"""What "auto" stands for."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxdw.geometry import Geometry


class _Choice(NamedTuple):
    platform: str
    least_taps: int
    method: str


#: The first line that fits; elsewhere "taps". `jaxdw bench --tune` measures the methods where it runs; the line for
#: CPUs is from two cores of an x86-64 with AVX-512, jax 0.10.2: under 49 taps the order of PyTorch's sum (taps) costs
#: less than a tenth; from 7x7 on its one long chain costs up to a third. Dtype, rank and size made no difference.
AUTO = (_Choice("cpu", 49, "rows"),)


def choose(geometry: Geometry, platform: str | None = None) -> str:
    """The method that "auto" stands for in a program for a JAX platform; None: the default one.

    >>> choose(Geometry.of((8, 56, 56, 96), (7, 7, 1, 96)), "cpu")
    'rows'
    """
    platform = platform or jax.default_backend()
    fitting = (c.method for c in AUTO if c.platform == platform and geometry.taps >= c.least_taps)
    return next(fitting, "taps")
