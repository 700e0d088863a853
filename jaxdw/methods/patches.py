"""patches: `lax.conv_general_dilated_patches`, then one einsum over the taps."""

from __future__ import annotations

import jax
import numpy as np

from jaxdw._arrays import PrecisionPair, accumulator, cast
from jaxdw.geometry import Geometry
from jaxdw.windows import contract_windows, one_hot_windows


def patches(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """Extraction and contraction at the same precision.

    Extraction is itself a convolution with a one-hot kernel: see `jaxdw.unfold` for what that does to infinities,
    NaN and subnormals, and, on GPU and TPU, to the input's low bits at default precision.
    """
    x, kernel, bias = cast(accumulator(result), x, kernel, bias)
    windows = one_hot_windows(x, geometry, None if precision is None else precision[0])
    return contract_windows(windows, kernel, bias, precision).astype(result)
