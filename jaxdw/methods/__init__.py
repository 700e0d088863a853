"""The ways to compute a depthwise convolution, all the same call.

A method takes x `(*batch, *spatial, C)`, kernel `(*kernel_size, 1, C*M)`, bias `(C*M,)` or None, all of one floating
dtype, the checked `Geometry` (with no size zero in it), a precision and the dtype of the result, and returns
`(*batch, *output_spatial, C*M)`, summed in float32 or wider and rounded to that dtype once.
"""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np

from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry
from jaxdw.methods.grouped import grouped
from jaxdw.methods.patches import patches
from jaxdw.methods.taps import automatic as automatic
from jaxdw.methods.taps import pallas, rows, taps


class Method(Protocol):
    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        geometry: Geometry,
        precision: PrecisionPair,
        result: np.dtype,
    ) -> jax.Array: ...


METHODS: dict[str, Method] = {"taps": taps, "rows": rows, "pallas": pallas, "patches": patches, "grouped": grouped}
