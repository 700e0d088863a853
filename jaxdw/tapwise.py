"""A function of windows, carried out tap by tap, so that XLA never has to make the windows.

The function is traced to a jaxpr, and that is read again with an array for each tap in place of the array of windows.
What can be read so leaves the output positions and the channels alone: elementwise functions, sums, products and
extremes over the taps, and choosing, reordering or broadcasting taps. The rest, a sort for one, cannot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxdw.geometry import Geometry


class NotTapwise(Exception):
    """The function does what cannot be done tap by tap."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of windows as a program, apart from the arrays that it closes over.

    Attributes:
      program: from windows to windows.
      closed_over: those arrays.
      leading: axes of the windows before those of the taps.
    """

    program: Jaxpr
    closed_over: tuple[Any, ...]
    leading: int

    @property
    def equations(self) -> int:
        """How many operations there are, on each tap or so."""
        return _equations(self.program)

    def of_windows(self, closed_over: Sequence[Any], windows: jax.Array) -> jax.Array:
        """The function itself, differentiable by its own rules."""
        (result,) = jaxpr_as_fun(ClosedJaxpr(self.program, closed_over))(windows)
        return result

    def of_taps(self, closed_over: Sequence[Any], taps: np.ndarray) -> np.ndarray:
        """taps `(*kernel_size,)` of arrays `(*positions, C)`, each as one tap of the result.

        The positions may be some of the outputs, in any number of axes: the function treats all alike. Derivatives
        that the function defines for itself are lost.
        """
        (result,) = _evaluate(self.program, closed_over, [_Taps(taps)], self.leading)
        if not isinstance(result, _Taps):
            raise NotTapwise("the result does not depend on the windows")
        return result.cells


def trace(fn: Callable[[jax.Array], Any], geometry: Geometry, dtype: np.dtype) -> Traced | None:
    """fn as a function of taps, or None where it is none, fails, or does not return windows like those it is given."""
    windows = jax.ShapeDtypeStruct(geometry.windows_shape, dtype)
    try:
        traced, result = jax.make_jaxpr(fn, return_shape=True)(windows)
    except Exception:  # of the user's function: called on windows, it says what is wrong, or is right after all
        return None
    like = isinstance(result, jax.ShapeDtypeStruct) and (result.shape, result.dtype) == (windows.shape, windows.dtype)
    if not like or traced.effects:
        return None
    whole = Traced(traced.jaxpr, tuple(traced.consts), len(geometry.batch) + geometry.rank)
    taps = [jax.ShapeDtypeStruct((1, geometry.channels), dtype)] * geometry.taps

    def attempt(closed_over: Sequence[Any], taps: Sequence[jax.Array]) -> list[jax.Array]:
        return list(whole.of_taps(closed_over, grid(taps, geometry.kernel_size)).flat)

    try:
        jax.eval_shape(attempt, whole.closed_over, taps)
    except NotTapwise:
        return None
    return whole


def grid(taps: Iterable[jax.Array], kernel_size: Sequence[int]) -> np.ndarray:
    """Arrays, one a tap in raster order, as an array of objects `(*kernel_size,)`."""
    cells = np.empty(tuple(kernel_size), object)
    for place, tap in zip(np.ndindex(*kernel_size), taps, strict=True):
        cells[place] = tap
    return cells


@dataclasses.dataclass(frozen=True)
class _Taps:
    """An array `(*leading, *cells.shape, C)` in the function's eyes, as one array a cell.

    Each is `(*positions, C)`; or `(C,)` or `(1,)` where it is the same at all positions, and perhaps in all channels.
    """

    cells: np.ndarray


def _evaluate(jaxpr: Jaxpr, constants: Iterable[Any], arguments: Iterable[Any], leading: int) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return jnp.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = _inner(equation)
        if inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, leading)
        elif any(isinstance(value, _Taps) for value in inputs):
            rule = _RULES.get(equation.primitive.name)
            if rule is None:
                raise NotTapwise(equation.primitive.name)
            outputs = [rule(inputs, equation, leading)]
        elif equation.primitive.name == "broadcast_in_dim":
            outputs = [_spread(inputs[0], equation, leading)]
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


#: Operations that only call a program, by the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def _inner(equation: JaxprEqn) -> ClosedJaxpr | None:
    name = _CALLS.get(equation.primitive.name)
    if name is None:
        return None
    inner = equation.params[name]
    return ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner


def _equations(jaxpr: Jaxpr) -> int:
    inner = [_inner(equation) for equation in jaxpr.eqns]
    return sum(1 if program is None else _equations(program.jaxpr) for program in inner)


def _elementwise(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    depth = next(value.cells.ndim for value in inputs if isinstance(value, _Taps))
    grids = [_cells(value, depth, leading) for value in inputs]
    shape = np.broadcast_shapes(*(cells.shape for cells in grids))
    grids = [np.broadcast_to(cells, shape) for cells in grids]
    result = np.empty(shape, object)
    for place in np.ndindex(*shape):
        operands = [cells[place] for cells in grids]
        common = np.broadcast_shapes(*(operand.shape for operand in operands))
        operands = [jnp.broadcast_to(operand, common) for operand in operands]
        result[place] = equation.primitive.bind(*operands, **equation.params)
    return _Taps(result)


def _cells(value: Any, depth: int, leading: int) -> np.ndarray:
    """What meets taps in an elementwise operation: taps, a number, or an array that is alike at all outputs."""
    if isinstance(value, _Taps):
        return value.cells
    if value.ndim == 0:
        value = value.reshape((1,) * (leading + depth + 1))
    if value.ndim != leading + depth + 1 or any(size != 1 for size in value.shape[:leading]):
        raise NotTapwise("an array that is not the same at every output position")
    return _apart(value, leading)


def _apart(value: jax.Array, leading: int) -> np.ndarray:
    """An array `(1, ..., 1, *cells, C)` as its cells, each `(C,)`."""
    shape = value.shape[leading:-1]
    rows = value.reshape(-1, value.shape[-1])
    return grid((lax.index_in_dim(rows, row, keepdims=False) for row in range(len(rows))), shape)


def _spread(value: jax.Array, equation: JaxprEqn, leading: int) -> Any:
    """What does not depend on the windows, made as large as they are: left small where it is alike at all outputs."""
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    alike = all(axis >= leading or value.shape[i] == 1 for i, axis in enumerate(axes))
    if len(shape) <= leading or max(shape[:leading], default=1) == 1 or not alike:
        return equation.primitive.bind(value, **equation.params)
    small = tuple(1 if axis < leading or axis == len(shape) - 1 else size for axis, size in enumerate(shape))
    channels = [value.shape[i] for i, axis in enumerate(axes) if axis == len(shape) - 1]
    small = (*small[:-1], *(channels or [1]))
    return _Taps(_apart(lax.broadcast_in_dim(value, small, axes), leading))


def _shape(equation: JaxprEqn, leading: int) -> tuple[int, ...]:
    """The cells' shape of a result, where outputs and channels are as they were."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if before[:leading] != after[:leading] or before[-1] != after[-1] or len(after) <= leading:
        raise NotTapwise(equation.primitive.name)
    return after[leading:-1]


