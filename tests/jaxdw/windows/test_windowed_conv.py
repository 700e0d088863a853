"""windowed_conv: `contract(fn(unfold(x)), kernel)`, whatever fn does, and which functions need no windows."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from jax import ad_checkpoint, lax

import jaxdw
from jaxdw.geometry import Geometry
from jaxdw.padding import pad, tap_slices
from jaxdw.windows import window_tracing
from tests.programs import release_programs
from tests.strategies import problems

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
    """Small enough that here every sum is exact."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-3, 4, shape).astype(dtype)) for shape in shapes]


def definition(fn, x, kernel, bias=None, **options):
    return jaxdw.contract(fn(jaxdw.unfold(x, kernel.shape[:-2], **options)), kernel, bias)


def assert_equal(actual, expected):
    """Equal trees of arrays; NaN equals NaN."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


# Windows `(3, 3, 3, 3, 3, 9)`: batch, output, taps and channels are of sizes that may be taken for one another.
X, KERNEL, BIAS, FULL, COLUMNS, CHANNELS = whole_numbers(
    0, (3, 5, 5, 9), (3, 3, 1, 9), (9,), (3, 3, 9), (3, 3, 1), (9,)
)
OPTIONS = {"padding": "VALID"}
GEOMETRY = Geometry.of(X.shape, KERNEL.shape, **OPTIONS)
TAPS = (-3, -2)
KEY, POSITIONS = jax.random.key(0), jnp.arange(9)


@jax.custom_jvp
def doubled_slope_5(w):
    return w * 2


doubled_slope_5.defjvp(lambda primals, tangents: (doubled_slope_5(*primals), tangents[0] * 5))


@jax.custom_vjp
def doubled_slope_7(w):
    return w * 2


doubled_slope_7.defvjp(lambda w: (doubled_slope_7(w), None), lambda _, dy: (dy * 7,))


def everywhere(value, w):
    """value with as many axes as windows have."""
    return value.reshape((1,) * (w.ndim - value.ndim) + value.shape)


def whole_noise(key, w, shape):
    return jax.random.randint(key, shape, 0, 5).astype(w.dtype)


def drawn(key):
    """A random number, by the cheapest program."""
    return (jax.random.key_data(key)[0] % 5).astype(jnp.float32)


def as_pixels(w):
    return w.reshape(*w.shape[:3], 9, 9)


TAP_BY_TAP = {
    "identity": lambda w: w,
    "numbers": lambda w: 2 * w + 1,
    "an array of taps and channels": lambda w: w * everywhere(FULL, w),
    "an array of taps": lambda w: w - everywhere(COLUMNS, w),
    "an array of channels": lambda w: everywhere(CHANNELS, w) + w,
    "arrays of one row, one column and one tap": lambda w: (
        w * everywhere(COLUMNS[:1], w) + everywhere(FULL[:, :1], w) - everywhere(FULL[1:2, 1:2], w)
    ),
    "an outer product": lambda w: w + everywhere(COLUMNS, w) * everywhere(CHANNELS, w),
    "an array as large as the windows, the same at all outputs": lambda w: w * jnp.broadcast_to(FULL, w.shape),
    "a NumPy array": lambda w: w * np.asarray(FULL).reshape(1, 1, 1, 3, 3, 9),
    "an element of an array": lambda w: w * FULL[1, 2, 3],
    "nothing but zeros": jnp.zeros_like,
    "nothing but an array": lambda w: jnp.broadcast_to(FULL, w.shape),
    "the centre": lambda w: w - w[..., 1:2, 1:2, :],
    "the centre, indexed": lambda w: w - w[..., 1, 1, :][..., None, None, :],
    "a column, indexed": lambda w: w - w[..., 0, :][..., None, :],
    "a row, indexed": lambda w: w - w[..., -1, :, :][..., None, :, :],
    "every other tap": lambda w: w - w[..., ::2, ::2, :].max(TAPS, keepdims=True),
    "reversed": lambda w: w[..., ::-1, ::-1, :],
    "reversed columns": lambda w: jnp.flip(w, -2),
    "transposed": lambda w: jnp.swapaxes(w, *TAPS),
    "rotated": lambda w: jnp.rot90(w, axes=TAPS),
    "rolled": lambda w: jnp.roll(w, (1, 2), TAPS),
    "stacked rows": lambda w: jnp.stack([w[..., i, :, :] for i in (2, 0, 1)], -3),
    "stacked columns": lambda w: jnp.stack([w[..., i, :] for i in (1, 1, 2)], -2),
    "concatenated": lambda w: jnp.concatenate([w[..., 1:, :], w[..., :0, :], w[..., :1, :]], -2),
    "taps in one axis": lambda w: as_pixels(w)[..., ::-1, :].reshape(w.shape),
    "the sum": lambda w: w - w.sum(TAPS, keepdims=True),
    "the greatest": lambda w: w - w.max(TAPS, keepdims=True),
    "the least of a column": lambda w: w * w.min(-3, keepdims=True),
    "the product of a row": lambda w: w + w.prod(-2, keepdims=True),
    "whether any": lambda w: w * (w > 1).any(TAPS, keepdims=True).astype(w.dtype),
    "whether all": lambda w: w * (w > -2).all(-2, keepdims=True).astype(w.dtype),
    "no axes": lambda w: lax.reduce_max(w, ()),
    "all pairs of taps": lambda w: (
        jnp.abs(as_pixels(w)[..., None, :] - as_pixels(w)[..., None, :, :]).max(-2).reshape(w.shape)
    ),
    "positions of taps": lambda w: w * everywhere(jnp.arange(3, dtype=w.dtype)[:, None], w),
    "positions of channels": lambda w: w * everywhere(jnp.arange(9, dtype=w.dtype), w),
    "chosen taps": lambda w: jnp.where(everywhere(jnp.eye(3, dtype=bool)[..., None], w), w, 0.0),
    "chosen values": lambda w: jnp.where(w > everywhere(COLUMNS, w), w, -w),
    "chosen by a closed-over number": lambda w: w * jnp.where(FULL[0, 0, 0] > 0, 2.0, 3.0),
    "clipped": lambda w: jnp.clip(w, -1, everywhere(COLUMNS, w)),
    "clamped by numbers": lambda w: lax.clamp(jnp.float32(-1), w, jnp.float32(2)),
    "int32": lambda w: w.astype(jnp.int32).astype(w.dtype),
    "int8, which overflows": lambda w: (w.astype(jnp.int8) * jnp.int8(100)).astype(w.dtype),
    "bits": lambda w: (w.astype(jnp.int32) ^ 5).astype(w.dtype),
    "bfloat16": lambda w: w.astype(jnp.bfloat16).max(TAPS, keepdims=True).astype(w.dtype) - w,
    "complex": lambda w: (w * everywhere(1j * FULL.astype(jnp.complex64), w).imag).real,
    "noise for each tap": lambda w: w + everywhere(whole_noise(KEY, w, (3, 3, 1)), w),
    "jit": jax.jit(lambda w: w * everywhere(FULL, w)),
    "jit of jit": jax.jit(lambda w: jax.jit(lambda w, k: w * everywhere(k, w))(w, FULL) + everywhere(COLUMNS, w)),
    "checkpoint": jax.checkpoint(lambda w: w * everywhere(FULL, w)),
    "a name": lambda w: ad_checkpoint.checkpoint_name(w * 2, "doubled"),
    "custom_jvp": doubled_slope_5,
    "custom_vjp": doubled_slope_7,
    "relu6": jax.nn.relu6,
    "grad": jax.grad(lambda w: (w**2 * everywhere(FULL, w)).sum()),
    "vmap": jax.vmap(jax.vmap(lambda w: w * everywhere(FULL, w))),
    "stop_gradient": lambda w: w - lax.stop_gradient(w.max(TAPS, keepdims=True)),
    "cond on closed-over arrays": lambda w: w * everywhere(lax.cond(FULL.sum() > 0, jnp.negative, jnp.abs, FULL), w),
    "scan over closed-over arrays": lambda w: w * lax.scan(lambda c, t: (c + t, None), 0.0, CHANNELS)[0],
    "a callback on closed-over arrays": lambda w: w * everywhere(jax.pure_callback(lambda a: a, FULL, FULL), w),
    "a slice at a closed-over position": lambda w: w * everywhere(lax.dynamic_slice_in_dim(FULL, POSITIONS[1], 1), w),
}

BY_WINDOWS = {
    "channels reversed": lambda w: w[..., ::-1],
    "channels summed": lambda w: w - w.sum(-1, keepdims=True),
    "outputs reversed": lambda w: w[:, ::-1],
    "outputs rolled": lambda w: jnp.roll(w, 1, 1),
    "outputs transposed": lambda w: jnp.swapaxes(w, 1, 2),
    "outputs and taps transposed": lambda w: jnp.swapaxes(w, 1, 3),
    "outputs and taps reshaped": lambda w: w.reshape(3, 9, 9, 9)[:, ::-1].reshape(w.shape),
    "taps and channels transposed": lambda w: jnp.swapaxes(as_pixels(w), -1, -2).reshape(w.shape),
    "reshape after a transposition": lambda w: lax.reshape(w, w.shape, (1, 0, 2, 3, 4, 5)),
    "images summed": lambda w: w - w.sum(0, keepdims=True),
    "outputs summed": lambda w: w - w.max((1, 2), keepdims=True),
    "outputs summed, in the place of taps": lambda w: w - jnp.broadcast_to(w.sum((1, 2))[:, None, None], w.shape),
    "all summed": lambda w: w - w.max(),
    "an array of positions": lambda w: w * jnp.arange(3, dtype=w.dtype).reshape(1, 3, 1, 1, 1, 1),
    "an iota of windows": lambda w: w * lax.broadcasted_iota(w.dtype, w.shape, 2),
    "a NumPy array of windows": lambda w: w * np.ones(w.shape, np.float32),
    "noise everywhere": lambda w: w + whole_noise(KEY, w, w.shape),
    "sort": lambda w: jnp.sort(w, -2),
    "median": lambda w: w - jnp.median(w, TAPS, keepdims=True),
    "cumulative sum": lambda w: jnp.cumsum(w, -2),
    "argmax": lambda w: w * jnp.argmax(w, -2, keepdims=True).astype(w.dtype),
    "scatter": lambda w: w.at[..., 1, 1, :].set(0),
    "gather": lambda w: w[..., jnp.array([2, 0, 1]), :],
    "padded": lambda w: jnp.pad(w, [(0, 0)] * 3 + [(1, 0), (0, 0), (0, 0)])[:, :, :, :3],
    "einsum": lambda w: jnp.einsum("...ijc,...kjc->...ikc", w, w),
    "concatenated with an array": lambda w: (
        jnp.concatenate([w[..., 1:, :], jnp.ones((3, 3, 3, 3, 1, 9))], -2) + lax.broadcasted_iota(w.dtype, w.shape, 0)
    ),
    "concatenated outputs": lambda w: jnp.concatenate([w[:, 1:], w[:, :1]], 1),
    "stacked outputs": lambda w: jnp.stack([w[:, 2], w[:, 0], w[:, 1]], 1),
    "cond": lambda w: lax.cond(w[0, 0, 0, 0, 0, 0] > 0, jnp.negative, jnp.abs, w),
    "scan": lambda w: lax.scan(lambda c, t: (c + t, None), w, CHANNELS)[0],
    "while": lambda w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + 1), (0, w))[1],
    "grad of outputs mixed": jax.grad(lambda w: (w**2 * w[:, ::-1]).sum()),
    "an effect": lambda w: (jax.debug.callback(lambda: None), w)[1],
    "a callback": lambda w: jax.pure_callback(lambda w: w, w, w),
}


#: JAX 0.8 makes a gather of these, which needs the windows.
GATHERED = ("a row, indexed", "every other tap") if jax.__version_info__ < (0, 9) else ()


def windowed_equals_definition(fn):
    def both(*operands):
        return jaxdw.windowed_conv(fn, *operands, **OPTIONS), definition(fn, *operands, **OPTIONS)

    assert_equal(*jax.jit(both)(X, KERNEL, BIAS))


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", TAP_BY_TAP)
def test_what_is_carried_out_tap_by_tap_gives_what_it_gives_on_windows(name):
    assert (window_tracing.trace(TAP_BY_TAP[name], GEOMETRY, X.dtype) is None) == (name in GATHERED)
    windowed_equals_definition(TAP_BY_TAP[name])


@pytest.mark.parametrize("name", BY_WINDOWS)
def test_every_other_function_gets_all_windows(name, full):
    assert window_tracing.trace(BY_WINDOWS[name], GEOMETRY, X.dtype) is None
    if full or name in ("sort", "outputs and taps transposed"):
        windowed_equals_definition(BY_WINDOWS[name])


def integers(w):
    return w.astype(jnp.int32)


ELEMENTWISE = {
    **{
        name: getattr(lax, name)
        for name in (
            *("neg", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p"),
            *("logistic", "tanh", "sinh", "cosh", "sin", "cos", "tan", "asin", "acos", "atan", "asinh", "acosh"),
            *("atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma", "bessel_i0e", "bessel_i1e", "is_finite"),
            *("round", "floor", "ceil", "stop_gradient"),
        )
    },
    **{
        name: lambda w, name=name: getattr(lax, name)(w, everywhere(CHANNELS / 2, w))
        for name in ("add", "sub", "mul", "div", "rem", "pow", "atan2", "max", "min", "nextafter")
    },
    **{
        name: lambda w, name=name: getattr(lax, name)(w, jnp.ones_like(w))
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    **{
        name.removeprefix("bitwise_"): lambda w, name=name: getattr(lax, name)(integers(w), jnp.full(w.shape, 3))
        for name in (
            *("bitwise_and", "bitwise_or", "bitwise_xor"),
            *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
        )
    },
    **{
        name.removeprefix("bitwise_"): lambda w, name=name: getattr(lax, name)(integers(w))
        for name in ("bitwise_not", "clz", "population_count")
    },
    "add_any": jax.grad(lambda w: (w * w).sum()),
    "integer_pow": lambda w: lax.integer_pow(w, 3),
    "clamp": lambda w: lax.clamp(-1.0, w, jnp.ones_like(w)),
    "select_n": lambda w: lax.select_n(w > 0, w, -w),
    "reduce_precision": lambda w: lax.reduce_precision(w, 5, 2),
    "convert_element_type": lambda w: w.astype(jnp.float16),
    "copy": lambda w: jnp.array(w, copy=True),
    "name": lambda w: ad_checkpoint.checkpoint_name(w, "windows"),
    "real": lambda w: lax.real(lax.complex(w, w)),
    "imag": lambda w: lax.imag(lax.complex(w, 2 * w)),
    "complex": lambda w: lax.real(lax.complex(w, w)),
    "conj": lambda w: lax.imag(lax.conj(lax.complex(w, w))),
}


def test_every_elementwise_operation_is_one():
    """Every bit of every tap is that of the windows."""
    assert set(ELEMENTWISE) == set(window_tracing.ELEMENTWISE)
    x = X[0] / 2
    geometry = Geometry.of_windows(x.shape, (2,))

    def by_windows(x):
        windows = jaxdw.unfold(x, (2,))
        return {name: operation(windows).astype(x.dtype) for name, operation in ELEMENTWISE.items()}

    def by_taps(x):
        taps = window_tracing.grid(tap_slices(pad(x, geometry), geometry, geometry.output_spatial), (2,))
        results = {}
        for name, operation in ELEMENTWISE.items():
            traced = window_tracing.trace(
                lambda w, operation=operation: operation(w).astype(w.dtype), geometry, x.dtype
            )
            assert traced is not None, name
            assert name in [equation.primitive.name for equation in traced.then.eqns]
            tap = traced.of_taps(traced.constants(traced.closed_over), taps)
            results[name] = jnp.stack([jnp.broadcast_to(value, x.shape) for value in tap], -2)
        return results

    assert_equal(jax.jit(by_taps)(x), jax.jit(by_windows)(x))


def steps_of(w, rank):
    """Functions of windows of whole numbers that keep them whole and small, by name."""
    taps = tuple(range(-rank - 1, -1))
    numbers = jnp.arange(w.shape[-1], dtype=w.dtype) % 5 - 2
    of_taps = jnp.arange(w.shape[-2], dtype=w.dtype)[:, None]
    return {
        "absolute": lambda: jnp.abs(w),
        "less the greatest": lambda: w - w.max(taps, keepdims=True),
        "the least along an axis": lambda: jnp.minimum(w, w.min(-2, keepdims=True) + everywhere(of_taps, w)),
        "the sum, clipped": lambda: jnp.clip(w.sum(taps, keepdims=True), -9, 9) - w,
        "plus an array of channels": lambda: w + everywhere(numbers, w),
        "chosen by an array of taps": lambda: jnp.where(w > everywhere(of_taps, w), w, -w),
        "reversed": lambda: jnp.flip(w, taps),
        "reversed along the first axis": lambda: jnp.flip(w, taps[0]),
        "rolled": lambda: jnp.roll(w, 1, -2),
        "the centre": lambda: w - lax.slice_in_dim(w, w.shape[-2] // 2, w.shape[-2] // 2 + 1, axis=-2),
        "whole bytes": lambda: w.astype(jnp.int8).astype(w.dtype),
        "by windows: sorted": lambda: jnp.sort(w, -2),
        "by windows: channels reversed": lambda: w[..., ::-1],
    }


STEPS = list(steps_of(np.zeros((1, 1, 1), np.float32), 1))


def test_random_functions_of_random_geometries_give_what_they_give_on_windows(full):
    """Infinities and NaN among the numbers; and over several images by `vmap`."""

    @hypothesis.settings(max_examples=500 if full else 4)
    @given(
        st.one_of(problems(max_size=7, max_channels=3), problems(max_size=7, min_channels=9, max_channels=11)),
        st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
        st.lists(st.sampled_from([np.nan, np.inf, -np.inf, -0.0]), max_size=3),
        st.booleans(),
    )
    def check(problem, names, special, mapped):
        release_programs()
        shapes = problem.x_shape, problem.kernel_shape, problem.kernel_shape[-1:]
        x, kernel, bias = whole_numbers(problem.seed, *shapes)
        bias = bias if problem.bias else None
        if x.size:
            places = np.random.default_rng(problem.seed).integers(0, x.size, len(special))
            special = special if "whole bytes" not in names else [-0.0] * len(special)  # no number for the others
            x = x.reshape(-1).at[places].set(np.array(special, np.float32)).reshape(x.shape)

        def fn(w):
            for name in names:
                w = steps_of(w, problem.rank)[name]()
            return w

        def run(conv):
            def of(x):
                return conv(fn, x, kernel, bias, **problem.options)

            return jax.jit(jax.vmap(of) if mapped else of)(jnp.stack([x, 2 * x]) if mapped else x)

        assert_equal(run(jaxdw.windowed_conv), run(definition))

    check()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name, dtype", list(zip(GEOMETRIES, itertools.cycle(["float32", "bfloat16", "float16"]))))
def test_every_bit_is_that_of_contract_where_the_function_rounds_nothing(name, dtype, seed):
    shape, kernel_size, multiplier, options = GEOMETRIES[name]
    rng = np.random.default_rng(seed)
    kernel_shape = (*kernel_size, 1, shape[-1] * multiplier)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, kernel_shape, kernel_shape[-1:]))
    geometry = Geometry.of(x.shape, kernel.shape, **options)
    if dtype == "float32" and geometry.channels == 9 and jax.__version_info__ >= (0, 12):
        pytest.skip("jaxlib 0.12 rounds the products of the ninth of nine channels in `contract`: docs/versions.md")
    taps = tuple(range(-geometry.rank - 1, -1))

    def fn(w):
        return jnp.where(w < w.max(taps, keepdims=True), jnp.flip(w, -2), -jnp.abs(w))

    assert 0 not in geometry.output_shape and window_tracing.trace(fn, geometry, x.dtype) is not None
    actual = jax.jit(lambda *operands: jaxdw.windowed_conv(fn, *operands, **options))(x, kernel, bias)
    expected = definition(fn, x, kernel, bias, **options)
    assert (np.asarray(actual).tobytes(), actual.dtype) == (np.asarray(expected).tobytes(), expected.dtype)


DIFFERENTIABLE = {
    "arrays": lambda w, k, *_: w * w * everywhere(k, w),
    "custom_jvp": lambda w, k, *_: doubled_slope_5(w) * everywhere(k, w),
    "custom_vjp": lambda w, k, *_: doubled_slope_7(w) + everywhere(k, w),
    "jit": lambda w, k, *_: jax.jit(lambda w: w * everywhere(k, w))(w),
    "stop_gradient": lambda w, k, *_: w * lax.stop_gradient(w.max(TAPS, keepdims=True)) * everywhere(k, w),
    "whole numbers and keys": lambda w, k, numbers, key: (
        w * everywhere(numbers.astype(w.dtype), w) + everywhere(k, w) * drawn(key)
    ),
    "no arrays": lambda w, *_: w * w,
    "no windows": lambda w, *_: jnp.zeros_like(w),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_are_those_of_the_function_itself(name):
    """By x, kernel, bias and what the function closes over; of jit, in jit, and forward over reverse."""
    fn = DIFFERENTIABLE[name]

    def run(conv):
        def loss(x, kernel, bias, k, numbers, key):
            y = jax.jit(lambda x: conv(lambda w: fn(w, k, numbers, key), x, kernel, bias, **OPTIONS))(x)
            return (y**2).sum()

        def gradients(*differentiated):
            return jax.value_and_grad(loss, (0, 1, 2, 3))(*differentiated, POSITIONS, KEY)

        primals = X, KERNEL, BIAS, FULL
        if name == "arrays":
            return jax.jit(lambda *primals: jax.jvp(gradients, primals, primals))(*primals), gradients(*primals)
        return jax.jit(gradients)(*primals)

    assert_equal(run(jaxdw.windowed_conv), run(definition))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_over_x_the_kernel_and_what_the_function_closes_over(axes):
    operands = [
        value if axis is None else jnp.stack([value, 2 - value]) for value, axis in zip((X, KERNEL, FULL), axes)
    ]

    def run(conv):
        def of(x, kernel, k):
            return conv(lambda w: jnp.maximum(w, everywhere(k, w)), x, kernel, BIAS, **OPTIONS)

        return jax.jit(jax.vmap(of, axes))(*operands)

    assert_equal(run(jaxdw.windowed_conv), run(definition))


def test_a_collective_gets_the_windows():
    def run(conv):
        def of(x):
            return conv(lambda w: w - lax.psum(w, "images"), x, KERNEL, **OPTIONS)

        return jax.jit(jax.vmap(of, axis_name="images"))(jnp.stack([X, 2 - X]))

    assert_equal(run(jaxdw.windowed_conv), run(definition))


class Stateful(nnx.Module):
    """A window function with parameters, a stream of random numbers, and a count."""

    def __init__(self):
        self.scale, self.calls = nnx.Param(FULL), nnx.Variable(jnp.zeros((), int))
        self.streams = nnx.Rngs(0)

    def scaled(self, w):
        return w * everywhere(self.scale[...], w)

    def drawn(self, w):
        return w * drawn(self.streams())

    def counted(self, w):
        self.calls[...] += 1
        return w


@pytest.mark.parametrize("method", ["scaled", "drawn", "counted"])
def test_the_window_function_of_the_nnx_layer_may_read_and_change_state(method):
    def run(jit):
        state = Stateful()
        layer = jaxdw.nnx.DepthwiseConv(9, (3, 3), kernel_init=lambda *_: KERNEL, rngs=nnx.Rngs(0))

        @jit
        def step(state, layer, x):
            layer.window_fn = getattr(state, method)
            y = layer(x)
            layer.window_fn = None
            return y

        return [step(state, layer, X) for _ in range(2)], state.calls[...]

    assert_equal(run(nnx.jit), run(lambda fn: fn))


class Counted(nn.Module):
    """A Linen window function that makes a parameter, draws random numbers and keeps statistics."""

    @nn.compact
    def __call__(self, w):
        calls = self.variable("statistics", "calls", jnp.zeros, ())
        calls.value += 1
        return w * drawn(self.make_rng("dropout")) * self.param("scale", nn.initializers.constant(2.0), ())


def test_the_window_function_of_the_linen_layer_is_called_once_on_all_windows():
    layer = jaxdw.linen.DepthwiseConv(9, (3, 3), window_fn=Counted(), kernel_init=lambda *_: KERNEL)
    keys = {"params": KEY, "dropout": jax.random.key(1)}

    def run(jit):
        variables = jit(layer.init)(keys, X)
        apply = jit(lambda variables: layer.apply(variables, X, rngs=keys, mutable=["statistics"]))
        return variables, apply(variables)

    assert_equal(run(jax.jit), run(lambda fn: fn))


def test_windows_are_not_in_memory_where_the_function_allows_it():
    x, kernel = jnp.ones((1, 32, 32, 16)), jnp.ones((5, 5, 1, 16))
    windows = x.nbytes * 25

    def temporaries(fn):
        compiled = jax.jit(lambda x, kernel: jaxdw.windowed_conv(fn, x, kernel)).lower(x, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(lambda w: w - w.max(TAPS, keepdims=True)) < 4 * x.nbytes < windows
    assert temporaries(lambda w: jnp.sort(w, -2)) >= windows


ERRORS = {
    "no function": (3, TypeError, "`fn` is 3, expected a function of windows"),
    "shape": (lambda w: w.max(TAPS), ValueError, r"`fn` returned float32 of shape \(3, 3, 3, 9\), expected float32"),
    "dtype": (lambda w: w > 0, ValueError, "`fn` returned bool of shape"),
    "no array": (lambda w: (w, w), TypeError, "`fn` returned a tuple, expected a JAX array"),
    "its own": (lambda w: w + jnp.ones((7,)), ValueError, "Incompatible shapes"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_is_wrong(name):
    fn, kind, message = ERRORS[name]
    for wrapper in (jax.jit, lambda fn: fn):
        with pytest.raises(kind, match=message), jax.numpy_rank_promotion("allow"):
            wrapper(lambda x: jaxdw.windowed_conv(fn, x, KERNEL, **OPTIONS))(X)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="`x` has dtype int32, expected one of float16"):
        jaxdw.windowed_conv(lambda w: w, X.astype(jnp.int32), KERNEL)
