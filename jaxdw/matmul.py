"""The matrix product whose every element is added in an order that you give, and what follows it element by element.

oneDNN and other libraries add the products of a 1x1 convolution, or of a fully connected layer, in orders that depend
on the sizes and the processor: `bridge.accumulation.reveal_dot` finds them.

`_matmul_p` is the product. `_finished_p` is a product with its epilogue: the compiled kernels compute both before they
store a sum. Its derivatives are those of its definition by JAX's operations.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import epilogue as epilogues
from jaxdw import native
from jaxdw._arrays import accumulator, as_array, check_floating
from jaxdw._compat import varying_nowhere, varying_together
from jaxdw.epilogue import Epilogue
from jaxdw.lowerings import cpu_native
from jaxdw.primitive import can_call_kernels, replicated
from jaxdw.sum_order import BIAS, SumOrder
from jaxdw.training import divide

#: Rows that the gradients by w and by the bias add in one chain.
ROWS_IN_CHAIN = 512

_matmul_p = Primitive("ordered_matmul")
_finished_p = Primitive("ordered_matmul_with_epilogue")


def ordered_matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    order: SumOrder | None = None,
    epilogue: Epilogue | None = None,
) -> jax.Array:
    """Return x w + bias, `(*batch, N)`, in an order of addition that nothing changes.

    Every operation of the order rounds once; bfloat16 and float16 are summed in float32. Then come scale and shift,
    residual and activation, and the result is rounded once. The instruction set, the number of threads, the batch and
    the surrounding program change no bit (docs/arithmetic.md).

    It runs on CPUs, by the compiled kernels. It has derivatives of every mode and order: the gradient by x is one
    chain over the N columns, those by w and by the bias are chains of 512 rows.

    Args:
      x: `(*batch, K)`, float32, float64, bfloat16 or float16.
      w: `(K, N)`.
      bias: `(N,)`, or None.
      order: how K products, and the bias, are added; None is one chain. A bias that the order does not have is added
        last.
      epilogue: what happens to each sum, for N channels and a result of shape `(*batch, N)`; None is nothing.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it. A program without the compiled
        kernels: for another platform, for several devices, or to be exported.

    >>> x, w = jnp.ones((2, 4), jnp.float32), jnp.ones((4, 3), jnp.float32)
    >>> ordered_matmul(x, w, order=SumOrder.blocks((2, 4))).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    x, w = as_array("x", x), as_array("w", w)
    bias = None if bias is None else as_array("bias", bias)
    check_floating(x=x, w=w, bias=bias)
    if w.ndim != 2:
        raise ValueError(f"`w` has shape {w.shape}, expected (terms, columns)")
    terms, columns = w.shape
    if x.ndim < 1 or x.shape[-1] != terms:
        raise ValueError(f"`x` has shape {x.shape}, expected (*batch, {terms}), as `w` has {terms} terms")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"`bias` has shape {bias.shape}, expected ({columns},)")
    order = checked_order(order, terms, bias is not None)
    operands = (x, w) if bias is None else (x, w, bias)
    dtype = functools.reduce(jnp.promote_types, (operand.dtype for operand in operands))
    shape, rows = (*x.shape[:-1], columns), math.prod(x.shape[:-1])
    epilogue = epilogues.fitting(epilogue, shape, accumulator(dtype), dtype)
    x, w, *biases = (operand.astype(dtype) for operand in operands)
    x = x.reshape(rows, terms)
    if epilogue is None:
        return _bind(x, w, *biases, order=order).reshape(shape)
    scaled = () if epilogue.scale is None else (epilogue.scale, epilogue.shift)
    residual = () if epilogue.residual is None else (epilogue.residual.reshape(rows, columns),)
    settings = _Settings(order, bool(biases), bool(scaled), epilogue.activation)
    return _bind_finished(x, w, *biases, *scaled, *residual, settings=settings).reshape(shape)


