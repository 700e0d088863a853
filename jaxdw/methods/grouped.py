"""grouped: `lax.conv_general_dilated` with one group a channel, as `flax.nnx.Conv` calls it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw._arrays import PrecisionPair, accumulator, cast
from jaxdw.geometry import Geometry
from jaxdw.windows import dimension_numbers, flat_batch


def grouped(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """XLA's own convolution; which library or loop runs is the backend's choice."""
    x, kernel, bias = cast(accumulator(result), x, kernel, bias)
    return lax_grouped(x, kernel, bias, geometry, precision).astype(result)


def lax_grouped(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, precision: PrecisionPair
) -> jax.Array:
    """The same in the arrays' own dtype, narrow ones too, as `flax.nnx.Conv` calls it."""
    flat, padding = flat_batch(x, geometry)
    y = lax.conv_general_dilated(
        flat,
        kernel,
        geometry.strides,
        padding,
        lhs_dilation=geometry.input_dilation,
        rhs_dilation=geometry.kernel_dilation,
        dimension_numbers=dimension_numbers(geometry.rank),
        feature_group_count=geometry.channels,
        precision=precision,
    ).reshape(geometry.output_shape)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)
