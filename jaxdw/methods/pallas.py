"""The sum over the taps in raster order, by hand-written kernels for NVIDIA GPUs and TPUs."""

from __future__ import annotations

import jax
import numpy as np

from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry
from jaxdw.methods.taps import in_raster_order


def pallas(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """The sum of `taps`, and derivatives alike, by the kernels of `jaxdw.sums.triton` and `jaxdw.sums.mosaic`.

    On a CPU the kernels are interpreted, operation by operation: the same sums, for tests, and slow. On other backends
    there are none, which is an error. `precision` has nothing to relax here.
    """
    del precision
    return in_raster_order(x, kernel, bias, geometry, "pallas", result)