def ordered_mean(x: jax.Array, order: SumOrder | None = None) -> jax.Array:
    """Return the mean `(*batch, C)` of x `(*batch, terms, C)`: the sum in an order, and one division by `terms`.

    Raises:
      as `ordered_matmul`.
    """
    x = as_array("x", x)
    check_floating(x=x)
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"`x` has shape {x.shape}, expected (*batch, terms, channels) with one term or more")
    *batch, terms, channels = x.shape
    settings = _Settings(checked_order(order, terms, False), divisor=terms)
    ones = jnp.ones((1, terms), x.dtype)
    return _bind_finished(ones, x.reshape(math.prod(batch), terms, channels), settings=settings).reshape(
        *batch, channels
    )


def checked_order(order: SumOrder | None, terms: int, biased: bool) -> SumOrder:
    """Return the order of a sum of so many terms, which has the bias if there is one.

    Raises:
      ValueError, TypeError: an order that does not fit.
    """
    if order is None:
        order = SumOrder.chain(terms)
    if not isinstance(order, SumOrder):
        raise TypeError(f"`order` is a {type(order).__name__}, expected a `jaxdw.SumOrder` or None")
    if order.terms != terms:
        raise ValueError(f"`order` has {order.terms} terms, expected {terms}")
    if order.has_bias and not biased:
        raise ValueError("`order` has a bias, and `bias` is None; use `order.without_bias()`, or give a bias")
    return order.with_bias() if biased else order


def _bind(x: jax.Array, w: jax.Array, *bias: jax.Array, **params: Any) -> jax.Array:
    options = {"x_transposed": False, "w_transposed": False}
    return _matmul_p.bind(*varying_together(x, w, *bias), **options | params)


@_matmul_p.def_abstract_eval
def _abstract(x, w, *bias, order, x_transposed, w_transposed):
    return replicated(_shape(x.shape, w.shape, x_transposed, w_transposed), x.dtype, x)


def _shape(x: tuple[int, ...], w: tuple[int, ...], x_transposed: bool, w_transposed: bool) -> tuple[int, ...]:
    """Return the shape of the product of arrays of these shapes, `([batch,] rows, columns)`."""
    batch = x[:-2] if len(x) == 3 else w[:-2]
    return (*batch, x[-1 if x_transposed else -2], w[-2 if w_transposed else -1])


def _jvp(primals, tangents, **params):
    x, w, *bias = primals
    y = _matmul_p.bind(*primals, **params)
    dx, dw, *dbias = tangents
    terms, params = [], params | {"order": params["order"].without_bias()}
    if type(dx) is not ad.Zero:
        terms.append(_bind(dx, w, **params))
    if type(dw) is not ad.Zero:
        terms.append(_bind(x, dw, **params))
    if bias and type(dbias[0]) is not ad.Zero:
        # a product, whose transpose adds the rows as the gradient by w does
        ones = jnp.ones((math.prod(y.shape[:-1]), 1), y.dtype)
        terms.append(_bind(ones, dbias[0][None], order=SumOrder.chain(1)).reshape(y.shape))
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _transpose(ct, x, w, *bias, order, x_transposed, w_transposed):
    if type(ct) is ad.Zero:
        return (None,) * (2 + len(bias))
    dx = dw = None
    if ad.is_undefined_primal(x):
        w = w if w_transposed else w.swapaxes(-1, -2)  # (columns, terms)
        dy = ct
        if x.aval.ndim < w.ndim:  # one x for several w: the sum over their columns, one after the other
            dy = jnp.moveaxis(dy, 0, 1)
            dy, w = dy.reshape(dy.shape[0], math.prod(dy.shape[1:])), _flat(w)
        dx = _bind(dy, w, order=SumOrder.chain(w.shape[-2]))
        dx = dx.swapaxes(-1, -2) if x_transposed else dx
    elif ad.is_undefined_primal(w):
        x = x.swapaxes(-1, -2) if x_transposed else x  # (rows, terms)
        dy = ct
        if w.aval.ndim < x.ndim:
            dy, x = _flat(dy), _flat(x)
        dw = _bind(x, dy, order=_order_of_rows(x.shape[-2]), x_transposed=True)
        dw = dw.swapaxes(-1, -2) if w_transposed else dw
    return dx, dw, *(_sum_of_rows(ct) if ad.is_undefined_primal(each) else None for each in bias)


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _order_of_rows(rows: int) -> SumOrder:
    return SumOrder.blocks((*range(ROWS_IN_CHAIN, rows, ROWS_IN_CHAIN), rows))


