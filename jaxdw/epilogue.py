"""What follows a convolution element by element: scale and shift, residual, activation.

It is defined here by JAX's operations, for every method and platform. `_finished_p` is a convolution with its epilogue:
the compiled kernels compute both before they store a sum, and have the same bits. Its derivatives, and what is mapped
over anything but x, are those of the definition.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import _arrays, primitive
from jaxdw._compat import varying_nowhere, varying_together
from jaxdw.bias import add_bias, starts_from_bias
from jaxdw.call import Call
from jaxdw.geometry import Geometry
from jaxdw.lowerings import cpu_native
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.methods import resolve
from jaxdw.native.calls import ACTIVATIONS

_finished_p = Primitive("depthwise_conv_with_epilogue")

#: The names that the argument `activation` accepts.
NAMES = tuple(name for name in ACTIVATIONS if name is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """Steps after a convolution y, in this order: y * scale + shift, + residual, activation.

    The product and its sum are one fused multiply-add. All steps are in float32 (float64 if the result is), which is
    rounded once to the dtype of the result. docs/arithmetic.md states each rounding.

    Attributes:
      scale: `(C*M,)` or None, which is 1 where there is a shift.
      shift: `(C*M,)` or None, which is 0 where there is a scale.
      residual: an array of the result's shape, no wider than the result, or None.
      activation: "relu", "relu6", "hard_swish", "hard_sigmoid", "silu" or None. The exponential of "silu" is XLA's, or
        that of the compiled kernels, where they run.

    >>> import jaxdw
    >>> epilogue = Epilogue(shift=jnp.array([-40.0]), activation="relu6")
    >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> jaxdw.depthwise_conv(x, jnp.ones((3, 3, 1, 1)), padding="VALID", epilogue=epilogue).item()
    0.0
    """

    scale: jax.Array | None = None
    shift: jax.Array | None = None
    residual: jax.Array | None = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def batch_norm(
        cls,
        mean: jax.Array,
        var: jax.Array,
        weight: jax.Array | None = None,
        bias: jax.Array | None = None,
        *,
        epsilon: float = 1e-5,
        residual: jax.Array | None = None,
        activation: str | None = None,
    ) -> Epilogue:
        """Return batch normalization by running statistics, then residual and activation.

        `scale = weight / sqrt(var + epsilon)`, `shift = bias - mean * scale`, rounded as PyTorch's `F.batch_norm`
        rounds them: the reciprocal, its product with the weight, and one fused multiply-add.

        Args:
          mean, var, weight, bias: `(C*M,)`; a missing weight is 1, a missing bias 0.
        """
        arrays = {"mean": mean, "var": var, "weight": weight, "bias": bias}
        given = {
            name: _arrays.as_array(name, a) for name, a in arrays.items() if a is not None or name in ("mean", "var")
        }
        _arrays.check_floating(**given)
        for name, array in given.items():
            if array.shape != given["mean"].shape or array.ndim != 1:
                raise ValueError(f"`{name}` has shape {array.shape}, expected one number for each channel, as `mean`")
        wide = _arrays.accumulator(*(array.dtype for array in given.values()))
        mean, var = given["mean"].astype(wide), given["var"].astype(wide)
        scale = 1 / in_memory(jnp.sqrt(var + jnp.asarray(epsilon, wide)))[0]  # or XLA would take an inverse square root
        if weight is not None:
            scale = scale * given["weight"].astype(wide)
        shift = multiply_add(-mean[None, None], scale, given["bias"].astype(wide) if bias is not None else None, 1)
        return cls(scale, shift.reshape(-1), residual, activation)

    def apply(self, y: jax.Array, rank: int, result: np.dtype) -> jax.Array:
        """Return the result of these steps on sums y `(*batch, *output_spatial, C*M)` in float32 or float64."""
        if self.scale is not None:
            y = multiply_add(y, self.scale, self.shift, rank)
        if self.residual is not None:
            # or XLA:CPU would contract a product that the program has as its residual
            y = y + in_memory(self.residual)[0].astype(y.dtype)
        return _activated(y, self.activation).astype(result)


def checked(epilogue: Any, call: Call) -> Epilogue | None:
    """Return an epilogue that fits the call, as `fitting` does."""
    return fitting(epilogue, call.geometry.output_shape, call.wide, call.result)


def fitting(epilogue: Any, shape: tuple[int, ...], wide: np.dtype, result: np.dtype) -> Epilogue | None:
    """Return an epilogue that fits a result, with both of scale and shift or none of them; None if nothing is to do.

    Raises:
      ValueError, TypeError: what does not fit; the message names it, its value and what was expected.
    """
    if epilogue is None:
        return None
    if not isinstance(epilogue, Epilogue):
        raise TypeError(f"`epilogue` is a {type(epilogue).__name__}, expected a `jaxdw.Epilogue` or None")
    if epilogue.activation is not None:
        _arrays.check_choice("epilogue.activation", epilogue.activation, NAMES)
    scale = _fitting("scale", epilogue.scale, shape[-1:], wide)
    shift = _fitting("shift", epilogue.shift, shape[-1:], wide)
    residual = _fitting("residual", epilogue.residual, shape, result)
    if scale is not None or shift is not None:
        scale = jnp.ones(shape[-1:], wide) if scale is None else scale.astype(wide)
        shift = jnp.zeros(shape[-1:], wide) if shift is None else shift.astype(wide)
    elif residual is None and epilogue.activation is None:
        return None
    return Epilogue(scale, shift, residual, epilogue.activation)


def _fitting(name: str, value: Any, shape: tuple[int, ...], widest: np.dtype) -> jax.Array | None:
    if value is None:
        return None
    name = f"epilogue.{name}"
    array = _arrays.as_array(name, value)
    _arrays.check_floating(**{name: array})
    if array.shape != shape:
        raise ValueError(f"`{name}` has shape {array.shape}, expected {shape}")
    if array.dtype != widest and array.dtype.itemsize >= widest.itemsize:
        raise TypeError(f"`{name}` has dtype {array.dtype}, expected {widest} or narrower")
    return array


def multiply_add(y: jax.Array, scale: jax.Array, shift: jax.Array | None, rank: int) -> jax.Array:
    """Return fma(y, scale, shift) for y `(*batch, *spatial, C)`: a depthwise convolution of one tap is this sum."""
    geometry = Geometry.of(y.shape, (*(1,) * rank, 1, y.shape[-1]))
    return primitive.conv(y, scale.reshape(geometry.kernel_shape), shift, geometry, "taps", y.dtype)


def _activated(y: jax.Array, activation: str | None) -> jax.Array:
    if activation == "relu":
        return relu(y)
    if activation == "relu6":
        return relu6(y)
    if activation == "hard_sigmoid":
        return hard_sigmoid(y)
    if activation == "silu":
        return jax.nn.silu(y)
    return hard_swish(y) if activation == "hard_swish" else y


def relu(y: jax.Array) -> jax.Array:
    """Return 0 where y < 0, else y, NaN and -0 too; the slope at 0 is 0, as in PyTorch."""
    return jnp.where(y > 0, y, lax.stop_gradient(jnp.where(y < 0, 0, y)))


def relu6(y: jax.Array) -> jax.Array:
    """Return ReLU of y, and 6 where y > 6; the slope at 0 and at 6 is 0, as in PyTorch.

    `jax.nn.relu6` has slope 1/2 there, and exact zeros are common: a window of zeros, normalized with a mean of 0.

    >>> [float(jax.grad(relu6)(x)) for x in (0.0, 1.0, 6.0)]
    [0.0, 1.0, 0.0]
    """
    return jnp.where((y > 0) & (y < 6), y, lax.stop_gradient(jnp.where(y < 0, 0, jnp.where(y > 6, 6, y))))


def hard_swish(y: jax.Array) -> jax.Array:
    """Return (y * ReLU6(y + 3)) / 6, each step rounded, as PyTorch does."""
    return y * relu6(y + 3) / _six_for_each(y)


def hard_sigmoid(y: jax.Array) -> jax.Array:
    """Return ReLU6(y + 3) / 6, each step rounded, as PyTorch does."""
    return relu6(y + 3) / _six_for_each(y)


def _six_for_each(y: jax.Array) -> jax.Array:
    """Return 6, or 1 where y is NaN, which stays NaN. XLA would multiply by the reciprocal of one divisor for all."""
    return jnp.where(jnp.isnan(y), jnp.ones((), y.dtype), 6)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    method: str,
    result: np.dtype,
    epilogue: Epilogue | None,
) -> jax.Array:
    """Return the convolution by a method of `jaxdw.methods` that has lowerings, its bias and its checked epilogue."""
    if epilogue is None:
        if bias is None or starts_from_bias(method, geometry):
            return primitive.conv(x, kernel, bias, geometry, method, result)
        epilogue = Epilogue()  # the kernels add a last bias to a sum that XLA would flush if it is subnormal
    given = (bias, epilogue.scale, epilogue.shift, epilogue.residual)
    operands = varying_together(x, kernel, *(array for array in given if array is not None))
    settings = _Settings(
        geometry, method, np.dtype(result), bias is not None, epilogue.scale is not None, epilogue.activation
    )
    return _finished_p.bind(*operands, settings=settings)


def _biased(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, method: str, dtype: np.dtype
) -> jax.Array:
    if bias is None or starts_from_bias(method, geometry):
        return primitive.conv(x, kernel, bias, geometry, method, dtype)
    y = primitive.conv(x, kernel, None, geometry, method, _arrays.accumulator(dtype))
    return add_bias(y, bias, dtype)


def differentiate_as_defined(finished: Primitive, defined: Callable[..., jax.Array]) -> None:
    """Give a primitive the derivatives of its definition, a function of the same operands and of `settings`."""

    def of_some(operands: Sequence[Any], numbers: list[int], settings: Any) -> Callable[..., jax.Array]:
        def compute(*values: jax.Array) -> jax.Array:
            given = list(operands)
            for number, value in zip(numbers, values):
                given[number] = value
            return defined(*given, settings=settings)

        return compute

    def jvp(primals, tangents, *, settings):
        moving = [number for number, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
        compute = of_some(primals, moving, settings)
        return jax.jvp(compute, [primals[number] for number in moving], [tangents[number] for number in moving])

    def transpose(ct, *operands, settings):
        unknown = [number for number, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
        cotangents: list[Any] = [None] * len(operands)
        if finished.multiple_results:
            ct = tuple(map(ad.instantiate_zeros, ct))
        elif type(ct) is ad.Zero:
            return cotangents
        avals = (operands[number].aval for number in unknown)
        transposed = jax.linear_transpose(of_some(operands, unknown, settings), *avals)
        for number, cotangent in zip(unknown, transposed(ct)):
            cotangents[number] = cotangent
        return cotangents

    ad.primitive_jvps[finished] = jvp
    ad.primitive_transposes[finished] = transpose


class _Settings(NamedTuple):
    """The parameters of `_finished_p`: of x, kernel, and what there is of bias, scale, shift and residual."""

    geometry: Geometry
    method: str
    result: np.dtype
    biased: bool
    scaled: bool
    activation: str | None

    def split(self, rest: Any) -> tuple[jax.Array | None, Epilogue]:
        """Return bias and epilogue of the operands after x and kernel."""
        rest = list(rest)
        bias = rest.pop(0) if self.biased else None
        scale, shift = (rest.pop(0), rest.pop(0)) if self.scaled else (None, None)
        return bias, Epilogue(scale, shift, rest[0] if rest else None, self.activation)


def _defined(x: jax.Array, kernel: jax.Array, *rest: jax.Array, settings: _Settings) -> jax.Array:
    """Compute the convolution, and then its epilogue."""
    bias, epilogue = settings.split(rest)
    wide = _arrays.accumulator(x.dtype, kernel.dtype, settings.result)
    y = _biased(x, kernel, bias, settings.geometry, settings.method, wide)
    return epilogue.apply(y, settings.geometry.rank, settings.result)


#: For readers of jaxprs: the same operands and parameters as the primitive.
definition = _defined


@_finished_p.def_abstract_eval
def _finished_abstract(x, kernel, *rest, settings: _Settings):
    return primitive.replicated(settings.geometry.output_shape, settings.result, x)


def _finished_batch(operands, axes, *, settings: _Settings):
    """Make the mapped axis a batch axis if x has it, and of the others only a residual; else map the definition."""
    x_axis, *others = axes
    has_residual = len(operands) > 2 + settings.biased + 2 * settings.scaled
    mapped = [axis is not None for axis in (others[:-1] if has_residual else others)]
    if x_axis is None or any(mapped) or (has_residual and others[-1] is None):
        return jax.vmap(functools.partial(_defined, settings=settings), in_axes=axes)(*operands), 0
    x, *rest = operands
    if x_axis != 0:
        (x,) = in_memory(x)
    if has_residual:
        rest[-1] = jnp.moveaxis(rest[-1] if others[-1] == 0 else in_memory(rest[-1])[0], others[-1], 0)
    batch = (x.shape[x_axis], *settings.geometry.batch)
    wide = settings._replace(geometry=dataclasses.replace(settings.geometry, batch=batch))
    return _finished_p.bind(jnp.moveaxis(x, x_axis, 0), *rest, settings=wide), 0


differentiate_as_defined(_finished_p, _defined)
batching.primitive_batchers[_finished_p] = _finished_batch
_finished_p.def_impl(functools.partial(xla.apply_primitive, _finished_p))


def _by_kernels(x: jax.Array, kernel: jax.Array, *rest: jax.Array, settings: _Settings) -> jax.Array:
    bias, epilogue = settings.split(rest)
    geometry, method, result = settings.geometry, settings.method, settings.result
    order, _ = resolve(method, geometry, "cpu", compiled=True)
    return cpu_native.conv(
        x,
        kernel,
        bias,
        geometry,
        order,
        _arrays.accumulator(x.dtype, kernel.dtype, result),
        result,
        flipped=False,
        epilogue=cpu_native.Epilogue(
            bias_last=not starts_from_bias(method, geometry),
            scale=epilogue.scale,
            shift=epilogue.shift,
            residual=epilogue.residual,
            activation=epilogue.activation,
        ),
    )


def _lower(ctx, *operands, settings: _Settings, on_cpu: bool = False):
    compute = _defined
    geometry = settings.geometry
    if on_cpu and not geometry.is_empty and not geometry.is_symbolic and primitive.can_call_kernels(ctx):
        _, lowering = resolve(settings.method, geometry, "cpu", compiled=True)
        compute = _by_kernels if lowering.conv is cpu_native.conv else _defined
    # `_by_kernels` does not know the mesh axes of a `shard_map` along which operands vary
    known = ctx.replace(avals_in=[varying_nowhere(aval) for aval in ctx.avals_in]) if compute is _by_kernels else ctx
    return mlir.lower_fun(compute, multiple_results=False)(known, *operands, settings=settings)


mlir.register_lowering(_finished_p, _lower)
mlir.register_lowering(_finished_p, functools.partial(_lower, on_cpu=True), platform="cpu")
