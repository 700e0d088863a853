"""Batch normalization in training: by the mean and the variance of the batch itself, and its derivatives.

On a CPU the compiled kernels compute it and its gradient, in a fixed order (docs/arithmetic.md). Elsewhere, and where
there are no kernels, it is `definition`, whose sums are XLA's.

Three primitives are closed under differentiation: the normalization; its tangent, linear in the tangents of x, scale
and bias; and the transpose of that, the gradient. Derivatives of higher order are those of `definition`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import native
from jaxdw._arrays import accumulator, as_array, check_floating, is_sharded
from jaxdw._compat import varying_together
from jaxdw.epilogue import relu, relu6
from jaxdw.native.calls import ACTIVATIONS
from jaxdw.primitive import kernel_lowering, replicated

#: Activations after the normalization, by name.
_FUNCTIONS: dict[str | None, Callable[[jax.Array], jax.Array]] = {None: lambda y: y, "relu": relu, "relu6": relu6}


def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float = 1e-5, activation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x normalized by the mean and the variance of each channel, and these two.

    `y = activation((x - mean) / sqrt(var + epsilon) * scale + bias)`. The mean and the variance are those of all values
    of a channel; the variance is the biased one. Sums are in float64. All else is in float32, or in float64 if x is.
    docs/arithmetic.md states each rounding.

    It has derivatives of every mode and order. On CPUs the gradient is computed by a kernel, as the result is.

    Args:
      x: `(*batch, C)`, float32, float64, bfloat16 or float16.
      scale, bias: `(C,)`, no wider than float32, or than float64 if x is float64.
      epsilon: added to the variance, 0 or more.
      activation: "relu", "relu6" or None.

    Returns:
      y: of the shape and dtype of x.
      mean, var: `(C,)`, float32, or float64 if x is.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> y, mean, var = batch_norm(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1), epsilon=0)
    >>> y.tolist(), mean.tolist(), var.tolist()
    ([[-1.0], [1.0]], [2.0], [1.0])
    """
    arrays = {name: as_array(name, array) for name, array in (("x", x), ("scale", scale), ("bias", bias))}
    check_floating(**arrays)
    x = arrays["x"]
    if x.ndim < 1 or 0 in x.shape[:-1]:
        raise ValueError(f"`x` has shape {x.shape}, expected (*batch, channels) with one value per channel or more")
    wide = accumulator(x.dtype)
    for name in ("scale", "bias"):
        if arrays[name].shape != x.shape[-1:]:
            raise ValueError(f"`{name}` has shape {arrays[name].shape}, expected {x.shape[-1:]}, as `x` has channels")
        if arrays[name].dtype != wide and arrays[name].dtype.itemsize >= wide.itemsize:
            raise TypeError(
                f"`{name}` has dtype {arrays[name].dtype}, expected {wide} or narrower beside `x` {x.dtype}"
            )
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float, np.number)) or not 0 <= epsilon < math.inf:
        raise ValueError(f"`epsilon` is {epsilon!r}, expected a number from 0 on")
    if activation not in _FUNCTIONS:
        names = ", ".join(name for name in _FUNCTIONS if name)
        raise ValueError(f"`activation` is {activation!r}, expected None or one of {names}")
    operands = (x, arrays["scale"].astype(wide), arrays["bias"].astype(wide))
    options: dict[str, Any] = {"epsilon": float(epsilon), "activation": activation}
    if any(map(is_sharded, operands)):  # XLA knows how to share it out
        return definition(*operands, **options)
    return tuple(_norm_p.bind(*varying_together(*operands), **options))


def definition(x, scale, bias, *, epsilon: float, activation: str | None):
    """Return y, mean and variance."""
    wide = scale.dtype
    axes = tuple(range(x.ndim - 1))
    mean = x.astype(wide).mean(axes)
    distance = x.astype(wide) - _along(mean, x)
    var = (distance * distance).mean(axes)
    factor = jax.lax.rsqrt(var + jnp.asarray(epsilon, wide)) * scale
    y = _FUNCTIONS[activation](distance * _along(factor, x) + _along(bias, x))
    return y.astype(x.dtype), mean, var


def _along(channels: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(channels, x.shape)


def definition_of_tangent(x, scale, bias, mean, var, dx, dscale, dbias, **options):
    """Return the tangents of y, mean and variance."""
    return jax.jvp(functools.partial(definition, **options), (x, scale, bias), (dx, dscale, dbias))[1]


def definition_of_gradient(x, scale, bias, mean, var, dy, **options):
    """Return the gradients by x, scale and bias."""
    return jax.vjp(lambda *operands: definition(*operands, **options)[0], x, scale, bias)[1](dy)


def _kernel(x, scale, bias, *, epsilon: float, activation: str | None):
    channels = jax.ShapeDtypeStruct(scale.shape, scale.dtype)
    call = jax.ffi.ffi_call(native.BATCH_NORM, (jax.ShapeDtypeStruct(x.shape, x.dtype), channels, channels))
    return call(x, scale, bias, epsilon=np.float64(epsilon), activation=ACTIVATIONS[activation])


def _kernel_of_gradient(x, scale, bias, mean, var, dy, *, epsilon: float, activation: str | None):
    channels = jax.ShapeDtypeStruct(scale.shape, scale.dtype)
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), channels, channels)
    call = jax.ffi.ffi_call(native.BATCH_NORM_GRADIENT, results, input_output_aliases={5: 0})  # dx in the place of dy
    return call(x, scale, bias, mean, var, dy, epsilon=np.float64(epsilon), activation=ACTIVATIONS[activation])


