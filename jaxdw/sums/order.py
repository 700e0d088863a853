"""The order of the sum over the taps, the same in every program that computes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    weight: jax.Array,
    bias: jax.Array | None,
    shape: Sequence[int],
    order: Order,
    *,
    salt: int = 0,
    contracted: bool = True,
) -> jax.Array:
    """The sum of value * weight, in `shape`, from the bias `(C,)` or from 0.

    XLA:CPU contracts each multiply and add to one FMA. A sum from 0 starts from a zero that the compiler cannot see to
    be one, since it would fold a constant away, and then either product of the first two could be the one that enters
    the FMA unrounded.

    LLVM contracts only what stands side by side, a product that nothing else uses. Where another sum in the same loop
    has the same product it computes that once for both, and where what follows reverses or repeats channels it moves
    the shuffle past the product. Neither happens to values that only this sum can have: their bits are joined with
    those of a zero that the compiler does not see to be one, the same for all channels.

    Args:
      weight: that of the first tap, `(C,)`: the zeros are made from it.
      salt: another number for each sum that may read the same values and weights.
      contracted: whether the program is for a compiler that contracts; where not, the values are left alone.
    """
    one_zero = opaque_zero(weight.reshape(-1)[0], salt)
    zero = jnp.broadcast_to(one_zero, shape)
    start = zero if bias is None else jnp.broadcast_to(bias, shape)
    if contracted:
        terms = (term._replace(value=_joined(term.value, one_zero)) for term in terms)
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


def opaque_zero(weight: jax.Array, salt: int = 0) -> jax.Array:
    """+0 in weight's shape and dtype (float32 or float64) that no compiler sees to be zero; another one for each salt.

    Of two whole numbers that follow each other one is even, so the last bit of their product is 0, whatever weight is.
    """
    whole = _whole(weight.dtype)
    number = lax.bitcast_convert_type(weight, whole) + jnp.array(salt, whole)
    one = jnp.ones((), whole)
    return lax.bitcast_convert_type(number * (number + one) & one, weight.dtype)


def _joined(value: jax.Array, zero: jax.Array) -> jax.Array:
    """value, whose bits are those of it or of a zero `()`."""
    whole = _whole(value.dtype)
    bits = lax.bitcast_convert_type(value, whole) | jnp.broadcast_to(lax.bitcast_convert_type(zero, whole), value.shape)
    return lax.bitcast_convert_type(bits, value.dtype)


def _whole(dtype: np.dtype) -> np.dtype:
    """The whole numbers as wide as float32 or float64."""
    return np.dtype(f"int{8 * dtype.itemsize}")


def _add(total: jax.Array, term: Term) -> jax.Array:
    return total + term.value * jnp.broadcast_to(term.weight, total.shape)
