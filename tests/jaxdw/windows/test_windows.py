"""unfold, fold, contract and map_windows: copies to the bit, adjoints to the integer, bounded memory."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from jax import lax

import jaxdw
from jaxdw.geometry import Geometry
from jaxdw.windows import extraction, mapping
from tests import oracle
from tests.strategies import problems

COPIED = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)


def any_bits(rng, shape, dtype):
    """Random bits. Of floats, a quarter each: anything; inf or NaN of any payload; subnormal; plain inf, 0 or -0."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    part = np.empty(0, dtype).real.dtype
    bits = np.dtype(f"u{part.itemsize}")
    raw = np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), bits)
    if part.kind not in "iu":
        exponent = np.array(np.inf, part).view(bits)
        sign = np.array(-0.0, part).view(bits)
        full, empty = raw | exponent, raw & ~exponent
        plain = np.where(rng.integers(0, 2, raw.shape), full, empty) & (sign | exponent)
        raw = np.choose(rng.integers(0, 4, raw.shape), [raw, full, empty, plain])
    return raw.view(dtype).reshape(shape)


def small_integers(rng, shape, dtype=np.float32):
    return rng.integers(-8, 9, shape).astype(dtype)


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        different = np.frombuffer(a.tobytes(), np.uint8) != np.frombuffer(b.tobytes(), np.uint8)
        assert not different.any(), f"{different.sum()} of {different.size} bytes differ"


def assert_within(actual, expected, bound):
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    outside = ~(abs(actual - expected) <= bound)
    assert not outside.any(), (actual[outside][0], expected[outside][0], np.broadcast_to(bound, outside.shape)[outside])


def kernel_size_of(problem):
    return problem.kernel_shape[: problem.rank]


def loop_windows(problem, x):
    return oracle.windows(x, kernel_size_of(problem), **problem.options)


# unfold


def test_unfold_copies_every_bit_of_every_dtype(x64, full):
    @hypothesis.settings(max_examples=500 if full else 12)
    @given(problems(), st.sampled_from(COPIED))
    def check(problem, name):
        dtype = jnp.dtype(name)
        x = any_bits(np.random.default_rng(problem.seed), problem.x_shape, dtype)
        if name == "bfloat16":  # XLA:CPU keeps such a NaN but not its payload
            with np.errstate(invalid="ignore"):  # that of asking a signalling NaN
                x[np.isnan(x)] = np.nan
        assert_same_bits(jaxdw.unfold(x, kernel_size_of(problem), **problem.options), loop_windows(problem, x))

    check()


