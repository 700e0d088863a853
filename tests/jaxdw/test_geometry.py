"""Geometry: sizes against lax and Flax, sources against the plain loop, and every message."""

import dataclasses
import functools
import math

import flax.nnx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax

from jaxdw.geometry import Geometry, spatial_tuple
from tests import oracle
from tests.strategies import problems

LAX_WORDS = ("SAME", "SAME_LOWER", "VALID")
FLAX_WORDS = (*LAX_WORDS, "CIRCULAR", "REFLECT", "CAUSAL")


def geometry_of(problem):
    return Geometry.of(problem.x_shape, problem.kernel_shape, **problem.options)


def each_axis(value, rank):
    return (value,) * rank if isinstance(value, int) else value


def shape_or_empty(function, *shapes):
    """The shape lax or Flax gives; None where it refuses to crop more than there is, to jaxdw an empty output."""
    try:
        return jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).shape
    except ValueError as error:
        assert "Negative padding is larger than the size" in str(error)
        return None


def test_the_output_shape_is_that_of_lax(full):
    @hypothesis.settings(max_examples=2000 if full else 200)
    @given(problems(words=LAX_WORDS))
    def check(problem):
        rank, options = problem.rank, problem.options
        axes = "DHW"[-rank:]
        geometry = geometry_of(problem)
        padding = options["padding"]
        if padding == "VALID" and max(geometry.input_dilation) > 1:  # lax takes no word with a dilated input
            padding = 0
        if not isinstance(padding, str):
            padding = [each_axis(pair, 2) for pair in each_axis(padding, rank)]
        conv = functools.partial(
            lax.conv_general_dilated,
            window_strides=each_axis(options["strides"], rank),
            padding=padding,
            lhs_dilation=each_axis(options["input_dilation"], rank),
            rhs_dilation=each_axis(options["kernel_dilation"], rank),
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=problem.x_shape[-1],
        )
        flat = (math.prod(geometry.batch), *geometry.spatial, geometry.channels)
        expected = shape_or_empty(conv, flat, problem.kernel_shape)
        if expected is None:
            assert 0 in geometry.output_spatial
        else:
            assert (flat[0], *geometry.output_shape[len(geometry.batch) :]) == expected

    check()


def test_the_output_shape_is_that_of_flax(full):
    @hypothesis.settings(max_examples=1000 if full else 100)
    @given(problems(words=FLAX_WORDS))
    def check(problem):
        rank, options = problem.rank, problem.options
        geometry = geometry_of(problem)
        # Flax flattens with reshape(-1), which nothing empty survives, and lax takes no word with a dilated input
        hypothesis.assume(len(geometry.batch) == 1 or 0 not in geometry.x_shape)
        hypothesis.assume(not isinstance(options["padding"], str) or max(geometry.input_dilation) == 1)

        def layer(x):
            return flax.nnx.Conv(
                geometry.channels,
                geometry.features,
                problem.kernel_shape[:rank],
                feature_group_count=geometry.channels,
                rngs=flax.nnx.Rngs(0),
                **options,
            )(x)

        expected = shape_or_empty(layer, problem.x_shape)
        if expected is None:
            assert 0 in geometry.output_spatial
        else:
            assert geometry.output_shape == expected

    check()


def test_sources_name_the_input_that_each_tap_reads(full):
    """Against the loop's windows of an image that holds its own positions, 1 and up; 0 is padding."""

    @hypothesis.settings(max_examples=5000 if full else 300)
    @given(problems())
    def check(problem):
        geometry = geometry_of(problem)
        numbers = np.arange(1, math.prod(geometry.spatial) + 1).reshape(*geometry.spatial, 1)
        expected = oracle.windows(numbers, geometry.kernel_size, **problem.options)[..., 0]
        flat = np.zeros((), int)
        for size, source in zip(geometry.spatial, geometry.sources):
            flat = np.add.outer(flat * size, source)
        flat = flat.transpose(*range(0, flat.ndim, 2), *range(1, flat.ndim, 2))
        valid = geometry.valid_taps()
        assert valid.dtype == bool and valid.shape == (*geometry.output_spatial, *geometry.kernel_size)
        np.testing.assert_array_equal(np.where(valid, flat + 1, 0), expected)
        if geometry.padding_mode != "zeros":
            assert valid.all()

    check()


