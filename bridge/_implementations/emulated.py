"""Emulate on a CPU how TPUs and GPUs round the operands of convolutions and matrix products.

Both round float32 operands before they multiply, and the precision says how (`jax.lax.Precision`):

| precision | TPU | NVIDIA GPU, from Ampere on |
| --- | --- | --- |
| default | bfloat16, one product | TF32 |
| high | two parts of bfloat16, three products | TF32 |
| highest | three parts of bfloat16, six products | float32, nothing rounded |

An operation that names two precisions runs at the higher. The table describes the units for matrix products. Compilers
do not send every product there. In the programs that XLA makes for TPU v5e and v6e (libtpu 0.0.42) and for an H100

- a matrix product of which one side is a vector, or that adds nothing, is a loop of float32 multiplications and
  additions: nothing is rounded. An example is the einsum of windows and a kernel without a channel multiplier;
- a depthwise convolution with one tap is a multiplication: nothing is rounded;

and on TPU alone, where the vector unit computes a depthwise convolution of two channels or more, without a multiplier,

- its input is rounded at the default precision, and not above that; the kernel never;
- for the gradient by its kernel, both operands are rounded at the default precision, and not above that.

There the compiler rounds an operand when it changes its layout, which depends on the shape: at 2x5x5x3, 1x14x14x32 and
8x56x56x144 it does; at 8x14x14x32 and 8x7x7x960 all stays float32. The emulation always rounds. Older TPUs were not
examined, and no program was run on hardware.

Here a function is traced, and each convolution and matrix product in it runs on operands that are rounded so, to
nearest with ties to even. Its derivatives do too, since they are convolutions and products. All other operations stay
as they are, for example elementwise multiplications, which no platform rounds. Sums are float32.

Three things are *not* emulated:

1. The order in which the platform adds. It is this machine's, so the low bits may differ, within the bound of float32.
2. Hardware that drops low bits instead of rounding to the nearest TF32.
3. What a platform makes of infinities that it splits. Here they stay infinite.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from bridge._implementations.algorithm import Emulation
from jaxdw.jaxprs import called, closed, equations, evaluate, inner, is_jaxpr


class Parts(NamedTuple):
    """The number of parts of one operand, and the bits of their significands without the hidden one.

    Products of parts i and j are made where i + j is less than the number of parts: 1, 3 or 6 of them.
    """

    number: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        """Of the significand that they stand for, the hidden one of each included."""
        return self.number * (self.mantissa_bits + 1)


#: By platform and precision; None rounds nothing.
PARTS: Mapping[str, Mapping[str, Parts | None]] = {
    "tpu": {"default": Parts(1, 7), "high": Parts(2, 7), "highest": Parts(3, 7)},
    "gpu": {"default": Parts(1, 10), "high": Parts(1, 10), "highest": None},
}

#: What the platforms are called.
PLATFORMS = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}

#: Why computing in a dtype is refused: the platform cannot, or does not document how.
_UNKNOWN = {
    ("tpu", "float64"): "a TPU has no float64 products",
    ("tpu", "float16"): "how a TPU rounds float16 operands is not documented",
}

_PRODUCTS = ("conv_general_dilated", "dot_general")

_RISING = ("default", "high", "highest")

_CONTROL = ("scan", "while", "cond")


def values() -> dict[str, Emulation]:
    """Return the values of the knob `precision` that emulate a platform.

    >>> list(values())
    ['tpu-default', 'tpu-high', 'tpu-highest', 'gpu-default', 'gpu-high', 'gpu-highest']
    """
    return {
        f"{platform}-{precision}": Emulation(platform, PLATFORMS[platform], precision, f'precision="{precision}"')
        for platform, precisions in PARTS.items()
        for precision in precisions
    }


def check(value: str, dtype: np.dtype) -> None:
    """Refuse arithmetic that the platform does not have, or that is not documented, for any method.

    Raises:
      ValueError: the message names the knob, its value and the dtypes that may be.
    """
    platform = value.partition("-")[0]
    reason = _UNKNOWN.get((platform, dtype.name))
    if reason:
        raise ValueError(f"`precision` is {value!r} for {dtype.name} arrays, expected float32 or bfloat16: {reason}")


@dataclasses.dataclass(frozen=True)
class On:
    """A function as a platform computes it. Call it as the function: with arrays, a geometry and a `lax.Precision`.

    That precision also holds for operations of the function that do not name their own.
    """

    platform: str
    compute: Callable[..., jax.Array]

    def __call__(self, *arguments: Any) -> jax.Array:
        *arrays, _, _ = arguments
        (y,) = _evaluate(self.platform, self._traced(arguments), jax.tree.leaves(arrays))
        return y

    def coarsest(self, *arguments: Any) -> Parts | None:
        """Return the parts that leave the fewest bits of any operand; None if nothing is rounded. Shapes are enough."""
        rounded = (
            each for equation in _products(self._traced(arguments)) for each in _rounded(self.platform, equation)
        )
        return min((each for each in rounded if each is not None), key=lambda each: each.bits, default=None)

    def _traced(self, arguments: Sequence[Any]) -> ClosedJaxpr:
        *arrays, geometry, precision = arguments
        with jax.default_matmul_precision(precision.name.lower()):
            return jax.make_jaxpr(lambda *arrays: self.compute(*arrays, geometry, precision))(*arrays)


def _rounding(platform: str, equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Return the results of an equation that is, or holds, a product; None for any other."""
    name = equation.primitive.name
    if name in _PRODUCTS:
        return [_product(platform, equation, *operands)]
    if not any(True for jaxpr in inner(equation) for _ in _products(jaxpr)):
        return None
    program = called(equation)
    if program is not None:
        return _evaluate(platform, program, operands)
    if name not in _CONTROL:
        raise ValueError(
            f"`precision` emulates {PLATFORMS[platform]}, expected no product within {name!r}: that cannot be emulated"
        )
    params = {key: _rewritten(platform, value) for key, value in equation.params.items()}
    return equation.primitive.bind(*operands, **params)


