"""The mistakes that act on each element alone: a function before or after the layer, a scale, a BatchNorm.

Functions come from a table, and what an affine map scales and shifts by comes from least squares. Neither is believed:
each is a hypothesis like the others, and y must lie within its bound, element by element.

*The bound after a function.* With f of Lipschitz constant L, |f(z) - f(r)| <= L |z - r|, so what is allowed grows by L.
Evaluating f adds at most `_ROUNDINGS` units roundoff of the greatest number on its way: of |z| for those that multiply
by z, of 1 for those between -1 and 1. Functions that only choose or clip add nothing.

*Affine maps.* Let R be the exact result without its bias, and V the sum of the weights under taps that read the input,
which is the convolution of ones. Of the input a x + b the layer gives a R + b V + bias, since padding stays zero.
After the layer, s y + t. Numbers that people write, such as 1/255, replace the fitted ones where they are near.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from bridge.case import Case
from bridge.diagnosis.mistakes import Mistake
from bridge.diagnosis.target import Expected, products, sampled_terms
from bridge.numerics import Products, cast, exact_sum, format_of

if TYPE_CHECKING:
    from bridge.diagnosis.side import Side

#: Units roundoff that evaluating a function costs: 4 of a library's exp, tanh or erf, and 4 operations around it.
_ROUNDINGS = 8
#: Roundings of (x - m) / s, and of its rounded constants.
_AFFINE = 4
#: Elements a fitted number must be drawn from.
_PER_NUMBER = 8
#: Factors of images that people write, and how.
_FACTORS = {
    1 / 255: "x/255",
    1 / 256: "x/256",
    1 / 127.5: "x/127.5",
    1 / 128: "x/128",
    255.0: "255*x",
    256.0: "256*x",
    127.5: "127.5*x",
    128.0: "128*x",
    2.0: "2*x",
    0.5: "x/2",
}


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of each element.

    Attributes:
      name: what people call it.
      of: itself, in float64.
      lipschitz: |f(a) - f(b)| <= lipschitz |a - b|.
      size: the greatest number on the way from z to f(z); None where f rounds nothing.
      code: how it is written.
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]
    lipschitz: float
    size: Callable[[np.ndarray], np.ndarray] | None
    code: str

    def after(self, expected: Expected, u: float) -> Expected:
        """What is expected of f where `expected` is of its argument."""
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

#: From those that are met most.
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
#: Of these, elements that are not clipped show what an affine map before them did.
_CLIPS = {"": (-np.inf, np.inf), "ReLU": (0.0, np.inf), "ReLU6": (0.0, 6.0)}
_BY_NAME = {function.name: function for function in FUNCTIONS}


def leaky(side: Side) -> Iterator[Function]:
    """Leaky ReLU after the layer, with the slope that negative elements show."""
    reference, allowed = side.expected.at(side.sample)
    y = side.y.ravel()[side.sample].astype(np.float64)
    negative = reference < -8 * allowed
    if np.count_nonzero(negative) >= _PER_NUMBER:
        yield from _with_slope(side, float(np.median(y[negative] / reference[negative])))


def leaky_before(side: Side) -> Iterator[Function]:
    """Leaky ReLU before the layer: then y = conv(max(x, 0)) + slope conv(min(x, 0)) + bias."""
    case = side.target.case
    at = np.unravel_index(side.sample, side.y.shape)
    terms = sampled_terms(case.replace(bias=None), at)
    parts = ([(clip(x, x.dtype.type(0)), w, valid) for x, w, valid in terms] for clip in (np.maximum, np.minimum))
    plus, minus = (exact_sum(Products.of(part, side.sample.shape)).reference for part in parts)
    left = side.y.ravel()[side.sample].astype(np.float64) - plus
    if case.bias is not None:
        left -= case.bias.astype(np.float64)[at[-1]]
    if power := float(minus @ minus):
        yield from _with_slope(side, float(left @ minus) / power)


def _with_slope(side: Side, slope: float) -> Iterator[Function]:
    near = float(f"{slope:.3g}") if math.isfinite(slope) else 0.0
    slope = near if abs(near - slope) <= _tolerance(side) else slope
    if 0 < abs(slope) < 1:
        name = f"leaky ReLU with slope {slope:.4g}"
        yield Function(name, lambda z: np.where(z > 0, z, slope * z), 1, np.abs, "leaky_relu")


def applied_after(mistake: Mistake, functions: list[Function], side: Side) -> Mistake:
    """The mistake with a function after it; others that are near enough to explain y as well are named beside it."""
    first, u = functions[0], format_of(side.y.dtype).unit_roundoff
    also = Mistake(
        f"{first.name} after",
        f"has {first.name} applied after the layer{_or(functions[1:])}, which the case has not",
        f"leave out {first.name} ({first.code}), or apply it to both sides",
        mistake.case,
        place="output",
        after=lambda expected, _: first.after(expected, u),
    )
    return also if mistake.case is side.target.case and mistake.rearrange is None else mistake.then(also)


def applied_before(side: Side, near: Callable[[Callable[[np.ndarray], np.ndarray]], bool]) -> Iterator[Mistake]:
    """Functions of the input that come near y; those that do the same to every element of x are one mistake."""
    case = side.target.case
    u, wide = format_of(case.dtype).unit_roundoff, case.x.astype(np.float64)
    found: dict[bytes, tuple[np.ndarray, list[Function]]] = {}
    for function in (*FUNCTIONS, *leaky_before(side)):
        if not near(function.of):
            continue
        with np.errstate(all="ignore"):
            x = cast(function.of(wide), case.dtype)
        found.setdefault(x.tobytes(), (x, []))[1].append(function)
    for x, (function, *others) in found.values():
        yield Mistake(
            f"{function.name} before",
            f"has {function.name} applied to its input{_or(others)}, which the case has not",
            f"leave out {function.name} ({function.code}) before the layer, or apply it on both sides",
            case.replace(x=x),
            place="x",
            error_of_x=None if function.size is None else _ROUNDINGS * u * function.size(wide),
        )


def _or(others: list[Function]) -> str:
    return f" (or {', '.join(f.name for f in others)}: these values do not tell them apart)" if others else ""


# Affine maps


def scaled(first: Mistake, factor: float, side: Side) -> Iterator[Mistake]:
    """A mistake with its input scaled too."""
    for also in _inputs(first.case, np.array([[factor, 0.0]]), _tolerance(side)):
        yield first.then(also)


def affine(side: Side) -> Iterator[Mistake]:
    """The input or the output scaled and shifted, by one number or by one a channel, and perhaps clipped after."""
    fits = _Fits(side)
    if not fits.many:
        return
    for name, (low, high) in _CLIPS.items():
        inside = fits.usable & (fits.y > low) & (fits.y < high)
        if name and (np.count_nonzero(inside) < fits.y.size / 16 or fits.y.min() < low or fits.y.max() > high):
            continue
        for mistake in _affine_of(side, fits, inside):
            yield mistake if not name else _clipped(mistake, _BY_NAME[name], side)


def _clipped(mistake: Mistake, function: Function, side: Side) -> Mistake:
    """The affine mistake with a function after it."""
    before, u = mistake.after, format_of(side.y.dtype).unit_roundoff
    also = applied_after(mistake, [function], side)

    def after(expected: Expected, channel: np.ndarray) -> Expected:
        return function.after(before(expected, channel) if before else expected, u)

    combined = mistake.then(also) if also.name == f"{function.name} after" else also
    return dataclasses.replace(combined, after=after, error_of_x=mistake.error_of_x)


class _Fits:
    """What is regressed on what: arrays `(positions, features)`."""

    def __init__(self, side: Side) -> None:
        case = side.target.case
        self.case, self.features = case, case.geometry.features
        self.bias = np.zeros(self.features) if case.bias is None else case.bias.astype(np.float64)
        self.y = side.y.astype(np.float64).reshape(-1, self.features)
        reference, allowed = (a.reshape(-1, self.features) for a in side.expected)
        self.exact, self.without_bias = reference, reference - self.bias
        self.usable = np.isfinite(self.y) & np.isfinite(reference) & np.isfinite(allowed) & (allowed > 0)
        self.weight = 1 / np.where(self.usable, allowed, 1.0)
        outside = side.outside.reshape(-1, self.features).any(axis=0)
        self.widespread = bool(2 * np.count_nonzero(outside) > self.features)

    @property
    def many(self) -> bool:
        """Whether most channels are wrong, and positions enough to fit two numbers to each."""
        return self.widespread and len(self.y) >= 2 * _PER_NUMBER

    @functools.cached_property
    def of_ones(self) -> np.ndarray:
        """V, the sum of the weights that read the input."""
        g = self.case.geometry
        ones = np.ones((*(min(1, n) for n in g.batch), *g.spatial, g.channels), self.case.dtype)
        total = exact_sum(products(self.case.replace(x=ones, bias=None), "y", None)).reference
        return np.broadcast_to(total, g.output_shape).reshape(-1, self.features)

    def solve(self, columns: list[np.ndarray], y: np.ndarray, inside: np.ndarray, group: int) -> np.ndarray:
        """`(features // group, columns)`: least squares over each `group` of features."""
        weight = np.where(inside, self.weight, 0.0)
        design = np.stack([np.where(inside, column, 0.0) * weight for column in columns], axis=-1)
        target = np.where(inside, y, 0.0) * weight
        gram = np.einsum("pfi,pfj->fij", design, design).reshape(-1, group, len(columns), len(columns)).sum(axis=1)
        inverse = np.linalg.pinv(gram, rcond=1e-13, hermitian=True)
        beta = np.zeros((len(gram), len(columns)))
        for _ in range(2):  # the second time refines
            left = target - np.einsum("pfi,fi->pf", design, np.repeat(beta, group, axis=0))
            right = np.einsum("pfi,pf->fi", design, left).reshape(-1, group, len(columns)).sum(axis=1)
            beta = beta + np.einsum("gij,gj->gi", inverse, right)
        return beta


def _affine_of(side: Side, fits: _Fits, inside: np.ndarray) -> Iterator[Mistake]:
    case, everything, per_input = fits.case, fits.features, fits.case.geometry.multiplier
    without = fits.y - fits.bias
    ones = np.ones_like(fits.y)
    if (a := fits.solve([fits.without_bias], without, inside, everything)[0, 0]) not in (0.0, -1.0):
        yield from _inputs(fits.case, np.array([[a, 0.0]]), _tolerance(side))
    if (a := fits.solve([fits.exact], fits.y, inside, everything)[0, 0]) and case.bias is not None:
        yield from _outputs(side, np.array([[a, 0.0]]))
    yield from _inputs(
        fits.case, fits.solve([fits.without_bias, fits.of_ones], without, inside, everything), _tolerance(side)
    )
    yield from _outputs(side, fits.solve([fits.exact, ones], fits.y, inside, everything))
    by_input = fits.solve([fits.without_bias, fits.of_ones], without, inside, per_input)
    by_output = fits.solve([fits.exact, ones], fits.y, inside, 1)
    inputs, outputs = _inputs(fits.case, by_input, _tolerance(side)), _outputs(side, by_output)
    if per_input == 1 and np.ptp(fits.of_ones, axis=0).max() == 0:  # nothing tells them apart; images have few channels
        alike = "; without padding, {} gives the same numbers"
        inputs = _with_cause(inputs, alike.format("a BatchNorm after the layer"))
        outputs = _with_cause(outputs, alike.format("an input that is normalised by channel"))
        if everything > 4:
            inputs, outputs = outputs, inputs
    if everything > 1:
        yield from inputs
        yield from outputs


def _with_cause(found: Iterator[Mistake], more: str) -> Iterator[Mistake]:
    return (dataclasses.replace(mistake, cause=mistake.cause + more) for mistake in found)


def _tolerance(side: Side) -> float:
    """How near a fitted number must be to one that people write."""
    return 64 * format_of(side.y.dtype).unit_roundoff


def _nice(a: np.ndarray, b: np.ndarray, tolerance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers as people write them where the fitted ones are near, and the fitted ones."""
    near, shift = a.copy(), b.copy()
    for i, value in enumerate(a):
        known = [c for c in (1.0, *_FACTORS) if abs(value - c) <= tolerance * c]
        rounded = float(f"{1 / value:.4g}") if value else 0.0
        near[i] = known[0] if known else 1 / rounded if rounded and abs(value * rounded - 1) <= tolerance else value
        centre = -b[i] / value if value else 0.0
        offset = float(f"{centre:.4g}")
        if abs(offset - centre) <= tolerance * (abs(1 / value) if value else 1.0):
            shift[i] = -offset * near[i]
        if abs(b[i] - round(b[i])) <= tolerance:
            shift[i] = float(round(b[i]))
    yield near, shift
    if (near != a).any() or (shift != b).any():
        yield a, b


