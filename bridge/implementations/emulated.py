"""What a TPU or a GPU does to the operands of convolutions and matrix products, done on the CPU.

Both round float32 operands before they multiply, and say how (`jax.lax.Precision`):

| precision | TPU | NVIDIA GPU, from Ampere on |
| --- | --- | --- |
| default | bfloat16, one product | TF32 |
| high | two parts of bfloat16, three products | TF32 |
| highest | three parts of bfloat16, six products | float32, nothing rounded |

Products of such operands are exact in float32, and sums are float32. An operation that names two precisions runs at the
higher. A function is traced, whatever it is made of, and each convolution and matrix product in it runs on operands
rounded so, to nearest with ties to even; its derivatives likewise, since they are convolutions and products too. All
else stays as it is, elementwise multiplications above all, which no platform rounds.

The order in which the platform adds is *not* emulated: it is this machine's. So the low bits, within the bound of
float32, may be others there. Nor is hardware that drops low bits in place of rounding to the nearest TF32.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal


class Parts(NamedTuple):
    """How many numbers stand for one operand, and the bits of their significands but for the hidden one.

    Products of parts i and j are made where i + j is less than the number of parts: 1, 3 or 6 of them.
    """

    number: int
    mantissa_bits: int


#: By platform and precision; None rounds nothing.
PARTS: Mapping[str, Mapping[str, Parts | None]] = {
    "tpu": {"default": Parts(1, 7), "high": Parts(2, 7), "highest": Parts(3, 7)},
    "gpu": {"default": Parts(1, 10), "high": Parts(1, 10), "highest": None},
}

#: What the platforms are called.
PLATFORMS = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}

#: What computing in a dtype would need, and the platform has not, or does not document.
_UNKNOWN = {
    ("tpu", "float64"): "a TPU has no float64 products",
    ("tpu", "float16"): "what a TPU rounds float16 operands to is not documented",
}

_PRODUCTS = ("conv_general_dilated", "dot_general")

#: Primitives that call a jaxpr once, and its name among their parameters.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

_RISING = ("default", "high", "highest")

_CONTROL = ("scan", "while", "cond")


def values() -> dict[str, str]:
    """The values of the knob `precision` that emulate a platform, each with its meaning in words.

    >>> list(values())
    ['tpu-default', 'tpu-high', 'tpu-highest', 'gpu-default', 'gpu-high', 'gpu-highest']
    """
    return {
        f"{platform}-{precision}": f'precision="{precision}" on {PLATFORMS[platform]} (emulated on this machine: '
        "operands rounded as there, added in the order of here)"
        for platform, precisions in PARTS.items()
        for precision in precisions
    }


def check(value: str, dtype: np.dtype) -> None:
    """Refuses arithmetic that the platform has not, or that is not documented, for any method.

    Raises:
      ValueError: the message names the knob, its value and the dtypes that may be.
    """
    platform = value.partition("-")[0]
    reason = _UNKNOWN.get((platform, dtype.name))
    if reason:
        raise ValueError(f"`precision` is {value!r} for {dtype.name} arrays, expected float32 or bfloat16: {reason}")


@dataclasses.dataclass(frozen=True)
class On:
    """compute as a platform computes it: called as compute is, with arrays, a geometry and a `lax.Precision`.

    That precision also holds for operations of compute that do not name their own.
    """

    platform: str
    compute: Callable[..., jax.Array]

    def __call__(self, *arguments: Any) -> jax.Array:
        *arrays, geometry, precision = arguments
        with jax.default_matmul_precision(precision.name.lower()):
            traced = jax.make_jaxpr(lambda *arrays: self.compute(*arrays, geometry, precision))(*arrays)
        (y,) = _evaluate(self.platform, traced, jax.tree.leaves(arrays))
        return y


def _evaluate(platform: str, traced: ClosedJaxpr, arrays: Sequence[Any]) -> list[Any]:
    jaxpr = traced.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*traced.consts, *arrays)))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        known.update(zip(equation.outvars, _apply(platform, equation, [read(atom) for atom in equation.invars])))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(platform: str, equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    """The results of one equation; what holds no product within is left as it is."""
    name, params = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        return [_product(platform, equation, *operands)]
    if any(_multiplies(inner) for inner in _inner(params)):
        if name in _CALLS:
            return _evaluate(platform, _closed(params[_CALLS[name]]), operands)
        if name not in _CONTROL:
            raise ValueError(
                f"`precision` emulates {PLATFORMS[platform]}, expected no product within {name!r}: "
                "that cannot be emulated"
            )
        params = {key: _rewritten(platform, value) for key, value in params.items()}
    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
    return list(results) if equation.primitive.multiple_results else [results]


def _product(platform: str, equation: JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """A convolution or matrix product of float32 operands as the platform rounds them; of others, as it is."""

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        # at highest, so that a machine with rounding of its own adds none to it
        highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
        return equation.primitive.bind(a, b, **{**equation.params, "precision": highest})

    parts = PARTS[platform][_precision(equation)]
    if parts is None or lhs.dtype != jnp.float32 or rhs.dtype != jnp.float32:
        return multiply(lhs, rhs)
    left, right = _split(lhs, parts), _split(rhs, parts)
    pairs = [(i, j) for i, j in itertools.product(range(parts.number), repeat=2) if i + j < parts.number]
    leading = multiply(left[0], right[0])
    small = [multiply(left[i], right[j]) for i, j in sorted(pairs, key=sum, reverse=True)[:-1]]
    if not small:
        return leading
    rest = sum(small[1:], small[0])
    # of infinities the rest has only NaN and wrong signs
    return jnp.where(jnp.isfinite(rest), rest, jnp.zeros_like(rest)) + leading


def _split(a: jax.Array, parts: Parts) -> list[jax.Array]:
    """a as a sum of numbers with few bits, the greatest first; what is left over is dropped."""
    found = []
    for _ in range(parts.number):
        found.append(lax.reduce_precision(a, exponent_bits=8, mantissa_bits=parts.mantissa_bits))
        a = a - found[-1]
    return found


def _precision(equation: JaxprEqn) -> str:
    asked = equation.params["precision"]
    if asked is None:
        return "default"
    if not isinstance(asked, tuple):
        raise ValueError(
            f"`precision` of {equation.primitive.name} is {asked}, expected default, high or highest to emulate"
        )
    return max((lax.Precision(each).name.lower() for each in asked), key=_RISING.index)


def _inner(params: Mapping[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    for value in params.values():
        yield from (each for each in (value if isinstance(value, tuple) else (value,)) if _is_jaxpr(each))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (Jaxpr, ClosedJaxpr))


def _closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _multiplies(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    return any(
        equation.primitive.name in _PRODUCTS or any(_multiplies(inner) for inner in _inner(equation.params))
        for equation in jaxpr.eqns
    )


def _rewritten(platform: str, value: Any) -> Any:
    """A parameter of a loop or a condition: its bodies with rounded products."""
    if isinstance(value, tuple) and any(map(_is_jaxpr, value)):
        return tuple(_rewritten(platform, each) for each in value)
    if not _is_jaxpr(value):
        return value
    body = _closed(value)
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals]
    return jax.make_jaxpr(lambda *arrays: _evaluate(platform, body, arrays))(*shapes)
