"""The method "fft": the loop within its bound, derivatives, layers, streams, what is not a number.

On small whole numbers its errors are below one half. So rounded results must be the exact ones.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import jaxdw
import jaxdw.nnx
from bridge import Case
from bridge._implementations import implementation
from bridge.numerics import error_bound, exact
from jaxdw.lowerings import fft
from tests import oracle
from tests.jaxdw.test_derivatives import whole_numbers
from tests.programs import release_programs
from tests.strategies import Problem, problems

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@st.composite
def long_problems(draw):
    """One or two axes, so long that some of them are cut into blocks."""
    spatial = draw(st.sampled_from([(draw(st.integers(1, 900)),), (3, draw(st.integers(300, 600)))]))
    kernel_size = tuple(draw(st.integers(1, 40 if len(spatial) == 1 else 3)) for _ in spatial)
    padding = draw(st.sampled_from(["SAME", "VALID", "CIRCULAR", draw(st.integers(-2, 9))]))
    options = {
        "strides": draw(st.integers(1, 3)),
        "padding": padding,
        "kernel_dilation": draw(st.integers(1, 2)),
        "input_dilation": draw(st.integers(1, 2)) if isinstance(padding, int) else 1,
    }
    channels, multiplier, seed = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2**32 - 1))
    batch = draw(st.sampled_from([(), (2,)]))
    shapes = (*batch, *spatial, channels), (*kernel_size, 1, channels * multiplier)
    return Problem(*shapes, options, draw(st.booleans()), seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_within_its_bound_of_the_loop(dtype, full):
    @hypothesis.settings(max_examples=100 if full else 5)
    @given(st.one_of(problems(), long_problems()))
    def check(problem):
        release_programs()
        case = Case(*problem.arrays(DTYPES[dtype]), **problem.options)
        method = implementation("jax.fft")
        y, expected = method.run(case), oracle.depthwise(case.x, case.kernel, case.bias, **problem.options)
        bound = error_bound(method.arithmetic(case), exact(case)) + expected.bound(np.float64)  # of the loop itself
        assert y.shape == expected.y.shape and (abs(y.astype(np.float64) - expected.y) <= bound).all()

    check()


def test_derivatives_of_every_kind_round_to_the_exact_ones(full):
    @hypothesis.settings(max_examples=60 if full else 5)
    @given(st.one_of(problems(max_batch_axes=1), long_problems()))
    def check(problem):
        release_programs()
        x, kernel = (a.astype(np.float64) for a in whole_numbers(problem.seed, problem.x_shape, problem.kernel_shape))

        def results(method):
            def conv(x, kernel):
                return jaxdw.depthwise_conv(x, kernel, method=method, **problem.options)

            def all_of(x, kernel):
                y, pull = jax.vjp(conv, x, kernel)
                dy = jnp.asarray(whole_numbers(problem.seed + 1, y.shape)[0], y.dtype)
                _, tangent = jax.jvp(conv, (x, kernel), (x, kernel))
                second = jax.vjp(lambda x, kernel: jax.vjp(conv, x, kernel)[1](dy), x, kernel)[1]((x, kernel))
                mapped = jax.vmap(conv, (None, 0))(x, jnp.stack([kernel, -2 * kernel]))
                return (
                    y,
                    pull(dy),
                    tangent,
                    second,
                    mapped,
                    jax.vmap(conv)(jnp.stack([x, 3 * x]), jnp.stack([kernel] * 2)),
                )

            return jax.tree.leaves(jax.jit(all_of)(x, kernel))

        with jax.enable_x64(True):
            for ours, expected in zip(results("fft"), results("taps"), strict=True):
                assert ours.dtype == expected.dtype and np.array_equal(np.rint(ours), expected)

    check()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_layers_round_to_the_exact_results(dtype, seed):
    x, kernel, bias = whole_numbers(seed, (2, 19, 3), (7, 1, 3), (3,), dtype=np.float32)
    sequence, weights = jnp.asarray(x, dtype), (jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype))
    for function, options in {
        jaxdw.causal_conv1d: {"return_state": True, "state": sequence[:, :6]},
        jaxdw.depthwise_conv_transpose: {"strides": 2, "padding": 3, "output_padding": 1},
    }.items():
        ours, expected = (jax.tree.leaves(function(sequence, *weights, method=m, **options)) for m in ("fft", "taps"))
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype and np.array_equal(np.rint(a.astype(np.float32)), b.astype(np.float32))
    layer = jaxdw.nnx.DepthwiseConv(3, (7,), method="fft", rngs=nnx.Rngs(0))
    nnx.update(layer, {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)})
    assert np.array_equal(np.rint(layer(x)), jaxdw.depthwise_conv(x, kernel, bias))
    gradient = nnx.grad(lambda layer: layer(x).sum())(layer)
    assert np.isfinite(gradient["kernel"][...]).all()


def test_channels_are_transformed_in_groups_where_memory_is_short(seed):
    x, kernel, dy = whole_numbers(seed, (2, 50, 6), (9, 1, 12), (2, 50, 12), dtype=np.float32)
    geometry, single = jaxdw.Geometry.of(x.shape, kernel.shape), np.dtype(np.float32)
    conv, gradient = (functools.partial(each, spectrum_bytes=8000) for each in (fft.conv, fft.kernel_gradient))
    assert fft._groups(geometry, fft.blocks_of(geometry), 8000) == 3
    y, pull = jax.vjp(lambda kernel: jaxdw.depthwise_conv(x, kernel), kernel)
    assert np.array_equal(np.rint(conv(x, kernel, None, geometry, None, single, single)), y)
    assert np.array_equal(np.rint(gradient(x, dy, geometry, single, single)), *pull(dy))


def test_what_is_no_number_spreads_over_its_channel_alone(seed):
    x, kernel = whole_numbers(seed, (2, 30, 3), (5, 1, 3), dtype=np.float32)
    x[1, 20, 2] = np.inf
    y = np.asarray(jaxdw.depthwise_conv(x, kernel, method="fft"))
    assert np.isnan(y[1, :, 2]).all()
    assert np.isfinite(y[0]).all() and np.isfinite(y[1, :, :2]).all()
    bound = error_bound(implementation("jax.fft").arithmetic(Case(x, kernel)), exact(Case(x, kernel)))
    assert np.isinf(bound[1, :, 2]).all() and np.isfinite(bound[0]).all()


def test_a_program_for_sizes_that_are_not_known_adds_the_taps(seed):
    x, kernel = whole_numbers(seed, (2, 30, 3), (5, 1, 3), dtype=np.float32)
    sizes = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t, 3"), np.float32)
    weights = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    exported = jax.export.export(jax.jit(lambda x, k: jaxdw.depthwise_conv(x, k, method="fft")))(sizes, weights)
    assert np.array_equal(exported.call(x, kernel), jaxdw.depthwise_conv(x, kernel))


def test_packed_sequences_have_no_transform():
    x, kernel = np.zeros((1, 8, 2), np.float32), np.zeros((3, 1, 2), np.float32)
    with pytest.raises(ValueError, match="`method` is 'fft' with `segment_ids`, expected one of auto, taps"):
        jaxdw.causal_conv1d(x, kernel, segment_ids=np.zeros((1, 8), np.int32), method="fft")


def test_lengths_have_small_prime_factors_and_blocks_cover_the_outputs(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        size, taps, stride = (int(10 ** rng.uniform(0, high)) for high in (5, 3, 1))
        geometry = jaxdw.Geometry.of((size, 1), (taps, 1, 1), strides=stride)
        (blocks,) = fft.blocks_of(geometry)
        rest = blocks.length
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        assert rest == 1 and blocks.length % 2 == 0 and blocks.length >= taps
        assert blocks.count * blocks.step >= (geometry.output_spatial[0] - 1) * stride + 1
        assert blocks.count == 1 or blocks.length == blocks.step + taps - 1
