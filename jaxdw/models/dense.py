"""The dense convolutions of the models as matrix products, one each, which XLA:CPU runs fastest.

A 1x1 convolution is a matrix product already. But `lax.dot_general` has a slow transpose: it computes the kernel's
gradient as dy^T x, for which XLA:CPU copies dy to another layout, one number at a time, although the other gradient
needs dy too. x^T dy needs no such copy. Therefore the product here is a primitive with that transpose.

A convolution of an image with three channels gathers its windows first. `lax.conv_general_dilated` takes more than
twice the time (`jaxdw bench --suite models`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw._arrays import is_sharded, precision_pair
from jaxdw._compat import varying_together
from jaxdw.primitive import replicated
from jaxdw.windows import unfold

#: Most input channels of a convolution that is computed as windows and one product.
FEW_CHANNELS = 4

_product_p = Primitive("product")
_outer_p = Primitive("outer_product")


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> jax.Array:
    """Compute `lax.dot_general`; lhs `(..., A)` times rhs `(A, B)` has the derivative described above."""
    (contract, other), batch = dimension_numbers
    plain = (tuple(contract), tuple(other)) == ((lhs.ndim - 1,), (0,)) and not any(batch) and rhs.ndim == 2
    plain = plain and not (is_sharded(lhs) or is_sharded(rhs))  # lax knows the sharding of the result
    if not plain or preferred_element_type is not None or any(v is not None for v in options.values()):
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **options)
    return _product_p.bind(*varying_together(lhs, rhs), precision=precision_pair(precision))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    precision: lax.PrecisionLike = None,
    **options: Any,
) -> jax.Array:
    """Compute `lax.conv_general_dilated` of images, channels last; with few channels as windows and a product."""
    channels, features = rhs.shape[-2:]
    plain = lhs.ndim == 4 and set(lhs_dilation or (1,)) == {1} and channels <= FEW_CHANNELS
    plain = plain and not (is_sharded(lhs) or is_sharded(rhs))
    if not plain or options.pop("feature_group_count", 1) != 1 or any(v is not None for v in options.values()):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            precision=precision,
            **options,
        )
    windows = unfold(lhs, rhs.shape[:2], strides=window_strides, padding=padding, kernel_dilation=rhs_dilation)
    flat = windows.reshape(*windows.shape[:3], math.prod(windows.shape[3:]))
    return dot_general(flat, rhs.reshape(math.prod(rhs.shape[:-1]), features), (((3,), (0,)), ((), ())), precision)


def _product(x: jax.Array, kernel: jax.Array, *, precision: Any) -> jax.Array:
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision)


def outer_product(x: jax.Array, dy: jax.Array, *, precision: Any) -> jax.Array:
    """Return `(A, B)`: the sum over all leading axes of x `(..., A)` times dy `(..., B)`."""
    rows = math.prod(x.shape[:-1])
    x, dy = x.reshape(rows, x.shape[-1]), dy.reshape(rows, dy.shape[-1])
    return lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision)


@_product_p.def_abstract_eval
def _product_abstract(x, kernel, *, precision):
    return replicated((*x.shape[:-1], kernel.shape[1]), x.dtype, x)


@_outer_p.def_abstract_eval
def _outer_abstract(x, dy, *, precision):
    return replicated((x.shape[-1], dy.shape[-1]), x.dtype, x)


def _bind(primitive: Primitive, *operands: jax.Array, precision: Any) -> jax.Array:
    return primitive.bind(*varying_together(*operands), precision=precision)


ad.defbilinear(
    _product_p,
    lambda ct, x, kernel, precision: _bind(_product_p, ct, kernel.T, precision=precision),
    lambda ct, x, kernel, precision: _bind(_outer_p, x, ct, precision=precision),
)
ad.defbilinear(
    _outer_p,
    lambda ct, x, dy, precision: _bind(_product_p, dy, ct.T, precision=precision),
    lambda ct, x, dy, precision: _bind(_product_p, x, ct, precision=precision),
)
for _primitive, _function in ((_product_p, _product), (_outer_p, outer_product)):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    mlir.register_lowering(_primitive, mlir.lower_fun(_function, multiple_results=False))
    # Several kernels at once are no longer this product: lax's own takes over, with its derivatives.
    batching.primitive_batchers[_primitive] = lambda operands, axes, *, precision, _function=_function: (
        jax.vmap(functools.partial(_function, precision=precision), in_axes=axes)(*operands),
        0,
    )
