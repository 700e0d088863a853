"""Checks and dtype rules that every public function shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

#: Dtypes of a convolution. Products of narrow dtypes are added in float32.
FLOATING = ("float16", "bfloat16", "float32", "float64")

#: The precisions at which x and the kernel are multiplied, or None to leave it to JAX.
PrecisionPair = tuple[lax.Precision, lax.Precision] | None


def as_array(name: str, value: Any) -> jax.Array:
    """Return value as a JAX array. Only arrays are accepted: a list, or another framework's tensor, is an error."""
    if not isinstance(value, (jax.Array, np.ndarray)) or (isinstance(value, np.ndarray) and value.dtype == object):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        held = " of objects" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"`{name}` is a {kind}{held}, expected a JAX or NumPy array of numbers")
    try:
        # Of an array that is being differentiated, `asarray` would be a copy, and that a program to compile.
        array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    except TypeError:  # text, dates, records, another machine's byte order
        array = None
    if array is None or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f"`{name}` has dtype {value.dtype}, expected a JAX or NumPy array of numbers")
    return array


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(choices)}")


def check_floating(**arrays: jax.Array | None) -> None:
    for name, array in arrays.items():
        if array is not None and array.dtype.name not in FLOATING:
            raise TypeError(f"`{name}` has dtype {array.dtype}, expected one of {', '.join(FLOATING)}")


def precision_pair(precision: lax.PrecisionLike) -> PrecisionPair:
    """Return one `lax.Precision` for x and one for the kernel, or None to leave it to JAX."""
    if precision is None:
        return None
    pair = tuple(precision) if isinstance(precision, (tuple, list)) else (precision, precision)
    try:
        lhs, rhs = (lax.Precision(p) for p in pair)
    except ValueError:
        raise ValueError(
            f"`precision` is {precision!r}, expected None, a `jax.lax.Precision`, its name, or a pair of them"
        ) from None
    return lhs, rhs


def common_and_result_dtype(
    arrays: Mapping[str, jax.Array | None], preferred_element_type: Any
) -> tuple[np.dtype, np.dtype]:
    """Return the dtype to which JAX promotes all arrays, and the dtype of the result.

    Under `jax_numpy_dtype_promotion="strict"` differing dtypes are an error.
    """
    check_floating(**arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    try:
        common = jnp.result_type(*present.values())
    except ValueError:  # a TypePromotionError, which JAX 0.8 keeps to itself
        given = ", ".join(f"`{name}` has dtype {array.dtype}" for name, array in present.items())
        raise TypeError(f"{given}; expected one dtype for all under strict dtype promotion") from None
    result = common
    if preferred_element_type is not None:
        result = jax.dtypes.canonicalize_dtype(preferred_element_type)
        if result.name not in FLOATING or result.itemsize < common.itemsize:
            raise TypeError(
                f"`preferred_element_type` is {jnp.dtype(preferred_element_type).name}, "
                f"expected a floating dtype no narrower than {common.name}, the dtype of the arrays"
            )
    return common, result


def accumulator(*dtypes: Any) -> np.dtype:
    """Return the dtype in which products of these dtypes are added: float64 if one of them is, else float32."""
    return np.dtype(np.float64 if np.dtype(np.float64) in map(np.dtype, dtypes) else np.float32)


def is_sharded(array: jax.Array) -> bool:
    """Return True if the array's type says that it is sharded, which happens only over explicit mesh axes."""
    return any(entry is not None for entry in jax.typeof(array).sharding.spec)