def _broadcast(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    (value,) = inputs
    shape, axes = _shape(equation, leading), equation.params["broadcast_dimensions"]
    if axes[:leading] != tuple(range(leading)) or axes[-1] != leading + len(shape):
        raise NotTapwise("broadcast_in_dim")
    ones = [1] * len(shape)
    for size, axis in zip(value.cells.shape, axes[leading:-1]):
        ones[axis - leading] = size
    return _Taps(np.broadcast_to(value.cells.reshape(ones), shape))


def _reshape(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    """A squeeze, too. With outputs and channels of the same sizes, what is left is a reshape of the cells."""
    if equation.primitive.name == "reshape" and equation.params["dimensions"] is not None:
        raise NotTapwise("reshape after a transposition")
    return _Taps(inputs[0].cells.reshape(_shape(equation, leading)))


def _transpose(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    order, depth = equation.params["permutation"], inputs[0].cells.ndim
    if tuple(order[:leading]) != tuple(range(leading)) or order[-1] != leading + depth:
        raise NotTapwise("transpose")
    return _Taps(inputs[0].cells.transpose([axis - leading for axis in order[leading:-1]]))


def _reverse(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    return _Taps(np.flip(inputs[0].cells, _tap_axes(equation.params["dimensions"], inputs[0], leading)))


def _slice(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    _shape(equation, leading)
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    if any(stride != 1 for stride in (*strides[:leading], strides[-1])):
        raise NotTapwise("slice")
    taps = [slice(*part) for part in zip(starts, limits, strides)][leading:-1]
    return _Taps(inputs[0].cells[tuple(taps)])


def _concatenate(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
    if not all(isinstance(value, _Taps) for value in inputs):
        raise NotTapwise("concatenate")
    (axis,) = _tap_axes((equation.params["dimension"],), inputs[0], leading)
    return _Taps(np.concatenate([value.cells for value in inputs], axis))


def _reduce(combine: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., _Taps]:
    """Over taps in raster order."""

    def rule(inputs: Sequence[Any], equation: JaxprEqn, leading: int) -> _Taps:
        cells = inputs[0].cells
        axes = _tap_axes(equation.params["axes"], inputs[0], leading)
        kept = [axis for axis in range(cells.ndim) if axis not in axes]
        shape = tuple(cells.shape[axis] for axis in kept)
        rows = cells.transpose([*kept, *axes]).reshape(*shape, -1)
        result = np.empty(shape, object)
        for place in np.ndindex(*shape):
            result[place] = functools.reduce(combine, rows[place])
        return _Taps(result)

    return rule


def _tap_axes(axes: Sequence[int], value: _Taps, leading: int) -> tuple[int, ...]:
    own = tuple(axis - leading for axis in axes)
    if any(not 0 <= axis < value.cells.ndim for axis in own):
        raise NotTapwise("along output positions or channels")
    return own


#: Operations whose result at one place depends on their operands at that place alone.
ELEMENTWISE = (
    *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt"),
    *("integer_pow", "pow", "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sinh", "cosh"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "erf_inv", "lgamma", "digamma", "bessel_i0e", "bessel_i1e"),
    *("max", "min", "clamp", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "nextafter"),
    *("round", "floor", "ceil", "reduce_precision", "convert_element_type", "real", "imag", "conj", "complex"),
    *("and", "or", "xor", "not", "shift_left", "shift_right_logical", "shift_right_arithmetic", "clz"),
    *("population_count", "copy", "name", "stop_gradient"),
)

_RULES: Mapping[str, Callable[[Sequence[Any], JaxprEqn, int], _Taps]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "concatenate": _concatenate,
    "reduce_sum": _reduce(lax.add),
    "reduce_prod": _reduce(lax.mul),
    "reduce_max": _reduce(lax.max),
    "reduce_min": _reduce(lax.min),
    "reduce_and": _reduce(lax.bitwise_and),
    "reduce_or": _reduce(lax.bitwise_or),
}
