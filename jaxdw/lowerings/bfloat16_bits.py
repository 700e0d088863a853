"""bfloat16 by its bits: XLA:CPU makes a float32 copy of every bfloat16 array that is sliced, gathered or padded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def stored(x: jax.Array) -> jax.Array:
    """x as what costs no copy to slice, gather and pad with zeros: bfloat16 as uint16, another dtype as it is."""
    return lax.bitcast_convert_type(x, np.uint16) if x.dtype == jnp.bfloat16 else x


def widened(value: jax.Array, dtype: np.dtype) -> jax.Array:
    """What is stored so, exactly, in a dtype at least as wide as float32."""
    if value.dtype != np.uint16:
        return value.astype(dtype)
    return lax.bitcast_convert_type(value.astype(np.uint32) << np.uint32(16), np.float32).astype(dtype)
