"""The matrix product whose every element is a sum of chains of fused multiply-adds, in an order that you give.

oneDNN and other libraries add the products of a 1x1 convolution, or of a fully connected layer, in such an order. Which
one depends on the sizes and the processor: `bridge.accumulation.reveal_dot` finds it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import native
from jaxdw._arrays import as_array, check_floating
from jaxdw._compat import varying_together
from jaxdw.lowerings import cpu_native
from jaxdw.primitive import can_call_kernels, replicated

#: Rows that the gradient by w adds in one chain.
_ROWS_IN_CHAIN = 512

_matmul_p = Primitive("chain_matmul")


def chain_matmul(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    block_ends: Sequence[int] | None = None,
    bias_first: bool = False,
) -> jax.Array:
    """Return x w + bias, `(*batch, N)`, in an order of addition that nothing changes.

    The products of an element are cut into consecutive blocks. A block is one chain of fused multiply-adds from +0, in
    order. The sums of the blocks are added in order, and then the bias. Every operation rounds once; bfloat16 and
    float16 are summed in float32, and the sum is rounded once. The instruction set, the number of threads, the batch
    and the surrounding program change no bit (docs/arithmetic.md).

    It runs on CPUs, by the compiled kernels. It has derivatives of every mode and order: the gradient by x is one
    chain over the N columns, that by w is chains of 512 rows.

    Args:
      x: `(*batch, K)`, float32, float64, bfloat16 or float16.
      w: `(K, N)`.
      bias: `(N,)`, or None.
      block_ends: where each block ends, ascending, the last at K; None is one block.
      bias_first: start the first chain from the bias, and do not add it at the end.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it. A program without the compiled
        kernels: for another platform, for several devices, or to be exported.

    >>> x, w = jnp.ones((2, 4), jnp.float32), jnp.ones((4, 3), jnp.float32)
    >>> chain_matmul(x, w, block_ends=(2, 4)).tolist()
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
    if not isinstance(bias_first, bool):
        raise TypeError(f"`bias_first` is {bias_first!r}, expected True or False")
    ends = _checked_ends(block_ends, terms)
    operands = (x, w) if bias is None else (x, w, bias)
    dtype = functools.reduce(jnp.promote_types, (operand.dtype for operand in operands))
    rows, *others = (operand.astype(dtype) for operand in operands)
    y = _bind(rows.reshape(math.prod(x.shape[:-1]), terms), *others, ends=ends, bias_first=bias_first)
    return y.reshape(*x.shape[:-1], columns)


def _checked_ends(ends: Sequence[int] | None, terms: int) -> tuple[int, ...]:
    if ends is None:
        return (terms,)
    given = tuple(ends) if isinstance(ends, Iterable) else ()
    whole = all(isinstance(end, (int, np.integer)) and not isinstance(end, bool) for end in given)
    least = 1 if terms else 0
    if not whole or not given or given[-1] != terms or any(a >= b for a, b in zip((least - 1, *given), given)):
        raise ValueError(f"`block_ends` is {ends!r}, expected ascending numbers from 1, and {terms} last")
    return tuple(map(int, given))


def _bind(x: jax.Array, w: jax.Array, *bias: jax.Array, **params: Any) -> jax.Array:
    options = {"bias_first": False, "x_transposed": False, "w_transposed": False}
    return _matmul_p.bind(*varying_together(x, w, *bias), **options | params)


@_matmul_p.def_abstract_eval
def _abstract(x, w, *bias, ends, bias_first, x_transposed, w_transposed):
    return replicated(_shape(x.shape, w.shape, x_transposed, w_transposed), x.dtype, x)


def _shape(x: tuple[int, ...], w: tuple[int, ...], x_transposed: bool, w_transposed: bool) -> tuple[int, int]:
    """Return rows and columns of the product of arrays of these shapes."""
    return x[x_transposed], w[not w_transposed]


