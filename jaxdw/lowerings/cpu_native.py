"""The convolution and its kernel's gradient on CPU by the compiled kernels of `jaxdw.native`.

docs/arithmetic.md states the order of each sum and where it is rounded. XLA changes nothing of it, whatever surrounds
the call, and compiles nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw import native
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import materialized
from jaxdw.lowerings.ordered_sum import Order
from jaxdw.native.calls import three
from jaxdw.padding import pad_repeated


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    order: Order,
    compute: np.dtype,
    dtype: np.dtype,
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)`: one chain of fused multiply-adds in raster order for each element."""
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    (x, kernel, *biases), geometry = _as_read(operands, geometry, compute, dtype)
    call = jax.ffi.ffi_call(native.CONV, jax.ShapeDtypeStruct(_spatial(geometry, outputs=True), x.dtype))
    y = call(
        x.reshape(_spatial(geometry)),
        kernel.reshape(_kernel(geometry)),
        *biases,
        **_attributes(geometry),
        bias_last=False,
    )
    return y.reshape(geometry.output_shape).astype(dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype, dtype: np.dtype) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)`: for each tap, the sum over all outputs of what it read times dy.

    The sum is a fixed tree.
    """
    (x, dy), geometry = _as_read((x, dy), geometry, compute, dtype)
    call = jax.ffi.ffi_call(native.KERNEL_GRADIENT, jax.ShapeDtypeStruct(_kernel(geometry), x.dtype))
    gradient = call(
        x.reshape(_spatial(geometry)), dy.reshape(_spatial(geometry, outputs=True)), **_attributes(geometry)
    )
    return gradient.reshape(geometry.kernel_shape).astype(dtype)


def _as_read(
    operands: tuple[jax.Array, ...], geometry: Geometry, compute: np.dtype, dtype: np.dtype
) -> tuple[list[jax.Array], Geometry]:
    """Return operands as the kernels read them, x first, and the geometry on that x.

    All are in `dtype` if all are given in it, else in `compute`. x has its periodic or reflected padding, and each
    channel once for each output channel that reads it.
    """
    one = dtype if all(array.dtype == dtype for array in operands) else compute
    # XLA would compute them once more in the loops that copy or reshape them, and there LLVM may contract otherwise
    operands = materialized(*operands)
    x, geometry = pad_repeated(operands[0], geometry)
    if geometry.multiplier > 1:
        x = jnp.repeat(x, geometry.multiplier, axis=-1)
    return [array.astype(one) for array in (x, *operands[1:])], geometry


def _spatial(geometry: Geometry, outputs: bool = False) -> tuple[int, ...]:
    """Return the shape of x or of y with one batch axis and three spatial axes."""
    sizes = geometry.output_spatial if outputs else geometry.spatial
    return (math.prod(geometry.batch), *three(sizes, 1), geometry.features)


def _kernel(geometry: Geometry) -> tuple[int, ...]:
    return (*three(geometry.kernel_size, 1), geometry.features)


def _attributes(geometry: Geometry) -> dict[str, np.ndarray]:
    low = tuple(low for low, _ in geometry.padding)
    attributes = {
        "strides": three(geometry.strides, 1),
        "padding": three(low, 0),
        "kernel_dilation": three(geometry.kernel_dilation, 1),
        "input_dilation": three(geometry.input_dilation, 1),
    }
    return {name: np.array(values, np.int64) for name, values in attributes.items()}
