"""The sum as TPUs compute it, called directly: on a CPU layouts mean nothing, and values everything."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxdw import Geometry
from jaxdw.lowerings import generic, tpu_tiles
from tests import oracle
from tests.programs import release_programs
from tests.strategies import problems

#: Geometries that XLA's own convolution computes, and their like that it does not.
CONVOLVED = {"strides": 2, "padding": 1}


def summed(how, x, kernel, bias, geometry, order="raster"):
    run = functools.partial(how, geometry=geometry, order=order, compute=np.dtype(np.float32))
    return np.asarray(jax.jit(run)(x, kernel, bias))


def whole(rng, shape):
    """Whole numbers whose products and sums float32 holds exactly, so that order and FMA change no bit."""
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("order", ["raster", "rows"])
def test_whole_numbers_have_one_sum(order, full):
    @hypothesis.settings(max_examples=300 if full else 12)
    @given(problems())
    def check(problem):
        release_programs()
        rng = np.random.default_rng(problem.seed)
        x, kernel = whole(rng, problem.x_shape), whole(rng, problem.kernel_shape)
        bias = whole(rng, problem.kernel_shape[-1:]) if problem.bias and order == "raster" else None
        geometry = Geometry.of(problem.x_shape, problem.kernel_shape, **problem.options)
        hypothesis.assume(0 not in geometry.output_shape and 0 not in geometry.x_shape)
        found = summed(tpu_tiles.conv, x, kernel, bias, geometry, order)
        assert found.shape == geometry.output_shape
        np.testing.assert_array_equal(found, summed(generic.conv, x, kernel, bias, geometry, order))
        np.testing.assert_array_equal(found, oracle.depthwise(x, kernel, bias, **problem.options).y)

    check()


@pytest.mark.parametrize(
    "x_shape, kernel, options",
    [
        ((8, 8, 8, 65), 3, {}),
        ((9, 12, 8, 70), 5, {"padding": (2, (1, 3))}),
        ((2, 4, 9, 16, 130), 3, {"strides": (1, 2)}),
    ],
)
def test_what_becomes_a_convolution_has_the_same_sums(x_shape, kernel, options):
    kernel_shape = (kernel, kernel, 1, x_shape[-1])
    geometry = Geometry.of(x_shape, kernel_shape, **(CONVOLVED | options))
    flat = dataclasses.replace(geometry, batch=(int(np.prod(geometry.batch)),))
    assert tpu_tiles._is_convolution(flat)
    rng = np.random.default_rng(0)
    x, weights = whole(rng, x_shape), whole(rng, kernel_shape)
    found = summed(tpu_tiles.conv, x, weights, None, geometry)
    np.testing.assert_array_equal(found, summed(generic.conv, x, weights, None, geometry))


def test_only_the_sum_that_a_convolution_is_becomes_one(monkeypatch):
    """Not with a bias in front, by rows, at stride 1, or where the batch fills no tile, or fills tiles better."""

    def convolution(*_):
        raise AssertionError("a convolution")

    monkeypatch.setattr(tpu_tiles, "_convolution", convolution)
    x, kernel, bias = jnp.ones((8, 8, 8, 65)), jnp.ones((3, 3, 1, 65)), jnp.ones(65)
    geometry = Geometry.of(x.shape, kernel.shape, **CONVOLVED)
    with pytest.raises(AssertionError, match="a convolution"):
        summed(tpu_tiles.conv, x, kernel, None, geometry)
    summed(tpu_tiles.conv, x, kernel, bias, geometry)
    summed(tpu_tiles.conv, x, kernel, None, geometry, "rows")
    for changed in ({"strides": (2, 1)}, {"batch": (7,)}, {"spatial": (8, 9)}, {"kernel_dilation": (2, 2)}):
        other = dataclasses.replace(geometry, **changed)
        summed(tpu_tiles.conv, jnp.ones(other.x_shape), kernel, None, other)


@pytest.mark.parametrize("order", ["raster", "rows"])
@pytest.mark.parametrize(
    "x_shape, kernel_shape, options",
    [
        ((2, 5, 40, 2), (2, 3, 1, 4), {"strides": (2, 3), "padding": (1, (2, -1))}),
        ((3, 50, 1), (4, 1, 1), {"strides": 5, "input_dilation": 2, "padding": 3}),
        ((2, 3, 4, 41, 1), (2, 1, 3, 1, 1), {"strides": (1, 1, 2), "kernel_dilation": 2, "padding": "REFLECT"}),
    ],
)
def test_a_sum_made_for_every_place_is_the_same_sum(x_shape, kernel_shape, options, order):
    geometry = Geometry.of(x_shape, kernel_shape, **options)
    assert not tpu_tiles._copy_is_cheaper(geometry)
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in (x_shape, kernel_shape))
    bias = rng.standard_normal(kernel_shape[-1:]).astype(np.float32) if order == "raster" else None
    found = summed(tpu_tiles.conv, x, kernel, bias, geometry, order)
    np.testing.assert_array_equal(found, summed(generic.conv, x, kernel, bias, geometry, order))


def test_few_channels_stay_where_they_are():
    """16 channels of 112 columns take eight times their size in lanes: a copy would cost more than it saves."""
    small, large = ((8, 112, 112, c) for c in (16, 64))
    kernel = (3, 3, 1, 16)
    assert not tpu_tiles._copy_is_cheaper(Geometry.of(small, kernel, strides=2))
    assert tpu_tiles._copy_is_cheaper(Geometry.of(large, (3, 3, 1, 64), strides=2))
