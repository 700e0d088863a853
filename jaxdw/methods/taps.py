"""Shifted multiply-add, without forming windows: taps, in the order of PyTorch's convolution on CPU, and variants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw import primitive
from jaxdw._arrays import PrecisionPair, accumulator
from jaxdw.choice import choose
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
    `precision` has nothing to relax here, nor in the methods below: products and sums are elementwise and never rounded
    below their dtype.
    """
    del precision
    return _sum("taps", x, kernel, bias, geometry, result)


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
    return _sum("rows", x, kernel, bias, geometry, result)


def pallas(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """The sum of `taps`, and derivatives alike, by the kernels of `jaxdw.sums.triton` and `jaxdw.sums.mosaic`.

    On a CPU they are interpreted, operation by operation: the same sums, for tests, and slow. On backends other than
    NVIDIA's and TPUs there are none, which is an error.
    """
    del precision
    return _sum("pallas", x, kernel, bias, geometry, result)


def automatic(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """That of the others which `jaxdw.choice` names for the platform that the program is compiled for."""
    del precision
    return _sum("auto", x, kernel, bias, geometry, result)


def starts_from_bias(method: str, geometry: Geometry) -> bool:
    """Whether the sum of a method starts from the bias, rather than that the bias is added to it at the end."""
    in_raster_order = method in ("taps", "pallas") or (method == "auto" and choose(geometry, "cpu") == "taps")
    return in_raster_order and bias_comes_first(geometry)


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


def _sum(
    method: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, result: np.dtype
) -> jax.Array:
    program = primitive.PROGRAMS[method]
    if bias is None or starts_from_bias(method, geometry):
        return primitive.conv(x, kernel, bias, geometry, program, result)
    y = primitive.conv(x, kernel, None, geometry, program, accumulator(result))
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(result)
