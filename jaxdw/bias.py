"""The place of the bias in the sum: its start, or its end."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw.auto import choose
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.methods import METHODS


def starts_from_bias(method: str, geometry: Geometry) -> bool:
    """Return True if the sum of a method starts from the bias, and False if the bias is added at the end."""
    order = METHODS[choose(geometry, "cpu") if method == "auto" else method].order
    return order == "raster" and bias_comes_first(geometry)


def bias_comes_first(geometry: Geometry) -> bool:
    """Return True if PyTorch's convolution on CPU starts its sum from the bias, and False if it adds the bias last.

    oneDNN's depthwise kernel (`jit_uni_dw_convolution`) starts from the bias. PyTorch uses it if all of these hold:

    1. There are one or two spatial axes, and no channel multiplier.
    2. The padding is smaller than the dilated kernel.
    3. The padding along the last axis is at most the number of outputs that the kernel computes at once.

    Its other kernels add the bias last. Padding that PyTorch's `padding=` cannot express counts as padded beforehand.
    Read in oneDNN 3.12, which torch 2.13 has, and seen on x86-64.
    """
    padding = geometry.symmetric_padding or (0,) * geometry.rank
    outputs, at_once = geometry.output_spatial[-1], outputs_at_once()
    if isinstance(outputs, int):  # a symbolic size of `jax.export` counts as larger
        at_once = min(outputs, at_once)
    return (
        geometry.multiplier == 1
        and geometry.rank < 3
        and all(amount < span for amount, span in zip(padding, geometry.spans))
        and padding[-1] <= at_once
    )


@functools.cache
def outputs_at_once() -> int:
    """Return how many outputs oneDNN's depthwise kernel computes at once along the last axis.

    They are 6 with AVX-512 and 4 without. ONEDNN_MAX_CPU_ISA, which oneDNN reads when it starts, can forbid AVX-512.
    """
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    avx512 = {"AVX512_SKX", "X86_V4"} & {*simd["baseline"], *simd["found"]}  # the older and the newer name
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return 6 if avx512 and not most.startswith(("SSE", "AVX2")) and most != "AVX" else 4


def add_bias(y: jax.Array, bias: jax.Array, result: np.dtype) -> jax.Array:
    """Return y plus the bias.

    The bias is rounded before: XLA:CPU would contract a product that the program has as its bias.
    """
    (bias,) = in_memory(bias)
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(result)
