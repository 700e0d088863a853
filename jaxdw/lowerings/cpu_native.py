"""The convolution and its kernel's gradient on CPU by the compiled kernels of `jaxdw.native`.

docs/arithmetic.md states the order of each sum and where it is rounded. XLA changes nothing of it, whatever surrounds
the call, and compiles nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdw import native
from jaxdw._arrays import accumulator
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import materialized
from jaxdw.lowerings.ordered_sum import Order
from jaxdw.native.calls import ACTIVATIONS
from jaxdw.padding import pad_repeated
from jaxdw.sum_order import SumOrder


class Epilogue(NamedTuple):
    """What the kernel does to each sum before it is rounded and stored; see docs/arithmetic.md.

    Attributes:
      bias_last: whether the bias is added to the sum, which else starts from it.
      scale, shift: `(C*M,)`, both or none.
      residual: `(*batch, *output_spatial, C*M)`, of the dtype of the result, or None.
      activation: a name of `jaxdw.native.calls.ACTIVATIONS`.
    """

    bias_last: bool = False
    scale: jax.Array | None = None
    shift: jax.Array | None = None
    residual: jax.Array | None = None
    activation: str | None = None


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    order: Order | None,
    compute: np.dtype,
    dtype: np.dtype,
    flipped: bool,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (it cannot change)
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)`: one chain of fused multiply-adds in raster order for each element.

    With `flipped` it is the raster order of the flipped kernel. The chain is reversed where the geometry says so.
    """
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    (x, kernel, *biases), geometry = _as_read(operands, geometry, compute, dtype)
    scaled, residual = epilogue.scale is not None, epilogue.residual is not None
    factors = materialized(epilogue.scale, epilogue.shift) if scaled else ()
    added = materialized(epilogue.residual) if residual else ()
    call = jax.ffi.ffi_call(native.CONV, jax.ShapeDtypeStruct(geometry.output_shape, x.dtype))
    y = call(
        x,
        kernel,
        *biases,
        *(factor.astype(compute) for factor in factors),
        *(array.astype(x.dtype) for array in added),
        **_attributes(geometry),
        bias_last=epilogue.bias_last,
        flipped=flipped,
        from_last_tap=geometry.from_last_tap,
        scaled=scaled,
        residual=residual,
        activation=ACTIVATIONS[epilogue.activation],
    )
    return y.astype(dtype)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype, dtype: np.dtype) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)`: for each tap, the sum over all outputs of what it read times dy.

    The sum is a fixed tree.
    """
    (x, dy), geometry = _as_read((x, dy), geometry, compute, dtype)
    call = jax.ffi.ffi_call(native.KERNEL_GRADIENT, jax.ShapeDtypeStruct(geometry.kernel_shape, x.dtype))
    return call(x, dy, **_attributes(geometry)).astype(dtype)


def matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    order: SumOrder,
    *,
    x_transposed: bool = False,
    w_transposed: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (it cannot change)
    divisor: float = 1.0,
) -> jax.Array:
    """Return `([batch,] rows, columns)` of x `([batch,] rows, terms)`, w `([batch,] terms, columns)`, of one dtype.

    Each element is the sum of its products, and of the bias, in the given order. It is divided by `divisor`, and then
    comes the epilogue. x, and w, may be given transposed.
    """
    x, w, *given = materialized(x, w, *(() if bias is None else (bias,)))
    scaled, residual = epilogue.scale is not None, epilogue.residual is not None
    factors = materialized(epilogue.scale, epilogue.shift) if scaled else ()
    added = materialized(epilogue.residual) if residual else ()
    batch = (x if x.ndim == 3 else w).shape[:-2]
    y = jax.ShapeDtypeStruct(
        (*batch, x.shape[-1 if x_transposed else -2], w.shape[-2 if w_transposed else -1]), x.dtype
    )
    return jax.ffi.ffi_call(native.MATMUL, y)(
        x,
        w,
        *given,
        *(factor.astype(accumulator(x.dtype)) for factor in factors),
        *(array.astype(x.dtype) for array in added),
        steps=np.array(order.steps, np.int64),
        x_transposed=x_transposed,
        w_transposed=w_transposed,
        scaled=scaled,
        residual=residual,
        activation=ACTIVATIONS[epilogue.activation],
        divisor=float(divisor),
    )


def _as_read(
    operands: tuple[jax.Array, ...], geometry: Geometry, compute: np.dtype, dtype: np.dtype
) -> tuple[list[jax.Array], Geometry]:
    """Return operands as the kernels read them, x first, and the geometry on that x.

    All are in `dtype` if all are given in it, else in `compute`. x has its periodic or reflected padding, and each
    channel once for each output channel that reads it.
    """
    one = dtype if all(array.dtype == dtype for array in operands) else compute
    # XLA would compute them once more in the loops that copy them, and there LLVM may contract otherwise
    operands = materialized(*operands)
    x, geometry = pad_repeated(operands[0], geometry)
    if geometry.multiplier > 1:
        x = jnp.repeat(x, geometry.multiplier, axis=-1)
    return [array.astype(one) for array in (x, *operands[1:])], geometry


def _attributes(geometry: Geometry) -> dict[str, np.ndarray]:
    attributes = {
        "strides": geometry.strides,
        "padding": tuple(low for low, _ in geometry.padding),
        "kernel_dilation": geometry.kernel_dilation,
        "input_dilation": geometry.input_dilation,
    }
    return {name: np.array(values, np.int64) for name, values in attributes.items()}