def _sum_of_rows(dy: jax.Array) -> jax.Array:
    dy = _flat(dy)
    return _bind(jnp.ones((1, len(dy)), dy.dtype), dy, order=_order_of_rows(len(dy)))[0]


def _batch(operands, axes, *, order, x_transposed, w_transposed):
    """Make the mapped axis of x rows, if only x has one; else there are several products."""
    x, w, *bias = operands
    if bias and axes[2] is not None:  # a product with 1 instead of the bias
        bias = batching.bdim_at_front(bias[0], axes[2], _count(operands, axes))
        x, w = (
            batching.bdim_at_front(x, axes[0], len(bias)),
            batching.bdim_at_front(w, axes[1], len(bias)),
        )
        term = jnp.ones((*x.shape[:-2], *((1, x.shape[-1]) if x_transposed else (x.shape[-2], 1))), x.dtype)
        x = jnp.concatenate([x, term], -2 if x_transposed else -1)
        row = jnp.broadcast_to(
            bias.reshape(len(bias), *(1,) * (w.ndim - 3), bias.shape[-1]), (*w.shape[:-2], bias.shape[-1])
        )
        w = jnp.concatenate([w, row[..., None] if w_transposed else row[..., None, :]], -1 if w_transposed else -2)
        order = SumOrder(tuple(2 * order.terms if step == BIAS else step for step in order.steps))
        return _batch((x, w), (0, 0), order=order, x_transposed=x_transposed, w_transposed=w_transposed)
    params = {"order": order, "x_transposed": x_transposed, "w_transposed": w_transposed}
    x, w, shape = _merged(x, w, axes[:2], x_transposed, w_transposed)
    return _bind(x, w, *bias, **params).reshape(shape), 0


def _count(operands: Any, axes: Any) -> int:
    return next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)


