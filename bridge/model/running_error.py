"""Running error analysis: arrays in float64 with two bounds that every operation carries on.

`rounding` bounds how far a float32 computation of the same formula may be from the exact value: any order of the terms
of a sum, fused or not, subnormal numbers kept or flushed. `function` bounds how far the float64 value here may be from
the exact value of the *function*: the roundings of float64, and one float32 rounding for each constant of the program
that stands for a number which float32 does not have. Two formulas whose values differ by more than their `function`
bounds are different functions, however little they differ.

Each operation adds its own rounding to the errors that its operands bring (Wilkinson 1986, "Error analysis revisited";
Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.3). With u the unit roundoff, lambda the
smallest normal number, y the exact result, and e the error that the operands bring:

    x + z:      e = e_x + e_z                      then  u (|y| + e) + 3 lambda
    x z:        e = |x| e_z + |z| e_x + e_x e_z    then  u (|y| + e) + 3 lambda (1 + |x| + |z|)
    x / z:      e = (e_x + |y| e_z) / (|z| - e_z)  then  2 u (|y| + e) + 3 lambda (...)   as x (1 / z), too
    sums:       e = sum e_i                        then  ((1 + u)^n - 1) sum (|x_i| + e_i) + n lambda
    f(x):       e = max |f(x +- e_x) - f(x)|, f monotone     then  ulps of the function, 2 u each

A comparison whose sides are closer than their errors is unsure; a choice by it errs by the distance of the choices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bridge.numerics import FLOAT32, FLOAT64

_TINY = FLOAT32.smallest_normal
_UNIT = FLOAT32.unit_roundoff
_WIDE = 4 * FLOAT64.unit_roundoff  # NumPy's functions are within 2 ulp; sums of n terms count each of them

#: Greatest errors of elementwise functions in units of the last place (2 u |y|) of XLA:CPU and PyTorch, with room:
#: `python benchmarks/elementwise_errors.py` measures them. A measurement is no proof.
ULPS: Mapping[str, float] = {
    "exp": 3,
    "exp2": 64,
    "log": 4,
    "log1p": 4,
    "expm1": 6,
    "tanh": 8,
    "logistic": 6,
    "erf": 8,
    "sin": 4,
    "cos": 4,
    "sqrt": 1,
    "rsqrt": 3,
    "cbrt": 4,
    "pow": 16,
}

Error = Any  # a float for all elements, or an array


@dataclasses.dataclass(frozen=True, eq=False)
class Bounded:
    """An array with its errors.

    Attributes:
      value: float64 for floating dtypes; integers and booleans as they are.
      rounding: the bound of a float32 computation; of booleans, 1 where they are unsure.
      function: the bound of `value` itself.
    """

    value: np.ndarray
    rounding: Error = 0.0
    function: Error = 0.0

    @classmethod
    def exact(cls, array: Any) -> Bounded:
        """Return an array that every computation starts from."""
        array = np.asarray(array)
        is_floating = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
        return cls(array.astype(np.float64) if is_floating else array)

    @classmethod
    def constant(cls, array: Any) -> Bounded:
        """Return a constant of a program: a number that float32 rounded, unless it has few digits."""
        made = cls.exact(array)
        if made.value.dtype != np.float64:
            return made
        with np.errstate(all="ignore"):
            short = np.abs(made.value) * 2.0**12
            is_short = (short == np.rint(short)) & (np.abs(made.value) < 2.0**20) | ~(np.abs(made.value) < 2.0**60)
        return dataclasses.replace(made, function=np.where(is_short, 0.0, 2 * _UNIT * np.abs(made.value)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def is_exact(self) -> bool:
        return not np.any(self.rounding)

    def moved(self, move: Callable[[np.ndarray], np.ndarray]) -> Bounded:
        """Return the elements in other places."""
        return Bounded(move(self.value), *(move(e) if np.ndim(e) else e for e in self._full()))

    def _full(self) -> Iterable[Error]:
        """Return the errors, arrays of the value's own shape."""
        return tuple(np.broadcast_to(e, self.shape) if np.ndim(e) else e for e in (self.rounding, self.function))


