"""NumPy: the correctly rounded result, and functions of the user."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from bridge import numerics
from bridge._implementations import user
from bridge._implementations.algorithm import Algorithm, Knob, declared, time_calls
from bridge.case import Case
from bridge.errors import ImplementationError
from bridge.numerics import FLOAT64, Arithmetic
from jaxdw.geometry import Geometry

KNOBS: dict[str, Knob] = {}


def exact(case: Case) -> np.ndarray:
    return numerics.exact(case).value


def input_gradient(case: Case, dy: np.ndarray) -> np.ndarray:
    return numerics.exact_input_gradient(case, dy).value


def rounded_once(case: Case) -> Arithmetic:
    return Arithmetic.of(case.dtype, product=FLOAT64, accumulator=FLOAT64)


def user_algorithm(function: user.UserFunction) -> Algorithm:
    """Return the algorithm of a user's function of NumPy arrays."""

    def compute(case: Case) -> np.ndarray:
        g = dataclasses.replace(case.geometry, batch=(math.prod(case.geometry.batch),))
        y = function.call(ARRAYS, case.x.reshape(g.x_shape), case.kernel, case.bias, g)
        return y.astype(case.dtype).reshape(case.geometry.output_shape)

    def gradient(case: Case, dy: np.ndarray) -> np.ndarray:
        raise ImplementationError(f"{function.name} is a function of NumPy arrays, which has no gradient")

    return Algorithm(
        compute,
        lambda case: declared(case, "same", flushes_subnormals=False, output_roundings=2),
        function.name,
        function.name,
        lambda case, repetitions: time_calls(lambda: compute(case), repetitions),
        gradient,
        function=function,
    )


def _padded(x: np.ndarray, g: Geometry) -> np.ndarray:
    for axis in range(g.rank):
        source = g.padded_sources(axis)
        taken = np.take(x, np.maximum(source, 0), axis=1 + axis)
        x = np.moveaxis(np.where(source >= 0, np.moveaxis(taken, 1 + axis, -1), x.dtype.type(0)), -1, 1 + axis)
    return np.ascontiguousarray(x)


def _no_layer(layer: object, g: Geometry) -> Callable[..., np.ndarray]:
    raise ImplementationError(f"{layer!r} is a layer of a framework, expected a function of NumPy arrays")


def _program(
    call: Callable[..., tuple[np.ndarray, ...]], *, differentiate: bool, form: str, device: str, jit: bool
) -> user.Program:
    del jit
    if device:
        raise ValueError(f"`device` is {device!r} for a function of NumPy arrays, expected none")

    def program(given: Sequence[np.ndarray], dy: np.ndarray | None) -> user.Results:
        if differentiate:
            raise user.NoGradient("a function of NumPy arrays has no gradient")
        for each in given:  # memory that a function does not write has NaN in it, not the results of the call before
            np.full_like(each, np.nan)
        arrays = [_in_memory(each, form) for each in given]
        outputs = call(*arrays)
        return user.Results([np.array(each) for each in outputs], [], arrays)

    return program


def _in_memory(array: np.ndarray, form: str) -> np.ndarray:
    """Return a copy that lies in memory in another way: `user.FORMS`."""
    if form == "moved":
        return np.moveaxis(np.array(np.moveaxis(array, -1, 0), order="C"), 0, -1)
    if form == "strided":
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    return np.array(array, order="C")


ARRAYS = user.Arrays(
    "numpy",
    np.ndarray,
    "channels_last",
    lambda *moved: np.ascontiguousarray(np.moveaxis(*moved)),
    _padded,
    _no_layer,
    _program,
    np.moveaxis,
)

ALGORITHMS = {
    "exact": Algorithm(
        exact,
        rounded_once,
        "exact",
        "bridge.numerics.exact(case).value",
        lambda case, repetitions: time_calls(lambda: exact(case), repetitions),
        input_gradient,
    )
}
