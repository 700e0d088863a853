"""The sum over the taps in a defined order, the same in every program for XLA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: "raster": one chain of fused multiply-adds over all taps. "rows": one such chain per kernel row (last axis), each
#: from zero; then the rows are added in order.
Order = Literal["raster", "rows"]


class Term(NamedTuple):
    """One tap: the inputs under it, its weights, and its kernel row."""

    value: jax.Array
    weight: jax.Array
    row: int


def accumulate(
    terms: Iterable[Term],
    zero: jax.Array,
    bias: jax.Array | None,
    shape: Sequence[int],
    order: Order,
    own_zero: jax.Array | None = None,
) -> jax.Array:
    """Return the sum of value * weight, in `shape`, from the bias `(C,)` or from 0.

    XLA:CPU contracts each multiply and add to one fused multiply-add. A sum from 0 starts from `zero`, `()` or `(C,)`.
    No compiler must see that it is 0: it would fold a constant away, and then either of the first two products could
    enter the fused multiply-add unrounded.

    LLVM fuses a product and an add only if they are adjacent and the product has one use. It computes a product once
    for two sums in one loop that both have it. Where the next operation reverses or repeats channels, it moves the
    shuffle past the product. Neither happens to values that only this sum can have: if `own_zero` `()` is given, the
    bits of each value are joined with its bits.
    """
    zero = jnp.broadcast_to(zero, shape)
    start = zero if bias is None else jnp.broadcast_to(bias, shape)
    if own_zero is not None:
        terms = (term._replace(value=joined(term.value, own_zero)) for term in terms)
    if order == "raster":
        for term in terms:
            start = _add(start, term)
        return start
    rows: dict[int, jax.Array] = {}
    for term in terms:
        rows[term.row] = _add(rows.get(term.row, zero), term)
    total = None
    for row in rows.values():
        total = row if total is None else total + row
    return start if total is None else total


def zero_like(weight: jax.Array) -> jax.Array:
    """Return +0 in weight's shape and dtype (float32 or float64) that no compiler sees to be zero.

    Of two consecutive integers one is even. So the last bit of their product is 0, whatever weight is.
    """
    whole = integers_like(weight.dtype)
    number = lax.bitcast_convert_type(weight, whole)
    one = jnp.ones((), whole)
    return lax.bitcast_convert_type(number * (number + one) & one, weight.dtype)


#: More than one number, so that XLA:CPU keeps them in memory and LLVM does not see their values.
_ZEROS = np.array([0] * 255 + [1], np.int32)


def zero_of_its_own(number: int, dtype: np.dtype) -> jax.Array:
    """Return +0 `()` in dtype. On CPU no compiler sees that it is zero, or equal to that of another number up to 254.

    It depends on no operand, so every device that has some of the channels has it.
    """
    zeros = lax.optimization_barrier(jnp.asarray(_ZEROS))  # or XLA would take the number out as a constant
    zero = lax.index_in_dim(zeros, number % (len(_ZEROS) - 1), keepdims=False)
    return lax.bitcast_convert_type(zero.astype(integers_like(dtype)), dtype)


#: Different instructions, each of which returns its first operand if the second is 0.
_IDENTITIES: tuple[Callable[[jax.Array, jax.Array], jax.Array], ...] = (
    lax.bitwise_or,
    lax.bitwise_xor,
    lax.add,
    lax.sub,
)


def joined(value: jax.Array, zero: jax.Array, by: int = 0) -> jax.Array:
    """Return value, its bits joined with those of a zero `()` by one of several instructions.

    Neighbours are to have different ones: then LLVM does not merge them.
    """
    whole = integers_like(value.dtype)
    bits = lax.bitcast_convert_type(value, whole)
    same = jnp.broadcast_to(lax.bitcast_convert_type(zero, whole), value.shape)
    return lax.bitcast_convert_type(_IDENTITIES[by % len(_IDENTITIES)](bits, same), value.dtype)


def integers_like(dtype: np.dtype) -> np.dtype:
    """Return the dtype of integers of the same width."""
    return np.dtype(f"int{8 * dtype.itemsize}")


def _add(total: jax.Array, term: Term) -> jax.Array:
    return total + term.value * jnp.broadcast_to(term.weight, total.shape)
