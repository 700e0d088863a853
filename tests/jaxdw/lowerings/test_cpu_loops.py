"""Kernels of many taps: loops, whose programs do not grow with the kernel, and the same sums."""

import jax
import numpy as np
import pytest

import jaxdw
from bridge import Case
from bridge.numerics import same_bits
from jaxdw.bias import bias_comes_first
from tests import oracle


def forward_and_gradients(x, kernel, dy):
    y, pull = jax.vjp(lambda x, kernel: jaxdw.depthwise_conv(x, kernel, method="taps"), x, kernel)
    return y, *pull(dy)


def operations(x_shape, kernel_size):
    """How many the whole program has, before XLA unrolls anything."""
    x = jax.ShapeDtypeStruct(x_shape, np.float32)
    kernel = jax.ShapeDtypeStruct((*kernel_size, 1, x_shape[-1]), np.float32)
    return jax.jit(forward_and_gradients).lower(x, kernel, x).as_text().count("stablehlo.")


@pytest.mark.parametrize(
    "x_shape, kernel_size",
    [
        ((1, 56, 56, 32), (13, 13)),
        ((1, 56, 56, 32), (31, 31)),
        ((1, 56, 56, 32), (51, 51)),
        ((1, 4096, 32), (1024,)),
        ((1, 4096, 32), (4096,)),
        ((2, 7, 7, 4), (51, 51)),
        ((1, 8, 14, 14, 16), (7, 7, 7)),
    ],
    ids=str,
)
def test_the_program_of_a_large_kernel_is_no_larger_than_that_of_a_small_one(x_shape, kernel_size):
    assert operations(x_shape, kernel_size) < operations((1, 56, 56, 32), (7, 7)) + operations((8, 14, 14, 32), (5, 5))


#: x, kernel, and the options: each kind of loop (columns in one body or in pieces, rows, planes), bodies left over, few
#: channels, padding, steps.
CASES = {
    "columns in pieces": ((1, 130, 9), (101,), {}),
    "few channels": ((2, 90, 2), (70,), {"padding": "CAUSAL"}),
    "one channel": ((1, 20, 21, 1), (9, 11), {"strides": 2}),
    "rows of one body": ((1, 24, 40, 10), (3, 31), {"kernel_dilation": (2, 1)}),
    "rows together": ((2, 17, 15, 16), (13, 13), {"strides": (2, 3), "padding": ((6, 2), (-1, 9))}),
    "larger than x": ((2, 5, 4, 9), (11, 13), {}),
    "narrow": ((1, 90, 3, 8), (67, 1), {}),
    "periodic": ((1, 12, 9, 9), (9, 9), {"padding": "CIRCULAR"}),
    "reflected": ((1, 12, 9, 9), (9, 9), {"padding": "REFLECT", "strides": 2}),
    "transposed": ((1, 9, 8, 9), (10, 9), {"padding": 5, "input_dilation": 2}),
    "transposed with steps": ((1, 9, 8, 9), (13, 11), {"padding": 9, "input_dilation": (3, 2), "kernel_dilation": 2}),
    "volume": ((1, 5, 6, 7, 9), (5, 3, 5), {"strides": 2}),
    "two outputs a channel": ((1, 12, 13, 5), (9, 9), {"multiplier": 2}),
    "7x7 from a padded copy": ((2, 9, 8, 16), (7, 7), {}),
    "7x7 with steps": ((2, 9, 8, 16), (7, 7), {"strides": 2, "kernel_dilation": 2}),
}


def arrays(shape, kernel_size, draw, multiplier=1):
    features = shape[-1] * multiplier
    return draw(shape), draw((*kernel_size, 1, features)), draw((features,))


@pytest.mark.parametrize("name", CASES)
def test_taps_is_one_chain_in_a_loop_too(name, seed):
    shape, kernel_size, options = CASES[name]
    rng = np.random.default_rng(seed)
    options = dict(options)
    x, kernel, bias = arrays(
        shape, kernel_size, lambda s: rng.standard_normal(s, np.float32), options.pop("multiplier", 1)
    )
    case = Case(x, kernel, bias, **options)
    y = jaxdw.depthwise_conv(x, kernel, bias, method="taps", **options)
    assert same_bits(np.asarray(y), oracle.fma_chain(case, bias_first=bias_comes_first(case.geometry))).all()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_many_taps_are_exact_on_whole_numbers(name, seed, full):
    shape, kernel_size, options = CASES[name]
    rng = np.random.default_rng(1)
    options = dict(options)
    x, kernel, bias = arrays(
        shape, kernel_size, lambda s: rng.integers(-8, 9, s).astype(np.float32), options.pop("multiplier", 1)
    )

    def gradients(method):
        def run(x, kernel):
            y, pull = jax.vjp(lambda x, k: jaxdw.depthwise_conv(x, k, bias, method=method, **options), x, kernel)
            return y, *pull(np.round(y / 64) % 8)

        return jax.jit(run)(x, kernel)

    expected = gradients("grouped")
    for method in ("taps", "rows") if full else [("taps", "rows")[seed % 2]]:
        for actual, exact in zip(gradients(method), expected, strict=True):
            np.testing.assert_array_equal(actual, exact)
