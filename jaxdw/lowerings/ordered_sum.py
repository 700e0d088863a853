"""The order of the sum over the taps, the same in every program that computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: "raster": one chain of fused multiply-adds over all taps. "rows": such a chain for each kernel row (last axis), each
#: from zero, and then the rows added one after the other.
Order = Literal["raster", "rows"]


class Term(NamedTuple):
    """One tap: the inputs under it, its weights, and the kernel row it is in."""

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
    """The sum of value * weight, in `shape`, from the bias `(C,)` or from 0.

    XLA:CPU contracts each multiply and add to one FMA. What starts from 0 starts from `zero`, `()` or `(C,)`, which no
    compiler must see to be one: it would fold a constant away, and then either product of the first two could be the
    one that enters the FMA unrounded.

    LLVM contracts only what stands side by side, a product that nothing else uses. Where another sum in the same loop
    has the same product it computes that once for both, and where what follows reverses or repeats channels it moves
    the shuffle past the product. Neither happens to values that only this sum can have: their bits are joined with
    those of `own_zero` `()`, where it is given.
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
    """+0 in weight's shape and dtype (float32 or float64) that no compiler sees to be zero.

    Of two whole numbers that follow each other one is even, so the last bit of their product is 0, whatever weight is.
    """
    whole = whole_numbers(weight.dtype)
    number = lax.bitcast_convert_type(weight, whole)
    one = jnp.ones((), whole)
    return lax.bitcast_convert_type(number * (number + one) & one, weight.dtype)


#: More than one number, so that XLA:CPU keeps them in memory and LLVM does not see them.
_ZEROS = np.array([0] * 255 + [1], np.int32)


def zero_of_its_own(number: int, dtype: np.dtype) -> jax.Array:
    """+0 `()` in dtype that on CPU no compiler sees to be zero, nor to be that of another number (up to 254).

    It depends on no operand, so it is at hand on every device that has some of the channels.
    """
    zeros = lax.optimization_barrier(jnp.asarray(_ZEROS))  # or XLA would take the number out as a constant
    zero = lax.index_in_dim(zeros, number % (len(_ZEROS) - 1), keepdims=False)
    return lax.bitcast_convert_type(zero.astype(whole_numbers(dtype)), dtype)


#: What leaves a number as it is where the other is 0, by instructions that are not each other's.
_KEEPING: tuple[Callable[[jax.Array, jax.Array], jax.Array], ...] = (
    lax.bitwise_or,
    lax.bitwise_xor,
    lax.add,
    lax.sub,
)


def joined(value: jax.Array, zero: jax.Array, by: int = 0) -> jax.Array:
    """value, its bits joined with those of a zero `()`, by an instruction that neighbouring numbers do not share."""
    whole = whole_numbers(value.dtype)
    bits = lax.bitcast_convert_type(value, whole)
    same = jnp.broadcast_to(lax.bitcast_convert_type(zero, whole), value.shape)
    return lax.bitcast_convert_type(_KEEPING[by % len(_KEEPING)](bits, same), value.dtype)


def whole_numbers(dtype: np.dtype) -> np.dtype:
    """The dtype of whole numbers as wide as these."""
    return np.dtype(f"int{8 * dtype.itemsize}")


def _add(total: jax.Array, term: Term) -> jax.Array:
    return total + term.value * jnp.broadcast_to(term.weight, total.shape)