_norm_p, _tangent_p, _gradient_p = map(Primitive, ("batch_norm", "batch_norm_tangent", "batch_norm_gradient"))


def _norm_jvp(primals, tangents, **options):
    x, scale, bias = primals
    y, mean, var = _norm_p.bind(*primals, **options)
    given = [ad.instantiate_zeros(tangent) for tangent in tangents]
    moved = _tangent_p.bind(*varying_together(x, scale, bias, mean, var, *given), **options)
    return (y, mean, var), tuple(moved)


def _tangent_transpose(cotangents, x, scale, bias, mean, var, dx, dscale, dbias, **options):
    dy, dmean, dvar = cotangents
    found: list[Any] = [None] * 3
    if type(dy) is not ad.Zero:
        found = list(_gradient_p.bind(*varying_together(x, scale, bias, mean, var, dy), **options))
    count = math.prod(x.shape[:-1])
    for cotangent, slope in ((dmean, lambda: 1.0), (dvar, lambda: 2 * (x.astype(mean.dtype) - _along(mean, x)))):
        if type(cotangent) is not ad.Zero:
            more = (slope() * _along(cotangent / count, x)).astype(x.dtype)
            found[0] = more if found[0] is None else found[0] + more
    wanted = [gradient if ad.is_undefined_primal(each) else None for gradient, each in zip(found, (dx, dscale, dbias))]
    return [None] * 5 + wanted


def _gradient_transpose(cotangents, x, scale, bias, mean, var, dy, **options):
    if all(type(cotangent) is ad.Zero for cotangent in cotangents):
        return [None] * 6
    given = tuple(ad.instantiate_zeros(cotangent) for cotangent in cotangents)
    of_dy = functools.partial(definition_of_gradient, x, scale, bias, mean, var, **options)
    return [None] * 5 + list(jax.linear_transpose(of_dy, dy.aval)(given))


def _of_definition(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of differentiation of a primitive that is differentiated as its definition is."""

    def jvp(primals, tangents, **options):
        given = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(functools.partial(definition, **options), tuple(primals), given)

    return jvp


def _batch(primitive: Primitive) -> Callable[..., Any]:
    """Return the rule that makes the mapped axis a factor of the channels: (..., C) becomes (..., count * C)."""

    def batch(operands, axes, **options):
        count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
        wide = []
        for operand, axis in zip(operands, axes):
            if axis is None:
                operand, axis = jnp.broadcast_to(operand, (count, *operand.shape)), 0
            operand = jnp.moveaxis(operand, axis, -2)
            wide.append(operand.reshape(*operand.shape[:-2], count * operand.shape[-1]))
            channels = operand.shape[-1]
        results = primitive.bind(*wide, **options)
        split = [result.reshape(*result.shape[:-1], count, channels) for result in results]
        return split, [result.ndim - 2 for result in split]

    return batch


def _shapes_of_rows_and_channels(x, scale, *others, **options):
    rows = replicated(x.shape, x.dtype, x)
    return [rows, *[replicated(scale.shape, scale.dtype, x)] * 2]


_RULES: tuple[tuple[Primitive, Callable[..., Any], Callable[..., Any] | None, Any, Any], ...] = (
    (_norm_p, definition, _kernel, _norm_jvp, None),
    (_tangent_p, definition_of_tangent, None, _of_definition(definition_of_tangent), _tangent_transpose),
    (
        _gradient_p,
        definition_of_gradient,
        _kernel_of_gradient,
        _of_definition(definition_of_gradient),
        _gradient_transpose,
    ),
)
for _primitive, _definition, _compiled, _jvp, _transpose in _RULES:
    _primitive.multiple_results = True
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    _primitive.def_abstract_eval(_shapes_of_rows_and_channels)
    ad.primitive_jvps[_primitive] = _jvp
    if _transpose is not None:
        ad.primitive_transposes[_primitive] = _transpose
    batching.primitive_batchers[_primitive] = _batch(_primitive)
    mlir.register_lowering(_primitive, mlir.lower_fun(_definition, multiple_results=True))
    if _compiled is not None:
        _lowering = kernel_lowering(_definition, _compiled, multiple_results=True)
        mlir.register_lowering(_primitive, _lowering, platform="cpu")
