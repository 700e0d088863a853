"""The convolution and its kernel's gradient as two primitives, closed under differentiation, transposition and vmap.

The convolution is linear in x and in the kernel. Its transpose by x is the same primitive with another geometry, its
transpose by the kernel is the second primitive, and the transposes of that one are the first. So every mode and order
of differentiation works and stays depthwise.

`jaxdw.methods` has the lowerings. The parameter `method` is the name of a method there, or "auto".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jaxdw._arrays import accumulator
from jaxdw._compat import triton_kernels, varying_nowhere, varying_together
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.methods import resolve
from jaxdw.native import is_available
from jaxdw.padding import padded_geometry, transposed_pad

_conv_p = Primitive("depthwise_conv")
_kernel_gradient_p = Primitive("depthwise_conv_kernel_gradient")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    method: str,
    dtype: Any,
    flipped: bool = False,
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` of dtype `dtype`; the sum starts from the bias if one is given.

    Sums are in float32, or in float64 if any dtype here is. A narrower result is rounded once at the end.

    Args:
      flipped: reverse the kernel along its spatial axes. The compiled kernels read it backwards, so that XLA has no
        program to compile for it.
    """
    operands = varying_together(*((x, kernel) if bias is None else (x, kernel, bias)))
    return _conv_p.bind(*operands, geometry=geometry, method=method, dtype=np.dtype(dtype), flipped=flipped)


