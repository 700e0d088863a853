"""Affine maps of each element: the input or the output scaled and shifted, or a BatchNorm.

Least squares gives the scale and the shift. Each pair is then a hypothesis like the others: y must lie within its
bound, element by element.

Let R be the exact result without its bias, and V the sum of the weights under taps that read the input, which is the
convolution of ones. From the input a x + b the layer computes a R + b V + bias, since padding stays zero. A map after
the layer gives s y + t. Numbers that people write, such as 1/255, replace the fitted ones where they are near.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from bridge.case import Case
from bridge.diagnosis.convention.functions import FUNCTIONS, PER_NUMBER, Function, applied_after, fit_tolerance
from bridge.diagnosis.convention.mistake import Mistake
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import Expected, exact_output
from bridge.numerics import cast, format_of

#: Roundings of (x - m) / s, and of its constants.
_ROUNDINGS = 4
#: Factors of images that people write, and how they write them.
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
_BY_NAME = {function.name: function for function in FUNCTIONS}


@dataclasses.dataclass(frozen=True)
class _Readable:
    """A function after an affine map, and the elements that show the map: there the argument can be read.

    Attributes:
      least, most: the range of the function.
      low, high: the range of the elements that show their argument.
      argument: of such an element.
    """

    least: float
    most: float
    low: float
    high: float
    argument: Callable[[np.ndarray], np.ndarray]


def _same(y: np.ndarray) -> np.ndarray:
    return y


def _solved(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the inverse of a function that is below its positive argument by less than 1/2, by Newton's method."""
    of, step = _BY_NAME[name].of, 1e-4  # of a difference quotient

    def argument(y: np.ndarray) -> np.ndarray:
        z = y + 0.1  # the three functions are below their argument by 0.16 to 0.28 at most
        for _ in range(8):  # each at least squares the error
            z = z - (of(z) - y) * 2 * step / (of(z + step) - of(z - step))
        return z

    return argument


#: By name; "" is no function.
_READABLE = {
    "": _Readable(-np.inf, np.inf, -np.inf, np.inf, _same),
    "ReLU": _Readable(0, np.inf, 0, np.inf, _same),
    "ReLU6": _Readable(0, 6, 0, 6, _same),
    "hard swish": _Readable(-0.375, np.inf, 0, np.inf, lambda y: np.where(y < 3, (np.sqrt(9 + 24 * y) - 3) / 2, y)),
    "SiLU": _Readable(-0.2785, np.inf, 0, np.inf, _solved("SiLU")),
    "GELU": _Readable(-0.17, np.inf, 0, np.inf, _solved("GELU")),
    "GELU (tanh)": _Readable(-0.1701, np.inf, 0, np.inf, _solved("GELU (tanh)")),
    "sigmoid": _Readable(0, 1, 0.05, 0.95, lambda y: np.log(y / (1 - y))),
    "tanh": _Readable(-1, 1, -0.9, 0.9, np.arctanh),
    "hard sigmoid": _Readable(0, 1, 0, 1, lambda y: 6 * y - 3),
    "ELU": _Readable(-1, np.inf, 0, np.inf, _same),
}


def scaled(first: Mistake, factor: float, output: Output) -> Iterator[Mistake]:
    """Yield a mistake with its input scaled too."""
    for also in _inputs(output, np.array([[factor, 0.0]]), first.case):
        yield first.then(also)


def affine(output: Output) -> Iterator[Mistake]:
    """Yield the input or the output scaled and shifted, by one number or one per channel, and a function after it."""
    fits = _Fits(output)
    if not fits.many:
        return
    for name, readable in _READABLE.items():
        inside = fits.usable & (fits.y > readable.low) & (fits.y < readable.high)
        least, most = readable.least - fit_tolerance(output), readable.most + fit_tolerance(output)
        if name and (np.count_nonzero(inside) < fits.y.size / 16 or fits.y.min() < least or fits.y.max() > most):
            continue
        with np.errstate(all="ignore"):
            arguments = np.where(inside, readable.argument(np.where(inside, fits.y, 0.5)), 0.0)
        for mistake in _affine_of(output, fits, arguments, inside):
            yield mistake if not name else _followed(mistake, _BY_NAME[name], output)


def _followed(mistake: Mistake, function: Function, output: Output) -> Mistake:
    """Return the affine mistake with a function after it."""
    before, u = mistake.after, format_of(output.y.dtype).unit_roundoff
    also = applied_after(mistake, [function], output)

    def after(expected: Expected, channel: np.ndarray) -> Expected:
        return function.after(before(expected, channel) if before else expected, u)

    combined = mistake.then(also) if also.name == f"{function.name} after" else also
    return dataclasses.replace(combined, after=after, error_of_x=mistake.error_of_x)


