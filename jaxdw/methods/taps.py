"""Shifted multiply-add, without forming windows: taps, in the order of PyTorch's convolution on CPU, and variants."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw import primitive
from jaxdw._arrays import PrecisionPair, accumulator
from jaxdw.choice import choose
from jaxdw.geometry import Geometry
from jaxdw.sums.boxes import materialized


def taps(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    precision: PrecisionPair,
    result: np.dtype,
) -> jax.Array:
    """y = fma(x_n, w_n, ... fma(x_1, w_1, start)) in raster order, start being the bias, or 0 and the bias added last.

    XLA:CPU contracts each multiply and add to one FMA. For float32 in PyTorch's contiguous layout, two channels or more
    and no channel multiplier, the order is that of `F.conv1d`, `F.conv2d` and `F.conv3d` on x86-64 (oneDNN), and so are
    the bits. docs/why-they-differ.md lists the few exceptions.
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

    oneDNN's depthwise kernel (`jit_uni_dw_convolution`) starts from the bias. It serves one or two spatial axes, no
    channel multiplier, padding below the dilated kernel, and padding along the last axis up to the number of outputs
    that it computes at once. The kernels that PyTorch takes elsewhere add the bias last. Padding that PyTorch's
    `padding=` cannot express counts as padded beforehand. Read in oneDNN 3.12, which torch 2.13 has, and seen on
    x86-64.
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
    """Outputs that oneDNN's depthwise kernel computes at once along the last axis: 6 with AVX-512, 4 without.

    ONEDNN_MAX_CPU_ISA, which oneDNN reads when it starts, can forbid AVX-512.
    """
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    avx512 = {"AVX512_SKX", "X86_V4"} & {*simd["baseline"], *simd["found"]}  # the older and the newer name
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return 6 if avx512 and not most.startswith(("SSE", "AVX2")) and most != "AVX" else 4


def _sum(
    method: str, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, result: np.dtype
) -> jax.Array:
    program = primitive.PROGRAMS[method]
    if bias is None or starts_from_bias(method, geometry):
        return primitive.conv(x, kernel, bias, geometry, program, result)
    y = primitive.conv(x, kernel, None, geometry, program, accumulator(result))
    return add_bias(y, bias, result)


def add_bias(y: jax.Array, bias: jax.Array, result: np.dtype) -> jax.Array:
    """y plus the bias, which is rounded before: XLA:CPU would contract a product that the program has as its bias."""
    (bias,) = lax.platform_dependent(bias, cpu=materialized, default=lambda bias: (bias,))
    return (y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)).astype(result)
