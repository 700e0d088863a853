"""What a training step needs beside its layers, each as one defined sequence of roundings: docs/arithmetic.md.

XLA may contract, reorder or flush what it computes itself. So the sum of two branches, the loss and the step of the
optimizer are compiled kernels, too. On other platforms, and without kernels, XLA computes their definitions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import native
from jaxdw._arrays import accumulator, as_array, check_floating, is_sharded
from jaxdw._compat import varying_together
from jaxdw.lowerings import cpu_native
from jaxdw.lowerings.cpu_fused import in_memory
from jaxdw.primitive import kernel_lowering, replicated
from jaxdw.sum_order import SumOrder

Tree = TypeVar("Tree")


def axpby(a: Any, x: jax.Array, b: Any, y: jax.Array) -> jax.Array:
    """Return a x + b y, element by element: `fma(a, x, b * y)`, with b y rounded.

    Args:
      a, b: numbers, or arrays of shape ().
      x, y: of one shape and one dtype: float32, float64, bfloat16 or float16. The arithmetic is in float32, in float64
        for float64.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> axpby(2, jnp.ones(3), -1, jnp.ones(3)).tolist()
    [1.0, 1.0, 1.0]
    """
    x, y = _alike(x, y)
    wide = accumulator(x.dtype)
    factors = []
    for name, factor in (("a", a), ("b", b)):
        _check_number(name, factor)
        factors.append(lax.convert_element_type(factor, wide))
    if is_sharded(x) or is_sharded(y):  # XLA knows how to share it out
        return _axpby_definition(jnp.stack(factors), x, y)
    return _axpby_p.bind(*varying_together(jnp.stack(factors), x, y))


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x + y, of one shape and dtype, rounded once, subnormal numbers too.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.
    """
    x, y = _alike(x, y)
    return _add_p.bind(*varying_together(x, y))


def _alike(x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    x, y = as_array("x", x), as_array("y", y)
    check_floating(x=x, y=y)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"`y` is {y.dtype} of shape {y.shape}, expected {x.dtype} of shape {x.shape}, as `x`")
    return x, y


def _check_number(name: str, value: Any) -> None:
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic)) and value.shape == ()
    if is_array and (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` is {value!r}, expected a number")


def fork(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return x twice, for two branches: the gradients that come back are added as `add` does."""
    return tuple(_fork_p.bind(x))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean over all rows of `log(sum(exp(logits))) - logits[label]`, a number of the dtype of logits.

    It is computed in float64 and rounded once, with an exponential and a logarithm that docs/arithmetic.md defines. It
    has derivatives of first order by the logits in reverse mode; those of higher order are an error.

    Args:
      logits: `(*batch, classes)`, float32, float64, bfloat16 or float16.
      labels: `(*batch,)`, integers from 0 to classes - 1; another one makes the result NaN.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))), 6)
    1.386294
    """
    logits, labels = as_array("logits", logits), as_array("labels", labels)
    check_floating(logits=logits)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` has dtype {labels.dtype}, expected integers")
    if logits.ndim < 1 or 0 in logits.shape or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"`logits` and `labels` have shapes {logits.shape} and {labels.shape}, expected (*batch, classes) and "
            "(*batch,), none of them empty"
        )
    rows = logits.reshape(math.prod(labels.shape), logits.shape[-1])
    if labels.dtype.itemsize >= 4 and labels.dtype != jnp.int32:  # a wide label must not wrap to one of a class
        labels = jnp.clip(labels, None if labels.dtype.kind == "u" else -1, 2**31 - 1)
    return _cross_entropy(rows, labels.reshape(-1).astype(jnp.int32))


