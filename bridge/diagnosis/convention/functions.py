"""Functions of each element that were applied before or after the layer by mistake: ReLU, SiLU and others.

The functions come from a table. Each is a hypothesis like the others: y must lie within its bound, element by element.

*The bound after a function.* With f of Lipschitz constant L, |f(z) - f(r)| <= L |z - r|, so what is allowed grows by L.
Evaluating f adds at most `_ROUNDINGS` units roundoff of its greatest intermediate number: of |z| for functions that
multiply by z, of 1 for functions between -1 and 1. Functions that only choose or clip add nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected, sampled_terms
from bridge.numerics import Products, cast, exact_sum, format_of

#: Units roundoff that evaluating a function costs: 4 of a library's exp, tanh or erf, and 4 operations around it.
_ROUNDINGS = 8
#: Least number of elements per fitted number.
PER_NUMBER = 8


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of each element.

    Attributes:
      name: its usual name.
      of: the function itself, in float64.
      lipschitz: |f(a) - f(b)| <= lipschitz |a - b|.
      size: the greatest intermediate number from z to f(z); None if f rounds nothing.
      code: how to write it.
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]
    lipschitz: float
    size: Callable[[np.ndarray], np.ndarray] | None
    code: str

    def after(self, expected: Expected, u: float) -> Expected:
        """Return what is expected of f if `expected` is expected of its argument."""
        allowed = self.lipschitz * expected.allowed
        if self.size is not None:
            allowed = allowed + _ROUNDINGS * u * (self.size(expected.reference) + expected.allowed)
        return Expected(self.of(expected.reference), allowed)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * z))


def _erf(z: np.ndarray) -> np.ndarray:
    return np.frompyfunc(math.erf, 1, 1)(z).astype(np.float64)


def _tanh_gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, z)


def _elu(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def _one(z: np.ndarray) -> np.ndarray:
    return np.ones_like(z)


def _more(z: np.ndarray) -> np.ndarray:
    return np.abs(z) + 1


_SELU = 1.0507009873554805

#: The functions, the most frequent first.
FUNCTIONS = (
    Function("ReLU", lambda z: np.maximum(z, 0), 1, None, "relu"),
    Function("ReLU6", lambda z: np.clip(z, 0, 6), 1, None, "relu6"),
    Function("hard swish", lambda z: z * np.clip(z + 3, 0, 6) / 6, 1.5, np.abs, "hardswish / jax.nn.hard_swish"),
    Function("SiLU", lambda z: z * _sigmoid(z), 1.1, np.abs, "silu"),
    Function("GELU", lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))), 1.13, np.abs, "gelu / approximate=False"),
    Function("GELU (tanh)", _tanh_gelu, 1.13, np.abs, "gelu(approximate='tanh') / approximate=True"),
    Function("sigmoid", _sigmoid, 0.25, _one, "sigmoid"),
    Function("tanh", np.tanh, 1, _one, "tanh"),
    Function("hard sigmoid", lambda z: np.clip(z + 3, 0, 6) / 6, 1 / 6, _one, "hardsigmoid / jax.nn.hard_sigmoid"),
    Function("hard tanh", lambda z: np.clip(z, -1, 1), 1, None, "hardtanh"),
    Function("hard sigmoid (0.2 z + 0.5)", lambda z: np.clip(0.2 * z + 0.5, 0, 1), 0.2, _one, "keras hard_sigmoid"),
    Function("quick GELU", lambda z: z * _sigmoid(1.702 * z), 1.1, np.abs, "z * sigmoid(1.702 * z)"),
    Function("ELU", _elu, 1, _more, "elu"),
    Function("SELU", lambda z: _SELU * np.where(z > 0, z, 1.6732632423543772 * _elu(z)), 1.7581, _more, "selu"),
    Function("softplus", _softplus, 1, _more, "softplus"),
    Function("mish", lambda z: z * np.tanh(_softplus(z)), 1.09, np.abs, "mish"),
    Function("softsign", lambda z: z / (1 + np.abs(z)), 1, _one, "soft_sign"),
    Function("log sigmoid", lambda z: -_softplus(-z), 1, _more, "log_sigmoid"),
    Function("the absolute value", np.abs, 1, None, "abs"),
)


def leaky(output: Output) -> Iterator[Function]:
    """Yield leaky ReLU after the layer, with the slope that negative elements show."""
    reference, allowed = output.expected.at(output.sample)
    y = output.y.ravel()[output.sample].astype(np.float64)
    negative = reference < -8 * allowed
    if np.count_nonzero(negative) >= PER_NUMBER:
        yield from _with_slope(output, float(np.median(y[negative] / reference[negative])))


def leaky_before(output: Output) -> Iterator[Function]:
    """Yield leaky ReLU before the layer: y = conv(max(x, 0)) + slope conv(min(x, 0)) + bias."""
    case = output.target.case
    at = np.unravel_index(output.sample, output.y.shape)
    terms = sampled_terms(case.replace(bias=None), at)
    parts = ([(clip(x, x.dtype.type(0)), w, valid) for x, w, valid in terms] for clip in (np.maximum, np.minimum))
    plus, minus = (exact_sum(Products.of(part, output.sample.shape)).reference for part in parts)
    left = output.y.ravel()[output.sample].astype(np.float64) - plus
    if case.bias is not None:
        left -= case.bias.astype(np.float64)[at[-1]]
    if power := float(minus @ minus):
        yield from _with_slope(output, float(left @ minus) / power)


def _with_slope(output: Output, slope: float) -> Iterator[Function]:
    near = float(f"{slope:.3g}") if math.isfinite(slope) else 0.0
    slope = near if abs(near - slope) <= fit_tolerance(output) else slope
    if 0 < abs(slope) < 1:
        name = f"leaky ReLU with slope {slope:.4g}"
        yield Function(name, lambda z: np.where(z > 0, z, slope * z), 1, np.abs, "leaky_relu")


def applied_after(mistake: Mistake, functions: list[Function], output: Output) -> Mistake:
    """Return the mistake with the first function after it; the cause names the others, which explain y as well."""
    first, u = functions[0], format_of(output.y.dtype).unit_roundoff
    also = Mistake(
        f"{first.name} after",
        f"has {first.name} applied after the layer{_or(functions[1:])}, which the case does not have",
        f"leave out {first.name} ({first.code}), or apply it in both implementations",
        mistake.case,
        place="output",
        after=lambda expected, _: first.after(expected, u),
    )
    return also if mistake.case is output.target.case and mistake.rearrange is None else mistake.then(also)


def followed_by_bias(output: Output) -> Iterator[Mistake]:
    """Yield the functions that were applied to the sum of products, with the bias added after them."""
    case, bias = output.target.case, output.target.case.bias
    if bias is None:
        return
    u, wide = format_of(output.y.dtype).unit_roundoff, bias.astype(np.float64)
    bare = case.replace(bias=None)
    for function in FUNCTIONS:

        def after(expected: Expected, channels: np.ndarray, function: Function = function) -> Expected:
            value, allowed = function.after(expected, u)
            total = value + wide[channels]
            return Expected(total, allowed + _ROUNDINGS * u * (np.abs(value) + np.abs(total) + allowed))

        yield Mistake(
            f"bias after {function.name}",
            f"has {function.name} applied to the sum of products, and the bias added after it",
            f"add the bias before {function.name} ({function.code})",
            bare,
            place="bias",
            after=after,
        )


def applied_before(output: Output, near: Callable[[Callable[[np.ndarray], np.ndarray]], bool]) -> Iterator[Mistake]:
    """Yield functions of the input that come near y; those that give the same x are one mistake."""
    case = output.target.case
    u, wide = format_of(case.dtype).unit_roundoff, case.x.astype(np.float64)
    found: dict[bytes, tuple[np.ndarray, list[Function]]] = {}
    for function in (*FUNCTIONS, *leaky_before(output)):
        if not near(function.of):
            continue
        with np.errstate(all="ignore"):
            x = cast(function.of(wide), case.dtype)
        found.setdefault(x.tobytes(), (x, []))[1].append(function)
    for x, (function, *others) in found.values():
        yield Mistake(
            f"{function.name} before",
            f"has {function.name} applied to its input{_or(others)}, which the case does not have",
            f"leave out {function.name} ({function.code}) before the layer, or apply it in both implementations",
            case.replace(x=x),
            place="x",
            error_of_x=None if function.size is None else _ROUNDINGS * u * function.size(wide),
        )


def _or(others: list[Function]) -> str:
    return f" (or {', '.join(f.name for f in others)}: these values do not distinguish them)" if others else ""


def fit_tolerance(output: Output) -> float:
    """Return how near a fitted number must be to one that people write."""
    return 64 * format_of(output.y.dtype).unit_roundoff