def _jvp(primals, tangents, **params):
    x, w, *bias = primals
    y = _matmul_p.bind(*primals, **params)
    dx, dw, *dbias = tangents
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(_bind(dx, w, **params))
    if type(dw) is not ad.Zero:
        terms.append(_bind(x, dw, **params))
    if bias and type(dbias[0]) is not ad.Zero:
        terms.append(jnp.broadcast_to(dbias[0], y.shape))
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _transpose(ct, x, w, *bias, ends, bias_first, x_transposed, w_transposed):
    if type(ct) is ad.Zero:
        return (None,) * (2 + len(bias))
    rows, columns = ct.shape
    dx = dw = None
    if ad.is_undefined_primal(x):
        dx = _bind(ct, w, ends=(columns,), w_transposed=not w_transposed)
        dx = dx.T if x_transposed else dx
    elif ad.is_undefined_primal(w):
        chains = (*range(_ROWS_IN_CHAIN, rows, _ROWS_IN_CHAIN), rows)
        dw = _bind(x, ct, ends=chains, x_transposed=not x_transposed)
        dw = dw.T if w_transposed else dw
    return dx, dw, *(ct.sum(0) if ad.is_undefined_primal(each) else None for each in bias)


def _batch(operands, axes, **params):
    """Make the mapped axis of x rows, if only x has one; else one product after the other."""
    x, w, *bias = operands
    if axes[0] is not None and not any(axis is not None for axis in axes[1:]) and not params["x_transposed"]:
        x = jnp.moveaxis(x, axes[0], 0)
        y = _bind(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), w, *bias, **params)
        return y.reshape(*x.shape[:2], y.shape[1]), 0
    mapped = [operand if axis is None else jnp.moveaxis(operand, axis, 0) for operand, axis in zip(operands, axes)]
    count = next(operand.shape[0] for operand, axis in zip(mapped, axes) if axis is not None)
    if count == 0:
        one_x, one_w = (each.shape[axis is not None :] for each, axis in zip(mapped[:2], axes))
        shape = _shape(one_x, one_w, params["x_transposed"], params["w_transposed"])
        return jnp.zeros((0, *shape), mapped[0].dtype), 0

    def product(number):
        one = (each if axis is None else each[number] for each, axis in zip(mapped, axes))
        return _bind(*one, **params)

    return jax.lax.map(product, jnp.arange(count)), 0


def _compute(x, w, *bias, ends, bias_first, x_transposed, w_transposed):
    if math.prod(x.shape) == 0 or math.prod(w.shape) == 0:
        first = bias[0] if bias else jnp.zeros((), x.dtype)
        if not bias_first:  # +0 plus -0 is +0
            first = jnp.where(first == 0, jnp.zeros((), x.dtype), first)
        return jnp.broadcast_to(first, _shape(x.shape, w.shape, x_transposed, w_transposed))
    return cpu_native.matmul(
        x, w, *bias, ends=ends, bias_last=not bias_first, x_transposed=x_transposed, w_transposed=w_transposed
    )


def _lower(ctx, *operands, **params):
    if not can_call_kernels(ctx):
        raise ValueError(
            "`chain_matmul` needs the compiled kernels, in a program for one device that runs here "
            f"(or inside `jax.shard_map`); {native.status()}"
        )
    return mlir.lower_fun(_compute, multiple_results=False)(ctx, *operands, **params)


def _lower_elsewhere(ctx, *operands, **params):
    raise ValueError("`chain_matmul` runs on CPUs alone: on another platform use `jnp.matmul`, whose order is its own")


_matmul_p.def_impl(functools.partial(xla.apply_primitive, _matmul_p))
ad.primitive_jvps[_matmul_p] = _jvp
ad.primitive_transposes[_matmul_p] = _transpose
batching.primitive_batchers[_matmul_p] = _batch
mlir.register_lowering(_matmul_p, _lower_elsewhere)
mlir.register_lowering(_matmul_p, _lower, platform="cpu")
