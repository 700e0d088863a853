"""A function of windows, carried out tap by tap, so that XLA never has to make the windows.

The function is traced to a jaxpr, and that is read again with an array for each tap in place of the array of windows.
What can be read so leaves the output positions and the channels alone: elementwise functions, sums, products and
extremes over the taps, and choosing, reordering or broadcasting taps. The rest, a sort for one, cannot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxdw.geometry import Geometry


class NotTapwise(Exception):
    """The function does what cannot be done tap by tap."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of windows as a program, apart from the arrays that it closes over.

    Attributes:
      program: from windows to windows, with those arrays as constants.
      closed_over: those arrays.
      first: from the closed-over arrays to all that is computed from them alone.
      then: from that and the windows to windows.
      leading: sizes of the windows' axes before those of the taps.
    """

    program: Jaxpr
    closed_over: tuple[Any, ...]
    first: Jaxpr
    then: Jaxpr
    leading: tuple[int, ...]

    @property
    def operations(self) -> int:
        """How many there are, on each tap or so."""
        return len(self.then.eqns)

    def of_windows(self, closed_over: Sequence[Any], windows: jax.Array) -> jax.Array:
        """The function itself, differentiable by its own rules."""
        (result,) = jax.core.eval_jaxpr(self.program, closed_over, windows)
        return result

    def constants(self, closed_over: Sequence[Any]) -> list[Any]:
        """What `of_taps` needs besides the taps."""
        return jax.core.eval_jaxpr(self.first, (), *closed_over)

    def of_taps(self, constants: Sequence[Any], taps: np.ndarray) -> np.ndarray:
        """taps `(*kernel_size,)` of arrays `(*positions, C)`, each as one tap of the result: `(*positions, C)`, or
        `(C,)` or `(1,)` where it is the same at all positions, or in all channels.

        The positions may be some of the outputs, in any number of axes: the function treats all alike. Derivatives
        that the function defines for itself are lost.
        """
        values: dict[Any, Any] = dict(zip(self.then.invars, [*constants, _Taps(taps)], strict=True))

        def read(atom: Any) -> Any:
            return jnp.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

        for equation in self.then.eqns:
            rule = _RULES.get(equation.primitive.name)
            if rule is None:
                raise NotTapwise(equation.primitive.name)
            values[equation.outvars[0]] = rule([read(atom) for atom in equation.invars], equation, self.leading)
        result = read(self.then.outvars[0])
        if not isinstance(result, _Taps):
            raise NotTapwise("windows that are not computed from the windows given")
        return result.cells


def trace(fn: Callable[[jax.Array], Any], geometry: Geometry, dtype: np.dtype) -> Traced | None:
    """fn as a function of taps, or None where it is none, fails, has effects, or does not return windows like those it
    is given."""
    windows = jax.ShapeDtypeStruct(geometry.windows_shape, dtype)
    try:
        traced, result = jax.make_jaxpr(fn, return_shape=True)(windows)
    except Exception:  # of the user's function: called on windows, it says what is wrong, or is right after all
        return None
    like = isinstance(result, jax.ShapeDtypeStruct) and (result.shape, result.dtype) == (windows.shape, windows.dtype)
    if not like or traced.effects:
        return None
    closed_over = tuple(traced.consts)
    leading = (*geometry.batch, *geometry.output_spatial)
    flat = jax.make_jaxpr(functools.partial(_without_calls, traced.jaxpr))(closed_over, [windows])
    first, then = _apart(flat.jaxpr, (*leading, geometry.channels))
    whole = Traced(traced.jaxpr, closed_over, first, then, leading)
    taps = [jax.ShapeDtypeStruct((1, geometry.channels), dtype)] * geometry.taps

    def attempt(closed_over: Sequence[Any], taps: Sequence[jax.Array]) -> list[jax.Array]:
        return list(whole.of_taps(whole.constants(closed_over), grid(taps, geometry.kernel_size)).flat)

    try:
        jax.eval_shape(attempt, closed_over, taps)
    except NotTapwise:
        return None
    return whole


def grid(taps: Iterable[jax.Array], kernel_size: Sequence[int]) -> np.ndarray:
    """Arrays, one a tap in raster order, as an array of objects `(*kernel_size,)`."""
    cells = np.empty(tuple(kernel_size), object)
    for place, tap in zip(np.ndindex(*kernel_size), taps, strict=True):
        cells[place] = tap
    return cells


def _without_calls(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program; where it only calls another, that one's own operations."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        called = _called(equation)
        if called is not None:
            outputs = _without_calls(called.jaxpr, called.consts, [read(atom) for atom in equation.invars])
        else:
            inputs = [atom for atom in equation.invars if not isinstance(atom, Literal)]
            alone = Jaxpr((), inputs, equation.outvars, [equation], equation.effects, jaxpr.debug_info)
            outputs = jax.core.eval_jaxpr(alone, (), *map(read, inputs))
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


def _called(equation: JaxprEqn) -> ClosedJaxpr | None:
    name = _CALLS.get(equation.primitive.name)
    if name is None:
        return None
    called = equation.params[name]
    return ClosedJaxpr(called, ()) if isinstance(called, Jaxpr) else called


def _apart(jaxpr: Jaxpr, alike: tuple[int, ...]) -> tuple[Jaxpr, Jaxpr]:
    """The program from `(*constants, windows)` in two: what does not depend on the windows, and the rest.

    The rest includes what makes a small array as large as the windows. `alike` are their sizes but for the taps.
    """
    *constants, windows = jaxpr.invars
    first, then, late = [], [], {windows}
    for equation in jaxpr.eqns:
        inputs = [atom for atom in equation.invars if not isinstance(atom, Literal)]
        if late.intersection(inputs) or _spreads(equation, alike):
            then.append(equation)
            late.update(equation.outvars)
        else:
            first.append(equation)
    read = [atom for equation in then for atom in equation.invars] + jaxpr.outvars
    passed = list(dict.fromkeys(atom for atom in read if not isinstance(atom, Literal) and atom not in late))
    debug_info = jaxpr.debug_info.with_unknown_names()
    return (
        Jaxpr((), constants, passed, first, debug_info=debug_info),
        Jaxpr((), [*passed, windows], jaxpr.outvars, then, debug_info=debug_info),
    )


def _spreads(equation: JaxprEqn, alike: tuple[int, ...]) -> bool:
    """Whether it makes an array as large as windows that is the same at all output positions."""
    if equation.primitive.name != "broadcast_in_dim":
        return False
    *leading, channels = alike
    shape, (value, *_) = equation.params["shape"], equation.invars
    return (
        len(shape) > len(leading)
        and (*shape[: len(leading)], shape[-1]) == (*leading, channels)
        and all(
            size == 1
            for size, axis in zip(value.aval.shape, equation.params["broadcast_dimensions"])
            if axis < len(leading)
        )
    )


@dataclasses.dataclass(frozen=True)
class _Taps:
    """An array `(*leading, *cells.shape, C)` in the function's eyes, as one array a cell.

    Each is `(*positions, C)`; or `(C,)` or `(1,)` where it is the same at all positions, and perhaps in all channels.
    """

    cells: np.ndarray


def _elementwise(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    grids = [_cells(value) for value in inputs]
    shape = np.broadcast_shapes(*(cells.shape for cells in grids))
    grids = [np.broadcast_to(cells, shape) for cells in grids]
    result = np.empty(shape, object)
    for place in np.ndindex(*shape):
        operands = [cells[place] for cells in grids]
        common = np.broadcast_shapes(*(operand.shape for operand in operands))
        operands = [jnp.broadcast_to(operand, common) for operand in operands]
        result[place] = equation.primitive.bind(*operands, **equation.params)
    return _Taps(result)


def _cells(value: Any) -> np.ndarray:
    """What meets in an elementwise operation: taps, or one number for all of them."""
    if isinstance(value, _Taps):
        return value.cells
    if value.ndim > 0:
        raise NotTapwise("an array that is not the same at every output position")
    return grid([value.reshape(1)], ())


def _shape(equation: JaxprEqn, leading: tuple[int, ...]) -> tuple[int, ...]:
    """The cells' shape of a result, where outputs and channels are as they were."""
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if len(after) <= len(leading) or (*leading, before[-1]) != (*after[: len(leading)], after[-1]):
        raise NotTapwise(equation.primitive.name)
    return after[len(leading) : -1]