def test_patches_copy_ordinary_numbers_on_cpu(full):
    @hypothesis.settings(max_examples=500 if full else 5)
    @given(problems(), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    def check(problem, dtype):
        x, _, _ = problem.arrays(dtype)
        actual = jaxdw.unfold(x, kernel_size_of(problem), method="patches", **problem.options)
        assert_same_bits(actual, loop_windows(problem, x))

    check()


@pytest.mark.parametrize("value, instead", [(np.inf, np.inf), (-np.inf, -np.inf), (np.nan, np.nan)])
def test_patches_spread_one_nonfinite_number_over_its_windows(value, instead):
    x = np.zeros((7, 1), np.float32)
    x[3] = value
    slices, patches = (np.asarray(jaxdw.unfold(x, (3,), method=method))[..., 0] for method in extraction.UNFOLD_METHODS)
    reads = np.array([[position + tap - 1 == 3 for tap in range(3)] for position in range(7)])
    np.testing.assert_array_equal(slices, np.where(reads, value, 0))
    poisoned = reads.any(axis=1, keepdims=True)
    np.testing.assert_array_equal(patches, np.where(reads, instead, np.where(poisoned, np.nan, 0)))


def test_patches_flush_subnormals_on_cpu():
    x = np.full((4, 2), 2.0**-140, np.float32)
    slices, patches = (
        np.asarray(jaxdw.unfold(x, (2,), padding="VALID", method=method)) for method in extraction.UNFOLD_METHODS
    )
    assert (slices == np.float32(2.0**-140)).all()
    assert (patches == 0).all()


def test_a_negative_zero_is_copied_by_slices_and_lost_by_patches():
    x = np.full((4, 1), -0.0, np.float32)
    assert np.signbit(jaxdw.unfold(x, (2,), padding="VALID")).all()
    assert not np.signbit(jaxdw.unfold(x, (2,), padding="VALID", method="patches")).all()


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT", ((-1, 2), (3, -1))])
def test_the_gradient_of_unfold_is_fold_whatever_x_holds(padding, seed):
    """Linear: so neither an infinity nor a NaN in x may reach its gradient, nor the tangent of its neighbours."""
    rng = np.random.default_rng(seed)
    x = any_bits(rng, (2, 5, 4, 2), np.float32)

    def unfold(x):
        return jaxdw.unfold(x, (3, 2), padding=padding, strides=(1, 2))

    taken, pullback = jax.vjp(unfold, x)
    weights = small_integers(rng, taken.shape)
    (gradient,) = pullback(weights)
    np.testing.assert_array_equal(gradient, jaxdw.fold(weights, (5, 4), padding=padding, strides=(1, 2)))
    tangent = any_bits(rng, x.shape, np.float32)
    assert_same_bits(jax.jvp(unfold, (x,), (tangent,))[1], unfold(tangent))


# fold


def test_fold_is_the_adjoint_of_unfold(full):
    """<unfold(x), w> = <x, fold(w)>, exactly, on integers whose sums stay below 2^24."""

    @hypothesis.settings(max_examples=500 if full else 5)
    @given(problems(), st.sampled_from([np.float32, np.int32, np.complex64]))
    def check(problem, dtype):
        rng = np.random.default_rng(problem.seed)
        x = small_integers(rng, problem.x_shape, dtype)
        taken = loop_windows(problem, x)
        w = small_integers(rng, taken.shape, dtype)
        rank = problem.rank
        folded = np.asarray(jaxdw.fold(w, problem.x_shape[-rank - 1 : -1], **problem.options))
        assert (folded.shape, folded.dtype) == (x.shape, x.dtype)
        assert (taken.astype(np.complex128) * w).sum() == (x.astype(np.complex128) * folded).sum()
        # the same for every x at once: which windows reach each position
        numbers = np.arange(1, math.prod(x.shape) + 1).reshape(x.shape)
        source = loop_windows(problem, numbers).ravel()
        expected = np.zeros(1 + x.size, dtype)
        np.add.at(expected, source, w.ravel())
        np.testing.assert_array_equal(folded, expected[1:].reshape(x.shape))

    check()


@st.composite
def torch_folds(draw):
    """Arguments that torch's fold accepts: 2-D, symmetric padding that is not negative, at least one window."""
    two = st.tuples
    kernel_size = draw(two(st.integers(1, 5), st.integers(1, 5)))
    options = {
        "strides": draw(two(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(two(st.integers(0, 3), st.integers(0, 3))),
        "kernel_dilation": draw(two(st.integers(1, 2), st.integers(1, 2))),
    }
    geometry = Geometry.of_windows(
        (draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.integers(1, 4))),
        kernel_size,
        **options,
    )
    hypothesis.assume(0 not in geometry.output_spatial)
    return geometry, options, draw(st.integers(0, 2**32 - 1))


def test_fold_has_the_bits_of_torch(full):
    """Random normal numbers, among them 0, -0 and infinities; every sum in the same order from +0."""
    torch = pytest.importorskip("torch")

    @hypothesis.settings(max_examples=500 if full else 6)
    @given(torch_folds())
    def check(drawn):
        geometry, options, seed = drawn
        rng = np.random.default_rng(seed)
        w = rng.standard_normal(geometry.windows_shape).astype(np.float32)
        w[rng.random(w.shape) < 0.2] = -0.0
        w[rng.random(w.shape) < 0.02] = np.inf
        columns = torch.from_numpy(w).permute(0, 5, 3, 4, 1, 2).reshape(w.shape[0], w.shape[5] * geometry.taps, -1)
        expected = torch.nn.functional.fold(
            columns,
            geometry.spatial,
            geometry.kernel_size,
            stride=geometry.strides,
            padding=options["padding"],
            dilation=geometry.kernel_dilation,
        )
        assert_same_bits(jaxdw.fold(w, geometry.spatial, **options), expected.permute(0, 2, 3, 1).numpy())

    check()


def test_an_infinity_in_one_window_folds_to_its_own_source_alone():
    w = np.ones((5, 3, 1), np.float32)
    w[2, 0] = np.inf
    assert np.asarray(jaxdw.fold(w, (5,)))[:, 0].tolist() == [2, np.inf, 3, 3, 2]


@pytest.mark.parametrize(
    "shape, spatial, options",
    [
        ((0, 4, 3, 2), (4,), {}),
        ((2, 0, 3, 2), (2,), {"padding": "VALID"}),
        ((2, 0, 3, 2), (5,), {"padding": -4}),
        ((2, 2, 3, 2), (0,), {"padding": 2}),
        ((8, 1, 1), (3,), {"padding": ((-5, 10),)}),
    ],
)
def test_fold_of_no_windows_or_onto_nothing_is_zero(shape, spatial, options):
    folded = jaxdw.fold(np.ones(shape, np.float32), spatial, **options)
    assert folded.shape == (*shape[:-3], *spatial, shape[-1])
    assert (folded == 0).all()


# contract


def test_unfold_then_contract_is_the_convolution_within_its_bound(x64, full):
    @hypothesis.settings(max_examples=500 if full else 5)
    @given(problems(), st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16]))
    def check(problem, dtype):
        x, kernel, bias = problem.arrays(dtype)
        expected = oracle.depthwise(x, kernel, bias, **problem.options)
        actual = jaxdw.contract(loop_windows(problem, x), kernel, bias)
        assert actual.dtype == dtype
        assert_within(actual, expected.y, expected.bound(dtype))

    check()