@dataclasses.dataclass(frozen=True)
class Unit:
    """The rounding of one operation's results in float32, and in float64."""

    rounding: float = _UNIT
    tiny: float = _TINY


FLOAT32_UNIT = Unit()


def _made(
    value: np.ndarray, carried: Callable[[int], Error], own: Callable[[Error, float, float], Error], unit: Unit
) -> Bounded:
    """Return a result: to both errors that the operands bring, `carried(k)`, add `own(carried, u, tiny)`."""
    with np.errstate(all="ignore"):
        errors = []
        for k, (u, tiny) in enumerate(((unit.rounding, unit.tiny), (_WIDE, 0.0))):
            e = carried(k)
            errors.append(e + own(e, u, tiny))
    return Bounded(value, *errors)


def _errors(x: Bounded) -> tuple[Error, Error]:
    return x.rounding, x.function


def add(x: Bounded, z: Bounded, unit: Unit = FLOAT32_UNIT) -> Bounded:
    return _sum(x, z, x.value + z.value, unit)


def sub(x: Bounded, z: Bounded, unit: Unit = FLOAT32_UNIT) -> Bounded:
    return _sum(x, z, x.value - z.value, unit)


def _sum(x: Bounded, z: Bounded, y: np.ndarray, unit: Unit) -> Bounded:
    if y.dtype != np.float64:
        return Bounded(y)
    size = np.where(np.isinf(y), 0.0, np.abs(y))  # an infinity, as masks have it, is not rounded
    ex, ez = _errors(x), _errors(z)
    return _made(y, lambda k: ex[k] + ez[k], lambda e, u, tiny: u * (size + e) + 3 * tiny, unit)


def mul(x: Bounded, z: Bounded, unit: Unit = FLOAT32_UNIT) -> Bounded:
    with np.errstate(all="ignore"):
        y = x.value * z.value
    if y.dtype != np.float64:
        return Bounded(y)
    a, b, size = np.abs(x.value), np.abs(z.value), np.abs(y)
    ex, ez = _errors(x), _errors(z)

    def own(e: Error, u: float, tiny: float) -> Error:
        return u * (size + e) + (3 * tiny * (1 + a + b) if tiny else 0.0)

    return _made(y, lambda k: a * ez[k] + b * ex[k] + ex[k] * ez[k], own, unit)