def kernel_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry, method: str, dtype: Any) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` of dtype `dtype`: for each tap, the sum over outputs of what it read times dy.

    `method` also computes the derivatives of this, which are convolutions.
    """
    return _kernel_gradient_p.bind(*varying_together(x, dy), geometry=geometry, method=method, dtype=np.dtype(dtype))


def input_gradient(
    dy: jax.Array, kernel: jax.Array, geometry: Geometry, method: str, dtype: Any, flipped: bool = False
) -> jax.Array:
    """Return the transpose of the convolution by x, a convolution of dy: `(*batch, *spatial, C)` of dtype `dtype`."""
    if geometry.padding_mode != "zeros":
        dx = input_gradient(dy, kernel, padded_geometry(geometry), method, dtype, flipped)
        return transposed_pad(dx, geometry)
    dx = conv(dy, kernel, None, adjoint(geometry), method, dtype, not flipped)
    if geometry.multiplier == 1:
        return dx
    return dx.reshape(*geometry.x_shape, geometry.multiplier).sum(axis=-1)


def adjoint(geometry: Geometry) -> Geometry:
    """Return the geometry of the convolution of dy `(*batch, *output_spatial, C*M)` with the flipped kernel.

    Its result has C*M channels; dx is the sum over the M of each input channel. As PyTorch's gradient it adds the taps
    of the kernel in raster order, which are those of the flipped kernel from the last on.
    """
    padding = []
    for axis, span in zip(geometry.axes, geometry.spans):
        before = span - 1 - axis.low
        gradient = (axis.outputs - 1) * axis.stride + 1
        padding.append((before, (axis.size - 1) * axis.input_dilation + span - gradient - before))
    return dataclasses.replace(
        geometry,
        spatial=geometry.output_spatial,
        channels=geometry.features,
        multiplier=1,
        strides=geometry.input_dilation,
        input_dilation=geometry.strides,
        padding=tuple(padding),
        from_last_tap=not geometry.from_last_tap,
    )


def replicated(shape: tuple[int, ...], dtype: np.dtype, like: Any) -> Any:
    """Return the type of a result that no explicit mesh axis shards and that varies as an operand does."""
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


@_conv_p.def_abstract_eval
def _conv_abstract(x, kernel, *bias, geometry: Geometry, method: str, dtype: np.dtype, flipped: bool):
    return replicated(geometry.output_shape, dtype, x)


@_kernel_gradient_p.def_abstract_eval
def _kernel_gradient_abstract(x, dy, *, geometry: Geometry, method: str, dtype: np.dtype):
    return replicated(geometry.kernel_shape, dtype, x)


def _conv_jvp(primals, tangents, *, geometry: Geometry, method: str, dtype: np.dtype, flipped: bool):
    x, kernel, *bias = primals
    y = _conv_p.bind(*primals, geometry=geometry, method=method, dtype=dtype, flipped=flipped)
    dx, dkernel, *dbias = tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(conv(dx, kernel, None, geometry, method, dtype, flipped))
    if type(dkernel) is not ad.Zero:
        terms.append(conv(x, dkernel, None, geometry, method, dtype, flipped))
    if bias and type(dbias[0]) is not ad.Zero:
        terms.append(jnp.broadcast_to(dbias[0].astype(dtype), geometry.output_shape))
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _conv_transpose(ct, x, kernel, *bias, geometry: Geometry, method: str, dtype: np.dtype, flipped: bool):
    if type(ct) is ad.Zero:
        return (None,) * (2 + len(bias))
    dx = dkernel = None
    if ad.is_undefined_primal(x):
        dx = input_gradient(ct, kernel, geometry, method, x.aval.dtype, flipped)
    elif ad.is_undefined_primal(kernel):
        dkernel = kernel_gradient(x, ct, geometry, method, kernel.aval.dtype)
        dkernel = _flip(dkernel, geometry) if flipped else dkernel
    return dx, dkernel, *(_bias_gradient(ct, each) for each in bias)


def _bias_gradient(ct: jax.Array, bias: Any) -> jax.Array | None:
    if not ad.is_undefined_primal(bias):
        return None
    return ct.sum(tuple(range(ct.ndim - 1))).astype(bias.aval.dtype)


def _flip(kernel: jax.Array, geometry: Geometry) -> jax.Array:
    return lax.rev(kernel, tuple(range(geometry.rank)))


def _kernel_gradient_jvp(primals, tangents, *, geometry: Geometry, method: str, dtype: np.dtype):
    x, dy = primals
    dx, ddy = tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(kernel_gradient(dx, dy, geometry, method, dtype))
    if type(ddy) is not ad.Zero:
        terms.append(kernel_gradient(x, ddy, geometry, method, dtype))
    value = _kernel_gradient_p.bind(x, dy, geometry=geometry, method=method, dtype=dtype)
    return value, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(value)


def _kernel_gradient_transpose(ct, x, dy, *, geometry: Geometry, method: str, dtype: np.dtype):
    if type(ct) is ad.Zero:
        return None, None
    if ad.is_undefined_primal(x):
        return input_gradient(dy, ct, geometry, method, x.aval.dtype), None
    return None, conv(x, ct, None, geometry, method, dy.aval.dtype)


ad.primitive_jvps[_conv_p] = _conv_jvp
ad.primitive_transposes[_conv_p] = _conv_transpose
ad.primitive_jvps[_kernel_gradient_p] = _kernel_gradient_jvp
ad.primitive_transposes[_kernel_gradient_p] = _kernel_gradient_transpose


def _conv_batch(operands, axes, *, geometry: Geometry, method: str, dtype: np.dtype, flipped: bool):
    """Make the mapped axis a batch axis if only x has it, else a factor of the channels or of the multiplier."""
    x, kernel, *bias = operands
    x_axis, kernel_axis, *bias_axis = axes
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    if kernel_axis is None and (not bias or bias_axis[0] is None):
        wide = dataclasses.replace(geometry, batch=(count, *geometry.batch))
        if x_axis != 0:
            (x,) = in_memory(x)
        y = conv(jnp.moveaxis(x, x_axis, 0), kernel, bias[0] if bias else None, wide, method, dtype, flipped)
        return y, 0
    # or XLA:CPU would compute them once more in the loops that move their axes, and there LLVM may contract otherwise
    x, kernel, *bias = in_memory(x, kernel, *bias)
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
    y = conv(x, kernel, bias[0].reshape(-1) if bias else None, wide, method, dtype, flipped)
    if x_axis is not None:
        return y.reshape(*geometry.output_shape[:-1], count, geometry.features), y.ndim - 1
    y = y.reshape(*geometry.output_shape[:-1], channels, count, multiplier)
    return jnp.moveaxis(y, -2, 0).reshape(count, *geometry.output_shape), 0


def _kernel_gradient_batch(operands, axes, *, geometry: Geometry, method: str, dtype: np.dtype):
    """Make the mapped axis a factor of the channels."""
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    x, dy = (jnp.moveaxis(_leading(a, axis, count), 0, -2) for a, axis in zip(in_memory(*operands), axes))
    wide = dataclasses.replace(geometry, channels=count * geometry.channels)
    value = kernel_gradient(x.reshape(wide.x_shape), dy.reshape(wide.output_shape), wide, method, dtype)
    return value.reshape(*geometry.kernel_shape[:-1], count, geometry.features), geometry.rank + 1


def _leading(array: jax.Array, axis: int | None, count: int) -> jax.Array:
    return jnp.broadcast_to(array, (count, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)


batching.primitive_batchers[_conv_p] = _conv_batch
batching.primitive_batchers[_kernel_gradient_p] = _kernel_gradient_batch


def _compute_conv(
    x,
    kernel,
    *bias,
    geometry: Geometry,
    method: str,
    dtype: np.dtype,
    flipped: bool,
    platform: str | None,
    compiled: bool,
):
    start = bias[0] if bias else None
    if geometry.is_empty:  # `vmap` over nothing gives any axis size 0
        first = jnp.zeros((), dtype) if start is None else start.astype(dtype)
        return jnp.broadcast_to(first, geometry.output_shape)
    order, lowering = resolve(method, geometry, platform, compiled)
    compute, options = accumulator(x.dtype, kernel.dtype, dtype), {}
    if lowering.reads_flipped:
        options["flipped"] = flipped
    elif geometry.from_last_tap and platform == "cpu":  # elsewhere no bits are promised, and two copies would be made
        axes = tuple(range(len(geometry.batch), len(geometry.batch) + geometry.rank))
        kernel = kernel if flipped else _flip(kernel, geometry)
        # in memory, or XLA:CPU would reverse what it computes, and there LLVM may contract otherwise
        x, kernel = in_memory(lax.rev(x, axes), kernel)
        (y,) = in_memory(lowering.conv(x, kernel, start, geometry.mirrored, order, compute, dtype))
        return lax.rev(y, axes)
    elif flipped:
        kernel = _flip(kernel, geometry)
    return lowering.conv(x, kernel, start, geometry, order, compute, dtype, **options)


def _compute_kernel_gradient(
    x, dy, *, geometry: Geometry, method: str, dtype: np.dtype, platform: str | None, compiled: bool
):
    if geometry.is_empty:
        return jnp.zeros(geometry.kernel_shape, dtype)
    _, lowering = resolve(method, geometry, platform, compiled)
    return lowering.kernel_gradient(x, dy, geometry, accumulator(x.dtype, dy.dtype, dtype), dtype)


def _lower_on_each_device(compute: Callable[..., jax.Array], platform: str | None) -> Callable[..., Any]:
    """Return a lowering rule without the mesh axes of a `shard_map` along which operands vary.

    They are checked before, and interpreted kernels do not know them.
    """
    lower = mlir.lower_fun(functools.partial(compute, platform=platform), multiple_results=False)

    def lowered(ctx, *operands, method: str, **params):
        if platform == "tpu" and method == "pallas" and not _is_for_one_device(ctx.module_context.axis_context):
            raise ValueError(
                "`method='pallas'` on TPUs needs mesh axes that are all manual (`jaxdw.sharding` or `jax.shard_map`): "
                "XLA cannot partition its kernels; use 'taps' or 'auto' over automatic axes"
            )
        avals = [varying_nowhere(aval) for aval in ctx.avals_in]
        compiled = platform == "cpu" and not params["geometry"].is_symbolic and can_call_kernels(ctx)
        with triton_kernels() if platform == "cuda" else contextlib.nullcontext():
            return lower(ctx.replace(avals_in=avals), *operands, method=method, compiled=compiled, **params)

    return lowered


def can_call_kernels(ctx: Any) -> bool:
    """Return True if a program for a CPU can call `jaxdw.native`: one for one device, that runs here.

    XLA cannot partition the kernels, and an exported program may run where there are none.
    """
    module = ctx.module_context
    runs_here = not module.lowering_parameters.for_export
    return runs_here and _is_for_one_device(module.axis_context) and is_available()


def kernel_lowering(
    definition: Callable[..., Any], kernel: Callable[..., Any], *, multiple_results: bool = False
) -> Callable[..., Any]:
    """Return a lowering for CPUs: by a call of `jaxdw.native` where one can be made, else by JAX's operations.

    The kernels take arrays of known sizes, none of them 0.
    """

    def lower(ctx, *operands, **options):
        compute = definition
        is_known = all(isinstance(size, int) and size for aval in ctx.avals_in for size in aval.shape)
        if is_known and can_call_kernels(ctx):
            compute = kernel
            ctx = ctx.replace(avals_in=[varying_nowhere(aval) for aval in ctx.avals_in])
        return mlir.lower_fun(compute, multiple_results=multiple_results)(ctx, *operands, **options)

    return lower


def _is_for_one_device(where: Any) -> bool:
    """Return True if a program for these axes is for one device: there is only one, or all axes are manual."""
    if hasattr(where, "num_devices"):
        return where.num_devices == 1
    manual: frozenset[Any] = getattr(where, "manual_axes", frozenset())
    return not manual or manual | set(where.mesh.manual_axes) == set(where.mesh.axis_names)


for _primitive, _compute in ((_conv_p, _compute_conv), (_kernel_gradient_p, _compute_kernel_gradient)):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    for _platform in (None, "cpu", "cuda", "tpu"):  # None: every other platform
        mlir.register_lowering(_primitive, _lower_on_each_device(_compute, _platform), platform=_platform)
