"""The ways to compute a depthwise convolution, one file each, all the same call.

A method takes x `(*batch, *spatial, C)`, kernel `(*kernel_size, 1, C*M)`, bias `(C*M,)` or None, all of one floating
dtype that is also the accumulator's, the checked `Geometry` (with no size zero in its output) and a precision, and
returns `(*batch, *output_spatial, C*M)` of the same dtype.
"""

from __future__ import annotations

from typing import Protocol

import jax

from jaxdw._arrays import PrecisionPair
from jaxdw.geometry import Geometry
from jaxdw.methods.grouped import grouped
from jaxdw.methods.patches import patches
from jaxdw.methods.taps import taps


class Method(Protocol):
    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        geometry: Geometry,
        precision: PrecisionPair,
    ) -> jax.Array: ...


METHODS: dict[str, Method] = {"taps": taps, "patches": patches, "grouped": grouped}