def _merged(
    x: jax.Array, w: jax.Array, axes: Any, x_transposed: bool, w_transposed: bool
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Return x and w with the axes that are mapped in their rows or products, and the shape of all results."""
    count = _count((x, w), axes)
    rank = max(x.ndim - (axes[0] is not None), w.ndim - (axes[1] is not None))
    x = x if axes[0] is None else jnp.moveaxis(x, axes[0], 0)
    w = w if axes[1] is None else jnp.moveaxis(w, axes[1], 0)
    if axes[1] is None and w.ndim == 2 and x.ndim == 3 and not x_transposed:
        columns = w.shape[-2 if w_transposed else -1]
        return _flat(x), w, (*x.shape[:-1], columns)
    if rank == 2:
        one_x, one_w = x.shape[axes[0] is not None :], w.shape[axes[1] is not None :]
        return x, w, (count, *_shape(one_x, one_w, x_transposed, w_transposed))
    # products of products: one axis for both
    products = (x.shape if x.ndim - (axes[0] is not None) == 3 else w.shape)[-3]

    def of_all(array: jax.Array, mapped: bool) -> jax.Array:
        array = array if mapped else array[None]
        array = array if array.ndim == 4 else array[:, None]
        return jnp.broadcast_to(array, (count, products, *array.shape[2:])).reshape(count * products, *array.shape[2:])

    x, w = of_all(x, axes[0] is not None), of_all(w, axes[1] is not None)
    return x, w, (count, products, *_shape(x.shape, w.shape, x_transposed, w_transposed)[1:])


def _compute(x, w, *bias, order, x_transposed, w_transposed):
    if 0 in (*x.shape, *w.shape):
        nothing = _sum_of_nothing(order, x.dtype, *bias)
        return jnp.broadcast_to(nothing, _shape(x.shape, w.shape, x_transposed, w_transposed))
    first = bias[0] if bias else None
    return cpu_native.matmul(x, w, first, order, x_transposed=x_transposed, w_transposed=w_transposed)


def _sum_of_nothing(order: SumOrder, dtype: Any, bias: jax.Array | None = None) -> jax.Array:
    """Return the bias if the order is no more than it, else the bias plus +0, which is never -0."""
    if bias is None:
        return jnp.zeros((), dtype)
    return bias if order.steps == (BIAS,) else jnp.where(bias == 0, jnp.zeros((), dtype), bias)


class _Settings(NamedTuple):
    """The parameters of `_finished_p`: of x, w, and what there is of bias, scale and shift, and residual."""

    order: SumOrder
    biased: bool = False
    scaled: bool = False
    activation: str | None = None
    divisor: int = 1

    def split(self, rest: Any) -> tuple[list[jax.Array], Epilogue]:
        """Return the bias, in a list, and the epilogue of the operands after x and w."""
        rest = list(rest)
        bias = [rest.pop(0)] if self.biased else []
        scale, shift = (rest.pop(0), rest.pop(0)) if self.scaled else (None, None)
        return bias, Epilogue(scale, shift, rest[0] if rest else None, self.activation)


def _bind_finished(*operands: jax.Array, settings: _Settings) -> jax.Array:
    return _finished_p.bind(*varying_together(*operands), settings=settings)


def _defined(x: jax.Array, w: jax.Array, *rest: jax.Array, settings: _Settings) -> jax.Array:
    """Compute the product, and then its epilogue."""
    bias, epilogue = settings.split(rest)
    wide = accumulator(x.dtype)
    y = _bind(*(array.astype(wide) for array in (x, w, *bias)), order=settings.order)
    if settings.divisor != 1:
        y = divide(y, settings.divisor)
    return epilogue.apply(y, 1, x.dtype)


@_finished_p.def_abstract_eval
def _finished_abstract(x, w, *rest, settings: _Settings):
    return replicated(_shape(x.shape, w.shape, False, False), x.dtype, x)


def _finished_batch(operands, axes, *, settings: _Settings):
    """Make the mapped axes of x, w and the residual rows or products; where others are mapped, map the definition."""
    (x, w, *rest), (x_axis, w_axis, *others) = operands, axes
    has_residual = len(rest) > settings.biased + 2 * settings.scaled
    factors = others[:-1] if has_residual else others
    if any(axis is not None for axis in factors) or (x_axis is None and w_axis is None):
        return jax.vmap(functools.partial(_defined, settings=settings), in_axes=axes)(*operands), 0
    count = _count(operands, axes)
    x, w, shape = _merged(x, w, (x_axis, w_axis), False, False)
    if has_residual:
        residual = batching.bdim_at_front(rest[-1], others[-1], count)
        rest[-1] = residual.reshape(_shape(x.shape, w.shape, False, False))
    return _bind_finished(x, w, *rest, settings=settings).reshape(shape), 0


def _by_kernels(x, w, *rest, settings: _Settings):
    bias, epilogue = settings.split(rest)
    if 0 in (*x.shape, *w.shape):
        return _defined(x, w, *rest, settings=settings)
    return cpu_native.matmul(
        x,
        w,
        bias[0] if bias else None,
        settings.order,
        epilogue=cpu_native.Epilogue(
            scale=epilogue.scale, shift=epilogue.shift, residual=epilogue.residual, activation=epilogue.activation
        ),
        divisor=settings.divisor,
    )


def _lower(ctx, *operands, compute, **params):
    if not can_call_kernels(ctx):
        raise ValueError(
            "`ordered_matmul` needs the compiled kernels, in a program for one device that runs here "
            f"(or inside `jax.shard_map`); {native.status()}"
        )
    # the computation does not know the mesh axes of a `shard_map` along which operands vary
    known = ctx.replace(avals_in=[varying_nowhere(aval) for aval in ctx.avals_in])
    return mlir.lower_fun(compute, multiple_results=False)(known, *operands, **params)


def _lower_elsewhere(ctx, *operands, **params):
    raise ValueError(
        "`ordered_matmul` runs on CPUs alone: on another platform use `jnp.matmul`, whose order is its own"
    )


ad.primitive_jvps[_matmul_p] = _jvp
ad.primitive_transposes[_matmul_p] = _transpose
batching.primitive_batchers[_matmul_p] = _batch
epilogues.differentiate_as_defined(_finished_p, _defined)
batching.primitive_batchers[_finished_p] = _finished_batch
for _primitive, _function in ((_matmul_p, _compute), (_finished_p, _by_kernels)):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    mlir.register_lowering(_primitive, _lower_elsewhere)
    mlir.register_lowering(_primitive, functools.partial(_lower, compute=_function), platform="cpu")
