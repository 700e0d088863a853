"""A function of windows, computed tap by tap, so that XLA need not compute the windows.

The function is traced to a jaxpr. That is then evaluated with one array per tap in place of the array of windows. It
must not mix output positions or channels: elementwise functions, sums, products and extremes over the taps, and
selecting, reordering or broadcasting taps are possible. Other functions, such as a sort, are not.
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
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxdw.geometry import Geometry
from jaxdw.jaxprs import called, evaluate


class NotTapwise(Exception):
    """The function cannot be computed tap by tap."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of windows as a program, without the arrays that it closes over.

    Attributes:
      program: from windows to windows, with the closed-over arrays as constants.
      closed_over: these arrays.
      first: from the closed-over arrays to everything that depends on them alone.
      then: from its results and the windows to windows.
      leading: sizes of the windows' axes before those of the taps.
      channels: size of their last axis.
    """

    program: Jaxpr
    closed_over: tuple[Any, ...]
    first: ClosedJaxpr
    then: Jaxpr
    leading: tuple[int, ...]
    channels: int

    @property
    def operations(self) -> int:
        """Number of operations; one on all taps counts once per tap."""
        return sum(
            max(math.prod(atom.aval.shape[len(self.leading) : -1]) for atom in (*equation.invars, *equation.outvars))
            for equation in self.then.eqns
            if equation.primitive.name in (*ELEMENTWISE, *_REDUCTIONS)
        )

    def of_windows(self, closed_over: Sequence[Any], windows: jax.Array) -> jax.Array:
        """Apply the function itself, differentiable by its own rules."""
        (result,) = jaxpr_as_fun(ClosedJaxpr(self.program, closed_over))(windows)
        return result

    def constants(self, closed_over: Sequence[Any]) -> list[Any]:
        """Return the arguments of `of_taps` besides the taps."""
        return jaxpr_as_fun(self.first)(*closed_over)

    def of_taps(self, constants: Sequence[Any], taps: np.ndarray) -> np.ndarray:
        """Apply the function to taps: `(*kernel_size,)` of arrays `(*positions, C)`.

        Each tap of the result is `(*positions, C)`, or `(C,)` or `(1,)` if it is the same at all positions, or also in
        all channels. The positions may be some of the outputs, in any number of axes: the function treats all in the
        same way. Derivatives that the function defines for itself are lost.
        """
        count = len(self.leading)

        def on_taps(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
            rule = _RULES.get(equation.primitive.name)
            shape = equation.outvars[0].aval.shape
            if rule is None or not _is_windows_shape(shape, self.leading, self.channels):
                raise NotTapwise(f"{equation.primitive.name} to shape {shape}")
            inputs = [
                jnp.asarray(operand, atom.aval.dtype) if isinstance(atom, Literal) else operand
                for atom, operand in zip(equation.invars, operands)
            ]
            return [_Taps(rule(inputs, equation, count, shape[count:-1]))]

        (result,) = evaluate(ClosedJaxpr(self.then, ()), [*constants, _Taps(taps)], on_taps)
        if not isinstance(result, _Taps):
            raise NotTapwise("windows that are not computed from the windows given")
        return result.cells


def trace(fn: Callable[[jax.Array], Any], geometry: Geometry, dtype: np.dtype) -> Traced | None:
    """Return fn as a function of taps, or None if it is none, fails, has effects, or does not return such windows."""
    windows = jax.ShapeDtypeStruct(geometry.windows_shape, dtype)
    try:
        traced, result = jax.make_jaxpr(fn, return_shape=True)(windows)
        like = isinstance(result, jax.ShapeDtypeStruct) and (result.shape, result.dtype) == (windows.shape, dtype)
        return _read(traced, geometry, dtype) if like and not traced.effects else None
    except Exception:  # on windows, fn itself says what is wrong, or is right after all
        return None


def _read(traced: ClosedJaxpr, geometry: Geometry, dtype: np.dtype) -> Traced:
    """Return the program as a function of taps, tried on shapes."""
    closed_over, leading = tuple(traced.consts), (*geometry.batch, *geometry.output_spatial)
    windows = jax.ShapeDtypeStruct(geometry.windows_shape, dtype)
    flat = jax.make_jaxpr(lambda *arrays: evaluate(ClosedJaxpr(traced.jaxpr, arrays[:-1]), arrays[-1:], _inlined))(
        *closed_over, windows
    )
    first, then = _split_at_windows(flat, leading, geometry.channels)
    whole = Traced(traced.jaxpr, closed_over, first, then, leading, geometry.channels)

    def attempt(closed_over: Sequence[Any], taps: Sequence[jax.Array]) -> list[jax.Array]:
        return list(whole.of_taps(whole.constants(closed_over), grid(taps, geometry.kernel_size)).flat)

    taps = [jax.ShapeDtypeStruct((1, geometry.channels), dtype)] * geometry.taps
    jax.eval_shape(attempt, closed_over, taps)
    return whole


def grid(taps: Iterable[jax.Array], kernel_size: Sequence[int]) -> np.ndarray:
    """Return arrays, one per tap in raster order, as an array of objects `(*kernel_size,)`."""
    cells = np.empty(tuple(kernel_size), object)
    for place, tap in zip(np.ndindex(*kernel_size), taps, strict=True):
        cells[place] = tap
    return cells


def _inlined(equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """Return the results of an equation that only calls a program, by the program's own operations; else None."""
    program = called(equation)
    return None if program is None else evaluate(program, operands, _inlined)