def test_contract_and_depthwise_conv_differ_by_rounding_alone(seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 9, 8, 3)), rng.standard_normal((3, 5, 1, 6))
    bias = rng.standard_normal(6)
    x, kernel, bias = (a.astype(np.float32) for a in (x, kernel, bias))
    options = {"strides": 2, "padding": "REFLECT"}
    contracted = jaxdw.contract(jaxdw.unfold(x, (3, 5), **options), kernel, bias)
    expected = oracle.depthwise(x, kernel, bias, **options)
    whole = jaxdw.depthwise_conv(x, kernel, bias, **options)
    assert_within(contracted, np.asarray(whole, np.float64), 2 * expected.bound(np.float32))


def test_contract_sums_and_returns_in_the_preferred_element_type():
    w = np.array([[[1.0], [2.0**-10], [-1.0]]], ml_dtypes.bfloat16)
    kernel = np.ones((3, 1, 1), ml_dtypes.bfloat16)
    y = jaxdw.contract(w, kernel, preferred_element_type=jnp.float32, precision="highest")
    assert y.dtype == jnp.float32 and y.item() == 2.0**-10


def test_contract_of_no_windows_is_empty():
    assert jaxdw.contract(np.zeros((2, 0, 3, 4), np.float32), np.zeros((3, 1, 8), np.float32)).shape == (2, 0, 8)


# map_windows

SELECTIONS = {
    "max": lambda w: w.max(axis=-2),
    "sort": lambda w: jnp.sort(w, axis=-2),
    "top-k": lambda w: lax.top_k(jnp.swapaxes(w, -1, -2), 1),
    "one tap": lambda w: w[..., -1, :],
    "which tap": lambda w: w.argmax(axis=-2),
    "to half": lambda w: {"half": w.astype(jnp.float16), "whole": w},
}
ROWS = (1, 2, 3, 100, None)


def test_map_windows_selects_the_bits_that_fn_selects_from_all_windows(full):
    @hypothesis.settings(max_examples=500 if full else 5)
    @given(problems(), st.sampled_from(sorted(SELECTIONS)), st.sampled_from(ROWS))
    def check(problem, name, rows):
        x, _, _ = problem.arrays(np.float32)
        actual = jaxdw.map_windows(SELECTIONS[name], x, kernel_size_of(problem), rows_per_step=rows, **problem.options)
        assert_same_bits(actual, SELECTIONS[name](jnp.asarray(loop_windows(problem, x))))

    check()


def test_map_windows_passes_every_bit(seed):
    x = any_bits(np.random.default_rng(seed), (2, 11, 3, 2), np.float32)
    mapped = jaxdw.map_windows(lambda w: w, x, (3, 2), strides=(2, 1), rows_per_step=2)
    assert_same_bits(mapped, oracle.windows(x, (3, 2), strides=(2, 1)))