def test_every_shape_follows_from_the_fields():
    g = Geometry.of((2, 0, 9, 8, 3), (3, 2, 1, 6), (6,), strides=(2, 1), padding=1, kernel_dilation=(2, 3))
    assert (g.batch, g.spatial, g.channels, g.multiplier, g.features) == ((2, 0), (9, 8), 3, 2, 6)
    assert (g.rank, g.kernel_size, g.taps, g.spans) == (2, (3, 2), 6, (5, 4))
    assert (g.padded_spatial, g.output_spatial) == ((11, 10), (4, 7))
    assert g.x_shape == (2, 0, 9, 8, 3)
    assert g.kernel_shape == (3, 2, 1, 6)
    assert g.output_shape == (2, 0, 4, 7, 6)
    assert g.windows_shape == (2, 0, 4, 7, 3, 2, 3)


# (spatial, kernel_size, options, padding of each axis, mode)
PADDINGS = {
    "SAME": ((56, 7), (3, 3), {}, ((1, 1), (1, 1)), "zeros"),
    "SAME at an even stride pads high": ((56, 7), (3, 3), {"strides": 2}, ((0, 1), (1, 1)), "zeros"),
    "SAME puts an odd rest high": ((8,), (4,), {"padding": "SAME"}, ((1, 2),), "zeros"),
    "SAME_LOWER puts an odd rest low": ((8,), (4,), {"padding": "SAME_LOWER"}, ((2, 1),), "zeros"),
    "SAME pads nothing under a stride beyond the kernel": ((9,), (2,), {"strides": 3}, ((0, 0),), "zeros"),
    "SAME of a dilated kernel": ((9,), (3,), {"kernel_dilation": 2}, ((2, 2),), "zeros"),
    "VALID": ((9, 9), (3, 5), {"padding": "VALID"}, ((0, 0), (0, 0)), "zeros"),
    "CIRCULAR": ((9,), (4,), {"padding": "CIRCULAR"}, ((1, 2),), "circular"),
    "CIRCULAR ignores strides": ((9,), (4,), {"padding": "CIRCULAR", "strides": 3}, ((1, 2),), "circular"),
    "REFLECT": ((9,), (3,), {"padding": "REFLECT", "kernel_dilation": 2}, ((2, 2),), "reflect"),
    "CAUSAL": ((9,), (3,), {"padding": "CAUSAL", "kernel_dilation": 2}, ((4, 0),), "zeros"),
    "int": ((9, 9), (3, 3), {"padding": 2}, ((2, 2), (2, 2)), "zeros"),
    "NumPy int": ((9, 9), (3, 3), {"padding": np.int64(2)}, ((2, 2), (2, 2)), "zeros"),
    "one int an axis": ((9, 9), (3, 3), {"padding": (0, 2)}, ((0, 0), (2, 2)), "zeros"),
    "one pair an axis": ((9, 9), (3, 3), {"padding": ((0, 1), (2, 3))}, ((0, 1), (2, 3)), "zeros"),
    "lists": ((9, 9), (3, 3), {"padding": [[0, 1], 2]}, ((0, 1), (2, 2)), "zeros"),
    "an array of pairs": ((9, 9), (3, 3), {"padding": np.array([[0, 1], [2, 3]])}, ((0, 1), (2, 3)), "zeros"),
    "negative": ((9,), (3,), {"padding": ((-2, 1),)}, ((-2, 1),), "zeros"),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_becomes_low_and_high_of_each_axis(name):
    spatial, kernel_size, options, padding, mode = PADDINGS[name]
    geometry = Geometry.of_windows((*spatial, 1), kernel_size, **options)
    assert (geometry.padding, geometry.padding_mode) == (padding, mode)


def test_none_means_one():
    options = {"strides": None, "kernel_dilation": None, "input_dilation": None}
    assert Geometry.of((4, 4, 1), (3, 3, 1, 1), **options) == Geometry.of((4, 4, 1), (3, 3, 1, 1))


def test_two_ways_to_write_a_geometry_are_equal_and_have_one_hash():
    one = Geometry.of([2, 8, 8, 3], [3, 3, 1, 6], strides=1, padding="SAME")
    other = Geometry.of((2, 8, 8, 3), (3, 3, 1, 6), strides=np.array([1, 1]), padding=[(1, 1), 1])
    one.sources  # noqa: B018  what is cached is no part of the value
    assert one == other and hash(one) == hash(other)
    assert one != Geometry.of((2, 8, 8, 3), (3, 3, 1, 6), strides=2, padding=1)
    assert one != Geometry.of((2, 8, 8, 3), (3, 3, 1, 6), padding="CIRCULAR")


def test_a_geometry_is_static_under_jit():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def zeros(geometry):
        traces.append(geometry)
        return jnp.zeros(geometry.output_shape)

    for padding in ("SAME", 1, ((1, 1), (1, 1))):
        assert zeros(Geometry.of((5, 4, 2), (3, 3, 1, 2), padding=padding)).shape == (5, 4, 2)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "spatial, options",
    [
        ((0,), {"padding": "VALID"}),
        ((0,), {"padding": "SAME"}),
        ((2,), {"padding": "VALID"}),
        ((5,), {"padding": -3}),
        ((5,), {"padding": "VALID", "kernel_dilation": 4}),
        ((0,), {"padding": 1, "input_dilation": 3}),
    ],
)
def test_where_no_window_fits_there_are_no_outputs(spatial, options):
    geometry = Geometry.of_windows((*spatial, 2), (3,), **options)
    assert geometry.output_spatial == (0,)
    assert geometry.valid_taps().shape == (0, 3)
    assert geometry.sources[0].shape == (0, 3)


