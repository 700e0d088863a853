"""bfloat16 as its bits: XLA:CPU makes a float32 copy of every bfloat16 array that is sliced, gathered or padded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def stored(x: jax.Array) -> jax.Array:
    """Return bfloat16 as uint16, which XLA slices, gathers and pads without a copy; another dtype as it is."""
    return lax.bitcast_convert_type(x, np.uint16) if x.dtype == jnp.bfloat16 else x


def widened(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """Return the numbers that `stored` returned, exactly, in a dtype at least as wide as float32."""
    if value.dtype != np.uint16:
        return value.astype(dtype)
    return lax.bitcast_convert_type(value.astype(np.uint32) << np.uint32(16), np.float32).astype(dtype)
