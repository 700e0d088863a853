"""taps and rows: shifted multiply-add, without forming windows; taps in the order of PyTorch's convolution on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw import primitive
from jaxdw._arrays import PrecisionPair, accumulator
from jaxdw.geometry import Geometry


def taps(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """y = fma(x_n, w_n, ... fma(x_1, w_1, start)) in raster order, start being the bias, or 0 and the bias added last.

    XLA:CPU contracts each multiply and add to one FMA. For float32 in PyTorch's contiguous layout and at least two
    channels the order is that of `F.conv2d` (oneDNN), and so are the bits, but for two things: XLA:CPU flushes
    subnormal numbers, and a weight that is infinite or NaN counts under padding, which oneDNN skips.
    `precision` has nothing to relax here: products and sums are elementwise and never rounded below their dtype.
    """
    del precision
    return in_raster_order(x, kernel, bias, geometry, "raster", result)


def rows(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """One chain of FMAs for each row of the kernel (along its last axis), these sums added in turn, the bias last.

    Not PyTorch's order: large kernels run faster, since the shorter chains do not wait for each other.
    """
    del precision
    return _bias_last(x, kernel, bias, geometry, "rows", result)


def in_raster_order(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    program: primitive.Program,
    result: np.dtype,
) -> jax.Array:
    """The sum of `taps`, by any program that adds in raster order."""
    if bias is not None and bias_comes_first(geometry):
        return primitive.conv(x, kernel, bias, geometry, program, result)
    return _bias_last(x, kernel, bias, geometry, program, result)


def bias_comes_first(geometry: Geometry) -> bool:
    """Whether PyTorch's convolution on CPU starts its sum from the bias; elsewhere it adds the bias at the end.

    oneDNN's depthwise kernel starts from the bias. It does not serve a channel multiplier, three spatial axes, or
    padding as wide as the dilated kernel; the kernels that PyTorch takes then add the bias last. Seen with torch 2.13
    on x86-64; `jaxdw doctor` checks it where it runs. With a multiplier and few output positions PyTorch's matrix
    product adds in yet another order, which this method does not follow.
    """
    padding = geometry.symmetric_padding or (0,) * geometry.rank  # what `padding=` cannot say is padded beforehand
    return (
        geometry.multiplier == 1
        and geometry.rank < 3
        and all(amount < span for amount, span in zip(padding, geometry.spans))
    )


def _bias_last(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    program: primitive.Program,
    result: np.dtype,
) -> jax.Array:
    if bias is None:
        return primitive.conv(x, kernel, None, geometry, program, result)
    y = primitive.conv(x, kernel, None, geometry, program, accumulator(result))
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(result)
