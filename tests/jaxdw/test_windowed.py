"""windowed_conv: `contract(fn(unfold(x)), kernel)`, whatever fn does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from jaxdw.geometry import Geometry

GEOMETRIES = {
    "few channels": ((2, 6, 5, 3), (3, 3), 1, {"padding": 1}),
    "stride": ((2, 9, 8, 16), (3, 3), 1, {"padding": "SAME", "strides": 2}),
    "multiplier": ((9, 8, 9), (3, 2), 2, {"padding": ((1, 2), (0, 3)), "kernel_dilation": (2, 1)}),
    "1-D": ((2, 9, 9), (3,), 1, {"padding": "CAUSAL"}),
    "3-D": ((2, 3, 4, 5, 9), (2, 3, 2), 1, {"padding": 1, "strides": 2}),
    "periodic": ((2, 5, 6, 9), (3, 3), 1, {"padding": "CIRCULAR"}),
    "reflected": ((2, 5, 6, 9), (3, 3), 1, {"padding": "REFLECT", "strides": 2}),
    "input dilation": ((2, 5, 4, 9), (3, 3), 1, {"padding": 2, "input_dilation": (2, 3), "strides": (3, 2)}),
}


def whole_numbers(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.integers(-3, 4, shape).astype(dtype) for shape in shapes]


def definition(fn, x, kernel, bias=None, **options):
    return jaxdw.contract(fn(jaxdw.unfold(x, kernel.shape[:-2], **options)), kernel, bias)


def example(name, seed):
    shape, size, multiplier, options = GEOMETRIES[name]
    kernel_shape = (*size, 1, shape[-1] * multiplier)
    assert 0 not in Geometry.of(shape, kernel_shape, **options).output_shape
    return whole_numbers(seed, shape, kernel_shape, kernel_shape[-1:]), options


@pytest.mark.parametrize("name", GEOMETRIES)
def test_less_the_least_of_each_window(name, seed):
    operands, options = example(name, seed)

    def fn(windows):
        taps = tuple(range(-len(operands[1].shape) + 1, -1))
        return windows - windows.min(axis=taps, keepdims=True)

    actual = jax.jit(lambda *operands: jaxdw.windowed_conv(fn, *operands, **options))(*operands)
    assert jnp.array_equal(actual, definition(fn, *operands, **options))