def _evaluate(platform: str, program: ClosedJaxpr, arrays: Sequence[Any]) -> list[Any]:
    return evaluate(program, arrays, functools.partial(_rounding, platform))


def _product(platform: str, equation: JaxprEqn, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Return a convolution or matrix product of float32 operands as the platform rounds them; of others, as it is."""

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        # at highest, so that a machine that rounds operands itself does not round these
        highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
        return equation.primitive.bind(a, b, **{**equation.params, "precision": highest})

    left, right = (split(operand, parts) for operand, parts in zip((lhs, rhs), _rounded(platform, equation)))
    number = max(len(left), len(right))
    pairs = [(i, j) for i, j in itertools.product(range(len(left)), range(len(right))) if i + j < number]
    leading = multiply(left[0], right[0])
    small = [multiply(left[i], right[j]) for i, j in sorted(pairs, key=sum, reverse=True)[:-1]]
    if not small:
        return leading
    rest = sum(small[1:], small[0])
    # infinite operands give NaN and wrong signs in all but the leading product
    return jnp.where(jnp.isfinite(rest), rest, jnp.zeros_like(rest)) + leading


def _rounded(platform: str, equation: JaxprEqn) -> tuple[Parts | None, Parts | None]:
    """Return the parts that stand for each operand of a product; None for an operand that is not rounded."""
    precision, lhs, rhs = _precision(equation), *(atom.aval for atom in equation.invars)
    parts = PARTS[platform][precision]
    if lhs.dtype != jnp.float32 or rhs.dtype != jnp.float32 or _is_of_vectors(equation):
        return None, None
    channels, forward = _depthwise_channels(equation), equation.params.get("batch_group_count") == 1
    if channels and forward and math.prod(rhs.shape) == channels:
        return None, None
    if platform != "tpu" or channels < 2:
        return parts, parts
    if precision != "default":
        return None, None
    return parts, None if forward else parts


def _is_of_vectors(equation: JaxprEqn) -> bool:
    """Return whether it is a matrix product of one row or one column, or of one column and one row, per common axes."""
    if equation.primitive.name != "dot_general":
        return False
    contracted, common = equation.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in equation.invars]
    added = math.prod(shapes[0][axis] for axis in contracted[0])
    kept = [
        math.prod(shape) // math.prod(shape[axis] for axis in (*own, *batch)) if math.prod(shape) else 0
        for shape, own, batch in zip(shapes, contracted, common)
    ]
    return 1 in (added, *kept)


def _depthwise_channels(equation: JaxprEqn) -> int:
    """Return the channels of a depthwise convolution without multiplier, or of its gradient by the kernel; else 0."""
    if equation.primitive.name != "conv_general_dilated":
        return 0
    lhs, rhs = (atom.aval.shape for atom in equation.invars)
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    own = lhs[numbers.lhs_spec[1]]
    if equation.params["batch_group_count"] > 1:
        groups, own = equation.params["batch_group_count"], lhs[numbers.lhs_spec[0]]
    return groups if groups == own == rhs[numbers.rhs_spec[0]] else 0


def split(a: jax.Array, parts: Parts | None) -> list[jax.Array]:
    """Return a as a sum of numbers with few bits, the greatest first; the remainder is dropped."""
    if parts is None:
        return [a]
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


def _products(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Yield the convolutions and matrix products in a jaxpr, at any depth."""
    return (equation for equation in equations(jaxpr) if equation.primitive.name in _PRODUCTS)


def _rewritten(platform: str, value: Any) -> Any:
    """Return a parameter of a loop or a condition, with rounded products in its bodies."""
    if isinstance(value, tuple) and any(map(is_jaxpr, value)):
        return tuple(_rewritten(platform, each) for each in value)
    if not is_jaxpr(value):
        return value
    body = closed(value)
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals]
    return jax.make_jaxpr(lambda *arrays: _evaluate(platform, body, arrays))(*shapes)