def test_both_derivatives_of_map_windows_are_those_of_fn_of_all_windows(full):
    """A product of taps on small integers: every value is exact, so the order of summation cannot show."""

    def fn(w):
        return (w * jnp.cumsum(w, axis=-2)).sum(axis=-2)

    @hypothesis.settings(max_examples=200 if full else 4)
    @given(problems(max_rank=2), st.sampled_from(ROWS[:3]))
    def check(problem, rows):
        rng = np.random.default_rng(problem.seed)
        x, dx = (small_integers(rng, problem.x_shape) for _ in range(2))

        @jax.jit
        def derivatives(x, dx, dy):
            def mapped(x):
                return jaxdw.map_windows(fn, x, kernel_size_of(problem), rows_per_step=rows, **problem.options)

            def whole(x):
                return fn(jaxdw.unfold(x, kernel_size_of(problem), **problem.options))

            return [(jax.jvp(f, (x,), (dx,)), jax.vjp(f, x)[1](dy)) for f in (mapped, whole)]

        y = fn(jnp.asarray(loop_windows(problem, x)))
        for a, b in zip(*map(jax.tree.leaves, derivatives(x, dx, small_integers(rng, y.shape)))):
            np.testing.assert_array_equal(a, b)

    check()


def test_windows_run_under_jit_vmap_scan_checkpoint_and_second_derivatives(seed):
    x = small_integers(np.random.default_rng(seed), (3, 7, 5, 2))

    def layer(x):
        squares = jaxdw.map_windows(lambda w: (w * w).sum((-3, -2)), x, (3, 2), padding="REFLECT", rows_per_step=2)
        return jaxdw.fold(jaxdw.unfold(squares, (2, 1), padding="CIRCULAR"), (7, 5), padding="CIRCULAR")

    @jax.jit
    def every_way(x):
        one, along = jax.jvp(jax.vmap(layer), (x,), (x,))
        _, twice = jax.jvp(lambda x: jax.jvp(layer, (x,), (x,))[1], (x,), (x,))
        scanned, _ = lax.scan(lambda carry, _: (jax.checkpoint(layer)(carry) % 8, None), x, length=2)
        return one, along, twice, scanned, (jax.grad(lambda x: layer(x).sum())(x) * x).sum()

    def loop(x):
        squares = (oracle.windows(x, (3, 2), padding="REFLECT") ** 2).sum((-3, -2))
        return 2 * squares  # every position lies in both taps of the periodic windows

    y = loop(x)
    # a quadratic form: its derivative along x is twice itself, and so again
    expected = (y, 2 * y, 4 * y, loop(y % 8) % 8, 2 * y.sum())
    for a, b in zip(every_way(x), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_map_windows_holds_the_windows_of_one_step_forward_and_backward():
    """Windows of one step and copies of the input and the output, where all windows are 25 times the input."""
    shape, kernel_size = (4, 128, 128, 32), (5, 5)
    geometry = Geometry.of_windows(shape, kernel_size)
    whole, padded, every_window = (
        4 * math.prod(size)
        for size in (shape, (*geometry.batch, *geometry.padded_spatial, geometry.channels), geometry.windows_shape)
    )
    step = mapping.STEP_BYTES

    def energy(x):
        return jaxdw.map_windows(lambda w: (w * w).sum((-3, -2)), x, kernel_size)

    def temporary(function):
        compiled = jax.jit(function).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # the padded input; the results as the steps give them and with their axes in order; a step's slices and their stack
    forward = padded + 2 * whole + 2 * step
    # besides: the gradient of the padded input as it is summed, a step's addend to it, the gradient of a step's windows
    backward = forward + 2 * padded + step
    assert temporary(energy) <= forward < every_window / 4
    assert temporary(jax.grad(lambda x: energy(x).sum())) <= backward < every_window / 2


@pytest.mark.parametrize(
    "shape, kernel_size, options",
    [
        ((0, 5, 4, 2), (3, 3), {}),
        ((5, 1, 2), (1, 3), {"padding": "VALID"}),
        ((1, 5, 2), (3, 1), {"padding": "VALID"}),
        ((5, 4, 2), (1, 3), {"padding": ((0, 0), (-5, -5))}),
        ((3, 0, 4, 2), (3, 3), {"padding": 2}),
        ((0, 4, 2), (1, 1), {"strides": 3}),
    ],
)
def test_an_empty_axis_gives_empty_windows_whatever_the_step(shape, kernel_size, options):
    x = np.ones(shape, np.float32)
    expected = oracle.windows(x, kernel_size, **options)
    assert_same_bits(jaxdw.unfold(x, kernel_size, **options), expected)
    assert_same_bits(jaxdw.map_windows(lambda w: w, x, kernel_size, rows_per_step=1, **options), expected)


def test_strides_and_dilations_far_beyond_the_input_take_the_first_window():
    x = np.arange(20, dtype=np.float32).reshape(5, 4, 1)
    options = {"strides": 2**40, "padding": "VALID"}
    taken = jaxdw.unfold(x, (2, 2), **options)
    assert taken.ravel().tolist() == [0, 1, 4, 5]
    assert jaxdw.fold(taken, (5, 4), **options).sum() == 10
    assert jaxdw.unfold(x, (1, 1), kernel_dilation=2**40).shape == (5, 4, 1, 1, 1)


# dtypes and strict settings


def test_without_x64_a_float64_array_is_float32_as_everywhere_in_jax():
    x = np.full((4, 1), 0.1)
    assert jaxdw.unfold(x, (2,)).dtype == jnp.float32
    assert jaxdw.fold(np.full((4, 2, 1), 0.1), (4,)).dtype == jnp.float32


def test_with_x64_a_float64_array_stays_float64(x64):
    x = np.full((4, 1), 0.1)
    assert (jaxdw.unfold(x, (2,), padding="VALID") == np.float64(0.1)).all()
    assert jaxdw.fold(jaxdw.unfold(x, (2,)), (4,))[1, 0] == np.float64(0.1) + np.float64(0.1)
    assert jaxdw.map_windows(lambda w: w, x, (2,), rows_per_step=3).dtype == jnp.float64


def test_windows_promote_no_dtype_and_no_rank_by_accident():
    def every_function(x, kernel, bias):
        for padding in ("SAME", "CIRCULAR", "REFLECT"):
            taken = jaxdw.unfold(x, (3, 3), padding=padding)
            x = x + jaxdw.fold(taken, (7, 5), padding=padding)
            y = jaxdw.contract(taken, kernel, bias)
            x = x + jaxdw.map_windows(lambda w: w.max((-3, -2)), x, (3, 3), padding=padding, rows_per_step=2)
        return (y * y).sum() + x.sum()

    shapes = ((2, 7, 5, 2), (3, 3, 1, 4), (4,))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        gradients = jax.eval_shape(
            jax.grad(every_function, (0, 1, 2)), *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        )
    assert tuple(gradient.shape for gradient in gradients) == shapes


# messages

X, W = np.ones((2, 5, 5, 4), np.float32), np.ones((2, 5, 5, 3, 3, 4), np.float32)
K, B = np.ones((3, 3, 1, 8), np.float32), np.ones(8, np.float32)

BAD = {
    "unfold takes arrays": (
        lambda: jaxdw.unfold([[1.0]], (1,)),
        TypeError,
        "`x` is a list, expected a JAX or NumPy array of numbers",
    ),
    "unfold takes numbers": (
        lambda: jaxdw.unfold(np.array([["a"]]), (1,)),
        TypeError,
        "`x` has dtype <U1, expected a JAX or NumPy array of numbers",
    ),
    "unfold takes this machine's byte order": (
        lambda: jaxdw.unfold(X.astype(">f4"), (1, 1)),
        TypeError,
        "`x` has dtype >f4, expected a JAX or NumPy array of numbers",
    ),
    "unfold takes no random keys": (
        lambda: jaxdw.unfold(jax.random.split(jax.random.key(0), (4, 1)), (3,)),
        TypeError,
        "`x` has dtype key<fry>, expected a JAX or NumPy array of numbers",
    ),
    "an integer kernel size": (
        lambda: jaxdw.unfold(X, 3),
        TypeError,
        "`kernel_size` is 3, expected a tuple with one int per spatial axis, such as (3,) for 1-D or (3, 3) for images",
    ),
    "unfold's rank": (
        lambda: jaxdw.unfold(X[0, 0], (3, 3)),
        ValueError,
        "`x` has shape (5, 4), expected (*batch, *spatial, channels) with 2 spatial axes for a kernel of size (3, 3)",
    ),
    "unfold's method": (
        lambda: jaxdw.unfold(X, (3, 3), method="gather"),
        ValueError,
        "`method` is 'gather', expected one of slices, patches",
    ),
    "patches of integers": (
        lambda: jaxdw.unfold(X.astype(np.int32), (3, 3), method="patches"),
        TypeError,
        "`x` has dtype int32, expected one of float16, bfloat16, float32, float64",
    ),
    "fold takes numbers": (
        lambda: jaxdw.fold(None, (5, 5)),
        TypeError,
        "`windows` is a NoneType, expected a JAX or NumPy array of numbers",
    ),
    "fold of booleans": (
        lambda: jaxdw.fold(W.astype(bool), (5, 5)),
        TypeError,
        "`windows` has dtype bool, expected one that can be added",
    ),
    "an integer spatial": (
        lambda: jaxdw.fold(W, 5),
        TypeError,
        "`spatial` is 5, expected a tuple with one int per spatial axis, such as (5,) for 1-D or (5, 5) for images",
    ),
    "a negative spatial": (
        lambda: jaxdw.fold(W, (5, -5)),
        ValueError,
        "`spatial` is (5, -5), expected 1 to 3 non-negative integers",
    ),
    "fold's rank": (
        lambda: jaxdw.fold(W, (5, 5, 5)),
        ValueError,
        "`windows` has shape (2, 5, 5, 3, 3, 4), expected (*batch, *output_spatial, *kernel_size, channels) "
        "for `spatial` (5, 5, 5)",
    ),
    "windows of another geometry": (
        lambda: jaxdw.fold(W, (5, 5), padding="VALID"),
        ValueError,
        "`windows` has shape (2, 5, 5, 3, 3, 4), expected (2, 3, 3, 3, 3, 4) for `spatial` (5, 5): `spatial` is the "
        "spatial size of x, which `unfold` took the windows from, and not the size of its output",
    ),
    "the output's size in place of x's": (
        lambda: jaxdw.fold(jaxdw.unfold(X, (3, 3), strides=2), (3, 3), strides=2),
        ValueError,
        "`windows` has shape (2, 3, 3, 3, 3, 4), expected (2, 2, 2, 3, 3, 4) for `spatial` (3, 3): `spatial` is the "
        "spatial size of x, which `unfold` took the windows from, and not the size of its output",
    ),
    "contract's kernel": (
        lambda: jaxdw.contract(W, np.ones((3, 3, 2, 8), np.float32)),
        ValueError,
        "`kernel` has shape (3, 3, 2, 8), expected (*kernel_size, 1, features)",
    ),
    "contract's kernel size": (
        lambda: jaxdw.contract(W, np.ones((3, 5, 1, 8), np.float32)),
        ValueError,
        "`windows` has shape (2, 5, 5, 3, 3, 4), expected (*batch, *output_spatial, *(3, 5), channels) "
        "for `kernel` of shape (3, 5, 1, 8)",
    ),
    "contract's rank": (
        lambda: jaxdw.contract(W[0, 0], K),
        ValueError,
        "`windows` has shape (5, 3, 3, 4), expected (*batch, *output_spatial, *(3, 3), channels) "
        "for `kernel` of shape (3, 3, 1, 8)",
    ),
    "contract's features": (
        lambda: jaxdw.contract(W, K[..., :6]),
        ValueError,
        "`kernel` has 6 output channels, expected a multiple of the 4 in `windows`",
    ),
    "contract's bias": (
        lambda: jaxdw.contract(W, K, B[:4]),
        ValueError,
        "`bias` has shape (4,), expected (8,)",
    ),
    "contract's dtypes": (
        lambda: jaxdw.contract(W, K.astype(np.float16)),
        TypeError,
        "`windows` has dtype float32, `kernel` has dtype float16; "
        "expected one dtype for all under strict dtype promotion",
    ),
    "contract of integers": (
        lambda: jaxdw.contract(W.astype(np.int32), K),
        TypeError,
        "`windows` has dtype int32, expected one of float16, bfloat16, float32, float64",
    ),
    "rows a step": (
        lambda: jaxdw.map_windows(lambda w: w, X, (3, 3), rows_per_step=0),
        ValueError,
        "`rows_per_step` is 0, expected a positive int or None",
    ),
    "a fraction of a row": (
        lambda: jaxdw.map_windows(lambda w: w, X, (3, 3), rows_per_step=1.5),
        ValueError,
        "`rows_per_step` is 1.5, expected a positive int or None",
    ),
    "fn drops an axis": (
        lambda: jaxdw.map_windows(lambda w: w.sum(0), X, (3, 3)),
        ValueError,
        "`fn` returned shape (5, 5, 3, 3, 4) for windows (2, 5, 5, 3, 3, 4), expected it to begin with (2, 5, 5)",
    ),
    "fn drops an axis of a step": (
        lambda: jaxdw.map_windows(lambda w: (w, w.sum()), X, (3, 3), rows_per_step=2),
        ValueError,
        "`fn` returned shape () for windows (2, 2, 5, 3, 3, 4), expected it to begin with (2, 2, 5)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