def _split_at_windows(closed: ClosedJaxpr, leading: tuple[int, ...], channels: int) -> tuple[ClosedJaxpr, Jaxpr]:
    """Split a program from `(*constants, windows)` into the part that does not depend on the windows, and the rest.

    The rest includes broadcasts of small arrays to the size of the windows. Equations that the result does not need are
    in neither part.
    """
    jaxpr = closed.jaxpr
    *constants, windows = jaxpr.invars
    needed = set(_variables(jaxpr.outvars))
    equations: list[JaxprEqn] = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            equations.insert(0, equation)
            needed.update(_variables(equation.invars))
    first, then, late = [], [], {windows}
    for equation in equations:
        if late.intersection(_variables(equation.invars)) or _broadcasts_over_positions(equation, leading, channels):
            then.append(equation)
            late.update(equation.outvars)
        else:
            first.append(equation)
    read = [atom for equation in then for atom in equation.invars] + jaxpr.outvars
    passed = [atom for atom in dict.fromkeys(_variables(read)) if atom not in late]
    debug_info = jaxpr.debug_info.with_unknown_names()
    return (
        ClosedJaxpr(Jaxpr(jaxpr.constvars, constants, passed, first, debug_info=debug_info), closed.consts),
        Jaxpr((), [*passed, windows], jaxpr.outvars, then, debug_info=debug_info),
    )


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _broadcasts_over_positions(equation: JaxprEqn, leading: tuple[int, ...], channels: int) -> bool:
    """Return True if the result is as large as windows, and the same at all output positions."""
    if equation.primitive.name != "broadcast_in_dim" or not _is_windows_shape(
        equation.params["shape"], leading, channels
    ):
        return False
    sizes = zip(equation.invars[0].aval.shape, equation.params["broadcast_dimensions"])
    return all(size == 1 for size, axis in sizes if axis < len(leading))


def _is_windows_shape(shape: tuple[int, ...], leading: tuple[int, ...], channels: int) -> bool:
    """Return True if a shape is `(*leading, ..., channels)`."""
    return len(shape) > len(leading) and (*shape[: len(leading)], shape[-1]) == (*leading, channels)


@dataclasses.dataclass(frozen=True)
class _Taps:
    """An array `(*leading, *cells.shape, C)` of the function, as one array per cell.

    Each is `(*positions, C)`, or `(C,)` or `(1,)` if it is the same at all positions, or also in all channels.
    """

    cells: np.ndarray


# Each rule takes the operands, the equation, the number of leading axes and the shape of the result's cells, and
# returns the cells. Sizes of the result's other axes have been checked: they are those of the windows.