def sgd(
    parameters: Tree,
    momenta: Tree,
    gradients: Tree,
    *,
    learning_rate: Any,
    momentum: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
) -> tuple[Tree, Tree]:
    """Return parameters and momenta after a step of stochastic gradient descent, as `torch.optim.SGD` takes it.

    For each parameter p with momentum m and gradient g, every line with one rounding:

        g = fma(weight_decay, p, g)
        m = fma(1, g, momentum * m)          two roundings: of the product, and of the sum
        g = fma(momentum, m, g)              with `nesterov`; else g = m
        p = fma(-learning_rate, g, p)

    Args:
      parameters, momenta, gradients: trees of arrays, of one structure; momenta are zeros before the first step.
      learning_rate, momentum, weight_decay: numbers from 0 on, or arrays of shape ().
      nesterov: look ahead by one step of the momentum.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it.

    >>> p, m = sgd(jnp.ones(2), jnp.zeros(2), jnp.ones(2), learning_rate=0.5, momentum=0.9)
    >>> p.tolist(), m.tolist()
    ([0.5, 0.5], [1.0, 1.0])
    """
    factors = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    for name, factor in factors.items():
        _check_number(name, factor)
        if isinstance(factor, (int, float)) and factor < 0:
            raise ValueError(f"`{name}` is {factor!r}, expected 0 or more")
    if not isinstance(nesterov, bool):
        raise TypeError(f"`nesterov` is {nesterov!r}, expected True or False")

    def step(p: jax.Array, m: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        g = axpby(weight_decay, p, 1, g)
        m = axpby(1, g, momentum, m)
        g = axpby(momentum, m, 1, g) if nesterov else m
        return axpby(-learning_rate, g, 1, p), m

    leaves, structure = jax.tree.flatten(parameters)
    others = (structure.flatten_up_to(tree) for tree in (momenta, gradients))
    stepped = [step(*each) for each in zip(leaves, *others)]
    return structure.unflatten([p for p, _ in stepped]), structure.unflatten([m for _, m in stepped])


def _call(name: str, operands: tuple[jax.Array, ...], like: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(like.shape, like.dtype))(*operands)


# a x + b y: for optimizers and averages, which nothing is differentiated through

_axpby_p = Primitive("axpby")


@_axpby_p.def_abstract_eval
def _axpby_abstract(factors, x, y):
    return replicated(x.shape, x.dtype, x)


def _axpby_definition(factors: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    a, b = factors
    return (a * x.astype(a.dtype) + b * y.astype(a.dtype)).astype(x.dtype)


def _axpby_kernel(factors: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return _call(native.AXPBY, (factors, x, y), x)


def _axpby_batch(operands, axes):
    factors, *others = operands
    if axes[0] is None:
        return _axpby_p.bind(factors, *_mapped(others, axes[1:])), 0
    factors, *others = _mapped(operands, axes)
    return lax.map(lambda one: _axpby_p.bind(*one), (factors, *others)), 0


def _mapped(operands, axes):
    """Return the operands with the mapped axis in front, and repeated along it where they have none."""
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    return [
        jnp.broadcast_to(operand, (count, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
        for operand, axis in zip(operands, axes)
    ]


# the sum of two branches, and its transpose

_add_p, _fork_p = Primitive("add_branches"), Primitive("fork")
_fork_p.multiple_results = True


@_add_p.def_abstract_eval
def _add_abstract(x, y):
    return x


@_fork_p.def_abstract_eval
def _fork_abstract(x):
    return [x, x]


def _add_kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    return _axpby_kernel(jnp.ones(2, accumulator(x.dtype)), x, y)


def _sum_of_given(values: tuple[Any, ...]) -> Any:
    given = [value for value in values if type(value) is not ad.Zero]
    return functools.reduce(add, given) if given else values[0]


def _add_jvp(primals, tangents):
    return _add_p.bind(*primals), _sum_of_given(tangents)


def _add_transpose(ct, x, y):
    return [ct if ad.is_undefined_primal(each) else None for each in (x, y)]


def _fork_jvp(primals, tangents):
    (tangent,) = tangents
    return _fork_p.bind(*primals), [tangent, tangent] if type(tangent) is ad.Zero else _fork_p.bind(tangent)


def _fork_transpose(cotangents, x):
    return [_sum_of_given(tuple(cotangents))]


ad.primitive_jvps[_add_p], ad.primitive_transposes[_add_p] = _add_jvp, _add_transpose
ad.primitive_jvps[_fork_p], ad.primitive_transposes[_fork_p] = _fork_jvp, _fork_transpose
batching.primitive_batchers[_axpby_p] = _axpby_batch
batching.primitive_batchers[_add_p] = lambda operands, axes: (_add_p.bind(*_mapped(operands, axes)), 0)
batching.primitive_batchers[_fork_p] = lambda operands, axes: (_fork_p.bind(*operands), [*axes, *axes])
mlir.register_lowering(_fork_p, mlir.lower_fun(lambda x: [x, x], multiple_results=True))


# division by a number, whose derivative is itself

_divide_p = Primitive("divide_by_number")


def divide(x: jax.Array, number: int) -> jax.Array:
    """Return x / number, each element rounded once: XLA would multiply by the reciprocal."""
    return _divide_p.bind(x, number=number)


@_divide_p.def_abstract_eval
def _divide_abstract(x, *, number: int):
    return x


def _divide_definition(x: jax.Array, *, number: int) -> jax.Array:
    return x / in_memory(jnp.full(x.shape, number, x.dtype))[0]


def _divide_kernel(x: jax.Array, *, number: int) -> jax.Array:
    one = jnp.ones((1, 1), x.dtype)
    return cpu_native.matmul(one, x.reshape(1, x.size), None, SumOrder.chain(1), divisor=number).reshape(x.shape)


ad.deflinear2(_divide_p, lambda ct, x, *, number: [divide(ct, number)])
batching.defvectorized(_divide_p)


# cross entropy and its gradient

_loss_p, _loss_gradient_p = Primitive("cross_entropy"), Primitive("cross_entropy_gradient")


@_loss_p.def_abstract_eval
def _loss_abstract(logits, labels):
    return replicated((), logits.dtype, logits)


@_loss_gradient_p.def_abstract_eval
def _loss_gradient_abstract(logits, labels, ct):
    return replicated(logits.shape, logits.dtype, logits)


def _loss_definition(logits: jax.Array, labels: jax.Array) -> jax.Array:
    wide = logits.astype(accumulator(logits.dtype))
    is_class = (labels >= 0) & (labels < logits.shape[-1])
    of_label = jnp.take_along_axis(wide, jnp.where(is_class, labels, 0)[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(wide, axis=-1) - of_label
    # a product, so that the gradient is NaN, too
    return (losses * jnp.where(is_class, 1, jnp.nan).astype(wide.dtype)).mean().astype(logits.dtype)


def _loss_gradient_definition(logits: jax.Array, labels: jax.Array, ct: jax.Array) -> jax.Array:
    return jax.vjp(lambda logits: _loss_definition(logits, labels), logits)[1](ct)[0]


def _loss_kernel(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(native.CROSS_ENTROPY, jax.ShapeDtypeStruct((), logits.dtype))(logits, labels)


def _loss_gradient_kernel(logits: jax.Array, labels: jax.Array, ct: jax.Array) -> jax.Array:
    return _call(native.CROSS_ENTROPY, (logits, labels, ct), logits)


@jax.custom_vjp
def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return _loss_p.bind(*varying_together(logits, labels))


def _cross_entropy_forward(logits, labels):
    return _cross_entropy(logits, labels), (logits, labels)


def _cross_entropy_backward(kept, ct):
    return _loss_gradient_p.bind(*varying_together(*kept, ct)), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _one_by_one(primitive: Primitive) -> Callable[..., Any]:
    def batch(operands, axes):
        mapped = _mapped(operands, axes)
        if not len(mapped[0]):
            (aval,) = (jax.eval_shape(primitive.bind, *(jax.ShapeDtypeStruct(o.shape[1:], o.dtype) for o in mapped)),)
            return jnp.zeros((0, *aval.shape), aval.dtype), 0
        return lax.map(lambda one: primitive.bind(*one), tuple(mapped)), 0

    return batch


batching.primitive_batchers[_loss_p] = _one_by_one(_loss_p)
batching.primitive_batchers[_loss_gradient_p] = _one_by_one(_loss_gradient_p)

for _primitive, _definition, _compiled in (
    (_axpby_p, _axpby_definition, _axpby_kernel),
    (_add_p, jnp.add, _add_kernel),
    (_divide_p, _divide_definition, _divide_kernel),
    (_loss_p, _loss_definition, _loss_kernel),
    (_loss_gradient_p, _loss_gradient_definition, _loss_gradient_kernel),
):
    _primitive.def_impl(functools.partial(xla.apply_primitive, _primitive))
    mlir.register_lowering(_primitive, mlir.lower_fun(_definition, multiple_results=False))
    mlir.register_lowering(_primitive, kernel_lowering(_definition, _compiled), platform="cpu")
_fork_p.def_impl(functools.partial(xla.apply_primitive, _fork_p))