def _inputs(case: Case, found: np.ndarray, tolerance: float) -> Iterator[Mistake]:
    """a x + b in place of x, for one pair (a, b) or one for each input channel."""
    if not np.isfinite(found).all() or not found[:, 0].all():
        return
    u, wide = format_of(case.dtype).unit_roundoff, case.x.astype(np.float64)
    for a, b in _nice(found[:, 0], found[:, 1], tolerance):
        if (np.abs(a + 1) < tolerance).all() and not b.any():
            return  # the wrong sign has a name of its own
        x = cast(a * wide + b, case.dtype)
        words, undo = _of_x(a, b)
        plain = not b.any()
        same = (
            ": the kernel or the output may be scaled as well, with the same numbers"
            if plain and case.bias is None
            else ""
        )
        yield Mistake(
            "input scaled" if plain else "input normalised",
            f"reads {words} in place of x{same}",
            f"give both sides the same input: {undo}",
            case.replace(x=x),
            place="x",
            error_of_x=_AFFINE * u * (np.abs(a * wide) + np.abs(b)),
        )


def _of_x(a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """What was read, and how to undo it."""
    if len(a) == 1:
        factor, shift = float(a[0]), float(b[0])
        scaled = _FACTORS.get(factor, "x" if factor == 1 else f"{factor:.6g}*x")
        if not shift:
            return scaled, f"the input was scaled by {factor:.6g}"
        if factor in (1.0, 2.0, 1 / 127.5, 1 / 128, 1 / 255, 1 / 256) and shift == round(shift):
            return (
                f"{scaled} {'-' if shift < 0 else '+'} {abs(shift):g}",
                f"the input was normalised to {scaled} {shift:+g}",
            )
        return f"(x - {-shift / factor:.6g})/{1 / factor:.6g}", "the input was normalised"
    means, deviations = (", ".join(f"{v:.4g}" for v in values[:8]) for values in (-b / a, 1 / a))
    more = ", ..." if len(a) > 8 else ""
    return (
        f"(x - m)/s for each channel, m = [{means}{more}] and s = [{deviations}{more}],",
        "it was normalised by channel",
    )


def _outputs(side: Side, found: np.ndarray) -> Iterator[Mistake]:
    """s y + t in place of y, for one pair (s, t) or one for each output channel."""
    case = side.target.case
    if not np.isfinite(found).all() or not found[:, 0].all():
        return
    u = format_of(side.y.dtype).unit_roundoff
    for s, t in _nice(found[:, 0], found[:, 1], _tolerance(side)):
        if (np.abs(s + 1) < _tolerance(side)).all() and not t.any():
            return
        name, cause, fix = _batch_norm(side, s, t) if len(s) > 1 else _whole(float(s[0]), float(t[0]))

        def after(expected: Expected, channel: np.ndarray, s: np.ndarray = s, t: np.ndarray = t) -> Expected:
            scale, shift = (a[channel if len(a) > 1 else np.zeros_like(channel)] for a in (s, t))
            reference = scale * expected.reference
            extra = _AFFINE * u * (np.abs(reference) + np.abs(shift))
            return Expected(reference + shift, np.abs(scale) * expected.allowed + extra)

        yield Mistake(name, cause, fix, case, place="output", after=after)


def _whole(s: float, t: float) -> tuple[str, str, str]:
    words = (
        f"{s:.6g} times the output"
        if not t
        else f"the output plus {t:.6g}"
        if s == 1
        else f"{s:.6g} y + {t:.6g} for an output y"
    )
    return (
        ("output scaled" if not t else "output shifted"),
        f"gives {words}",
        "give both sides the same scale and shift after the layer",
    )


def _batch_norm(side: Side, s: np.ndarray, t: np.ndarray) -> tuple[str, str, str]:
    """What one factor and one term for each channel are: another bias, BatchNorm with another eps, or BatchNorm."""
    spread = f"factors {s.min():.6g} to {s.max():.6g}, terms {t.min():.4g} to {t.max():.4g}"
    tolerance = _tolerance(side)
    if (np.abs(s - 1) <= tolerance).all():
        what = "a bias, which the case has not" if side.target.case.bias is None else "another bias"
        return (
            "bias added" if side.target.case.bias is None else "bias",
            f"has {what}: it is off by one term for each channel, {t.min():.4g} to {t.max():.4g}",
            "give both sides the same bias",
        )
    axes = tuple(range(side.y.ndim - 1))
    y = side.y.astype(np.float64)
    deviation = y.std(axis=axes)
    if np.abs(y.mean(axis=axes)).max() <= 1e-2 and (np.abs(deviation - 1) <= 1e-2).all():
        return (
            "BatchNorm",
            f"is the case's result with each channel shifted and scaled to mean 0 and deviation 1 ({spread}): "
            "a BatchNorm that normalises by this very batch, as in training",
            "use the running statistics on both sides (model.eval(), use_running_average=True), or no BatchNorm",
        )
    one_sided = (s <= 1 + tolerance).all() or (s >= 1 - tolerance).all()
    if one_sided and np.abs(s - 1).max() < 0.25:
        return (
            "BatchNorm eps",
            f"is the case's result times one factor and plus one term for each channel ({spread}), with all factors "
            f"{'below' if s.min() < 1 - tolerance else 'above'} 1, as of a BatchNorm with "
            f"{'a greater' if s.min() < 1 - tolerance else 'a smaller'} eps",
            "give the BatchNorm the same eps on both sides: PyTorch's is 1e-5, Keras's and many JAX models' 1e-3",
        )
    return (
        "BatchNorm",
        f"is the case's result times one factor and plus one term for each channel ({spread}), as of a BatchNorm that "
        "only one of the two has",
        "apply the BatchNorm on both sides, or fold it into the kernel and the bias of the case",
    )
