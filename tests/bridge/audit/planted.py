"""Functions of x and kernel with one hazard each, and a twin without any: 3x3, padding 1, stride 1."""

import jax
import jax.numpy as jnp
from jax import lax

import jaxdw


def clean(x, kernel):
    return jaxdw.depthwise_conv(x, kernel, padding=1, method="taps")


def copy_in_bfloat16(x, kernel):
    """A copy that the compiler keeps; without the barrier it would drop both conversions."""
    return clean(lax.optimization_barrier(x.astype(jnp.bfloat16)).astype(x.dtype), kernel)


def copy_in_float32(x, kernel):
    return clean(lax.optimization_barrier(x + 1) - 1, kernel)


def fewer_bits_of_the_kernel(x, kernel):
    return clean(x, lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=10))


def as_many_bits_of_the_kernel(x, kernel):
    return clean(x, lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=23))


def product_with_the_identity(x, kernel):
    return clean(jnp.einsum("bhwc,cd->bhwd", x, jnp.eye(x.shape[-1], dtype=x.dtype)), kernel)


def columns_first(x, kernel):
    """Transposed, convolved with the transposed kernel, and transposed back."""
    swapped = lax.optimization_barrier(jnp.swapaxes(x, 1, 2))
    return jnp.swapaxes(lax.optimization_barrier(clean(swapped, jnp.swapaxes(kernel, 0, 1))), 1, 2)


def windows_in_memory(x, kernel):
    return jaxdw.depthwise_conv(x, kernel, padding=1, method="patches")


def row_by_row(x, kernel):
    """A loop whose rounds run programs of their own."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def row(i):
        rows = lax.dynamic_slice_in_dim(padded, i, 3, axis=1)
        return jaxdw.depthwise_conv(rows, kernel, padding="VALID", method="taps")[:, 0]

    return jnp.moveaxis(lax.map(row, jnp.arange(x.shape[1])), 0, 1)


def wrong_shape(x, kernel):
    return clean(x, kernel)[:, 1:]


def raises(x, kernel):
    raise RuntimeError("as planted")


def jitted(x, kernel):
    return jax.jit(clean)(x, kernel)
