"""The convolution and its kernel's gradient as two primitives, closed under differentiation, transposition and vmap.

The convolution is linear in x and in the kernel. Its transpose by x is the same primitive with another geometry, its
transpose by the kernel is the second primitive, and the transposes of that one are the first. So every mode and order
of differentiation works and stays depthwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jaxdw._arrays import accumulator
from jaxdw._compat import triton_kernels, varying_along, varying_axes, varying_nowhere
from jaxdw.choice import choose
from jaxdw.geometry import Geometry
from jaxdw.sums import cpu_native
from jaxdw.sums.boxes import sum_in_boxes
from jaxdw.sums.kernel_gradient import kernel_gradient as kernel_gradient_in_rows
from jaxdw.sums.order import Order
from jaxdw.sums.padded import kernel_gradient_of_padded, of_padded, sum_of_padded
from jaxdw.sums.tiles import sum_on_tiles
from jaxdw.windows import pad

#: What computes a sum: a program for XLA that adds in an order; kernels written by hand, which add in raster order
#: ("native" are the compiled ones for CPUs, in place of "raster"); or that of these which `jaxdw.choice` names for the
#: platform.
Program = Order | Literal["pallas", "native", "auto"]

#: By the name of the method.
PROGRAMS: dict[str, Program] = {"taps": "raster", "rows": "rows", "pallas": "pallas", "auto": "auto"}

_conv_p = Primitive("depthwise_conv")
_kernel_gradient_p = Primitive("depthwise_conv_kernel_gradient")


def conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Program, dtype: Any
) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` of dtype `dtype`, summed in `order`, from the bias where one is given.

    Sums are in float32, or in float64 if any dtype here is; what is narrower is rounded once at the end.
    """
    operands = (x, kernel) if bias is None else (x, kernel, bias)
    return _conv_p.bind(*alike(*operands), geometry=geometry, order=order, dtype=np.dtype(dtype))


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, order: Program, dtype: Any) -> jax.Array:
    """`(*kernel_size, 1, C*M)` of dtype `dtype`: for each tap, the sum over all outputs of what it read times dy.

    `order` is that of the convolutions which this one's own derivatives are.
    """
    return _kernel_gradient_p.bind(*alike(x, dy), geometry=geometry, order=order, dtype=np.dtype(dtype))


def input_gradient(dy: jax.Array, kernel: jax.Array, geometry: Geometry, order: Program, dtype: Any) -> jax.Array:
    """`(*batch, *spatial, C)` of dtype `dtype`: the transpose of the convolution by x, itself a convolution of dy."""
    if geometry.padding_mode != "zeros":
        padded = input_gradient(dy, kernel, of_padded(geometry), order, dtype)
        x = jax.typeof(padded).update(shape=geometry.x_shape)  # varying as `padded` does, inside a `shard_map`
        (dx,) = jax.linear_transpose(lambda x: pad(x, geometry), x)(padded)
        return dx
    flipped = lax.rev(kernel, tuple(range(geometry.rank)))
    dx = conv(dy, flipped, None, adjoint(geometry), order, dtype)
    if geometry.multiplier == 1:
        return dx
    return dx.reshape(*geometry.x_shape, geometry.multiplier).sum(axis=-1)


def adjoint(geometry: Geometry) -> Geometry:
    """The geometry that, with the flipped kernel, takes dy `(*batch, *output_spatial, C*M)` to dx, M channels apart."""
    padding = []
    for size, out, span, (low, _), stride, spread in zip(
        geometry.spatial,
        geometry.output_spatial,
        geometry.spans,
        geometry.padding,
        geometry.strides,
        geometry.input_dilation,
    ):
        before = span - 1 - low
        padding.append((before, (size - 1) * spread + span - ((out - 1) * stride + 1) - before))
    return dataclasses.replace(
        geometry,
        spatial=geometry.output_spatial,
        channels=geometry.features,
        multiplier=1,
        strides=geometry.input_dilation,
        input_dilation=geometry.strides,
        padding=tuple(padding),
    )


def alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands varying over the same axes of a `shard_map`, as a primitive must have them."""
    every = frozenset().union(*map(varying_axes, operands))
    return [varying_along(operand, every) for operand in operands]


def abstract(shape: tuple[int, ...], dtype: np.dtype, like: Any, spec: PartitionSpec) -> Any:
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(like.sharding.mesh, spec))


@_conv_p.def_abstract_eval
def _conv_abstract(x, kernel, *bias, geometry: Geometry, order: Program, dtype: np.dtype):
    return abstract(geometry.output_shape, dtype, x, PartitionSpec())


@_kernel_gradient_p.def_abstract_eval
def _kernel_gradient_abstract(x, dy, *, geometry: Geometry, order: Program, dtype: np.dtype):
    return abstract(geometry.kernel_shape, dtype, x, PartitionSpec())


def _conv_jvp(primals, tangents, *, geometry: Geometry, order: Program, dtype: np.dtype):
    x, kernel, *bias = primals
    y = _conv_p.bind(*primals, geometry=geometry, order=order, dtype=dtype)
    dx, dkernel, *dbias = tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(conv(dx, kernel, None, geometry, order, dtype))
    if type(dkernel) is not ad.Zero:
        terms.append(conv(x, dkernel, None, geometry, order, dtype))
    if bias and type(dbias[0]) is not ad.Zero:
        terms.append(jnp.broadcast_to(dbias[0].astype(dtype), geometry.output_shape))
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _conv_transpose(ct, x, kernel, *, geometry: Geometry, order: Program, dtype: np.dtype):
    if type(ct) is ad.Zero:
        return None, None
    if ad.is_undefined_primal(x):
        return input_gradient(ct, kernel, geometry, order, x.aval.dtype), None
    return None, kernel_gradient(x, ct, geometry, order, kernel.aval.dtype)


def _kernel_gradient_jvp(primals, tangents, *, geometry: Geometry, order: Program, dtype: np.dtype):
    x, dy = primals
    dx, ddy = tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(kernel_gradient(dx, dy, geometry, order, dtype))
    if type(ddy) is not ad.Zero:
        terms.append(kernel_gradient(x, ddy, geometry, order, dtype))
    value = _kernel_gradient_p.bind(x, dy, geometry=geometry, order=order, dtype=dtype)
    return value, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(value)


def _kernel_gradient_transpose(ct, x, dy, *, geometry: Geometry, order: Program, dtype: np.dtype):
    if type(ct) is ad.Zero:
        return None, None
    if ad.is_undefined_primal(x):
        return input_gradient(dy, ct, geometry, order, x.aval.dtype), None
    return None, conv(x, ct, None, geometry, order, dy.aval.dtype)


ad.primitive_jvps[_conv_p] = _conv_jvp
ad.primitive_transposes[_conv_p] = _conv_transpose
ad.primitive_jvps[_kernel_gradient_p] = _kernel_gradient_jvp
ad.primitive_transposes[_kernel_gradient_p] = _kernel_gradient_transpose


def _conv_batch(operands, axes, *, geometry: Geometry, order: Program, dtype: np.dtype):
    """x alone: one more batch axis. The kernel or bias too: one more factor of the channels, or of the multiplier."""
    x, kernel, *bias = operands
    x_axis, kernel_axis, *bias_axis = axes
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    if kernel_axis is None and (not bias or bias_axis[0] is None):
        wide = dataclasses.replace(geometry, batch=(count, *geometry.batch))
        y = conv(jnp.moveaxis(x, x_axis, 0), kernel, bias[0] if bias else None, wide, order, dtype)
        return y, 0
    channels, multiplier = geometry.channels, geometry.multiplier
    kernel, *bias = (_leading(a, axis, count) for a, axis in zip((kernel, *bias), (kernel_axis, *bias_axis)))
    if x_axis is not None:  # (..., C) of each becomes (..., count * C)
        x = jnp.moveaxis(x, x_axis, -2).reshape(*geometry.x_shape[:-1], count * channels)
        kernel, *bias = (jnp.moveaxis(a, 0, -2) for a in (kernel, *bias))
        wide = dataclasses.replace(geometry, channels=count * channels)
    else:  # (..., C, M) of each becomes (..., C, count * M)
        kernel, *bias = (jnp.moveaxis(a.reshape(*a.shape[:-1], channels, multiplier), 0, -2) for a in (kernel, *bias))
        wide = dataclasses.replace(geometry, multiplier=count * multiplier)
    kernel = kernel.reshape(wide.kernel_shape)
    y = conv(x, kernel, bias[0].reshape(-1) if bias else None, wide, order, dtype)
    if x_axis is not None:
        return y.reshape(*geometry.output_shape[:-1], count, geometry.features), y.ndim - 1
    y = y.reshape(*geometry.output_shape[:-1], channels, count, multiplier)
    return jnp.moveaxis(y, -2, 0).reshape(count, *geometry.output_shape), 0


def _kernel_gradient_batch(operands, axes, *, geometry: Geometry, order: Program, dtype: np.dtype):
    """One more factor of the channels."""
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    x, dy = (jnp.moveaxis(_leading(a, axis, count), 0, -2) for a, axis in zip(operands, axes))
    wide = dataclasses.replace(geometry, channels=count * geometry.channels)
    value = kernel_gradient(x.reshape(wide.x_shape), dy.reshape(wide.output_shape), wide, order, dtype)
    return value.reshape(*geometry.kernel_shape[:-1], count, geometry.features), geometry.rank + 1


def _leading(array: jax.Array, axis: int | None, count: int) -> jax.Array:
    return jnp.broadcast_to(array, (count, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)


batching.primitive_batchers[_conv_p] = _conv_batch
batching.primitive_batchers[_kernel_gradient_p] = _kernel_gradient_batch


def _conv_on(platform: str | None, implementation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(x, kernel, *bias, geometry: Geometry, order: Program, dtype: np.dtype):
        compute = accumulator(x.dtype, kernel.dtype, dtype)
        start = bias[0] if bias else None
        if _is_empty(geometry):
            first = jnp.zeros((), dtype) if start is None else start.astype(dtype)
            return jnp.broadcast_to(first, geometry.output_shape)
        program = _chosen(order, compute, geometry, platform, starts_from_bias=start is not None)
        if program == "native":
            return cpu_native.conv(x, kernel, start, geometry, dtype, bias_last=False)
        if program == "pallas":
            kernels, interpret = _kernels(platform)
            return kernels.sum_in_kernel(x, kernel, start, geometry, compute, dtype, interpret=interpret)
        return implementation(x, kernel, start, geometry, program, compute).astype(dtype)

    return run


def _kernel_gradient_on(platform: str | None, implementation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(x, dy, *, geometry: Geometry, order: Program, dtype: np.dtype):
        compute = accumulator(x.dtype, dy.dtype, dtype)
        if _is_empty(geometry):
            return jnp.zeros(geometry.kernel_shape, dtype)
        program = _chosen(order, compute, geometry, platform, gradient=True)
        if program == "native":
            return cpu_native.kernel_gradient(x, dy, geometry, dtype)
        if program == "pallas":
            kernels, interpret = _kernels(platform)
            return kernels.kernel_gradient_in_kernel(x, dy, geometry, compute, dtype, interpret=interpret)
        return implementation(x, dy, geometry, compute).astype(dtype)

    return run


def _is_empty(geometry: Geometry) -> bool:
    """Whether there is no product to add: `vmap` over nothing makes any axis one of size 0."""
    return 0 in geometry.x_shape + geometry.output_shape


def _chosen(order: Program, compute: np.dtype, geometry: Geometry, platform: str | None, **of: bool) -> Program:
    if order == "pallas" and geometry.is_symbolic:  # the kernels are made for sizes
        return "raster"
    if order != "auto":
        return order
    program = PROGRAMS[choose(geometry, platform or "another", **of)]
    return "raster" if program == "pallas" and compute == np.float64 else program  # TPU kernels add float32


def _kernels(platform: str | None) -> tuple[ModuleType, bool]:
    """The module of the hand-written kernels for a platform, and whether they are interpreted."""
    if platform not in ("cpu", "cuda", "tpu"):
        raise ValueError("`method` is 'pallas', expected another: there are kernels for NVIDIA GPUs and TPUs alone")
    return importlib.import_module("jaxdw.sums.mosaic" if platform == "tpu" else "jaxdw.sums.triton"), platform == "cpu"


def _register(platform: str | None, conv: Callable[..., jax.Array], kernel_gradient: Callable[..., jax.Array]) -> None:
    """What computes the two primitives on a platform; None: on those that are not registered."""
    for primitive, run in (
        (_conv_p, _conv_on(platform, conv)),
        (_kernel_gradient_p, _kernel_gradient_on(platform, kernel_gradient)),
    ):
        mlir.register_lowering(
            primitive, _on_each_device(mlir.lower_fun(run, multiple_results=False), platform), platform=platform
        )


def _on_each_device(lower: Callable[..., Any], platform: str | None) -> Callable[..., Any]:
    """Without the axes of a `shard_map` that operands vary over: checked before, and unknown to interpreted kernels.

    Where XLA is to share a program out, there are no kernels for TPUs: Mosaic's cannot be shared out.
    """

    def lowered(ctx, *operands, order: Program, **params):
        if platform == "cpu" and order == "raster" and cpu_native.serves(ctx, params["geometry"]):
            order = "native"
        if platform == "tpu" and not _is_for_one_device(ctx.module_context.axis_context):
            if order == "pallas":
                raise ValueError(
                    "`method` is 'pallas' on TPUs over mesh axes that XLA shares out, expected another, or all axes "
                    "shared out by `jaxdw.sharding` or `jax.shard_map`: kernels for TPUs are for one device"
                )
            order = "raster" if order == "auto" else order
        avals = [varying_nowhere(aval) for aval in ctx.avals_in]
        with triton_kernels() if platform == "cuda" else contextlib.nullcontext():
            return lower(ctx.replace(avals_in=avals), *operands, order=order, **params)

    return lowered


def _is_for_one_device(where: Any) -> bool:
    """Whether a program for these axes is one device's own: there is one, or every axis is a `shard_map`'s."""
    if hasattr(where, "num_devices"):
        return where.num_devices == 1
    manual: frozenset[Any] = getattr(where, "manual_axes", frozenset())
    return not manual or manual | set(where.mesh.manual_axes) == set(where.mesh.axis_names)


for _primitive in (_conv_p, _kernel_gradient_p):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
_register(None, sum_of_padded, kernel_gradient_of_padded)
_register("cpu", sum_in_boxes, kernel_gradient_in_rows)
_register("cuda", sum_of_padded, kernel_gradient_of_padded)
_register("tpu", sum_on_tiles, kernel_gradient_of_padded)
