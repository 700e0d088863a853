"""The place of the bias in the sum: its start, or its end."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw.auto import choose
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.methods import METHODS
from jaxdw.onednn import padding_fits


def starts_from_bias(method: str, geometry: Geometry) -> bool:
    """Return True if the sum of a method starts from the bias, and False if the bias is added at the end."""
    order = METHODS[choose(geometry, "cpu") if method == "auto" else method].order
    return order == "raster" and bias_comes_first(geometry)


def bias_comes_first(geometry: Geometry) -> bool:
    """Return True if PyTorch's convolution on CPU starts its sum from the bias, and False if it adds the bias last.

    oneDNN's depthwise kernel (`jit_uni_dw_convolution`) starts from the bias. PyTorch uses it if all of these hold:

    1. There are one or two spatial axes, and no channel multiplier.
    2. The padding fits (`padding_fits`); a symbolic size of `jax.export` counts as large.

    Its other kernels add the bias last, and so do its transposed convolutions. Padding that PyTorch's `padding=` cannot
    express counts as padded beforehand.
    """
    padding = geometry.symmetric_padding or (0,) * geometry.rank
    outputs = geometry.output_spatial[-1]
    return (
        geometry.multiplier == 1
        and not geometry.from_last_tap
        and geometry.rank < 3
        and padding_fits(padding, geometry.spans, outputs if isinstance(outputs, int) else sys.maxsize)
    )


def add_bias(y: jax.Array, bias: jax.Array, result: np.dtype) -> jax.Array:
    """Return y plus the bias.

    The bias is rounded before: XLA:CPU would contract a product that the program has as its bias.
    """
    (bias,) = in_memory(bias)
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(result)