def div(x: Bounded, z: Bounded, unit: Unit = FLOAT32_UNIT) -> Bounded:
    if x.value.dtype != np.float64:
        return Bounded(np.asarray(x.value // np.where(z.value == 0, 1, z.value)))
    with np.errstate(all="ignore"):
        y = x.value / z.value
        size, below = np.abs(y), np.abs(z.value)
    ex, ez = _errors(x), _errors(z)

    def carried(k: int) -> Error:
        room = below - ez[k]
        return np.where(room > 0, (ex[k] + size * ez[k]) / np.where(room > 0, room, 1.0), np.inf)

    def own(e: Error, u: float, tiny: float) -> Error:
        return 3 * u * (size + e) + (3 * tiny * (1 + 1 / below + np.abs(x.value)) if tiny else 0.0)

    return _made(y, carried, own, unit)


def neg(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.rounding, x.function)


def absolute(x: Bounded) -> Bounded:
    return Bounded(np.abs(x.value), x.rounding, x.function)


def extreme(choose: Callable[..., np.ndarray], x: Bounded, z: Bounded) -> Bounded:
    """Return the maximum or minimum."""
    y = choose(x.value, z.value)
    flushed = _flushed(x, z)
    return Bounded(y, np.maximum(np.maximum(x.rounding, z.rounding), flushed), np.maximum(x.function, z.function))


def _flushed(*operands: Bounded) -> Error:
    """Return the greatest subnormal operand's size: a comparison may take it for zero."""
    if operands[0].value.dtype != np.float64:
        return 0.0
    return _TINY if any(((x.value != 0) & (np.abs(x.value) < _TINY)).any() for x in operands) else 0.0


def function(name: str, of: Callable[[np.ndarray], np.ndarray], x: Bounded, unit: Unit = FLOAT32_UNIT) -> Bounded:
    """Return a function that is monotone on both sides of zero, within so many ulp as `ULPS` has for its name."""
    with np.errstate(all="ignore"):
        y = of(x.value)
    size = np.abs(y)
    ulps = ULPS[name]

    def carried(k: int) -> Error:
        e = _errors(x)[k]
        if not np.any(e):
            return 0.0
        with np.errstate(all="ignore"):
            ends = [of(x.value - e), of(x.value + e)]
            if name in ("cos", "sin"):
                return np.minimum(e, 2.0)
            spread = np.maximum(np.abs(ends[0] - y), np.abs(ends[1] - y))
            return np.where(np.isnan(spread) & ~np.isnan(y), np.inf, spread)

    def own(e: Error, u: float, tiny: float) -> Error:
        return 2 * ulps * u * (size + e) + 2 * tiny

    return _made(y, carried, own, unit)


def power(x: Bounded, exponent: int, unit: Unit = FLOAT32_UNIT) -> Bounded:
    """Return an integer power by repeated products."""
    if exponent < 0:
        return div(Bounded(np.ones(())), power(x, -exponent, unit), unit)
    result: Bounded | None = None
    for _ in range(exponent):
        result = x if result is None else mul(result, x, unit)
    return Bounded(np.ones_like(x.value)) if result is None else result


def compare(of: Callable[[np.ndarray, np.ndarray], np.ndarray], x: Bounded, z: Bounded) -> Bounded:
    """Return a comparison, unsure where both sides are closer than their errors."""
    y = of(x.value, z.value)
    if x.value.dtype != np.float64 or (x.is_exact and z.is_exact):
        return Bounded(y)
    distance = np.abs(x.value - z.value)
    unsure = [(distance <= ex + ez) & (ex + ez > 0) for ex, ez in zip(_errors(x), _errors(z))]
    return Bounded(y, *(each.astype(np.float64) for each in unsure))


def logic(of: Callable[..., np.ndarray], *operands: Bounded) -> Bounded:
    """Return a logical operation, unsure where an operand is."""
    rounding = sum((np.asarray(x.rounding) for x in operands), np.zeros(()))
    wide = sum((np.asarray(x.function) for x in operands), np.zeros(()))
    return Bounded(of(*(x.value for x in operands)), np.minimum(rounding, 1.0), np.minimum(wide, 1.0))


def select(which: Bounded, *cases: Bounded) -> Bounded:
    """Return `cases[which]`, element by element."""
    index = which.value.astype(np.int64)
    shape = np.broadcast_shapes(index.shape, *(case.shape for case in cases))

    def chosen(arrays: Sequence[Any]) -> np.ndarray:
        wide = [np.broadcast_to(array, shape) for array in arrays]
        return np.where(index > 0, wide[1], wide[0]) if len(wide) == 2 else np.choose(index, wide)  # `where` is faster

    y = chosen([c.value for c in cases])
    errors: list[Error] = []
    for k in range(2):
        each = [_errors(case)[k] for case in cases]
        e = chosen(each) if any(np.any(error) for error in each) else 0.0
        unsure = np.broadcast_to(_errors(which)[k], shape) > 0
        if unsure.any() and y.dtype == np.float64:
            with np.errstate(all="ignore"):
                spread = np.max(
                    [np.abs(np.broadcast_to(c.value, shape) - y) + ec for c, ec in zip(cases, each)], axis=0
                )
            e = np.where(unsure, np.where(np.isnan(spread), np.inf, spread), e)
        errors.append(e)
    return Bounded(y, *errors)


def greatest(x: Bounded, axes: Sequence[int]) -> Bounded:
    """Return the maximum over axes."""
    axes = tuple(axes)
    y = x.value.max(axes)
    if y.dtype != np.float64:
        return Bounded(y)
    errors: list[Error] = []
    for e in _errors(x):
        if np.ndim(e):
            with np.errstate(all="ignore"):
                ends = [np.abs((x.value + each).max(axes) - y) for each in (e, -e)]
            e = np.where(np.isnan(ends[0]), 0.0, np.maximum(*ends))
        errors.append(e)
    return Bounded(y, *errors)


def total(x: Bounded, axes: Sequence[int], unit: Unit = FLOAT32_UNIT) -> Bounded:
    """Return the sum over axes."""
    axes = tuple(axes)
    y = x.value.sum(axes)
    if y.dtype != np.float64:
        return Bounded(y)
    n = math.prod(x.shape[axis] for axis in axes)
    size = np.abs(x.value).sum(axes)
    return _made(y, lambda k: _added(_errors(x)[k], x.shape, axes, n), _of_terms(n, size), unit)


def _added(e: Error, shape: tuple[int, ...], axes: tuple[int, ...], n: int) -> Error:
    return np.broadcast_to(e, shape).sum(axes) if np.ndim(e) else n * e


def _of_terms(n: int, size: np.ndarray) -> Callable[[Error, float, float], Error]:
    def own(e: Error, u: float, tiny: float) -> Error:
        return ((1 + u) ** max(n - 1, 1) - 1) * (size + e) + 2 * n * tiny

    return own


def mean(x: Bounded, axes: Sequence[int], unit: Unit = FLOAT32_UNIT) -> Bounded:
    n = math.prod(x.shape[axis] for axis in axes)
    return div(total(x, axes, unit), Bounded(np.asarray(n, np.float64)), unit)


def cumulative(x: Bounded, axis: int, reverse: bool, unit: Unit = FLOAT32_UNIT) -> Bounded:
    """Return the running sum along an axis."""

    def sums(array: np.ndarray) -> np.ndarray:
        array = np.flip(array, axis) if reverse else array
        array = np.cumsum(array, axis)
        return np.flip(array, axis) if reverse else array

    y = sums(x.value)
    if y.dtype != np.float64:
        return Bounded(y)
    size, n = sums(np.abs(x.value)), x.shape[axis]
    return _made(y, lambda k: sums(np.broadcast_to(_errors(x)[k], x.shape)), _of_terms(n, size), unit)


def bilinear(
    of: Callable[[np.ndarray, np.ndarray], np.ndarray], x: Bounded, w: Bounded, terms: int, unit: Unit = FLOAT32_UNIT
) -> Bounded:
    """Return sums of `terms` products: a convolution or a matrix product.

    Args:
      of: the operation in float64.
      x, w: its operands.
      terms: products in each element.
      unit: of the result.
    """
    y = of(x.value, w.value)
    if y.dtype != np.float64:
        return Bounded(y)
    a, b = np.abs(x.value), np.abs(w.value)
    size = of(a, b)
    ex, ew = _errors(x), _errors(w)

    def carried(k: int) -> Error:
        e: Error = 0.0
        if np.any(ex[k]):
            e = e + of(np.broadcast_to(ex[k], x.shape).astype(np.float64), b + np.broadcast_to(ew[k], w.shape))
        if np.any(ew[k]):
            e = e + of(a, np.broadcast_to(ew[k], w.shape).astype(np.float64))
        return e

    def own(e: Error, u: float, tiny: float) -> Error:
        # a product and the sum of all: `terms` roundings each; a flushed operand costs tiny times the other
        flushed = tiny * (terms * 4 + (a.sum() if terms < 2 else float(terms) * (a.max(initial=0) + b.max(initial=0))))
        return ((1 + u) ** (terms + 1) - 1) * (size + e) + flushed

    return _made(y, carried, own, unit)