def _elementwise(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    grids = [np.broadcast_to(_cells(value, leading), shape) for value in inputs]
    result = np.empty(shape, object)
    for place in np.ndindex(*shape):
        operands = [cells[place] for cells in grids]
        common = np.broadcast_shapes(*(operand.shape for operand in operands))
        operands = [jnp.broadcast_to(operand, common) for operand in operands]
        result[place] = equation.primitive.bind(*operands, **equation.params)
    return result


def _cells(value: Any, leading: int) -> np.ndarray:
    """Return the cells of an operand: taps, or a number or an array that is the same at every output."""
    if isinstance(value, _Taps):
        return value.cells
    if any(size != 1 for size in value.shape[:leading]):
        raise NotTapwise("an array that is not the same at every output position")
    return _rows(value.reshape(value.shape[leading:] or (1,)))


def _rows(value: jax.Array) -> np.ndarray:
    """Return value `(*cells, C)` as its cells."""
    rows = value.reshape(math.prod(value.shape[:-1]), value.shape[-1])
    return grid((rows[row] for row in range(len(rows))), value.shape[:-1])


def _broadcast(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    """Broadcast taps to more of them, or an array that is the same at all output positions to taps."""
    (value,) = inputs
    axes, last = equation.params["broadcast_dimensions"], leading + len(shape)
    if isinstance(value, _Taps):
        if axes[:leading] != tuple(range(leading)) or axes[-1] != last:
            raise NotTapwise("output positions or channels that become taps")
        cells, axes = value.cells, axes[leading:-1]
    else:
        sizes = dict(zip(axes, value.shape))
        cells = _rows(value.reshape([sizes.get(axis, 1) for axis in range(leading, last + 1)]))
        axes = range(leading, last)
    ones = [1] * len(shape)
    for size, axis in zip(cells.shape, axes):
        ones[axis - leading] = size
    return np.broadcast_to(cells.reshape(ones), shape)


def _reshape(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reshape or squeeze the cells: the sizes of outputs and channels stay the same."""
    if equation.params.get("dimensions") is not None and equation.primitive.name == "reshape":
        raise NotTapwise("reshape after a transposition")
    return inputs[0].cells.reshape(shape)


def _transpose(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    order = equation.params["permutation"]
    if tuple(order[:leading]) != tuple(range(leading)) or order[-1] != len(order) - 1:
        raise NotTapwise("transpose")
    return inputs[0].cells.transpose([axis - leading for axis in order[leading:-1]])


def _reverse(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.flip(inputs[0].cells, _tap_axes(equation.params["dimensions"], leading, len(shape)))


def _slice(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    return inputs[0].cells[tuple(slice(*part) for part in zip(starts, limits, strides))[leading:-1]]


def _concatenate(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    (axis,) = _tap_axes((equation.params["dimension"],), leading, len(shape))
    return np.concatenate([_cells(value, leading) for value in inputs], axis)


def _stack(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
    (axis,) = _tap_axes((equation.params["axis"],), leading, len(shape))
    return np.stack([_cells(value, leading) for value in inputs], axis)


def _reduce(combine: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., np.ndarray]:
    """Return the rule of a reduction over taps, in raster order."""

    def rule(inputs: Sequence[Any], equation: JaxprEqn, leading: int, shape: tuple[int, ...]) -> np.ndarray:
        cells = inputs[0].cells
        if cells.size == 0:
            raise NotTapwise("no taps to combine")
        axes = _tap_axes(equation.params["axes"], leading, cells.ndim)
        kept = [axis for axis in range(cells.ndim) if axis not in axes]
        rows = cells.transpose([*kept, *axes]).reshape(*shape, -1)
        result = np.empty(shape, object)
        for place in np.ndindex(*shape):
            result[place] = functools.reduce(combine, rows[place])
        return result

    return rule


def _tap_axes(axes: Sequence[int], leading: int, count: int) -> tuple[int, ...]:
    """Return these axes of an array as axes of its cells, which have `count` axes."""
    own = tuple(axis - leading for axis in axes)
    if any(not 0 <= axis < count for axis in own):
        raise NotTapwise("along output positions or channels")
    return own


#: Operations whose result at one position depends on their operands at that position alone.
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

_REDUCTIONS = {
    "reduce_sum": _reduce(lax.add),
    "reduce_prod": _reduce(lax.mul),
    "reduce_max": _reduce(lax.max),
    "reduce_min": _reduce(lax.min),
    "reduce_and": _reduce(lax.bitwise_and),
    "reduce_or": _reduce(lax.bitwise_or),
}

_RULES: Mapping[str, Callable[[Sequence[Any], JaxprEqn, int, tuple[int, ...]], np.ndarray]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **_REDUCTIONS,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "concatenate": _concatenate,
    "stack": _stack,
}