def _broadcast(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    """Of taps, to more of them; of an array that is the same at all output positions, to taps."""
    (value,) = inputs
    axes, count, rank = equation.params["broadcast_dimensions"], len(leading), len(equation.params["shape"])
    if not isinstance(value, _Taps):
        own = [i for i, axis in enumerate(axes) if axis >= count]
        small = value.reshape([value.shape[i] for i in own])
        return _Taps(_rows(small, [axes[i] - count for i in own], equation.params["shape"][count:-1]))
    shape = _shape(equation, leading)
    if axes[:count] != tuple(range(count)) or axes[-1] != rank - 1:
        raise NotTapwise("broadcast_in_dim")
    ones = [1] * len(shape)
    for size, axis in zip(value.cells.shape, axes[count:-1]):
        ones[axis - count] = size
    return _Taps(np.broadcast_to(value.cells.reshape(ones), shape))


def _rows(value: jax.Array, axes: Sequence[int], cells: tuple[int, ...]) -> np.ndarray:
    """value as cells of shape `cells`, each `(C,)` or `(1,)`: its axes are these of `(*cells, C)`."""
    sizes = dict(zip(axes, value.shape))
    value = value.reshape([sizes.get(axis, 1) for axis in range(len(cells) + 1)])
    own = value.shape[:-1]
    flat = value.reshape(math.prod(own), value.shape[-1])
    return np.broadcast_to(grid((flat[row] for row in range(len(flat))), own), cells)


def _reshape(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    """A squeeze, too. With outputs and channels of the same sizes, what is left is a reshape of the cells."""
    if equation.primitive.name == "reshape" and equation.params["dimensions"] is not None:
        raise NotTapwise("reshape after a transposition")
    return _Taps(inputs[0].cells.reshape(_shape(equation, leading)))


def _transpose(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    order, count = equation.params["permutation"], len(leading)
    if tuple(order[:count]) != tuple(range(count)) or order[-1] != len(order) - 1:
        raise NotTapwise("transpose")
    return _Taps(inputs[0].cells.transpose([axis - count for axis in order[count:-1]]))


def _reverse(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    return _Taps(np.flip(inputs[0].cells, _tap_axes(equation.params["dimensions"], inputs[0], leading)))


def _slice(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    _shape(equation, leading)
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    if any(stride != 1 for stride in (*strides[: len(leading)], strides[-1])):
        raise NotTapwise("slice")
    taps = [slice(*part) for part in zip(starts, limits, strides)][len(leading) : -1]
    return _Taps(inputs[0].cells[tuple(taps)])


def _concatenate(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    if not all(isinstance(value, _Taps) for value in inputs):
        raise NotTapwise("concatenate")
    (axis,) = _tap_axes((equation.params["dimension"],), inputs[0], leading)
    return _Taps(np.concatenate([value.cells for value in inputs], axis))


def _stack(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
    axis, count = equation.params["axis"], len(leading)
    if not all(isinstance(value, _Taps) for value in inputs) or not count <= axis <= count + inputs[0].cells.ndim:
        raise NotTapwise("stack")
    return _Taps(np.stack([value.cells for value in inputs], axis - count))


def _reduce(combine: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., _Taps]:
    """Over taps in raster order."""

    def rule(inputs: Sequence[Any], equation: JaxprEqn, leading: tuple[int, ...]) -> _Taps:
        cells = inputs[0].cells
        if cells.size == 0:
            raise NotTapwise("no taps to combine")
        axes = _tap_axes(equation.params["axes"], inputs[0], leading)
        kept = [axis for axis in range(cells.ndim) if axis not in axes]
        shape = tuple(cells.shape[axis] for axis in kept)
        rows = cells.transpose([*kept, *axes]).reshape(*shape, -1)
        result = np.empty(shape, object)
        for place in np.ndindex(*shape):
            result[place] = functools.reduce(combine, rows[place])
        return _Taps(result)

    return rule


def _tap_axes(axes: Sequence[int], value: _Taps, leading: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(axis - len(leading) for axis in axes)
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

_RULES: Mapping[str, Callable[[Sequence[Any], JaxprEqn, tuple[int, ...]], _Taps]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "reduce_sum": _reduce(lax.add),
    "reduce_prod": _reduce(lax.mul),
    "reduce_max": _reduce(lax.max),
    "reduce_min": _reduce(lax.min),
    "reduce_and": _reduce(lax.bitwise_and),
    "reduce_or": _reduce(lax.bitwise_or),
}