class _Fits:
    """The arrays of the regressions, each `(positions, features)`."""

    def __init__(self, output: Output) -> None:
        case = output.target.case
        self.case, self.features = case, case.geometry.features
        self.bias = np.zeros(self.features) if case.bias is None else case.bias.astype(np.float64)
        self.y = output.y.astype(np.float64).reshape(-1, self.features)
        reference, allowed = (a.reshape(-1, self.features) for a in output.expected)
        self.exact, self.without_bias = reference, reference - self.bias
        self.usable = np.isfinite(self.y) & np.isfinite(reference) & np.isfinite(allowed) & (allowed > 0)
        self.weight = 1 / np.where(self.usable, allowed, 1.0)
        outside = output.outside.reshape(-1, self.features).any(axis=0)
        self.is_widespread = bool(2 * np.count_nonzero(outside) > self.features)

    @property
    def many(self) -> bool:
        """True if most channels are wrong, with enough positions to fit two numbers to each."""
        return self.is_widespread and len(self.y) >= 2 * PER_NUMBER

    @functools.cached_property
    def of_ones(self) -> np.ndarray:
        """V, the sum of the weights that read the input."""
        g = self.case.geometry
        ones = np.ones((*(min(1, n) for n in g.batch), *g.spatial, g.channels), self.case.dtype)
        total = exact_output(self.case.replace(x=ones, bias=None)).reference
        return np.broadcast_to(total, g.output_shape).reshape(-1, self.features)

    def solve(self, columns: list[np.ndarray], y: np.ndarray, inside: np.ndarray, group: int) -> np.ndarray:
        """Return `(features // group, columns)`: least squares over each `group` of features."""
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


def _affine_of(output: Output, fits: _Fits, y: np.ndarray, inside: np.ndarray) -> Iterator[Mistake]:
    """Yield the maps that give y where `inside`."""
    case, everything, per_input = fits.case, fits.features, fits.case.geometry.multiplier
    without = y - fits.bias
    ones = np.ones_like(y)
    by_output = fits.solve([fits.exact, ones], y, inside, 1)
    if any(_is_negation(s, t, fit_tolerance(output)) for s, t in _nice(by_output, fit_tolerance(output))):
        return  # without padding, an input of -x and other constants gives the same numbers
    if (a := fits.solve([fits.without_bias], without, inside, everything)[0, 0]) not in (0.0, -1.0):
        yield from _inputs(output, np.array([[a, 0.0]]), case)
    if (a := fits.solve([fits.exact], y, inside, everything)[0, 0]) and case.bias is not None:
        yield from _outputs(output, np.array([[a, 0.0]]))
    yield from _inputs(output, fits.solve([fits.without_bias, fits.of_ones], without, inside, everything), case)
    yield from _outputs(output, fits.solve([fits.exact, ones], y, inside, everything))
    by_input = fits.solve([fits.without_bias, fits.of_ones], without, inside, per_input)
    inputs, outputs = _inputs(output, by_input, case), _outputs(output, by_output)
    if per_input == 1 and np.ptp(fits.of_ones, axis=0).max() == 0:  # both give the same y; images have few channels
        same = "; without padding, {} gives the same numbers"
        inputs = _with_cause(inputs, same.format("a BatchNorm after the layer"))
        outputs = _with_cause(outputs, same.format("an input that is normalised by channel"))
        if everything > 4:
            inputs, outputs = outputs, inputs
    if everything > 1:
        yield from inputs
        yield from outputs


def _with_cause(found: Iterator[Mistake], more: str) -> Iterator[Mistake]:
    return (dataclasses.replace(mistake, cause=mistake.cause + more) for mistake in found)


