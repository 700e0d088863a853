"""depthwise_conv, every method, against the plain loop."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import jaxdw
from jaxdw.methods import METHODS
from jaxdw.native import is_available
from tests import oracle
from tests.programs import release_programs
from tests.strategies import problems

#: All but "fft", which has a bound of its own: test_fft.py.
SUMS = [method for method in METHODS if method != "fft"]

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def assert_within(actual, expected, bound):
    actual, expected, bound = (np.asarray(a, np.float64) for a in (actual, expected, bound))
    assert actual.shape == expected.shape
    outside = ~(np.abs(actual - expected) <= bound)
    assert not outside.any(), (
        f"{outside.sum()} of {outside.size} beyond the bound, first at {np.argwhere(outside)[0]}: "
        f"{actual[outside][0]!r} against {expected[outside][0]!r}, bound {bound[outside][0]!r}"
    )


def examples(method, count):
    """Fewer of the kernels, which are interpreted here, and have tests of their own."""
    return -(-count // 4) if method == "pallas" else count


@pytest.mark.sampled(6)
@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_method_is_within_its_bound_of_the_loop(method, dtype, x64, full):
    @hypothesis.settings(max_examples=examples(method, 500 if full else 12))
    @given(problems())
    def check(problem):
        release_programs()
        x, kernel, bias = problem.arrays(DTYPES[dtype])
        expected = oracle.depthwise(x, kernel, bias, **problem.options)
        actual = jaxdw.depthwise_conv(x, kernel, bias, method=method, **problem.options)
        assert actual.dtype == DTYPES[dtype]
        assert_within(actual, expected.y, expected.bound(DTYPES[dtype]))

    check()


@pytest.mark.parametrize("method", SUMS)
def test_float16_sums_in_float32_and_rounds_once(method):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 7, 3)).astype(np.float16)
    kernel = rng.standard_normal((3, 3, 1, 6)).astype(np.float16)
    expected = oracle.depthwise(x, kernel)
    assert_within(jaxdw.depthwise_conv(x, kernel, method=method), expected.y, expected.bound(np.float16))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", SUMS)
def test_both_derivative_modes_are_those_of_the_bilinear_sum(method, x64, full):
    """jvp and vjp in float64 against the loop, and float32 against float64 within the float32 bound."""

    @hypothesis.settings(max_examples=examples(method, 500 if full else 5))
    @given(problems())
    def check(problem):
        release_programs()
        x, kernel, bias = problem.arrays()
        dx, dkernel, dbias = problems_tangent(problem)
        y_shape = oracle.depthwise(x, kernel, bias, **problem.options).y.shape
        dy = np.random.default_rng(problem.seed + 2).standard_normal(y_shape)

        def conv(x, kernel, bias):
            return jaxdw.depthwise_conv(x, kernel, bias, method=method, **problem.options)

        # d(x*k) = dx*k + x*dk: each half is a sum the loop can do
        half_a = oracle.depthwise(dx, kernel, dbias, **problem.options)
        half_b = oracle.depthwise(x, dkernel, **problem.options)
        bound = half_a.bound(np.float64) + half_b.bound(np.float64)
        bound = bound + np.finfo(np.float64).eps * (half_a.magnitude + half_b.magnitude)
        _, tangent = jax.jvp(conv, (x, kernel, bias), (dx, dkernel, dbias))
        assert_within(tangent, half_a.y + half_b.y, bound)

        for dtype in (np.float64, np.float32):
            arguments = [None if a is None else a.astype(dtype) for a in (x, kernel, bias)]
            _, pullback = jax.vjp(conv, *arguments)
            for actual, (value, limit) in zip(
                pullback(dy.astype(dtype)), loop_gradients(*arguments, dy.astype(dtype), dtype, problem.options)
            ):
                if value is not None:
                    assert actual.dtype == dtype
                    assert_within(actual, value, limit)

    check()


def problems_tangent(problem):
    import dataclasses

    dx, dkernel, dbias = dataclasses.replace(problem, seed=problem.seed + 1).arrays()
    return dx, dkernel, dbias


def loop_gradients(x, kernel, bias, dy, dtype, options):
    """(value, bound) for dx, dkernel and dbias, by adding up every product the definition names."""
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    kernel_size, features = kernel.shape[:-2], kernel.shape[-1]
    channels = x.shape[-1]
    multiplier = features // channels
    # windows of an array of positions tell where each tap reads: 0 means padding
    numbers = np.arange(1, x.size // channels + 1).reshape(*x.shape[:-1], 1) if x.size else np.zeros((*x.shape[:-1], 1))
    source = oracle.windows(numbers, kernel_size, **options).reshape(-1, int(np.prod(kernel_size)))
    flat_x = np.concatenate([np.zeros((1, channels)), x.reshape(-1, channels)])
    flat_dy, flat_kernel = dy.reshape(-1, features), kernel.reshape(-1, features)
    dx, dx_size = np.zeros_like(flat_x), np.zeros_like(flat_x)
    dkernel, dkernel_size = np.zeros_like(flat_kernel), np.zeros_like(flat_kernel)
    for output in range(len(flat_dy)):
        for tap in range(source.shape[1]):
            at = int(source[output, tap])
            to_x = (flat_dy[output] * flat_kernel[tap]).reshape(channels, multiplier)
            dx[at] += to_x.sum(-1)
            dx_size[at] += np.abs(to_x).sum(-1)
            to_kernel = flat_dy[output] * np.repeat(flat_x[at], multiplier)
            dkernel[tap] += to_kernel
            dkernel_size[tap] += np.abs(to_kernel)
    n = max(1, len(flat_dy))
    results = [
        (dx[1:].reshape(x.shape), dx_size[1:].reshape(x.shape), int(np.prod(kernel_size)) * multiplier),
        (dkernel.reshape(kernel.shape), dkernel_size.reshape(kernel.shape), n),
        (None if bias is None else flat_dy.sum(0), np.abs(flat_dy).sum(0), n),
    ]
    if options["padding"] in ("CIRCULAR", "REFLECT"):  # each input is read from several padded places, added up after
        results[0] = (*results[0][:2], results[0][2] * source.shape[0])
    return [(v, None if v is None else oracle.Expected(v, s, terms).bound(dtype)) for v, s, terms in results]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", SUMS)
def test_every_method_runs_under_jit_vmap_and_second_derivatives(method, x64):
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((3, 6, 5, 2)), rng.standard_normal((3, 3, 1, 4))

    def conv(x, kernel):
        return jaxdw.depthwise_conv(x, kernel, method=method, padding=1)

    expected = oracle.depthwise(x, kernel, padding=1)
    bound = expected.bound(np.float64)
    assert_within(jax.jit(conv)(x, kernel), expected.y, bound)
    assert_within(jax.vmap(conv, (0, None))(x, kernel), expected.y, bound)
    kernels = np.stack([kernel, 2 * kernel])
    assert_within(jax.vmap(conv, (None, 0))(x, kernels)[1], 2 * expected.y, 2 * bound)
    hessian = jax.jacfwd(jax.grad(lambda k: (conv(x, k) ** 2).sum()))(kernel)
    jacobian = jax.jacobian(conv, 1)(x, kernel)
    gauss = 2 * np.einsum("nhwfijac,nhwfklbd->ijacklbd", jacobian, jacobian)
    # sums of 3*6*5 products of entries that are single inputs: exact Jacobian, one float64 sum
    size = 2 * np.einsum("nhwfijac,nhwfklbd->ijacklbd", abs(jacobian), abs(jacobian))
    assert_within(hessian, gauss, 4 * x.size * 2**-53 * size)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("method", SUMS)
@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH, ("highest", "default")])
def test_every_method_takes_every_precision(method, precision):
    x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32)
    assert jaxdw.depthwise_conv(x, kernel, method=method, precision=precision).sum() == 2 * (16 + 24 * 2 + 36)


@pytest.mark.parametrize("method", SUMS)
def test_preferred_element_type_is_what_is_summed_in_and_returned(method, x64):
    x = np.array([1.0, 2.0**-24, -1.0], np.float32).reshape(3, 1)
    kernel = np.ones((3, 1, 1), np.float32)
    wide = jaxdw.depthwise_conv(x, kernel, padding="VALID", method=method, preferred_element_type=jnp.float64)
    assert wide.dtype == jnp.float64 and wide.item() == 2.0**-24
    narrow = jaxdw.depthwise_conv(
        x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), method=method, preferred_element_type=jnp.float32
    )
    assert narrow.dtype == jnp.float32


@pytest.mark.parametrize("method", SUMS)
def test_infinities_and_nan_reach_the_outputs_that_read_them(method):
    x = np.zeros((7, 1), np.float32)
    x[3] = np.inf
    y = np.asarray(jaxdw.depthwise_conv(x, np.ones((3, 1, 1), np.float32), method=method))[:, 0]
    if method == "patches":  # the one-hot extraction multiplies the infinity by zero
        assert np.isnan(y[2:5]).all()
    else:
        assert np.isinf(y[2:5]).all()
    assert (y[[0, 1, 5, 6]] == 0).all()


def test_a_narrow_multiplier_keeps_the_channel_order_c_times_m_plus_m():
    x = np.array([[1.0, 10.0]], np.float32)
    kernel = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 4)
    assert jaxdw.depthwise_conv(x, kernel).tolist() == [[1.0, 2.0, 30.0, 40.0]]


def test_mixed_dtypes_promote_as_jax_does():
    with jax.numpy_dtype_promotion("standard"):
        y = jaxdw.depthwise_conv(np.ones((4, 1), np.float32), np.ones((3, 1, 1), jnp.bfloat16))
    assert y.dtype == jnp.float32


X, K = np.zeros((2, 5, 5, 4), np.float32), np.zeros((3, 3, 1, 8), np.float32)

BAD = {
    "rank of x": (dict(x=X[0, 0]), ValueError, "`x` has shape (5, 4), expected (*batch, *spatial, channels) with 2"),
    "rank of kernel": (dict(kernel=K[0, 0]), ValueError, "`kernel` has shape (1, 8), expected (*kernel_size, 1,"),
    "channels": (
        dict(x=X[..., :3]),
        ValueError,
        "`kernel` has 8 output channels, expected a positive multiple of the 3",
    ),
    "no channels": (dict(x=X[..., :0]), ValueError, "`x` has shape (2, 5, 5, 0), expected at least one channel"),
    "input channels a group": (
        dict(kernel=np.zeros((3, 3, 2, 8), np.float32)),
        ValueError,
        "`kernel` has shape (3, 3, 2, 8), expected (3, 3, 1, 8): a depthwise kernel has one input channel per group",
    ),
    "bias": (dict(bias=np.zeros(4, np.float32)), ValueError, "`bias` has shape (4,), expected (8,)"),
    "zero stride": (dict(strides=0), ValueError, "`strides` is 0, expected a positive int or 2"),
    "negative dilation": (dict(kernel_dilation=(1, -1)), ValueError, "`kernel_dilation` is (1, -1), expected a posit"),
    "input dilation": (
        dict(input_dilation=(1, 2, 3)),
        ValueError,
        "`input_dilation` is (1, 2, 3), expected a positive",
    ),
    "float stride": (dict(strides=1.5), TypeError, "`strides` is 1.5, expected integers"),
    "bool stride": (dict(strides=True), TypeError, "`strides` is True, expected integers"),
    "unknown padding": (dict(padding="same"), ValueError, "`padding` is 'same', expected one of SAME, SAME_LOWER"),
    "padding of another rank": (dict(padding=((1, 1),)), ValueError, "`padding` is ((1, 1),), expected an int, 2"),
    "padding type": (dict(padding=1.0), TypeError, "`padding` is 1.0, expected an int, 2 ints"),
    "causal images": (dict(padding="CAUSAL"), ValueError, "`padding` is 'CAUSAL' with 2 spatial axes, expected 1"),
    "words and input dilation": (
        dict(input_dilation=2),
        ValueError,
        "`padding` is 'SAME' with `input_dilation` (2, 2)",
    ),
    "unknown method": (
        dict(method="fast"),
        ValueError,
        "`method` is 'fast', expected one of auto, taps, rows, pallas, fft, patches, grouped",
    ),
    "unknown precision": (dict(precision="most"), ValueError, "`precision` is 'most', expected None"),
    "narrower result": (
        dict(preferred_element_type=jnp.bfloat16),
        TypeError,
        "`preferred_element_type` is bfloat16, expected a floating dtype no narrower than float32",
    ),
    "list": (dict(x=[1.0]), TypeError, "`x` is a list, expected a JAX or NumPy array"),
    "objects": (dict(kernel=np.array([None])), TypeError, "`kernel` is a numpy.ndarray of objects, expected"),
    "integers": (dict(x=X.astype(np.int32)), TypeError, "`x` has dtype int32, expected one of float16, bfloat16"),
    "complex": (dict(kernel=K.astype(np.complex64)), TypeError, "`kernel` has dtype complex64, expected one of"),
    "mixed dtypes": (dict(x=X.astype(np.float16)), TypeError, "`x` has dtype float16, `kernel` has dtype float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, message = BAD[name]
    with pytest.raises(error) as caught:
        jaxdw.depthwise_conv(**{"x": X, "kernel": K, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", ["VALID", -2, ((0, 0), (-5, 0))])
def test_a_window_larger_than_the_input_gives_an_empty_output(method, padding):
    y, pullback = jax.vjp(
        lambda x, k: jaxdw.depthwise_conv(x, k, padding=padding, method=method), X[:, :2], K.astype(np.float32)
    )
    assert y.size == 0
    assert all((gradient == 0).all() for gradient in pullback(y))


@pytest.mark.parametrize("method", ["grouped", "patches"])
def test_padding_beyond_the_kernel_and_negative_padding_are_exact_on_integers(method, seed, full):
    """For these jaxlib 0.8 to 0.10 have wrong convolutions, wrong gradients, and ends of the process."""
    rng = np.random.default_rng(seed)
    shapes = [((1, 5, 1, 17), (2, 1), ((0, 0), (1, 1)), 3), ((1, 15, 6, 17), (1, 1), ((-15, 1), (0, 0)), 1)]
    for _ in range(40 if full else 3):
        pairs = tuple(tuple(int(i) for i in rng.integers(-3, 7, 2)) for _ in range(2))
        size = (2, *(int(i) for i in rng.integers(1, 9, 2)), int(rng.choice([1, 3, 8, 17])))
        shapes.append((size, tuple(int(i) for i in rng.integers(1, 4, 2)), pairs, int(rng.integers(1, 4))))
    for shape, kernel_size, padding, strides in shapes:
        x, kernel = (rng.integers(-3, 4, size).astype(np.float32) for size in (shape, (*kernel_size, 1, 2 * shape[-1])))
        options = {"padding": padding, "strides": strides}
        y, pullback = jax.vjp(functools.partial(jaxdw.depthwise_conv, method=method, **options), x, kernel)
        assert np.array_equal(y, oracle.depthwise(x, kernel, **options).y), (shape, kernel_size, options)
        dy = rng.integers(-3, 4, y.shape).astype(np.float32)
        options |= {"kernel_dilation": 1, "input_dilation": 1}
        for actual, (value, _) in zip(pullback(dy), loop_gradients(x, kernel, None, dy, np.float32, options)):
            assert np.array_equal(actual, value), (shape, kernel_size, options)


def test_auto_is_chosen_for_the_platform_that_a_program_is_compiled_for():
    """Not for the one where it is traced: a program for TPU is compiled on a CPU, and one may be for several."""

    def program(method, platform):
        def conv(x, kernel):
            return jaxdw.depthwise_conv(x, kernel, method=method)

        traced = jax.jit(conv).trace(jnp.ones((2, 9, 9, 4)), jnp.ones((7, 7, 1, 4)))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    on_cpu = ("taps", "rows") if is_available() else ("rows", "taps")
    assert program("auto", "cpu") == program(on_cpu[0], "cpu") != program(on_cpu[1], "cpu")
    for platform in ("tpu", "cuda"):
        assert program("auto", platform) == program("taps", platform) != program("rows", platform)
