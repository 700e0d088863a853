"""The order of the sum over the taps, the same in every program that computes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

#: "raster": one chain of fused multiply-adds over all taps. "rows": such a chain for each kernel row (last axis), each
#: from zero, and then the rows added one after the other.
Order = Literal["raster", "rows"]


class Term(NamedTuple):
    """One tap: the inputs under it, its weights, and the kernel row it is in."""

    value: jax.Array
    weight: jax.Array
    row: int


def accumulate(terms: Iterable[Term], start: jax.Array, zero: jax.Array, order: Order) -> jax.Array:
    """The sum of value * weight from `start`.

    XLA:CPU contracts each multiply and add to one FMA. `zero` begins each row; it is an array that the compiler cannot
    see to be zero, since it would fold a constant away, and then either product of the first two could be the one that
    enters the FMA unrounded.
    """
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
    whole = jnp.int64 if weight.dtype.itemsize == 8 else jnp.int32
    number = lax.bitcast_convert_type(weight, whole) + jnp.array(salt, whole)
    one = jnp.ones((), whole)
    return lax.bitcast_convert_type(number * (number + one) & one, weight.dtype)


def _add(total: jax.Array, term: Term) -> jax.Array:
    return total + term.value * jnp.broadcast_to(term.weight, total.shape)