def _nice(fitted: np.ndarray, tolerance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers that people write, where the fitted ones are near, then the fitted ones."""
    a, b = fitted.T
    if not np.isfinite(fitted).all() or not a.all():
        return
    near, shift = a.copy(), b.copy()
    for i, value in enumerate(a):
        known = [c for c in (1.0, *_FACTORS) if abs(value - c) <= tolerance * c]
        rounded = float(f"{1 / value:.4g}")
        near[i] = known[0] if known else 1 / rounded if rounded and abs(value * rounded - 1) <= tolerance else value
        centre = -b[i] / value
        offset = float(f"{centre:.4g}")
        if abs(offset - centre) <= tolerance * abs(1 / value):
            shift[i] = -offset * near[i]
        if abs(b[i] - round(b[i])) <= tolerance:
            shift[i] = float(round(b[i]))
    yield near, shift
    if (near != a).any() or (shift != b).any():
        yield a, b


def _is_negation(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Return whether a x + b is -x: the wrong sign has a name of its own."""
    return bool((np.abs(a + 1) < tolerance).all() and not b.any())


def _inputs(output: Output, found: np.ndarray, case: Case) -> Iterator[Mistake]:
    """Yield a x + b in place of the case's x, for one pair (a, b) or one per input channel."""
    u, wide, tolerance = format_of(case.dtype).unit_roundoff, case.x.astype(np.float64), fit_tolerance(output)
    for a, b in _nice(found, tolerance):
        if _is_negation(a, b, tolerance):
            return
        x = cast(a * wide + b, case.dtype)
        words, undo = _of_x(a, b)
        also = ": the kernel or the output may be scaled as well, with the same numbers"
        yield Mistake(
            "input normalised" if b.any() else "input scaled",
            f"reads {words} in place of x{'' if b.any() or case.bias is not None else also}",
            f"give both implementations the same input: {undo}",
            case.replace(x=x),
            place="x",
            error_of_x=_ROUNDINGS * u * (np.abs(a * wide) + np.abs(b)),
        )


def _of_x(a: np.ndarray, b: np.ndarray) -> tuple[str, str]:
    """Return the input that was read, and how to undo it."""
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


def _outputs(output: Output, found: np.ndarray) -> Iterator[Mistake]:
    """Yield s y + t in place of y, for one pair (s, t) or one per output channel."""
    case = output.target.case
    u = format_of(output.y.dtype).unit_roundoff
    for s, t in _nice(found, fit_tolerance(output)):
        if _is_negation(s, t, fit_tolerance(output)):
            return
        name, cause, fix = _batch_norm(output, s, t) if len(s) > 1 else _whole(float(s[0]), float(t[0]))

        def after(expected: Expected, channel: np.ndarray, s: np.ndarray = s, t: np.ndarray = t) -> Expected:
            scale, shift = (a[channel if len(a) > 1 else np.zeros_like(channel)] for a in (s, t))
            reference = scale * expected.reference
            extra = _ROUNDINGS * u * (np.abs(reference) + np.abs(shift))
            return Expected(reference + shift, np.abs(scale) * expected.allowed + extra)

        yield Mistake(name, cause, fix, case, place="output", after=after)


def _whole(s: float, t: float) -> tuple[str, str, str]:
    fix = "give both implementations the same scale and shift after the layer"
    if not t:
        return "output scaled", f"gives {s:.6g} times the output", fix
    shifted = f"the output plus {t:.6g}" if s == 1 else f"{s:.6g} y + {t:.6g} for an output y"
    return "output shifted", f"gives {shifted}", fix


def _batch_norm(output: Output, s: np.ndarray, t: np.ndarray) -> tuple[str, str, str]:
    """Return what one factor and one term per channel are: another bias, BatchNorm with another eps, or BatchNorm."""
    fitted = f"factors {s.min():.6g} to {s.max():.6g}, terms {t.min():.4g} to {t.max():.4g}"
    tolerance = fit_tolerance(output)
    if (np.abs(s - 1) <= tolerance).all():
        added = output.target.case.bias is None
        what = "a bias, which the case does not have" if added else "another bias"
        return (
            "bias added" if added else "bias",
            f"has {what}: it is off by one term per channel, {t.min():.4g} to {t.max():.4g}",
            "give both implementations the same bias",
        )
    axes = tuple(range(output.y.ndim - 1))
    y = output.y.astype(np.float64)
    deviation = y.std(axis=axes)
    if np.abs(y.mean(axis=axes)).max() <= 1e-2 and (np.abs(deviation - 1) <= 1e-2).all():
        return (
            "BatchNorm",
            f"is the case's result with each channel shifted and scaled to mean 0 and deviation 1 ({fitted}): "
            "a BatchNorm that normalises by this very batch, as in training",
            "use the running statistics in both (model.eval(), use_running_average=True), or no BatchNorm",
        )
    below = s.min() < 1 - tolerance
    if not (below and s.max() > 1 + tolerance) and np.abs(s - 1).max() < 0.25:
        return (
            "BatchNorm eps",
            f"is the case's result times one factor and plus one term per channel ({fitted}), with all factors "
            f"{'below' if below else 'above'} 1, as of a BatchNorm with a {'greater' if below else 'smaller'} eps",
            "give the BatchNorm the same eps in both: PyTorch's is 1e-5, Keras's and many JAX models' 1e-3",
        )
    return (
        "BatchNorm",
        f"is the case's result times one factor and plus one term per channel ({fitted}), as of a BatchNorm that "
        "only one of the two has",
        "apply the BatchNorm in both implementations, or fold it into the kernel and the bias of the case",
    )