def test_an_empty_input_that_is_padded_enough_has_outputs_that_read_only_padding():
    geometry = Geometry.of_windows((0, 2), (3,), padding=2)
    assert geometry.output_spatial == (2,)
    assert not geometry.valid_taps().any()


def test_cropping_beyond_the_input_and_padding_it_again_reads_only_padding():
    geometry = Geometry.of_windows((3, 1), (1,), padding=((-5, 10),))
    assert geometry.output_spatial == (8,)
    assert not geometry.valid_taps().any()


def test_strides_and_dilations_far_beyond_the_input_cost_nothing():
    geometry = Geometry.of_windows((5, 1), (1,), strides=2**40, kernel_dilation=2**40)
    assert geometry.output_spatial == (1,)
    assert geometry.sources[0].tolist() == [[0]]


def of(x=(2, 9, 9, 4), kernel=(3, 3, 1, 8), bias=None, **options):
    return Geometry.of(x, kernel, bias, **options)


WORDS_LISTED = "SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL"

BAD = {
    "rank of the kernel": (
        {"kernel": (3, 3, 3, 3, 1, 8)},
        ValueError,
        "`kernel` has shape (3, 3, 3, 3, 1, 8), expected (*kernel_size, 1, features) with 1 to 3 spatial axes",
    ),
    "no spatial axis": (
        {"kernel": (1, 8)},
        ValueError,
        "`kernel` has shape (1, 8), expected (*kernel_size, 1, features) with 1 to 3 spatial axes",
    ),
    "rank of x": (
        {"x": (9, 4)},
        ValueError,
        "`x` has shape (9, 4), expected (*batch, *spatial, channels) with 2 spatial axes for a kernel of size (3, 3)",
    ),
    "no channels": (
        {"x": (9, 9, 0)},
        ValueError,
        "`x` has shape (9, 9, 0), expected at least one channel on the last axis",
    ),
    "channels a group": (
        {"kernel": (3, 3, 4, 8)},
        ValueError,
        "`kernel` has shape (3, 3, 4, 8), expected (3, 3, 1, 8): a depthwise kernel has one input channel per group",
    ),
    "features": (
        {"kernel": (3, 3, 1, 6)},
        ValueError,
        "`kernel` has 6 output channels, expected a positive multiple of the 4 channels of `x` (shape (2, 9, 9, 4))",
    ),
    "no features": (
        {"kernel": (3, 3, 1, 0)},
        ValueError,
        "`kernel` has 0 output channels, expected a positive multiple of the 4 channels of `x` (shape (2, 9, 9, 4))",
    ),
    "a kernel without taps": (
        {"kernel": (3, 0, 1, 8)},
        ValueError,
        "`kernel_size` is (3, 0), expected 1 to 3 positive integers",
    ),
    "bias": (
        {"bias": (4,)},
        ValueError,
        "`bias` has shape (4,), expected (8,): one value per output channel",
    ),
    "rank of the bias": (
        {"bias": (1, 8)},
        ValueError,
        "`bias` has shape (1, 8), expected (8,): one value per output channel",
    ),
    "zero stride": (
        {"strides": 0},
        ValueError,
        "`strides` is 0, expected a positive int or 2 of them, one per spatial axis",
    ),
    "strides of another rank": (
        {"strides": (1, 1, 1)},
        ValueError,
        "`strides` is (1, 1, 1), expected a positive int or 2 of them, one per spatial axis",
    ),
    "no strides": (
        {"strides": ()},
        ValueError,
        "`strides` is (), expected a positive int or 2 of them, one per spatial axis",
    ),
    "negative kernel dilation": (
        {"kernel_dilation": (1, -2)},
        ValueError,
        "`kernel_dilation` is (1, -2), expected a positive int or 2 of them, one per spatial axis",
    ),
    "zero input dilation": (
        {"input_dilation": 0},
        ValueError,
        "`input_dilation` is 0, expected a positive int or 2 of them, one per spatial axis",
    ),
    "float stride": ({"strides": 2.0}, TypeError, "`strides` is 2.0, expected integers"),
    "bool stride": ({"strides": (True, 1)}, TypeError, "`strides` is (True, 1), expected integers"),
    "text stride": ({"strides": "2"}, TypeError, "`strides` is '2', expected integers"),
    "nested strides": ({"strides": ((1, 1), (1, 1))}, TypeError, "`strides` is ((1, 1), (1, 1)), expected integers"),
    "unknown padding": (
        {"padding": "same"},
        ValueError,
        f"`padding` is 'same', expected one of {WORDS_LISTED}, an int, or one int or (low, high) per axis",
    ),
    "a word and input dilation": (
        {"padding": "CIRCULAR", "input_dilation": (1, 2)},
        ValueError,
        "`padding` is 'CIRCULAR' with `input_dilation` (1, 2), expected explicit (low, high) pairs: "
        "a word does not say what to pad when the input is dilated (lax refuses it too)",
    ),
    "CAUSAL images": (
        {"padding": "CAUSAL"},
        ValueError,
        "`padding` is 'CAUSAL' with 2 spatial axes, expected 1",
    ),
    "nothing to reflect": (
        {"x": (2, 0, 9, 4), "padding": "REFLECT"},
        ValueError,
        "`padding` is 'REFLECT' with spatial sizes (0, 9), expected at least 1 on each axis",
    ),
    "one pair for two axes": (
        {"padding": ((1, 1),)},
        ValueError,
        f"`padding` is ((1, 1),), expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
    "a triple": (
        {"padding": ((1, 1), (1, 1, 1))},
        ValueError,
        f"`padding` is ((1, 1), (1, 1, 1)), expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
    "no padding": (
        {"padding": None},
        TypeError,
        f"`padding` is None, expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
    "float padding": (
        {"padding": (1, 1.5)},
        TypeError,
        f"`padding` is (1, 1.5), expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
    "bool padding": (
        {"padding": True},
        TypeError,
        f"`padding` is True, expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
    "words an axis": (
        {"padding": ("SAME", "VALID")},
        TypeError,
        f"`padding` is ('SAME', 'VALID'), expected an int, 2 ints or 2 (low, high) pairs, or one of {WORDS_LISTED}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named(name):
    changes, error, message = BAD[name]
    with pytest.raises(error) as caught:
        of(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value, smallest, error, message",
    [
        (
            3,
            1,
            TypeError,
            "`size` is 3, expected a tuple with one int per spatial axis, such as (3,) for 1-D or (3, 3) for images",
        ),
        ((3, 0), 1, ValueError, "`size` is (3, 0), expected 1 to 3 positive integers"),
        ((3, -1), 0, ValueError, "`size` is (3, -1), expected 1 to 3 non-negative integers"),
        ((), 1, ValueError, "`size` is (), expected 1 to 3 positive integers"),
        ((1, 1, 1, 1), 1, ValueError, "`size` is (1, 1, 1, 1), expected 1 to 3 positive integers"),
        ((3.0,), 1, TypeError, "`size` is (3.0,), expected integers"),
        ("33", 1, TypeError, "`size` is '33', expected integers"),
        (None, 1, TypeError, "`size` is None, expected integers"),
    ],
)
def test_a_size_is_a_tuple_of_one_to_three_ints(value, smallest, error, message):
    with pytest.raises(error) as caught:
        spatial_tuple("size", value, smallest)
    assert str(caught.value) == message


def test_a_size_may_be_zero_where_it_is_said_so():
    assert spatial_tuple("size", [np.int32(0), 4], smallest=0) == (0, 4)


@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect"])
def test_padding_far_beyond_the_input_costs_what_is_read_of_it(padding):
    geometry = Geometry.of_windows((5, 1), (2,), strides=2**40, padding=((2**40, 2**40),))
    geometry = dataclasses.replace(geometry, padding_mode=padding)
    far = {"zeros": ([-1, -1], [-1, -1]), "circular": ([4, 0], [1, 2]), "reflect": ([0, 1], [0, 1])}
    read = {name: [before, [0, 1], after] for name, (before, after) in far.items()}
    assert geometry.sources[0].tolist() == read[padding]
