"""Both Flax modules: twins of Flax's own Conv, with work on windows, and errors that name the argument."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxdw.linen
import jaxdw.nnx
from tests import oracle

FRAMEWORKS = ("nnx", "linen")
X = np.zeros((2, 5, 5, 4), np.float32)
GEOMETRY = ("strides", "padding", "kernel_dilation", "input_dilation")


@dataclasses.dataclass(frozen=True)
class Built:
    """A module, its parameters as a tree, and the pure function of both."""

    params: Any
    apply: Callable[[Any, Any], jax.Array]

    @property
    def arrays(self):
        """(kernel, bias or None)."""
        *bias, kernel = jax.tree.leaves(self.params)
        return kernel, bias[0] if bias else None


def ours(framework, key, x, features, kernel_size, **options):
    if framework == "nnx":
        return built_nnx(jaxdw.nnx.DepthwiseConv(features, kernel_size, rngs=nnx.Rngs(key), **options))
    return built_linen(jaxdw.linen.DepthwiseConv(features, kernel_size, **options), key, x)


def flaxs(framework, key, x, features, kernel_size, channel_multiplier=1, **options):
    options["feature_group_count"] = features
    out_features = features * channel_multiplier
    if framework == "nnx":
        return built_nnx(nnx.Conv(features, out_features, kernel_size, rngs=nnx.Rngs(key), **options))
    return built_linen(nn.Conv(out_features, kernel_size, **options), key, x)


def built_nnx(layer):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return Built(params, jax.jit(lambda params, x: nnx.merge(graph, params, rest)(x)))


def built_linen(layer, key, x):
    params = layer.init(jax.random.key(key), x)["params"]
    return Built(params, jax.jit(lambda params, x: layer.apply({"params": params}, x)))


def case(x_shape=(2, 7, 6, 3), kernel_size=(3, 2), x_dtype=np.float32, **options):
    return x_shape, kernel_size, x_dtype, options


MASK = (np.arange(3 * 2 * 3).reshape(3, 2, 1, 3) % 4 != 1).astype(np.float32)

#: Every option that Flax's Conv has too.
CASES = {
    "defaults": case(),
    "strides": case(strides=(2, 3)),
    "no strides": case(strides=None, kernel_dilation=None, input_dilation=None),
    "valid": case(padding="VALID", strides=2),
    "same at stride 2": case(padding="SAME", strides=2),
    "one at stride 2": case(padding=1, strides=2),
    "same lower": case(padding="SAME_LOWER", strides=2),
    "circular": case(padding="CIRCULAR", strides=2, kernel_dilation=2),
    "reflect": case(padding="REFLECT", kernel_dilation=(1, 2)),
    "causal": case((2, 9, 3), (4,), padding="CAUSAL", kernel_dilation=2),
    "ints": case(padding=(2, 0)),
    "pairs": case(padding=((0, 2), (3, 1))),
    "crops": case(padding=((-1, 2), (0, -2))),
    "input dilation": case(padding=((2, 2), (1, 0)), input_dilation=(2, 3), strides=(1, 2)),
    "kernel dilation": case(kernel_dilation=(2, 1)),
    "multiplier": case(channel_multiplier=3, strides=2),
    "one channel": case((2, 7, 6, 1), channel_multiplier=2),
    "no bias": case(use_bias=False),
    "mask": case(mask=MASK),
    "no batch": case((7, 6, 3)),
    "two batch axes": case((2, 2, 5, 4, 3)),
    "three batch axes": case((2, 1, 2, 5, 4, 3), strides=2),
    "1-D": case((2, 9, 3), (3,), strides=2),
    "3-D": case((2, 4, 3, 4, 3), (2, 3, 1), channel_multiplier=2),
    "precision": case(precision="highest"),
    "bfloat16 on float32 parameters": case(dtype=jnp.bfloat16),
    "bfloat16 parameters": case(x_dtype=ml_dtypes.bfloat16, param_dtype=jnp.bfloat16, channel_multiplier=2),
    "wider result": case(dtype=jnp.bfloat16, preferred_element_type=jnp.float32),
}


PAIRS = [
    pytest.param(framework, name, id=f"{framework}, {name}")
    for framework in FRAMEWORKS
    for name, (_, _, _, options) in CASES.items()
    if framework == "nnx" or "preferred_element_type" not in options  # flax.linen.Conv has none
]


def ternary(key, shape, dtype=jnp.float32):
    """-1, 0 and 1: every sum here is exact in every dtype, so that outputs and gradients have one right answer."""
    return jax.random.randint(key, shape, -1, 2).astype(dtype)


@pytest.mark.sampled(20)
@pytest.mark.parametrize(("framework", "name"), PAIRS)
def test_one_seed_gives_both_the_same_parameters_and_outputs_within_the_bounds(framework, name, seed):
    x_shape, kernel_size, x_dtype, options = CASES[name]
    x = np.random.default_rng(seed).standard_normal(x_shape).astype(x_dtype)
    options = {"bias_init": nn.initializers.normal(), **options}
    mine = ours(framework, seed, x, x_shape[-1], kernel_size, **options)
    flax = flaxs(framework, seed, x, x_shape[-1], kernel_size, **options)
    assert jax.tree.structure(mine.params) == jax.tree.structure(flax.params)
    for a, b in zip(jax.tree.leaves(mine.params), jax.tree.leaves(flax.params)):
        assert a.dtype == b.dtype and np.array_equal(a, b)

    kernel, bias = mine.arrays
    kernel = kernel * options["mask"] if "mask" in options else kernel
    dtype = np.dtype(options.get("dtype", x_dtype))
    operands = [None if a is None else np.asarray(a).astype(dtype) for a in (x, kernel, bias)]
    geometry = {key: 1 if options[key] is None else options[key] for key in GEOMETRY if key in options}
    expected = oracle.depthwise(*operands, **geometry)

    y = mine.apply(flax.params, x)  # each with the other's parameters
    with jax.numpy_dtype_promotion("standard"):  # Flax adds a bias of the operands' dtype to a wider result
        y_flax = flax.apply(mine.params, x)
    assert y.dtype == y_flax.dtype
    bound = expected.bound(y.dtype)
    # Flax may sum a narrow dtype in that dtype: every sum and product rounded to it, gamma_k as in Higham (2002), 3.4
    k, u = expected.terms + 1, float(ml_dtypes.finfo(dtype).eps) / 2
    bound_flax = np.maximum(bound, k * u / (1 - k * u) * expected.magnitude * (1 + 2.0**-40))
    y, y_flax = np.asarray(y, np.float64), np.asarray(y_flax, np.float64)
    assert y.shape == y_flax.shape == expected.y.shape
    assert (abs(y - expected.y) <= bound).all()
    assert (abs(y - y_flax) <= bound + bound_flax).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("framework", "name"),
    [("nnx", "circular"), ("nnx", "multiplier"), ("nnx", "bfloat16 on float32 parameters"), ("linen", "mask")],
)
def test_outputs_and_gradients_equal_flax_where_every_sum_is_exact(framework, name, seed):
    x_shape, kernel_size, x_dtype, options = CASES[name]
    x = ternary(jax.random.key(seed), x_shape, x_dtype)
    options = {"kernel_init": ternary, "bias_init": ternary, **options}
    mine = ours(framework, seed, x, x_shape[-1], kernel_size, **options)
    flax = flaxs(framework, seed, x, x_shape[-1], kernel_size, **options)

    @jax.jit
    def both(params, x):
        y, pullback = jax.vjp(mine.apply, params, x)
        y_flax, pullback_flax = jax.vjp(flax.apply, params, x)
        dy = ternary(jax.random.key(seed + 1), y.shape, y.dtype)
        return (y, pullback(dy)), (y_flax, pullback_flax(dy))

    mine_results, flax_results = both(mine.params, x)
    for a, b in zip(jax.tree.leaves(mine_results), jax.tree.leaves(flax_results), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    gradients = jax.tree.leaves(mine_results[1])
    assert all(np.asarray(gradient, np.float32).any() for gradient in gradients)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("framework", "name", "method"),
    [
        *(("nnx", name, "auto") for name in ("reflect", "crops", "input dilation", "three batch axes", "wider result")),
        *(("nnx", name, "patches") for name in ("same at stride 2", "mask", "3-D", "bfloat16 parameters")),
        *(("linen", "multiplier", method) for method in ("auto", "patches")),
    ],
)
def test_the_identity_on_windows_changes_nothing(framework, name, method, seed):
    x_shape, kernel_size, x_dtype, options = CASES[name]
    x = ternary(jax.random.key(seed), x_shape, x_dtype)
    options = {"kernel_init": ternary, "bias_init": ternary, **options}
    plain = ours(framework, seed, x, x_shape[-1], kernel_size, **options)
    layer = ours(framework, seed, x, x_shape[-1], kernel_size, method=method, window_fn=lambda w: w, **options)
    y = plain.apply(plain.params, x)
    through_windows = layer.apply(plain.params, x)
    assert through_windows.dtype == y.dtype and np.array_equal(through_windows, y)


@pytest.mark.parametrize("method", ["auto", "patches"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_windows_stay_within_the_bound_on_random_data(framework, method, seed):
    x = np.random.default_rng(seed).standard_normal((2, 7, 6, 3)).astype(np.float32)
    layer = ours(framework, seed, x, 3, (3, 3), strides=2, method=method, window_fn=lambda w: w)
    expected = oracle.depthwise(x, *map(np.asarray, layer.arrays), strides=2)
    assert (abs(layer.apply(layer.params, x) - expected.y) <= expected.bound(np.float32)).all()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_window_function_keeps_the_largest_values_of_each_window(framework, seed):
    """The top 3 of 9 by NumPy's sort; distinct small integers, so that there are no ties and the sums are exact."""

    def top_3(windows):
        flat = windows.reshape(*windows.shape[:-3], 9, windows.shape[-1])
        threshold = jnp.sort(flat, axis=-2)[..., -3:-2, :]
        return jnp.where(flat >= threshold, flat, 0).reshape(windows.shape)

    rng = np.random.default_rng(seed)
    x = rng.permutation(np.arange(1, 6 * 5 * 2 + 1)).reshape(6, 5, 2).astype(np.float32)
    layer = ours(framework, seed, x, 2, (3, 3), padding="VALID", window_fn=top_3, kernel_init=ternary)
    windows = oracle.windows(x, (3, 3), padding="VALID").reshape(4, 3, 9, 2)
    kept = np.where(windows.argsort(axis=-2).argsort(axis=-2) >= 6, windows, 0)
    kernel, _ = layer.arrays
    expected = (kept * np.asarray(kernel).reshape(9, 2)).sum(-2)
    assert np.array_equal(layer.apply(layer.params, x), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_window_function_quantises_each_window_by_its_own_scale(framework, seed):
    """Powers of two as scales: the quantised values and their ternary sums are exact, and NumPy has the same ones."""

    def quantise(windows, xp=jnp):
        largest = abs(windows).max(axis=(-3, -2), keepdims=True)
        scale = xp.exp2(xp.floor(xp.log2(xp.maximum(largest, 1)))) / 4
        return xp.round(windows / scale) * scale

    x = np.random.default_rng(seed).integers(-99, 100, (2, 6, 5, 3)).astype(np.float32)
    layer = ours(framework, seed, x, 3, (3, 3), padding=1, window_fn=quantise, kernel_init=ternary)
    kernel, _ = layer.arrays
    windows = quantise(oracle.windows(x, (3, 3), padding=1), np)
    expected = (windows * np.asarray(kernel)[:, :, 0]).sum((-3, -2))
    assert np.array_equal(layer.apply(layer.params, x), expected)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_by_default_windows_are_exact_copies(framework):
    """An infinity reaches its own windows alone and comes out of the function again: patches would give NaN."""
    x = np.ones((5, 1), np.float32)
    x[2] = np.inf
    clip = {"window_fn": lambda w: jnp.minimum(w, 2), "kernel_init": nn.initializers.ones}
    exact = ours(framework, 0, x, 1, (3,), padding="VALID", **clip)
    assert exact.apply(exact.params, x).tolist() == [[4], [4], [4]]
    patches = ours(framework, 0, x, 1, (3,), padding="VALID", method="patches", **clip)
    assert np.isnan(patches.apply(patches.params, x)).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_mixed_dtypes_promote_as_in_flax(framework):
    x = np.ones((4, 3), np.int32)
    with jax.numpy_dtype_promotion("standard"):
        for dtype, param_dtype in ((None, jnp.bfloat16), (jnp.float16, jnp.float32), (None, jnp.float32)):
            options = {"dtype": dtype, "param_dtype": param_dtype}
            mine = ours(framework, 0, x, 3, (3,), **options)
            flax = flaxs(framework, 0, x, 3, (3,), **options)
            assert mine.apply(mine.params, x).dtype == flax.apply(flax.params, x).dtype


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_promote_dtype_is_called_as_flax_calls_it(framework):
    def in_float32(*arrays, dtype=None):
        arrays = arrays[0] if framework == "nnx" else arrays
        return tuple(None if a is None else jnp.asarray(a, jnp.float32) for a in arrays)

    x = np.ones((4, 3), jnp.bfloat16)
    layer = ours(framework, 0, x, 3, (3,), param_dtype=jnp.bfloat16, promote_dtype=in_float32)
    assert layer.apply(layer.params, x).dtype == jnp.float32


@pytest.mark.parametrize("method", ["taps", "grouped", "patches"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_named_method_computes(framework, method, seed):
    x = np.random.default_rng(seed).standard_normal((2, 7, 6, 3)).astype(np.float32)
    layer = ours(framework, seed, x, 3, (3, 3), method=method)
    y = jaxdw.depthwise_conv(x, *layer.arrays, method=method)
    assert np.array_equal(layer.apply(layer.params, x), y)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_precision_reaches_the_arithmetic(framework):
    """Seen in the program, since CPUs compute at full precision whatever is asked."""
    made = (ours(framework, 0, X, 4, (3, 3), precision=given, method="patches") for given in ("highest", None))
    asked, left = made
    programs = [str(jax.make_jaxpr(layer.apply)(layer.params, X)) for layer in (asked, left)]
    counts = [program.count("Precision.HIGHEST") for program in programs]
    assert counts[0] > counts[1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_arguments_are_those_of_flax_in_its_order_with_its_defaults(framework):
    layers = {"nnx": (jaxdw.nnx.DepthwiseConv, nnx.Conv), "linen": (jaxdw.linen.DepthwiseConv, nn.Conv)}[framework]
    mine, flax = (dict(inspect.signature(layer.__init__).parameters) for layer in layers)
    ours_alone = {"features", "channel_multiplier", "method", "window_fn", "depthwise_conv", "preferred_element_type"}
    flaxs_alone = {
        *("in_features", "out_features", "features", "feature_group_count", "preferred_element_type"),
        *("conv_general_dilated", "conv_general_dilated_cls"),
    }
    assert list(mine)[:2] == ["self", "features"]
    assert [n for n in mine if n not in ours_alone] == [n for n in flax if n not in flaxs_alone]
    for name in mine.keys() - ours_alone - {"kernel_init", "bias_init"}:  # new functions each time they are made
        assert mine[name].default == flax[name].default, name
        assert mine[name].kind == flax[name].kind, name


BAD = {
    "channels": (X[..., :2], {}, ValueError, "`inputs` has shape (2, 5, 5, 2), expected 4 channels (`features`)"),
    "channels of a multiplier": (X[..., :2], {"channel_multiplier": 2}, ValueError, "expected 4 channels (`features`)"),
    "rank": (X[0, 0], {}, ValueError, "`x` has shape (5, 4), expected (*batch, *spatial, channels) with 2"),
    "scalar": (np.zeros((), np.float32), {}, ValueError, "`inputs` has shape (), expected 4 channels"),
    "list": ([1.0], {}, TypeError, "`inputs` is a list, expected a JAX or NumPy array"),
    "kernel size": (X, {"kernel_size": 3}, TypeError, "`kernel_size` is 3, expected a tuple with one int per spatial"),
    "zero kernel size": (X, {"kernel_size": (3, 0)}, ValueError, "`kernel_size` is (3, 0), expected 1 to 3"),
    "features": (X, {"features": 0}, ValueError, "`features` is 0, expected a positive int"),
    "multiplier": (X, {"channel_multiplier": 1.5}, ValueError, "`channel_multiplier` is 1.5, expected a positive int"),
    "mask": (
        X,
        {"mask": np.ones((3, 3, 4), np.float32)},
        ValueError,
        "`mask` has shape (3, 3, 4), expected an array of shape (3, 3, 1, 4), as the kernel",
    ),
    "mask of another type": (
        X,
        {"mask": 1.0},
        ValueError,
        "`mask` is a float, expected an array of shape (3, 3, 1, 4)",
    ),
    "method": (X, {"method": "winograd"}, ValueError, "`method` is 'winograd', expected one of auto, taps"),
    "padding": (X, {"padding": "same"}, ValueError, "`padding` is 'same', expected one of SAME"),
    "strides": (X, {"strides": 0}, ValueError, "`strides` is 0, expected a positive int"),
    "window function": (X, {"window_fn": 3}, TypeError, "`window_fn` is 3, expected a function of windows or None"),
    "method without windows": (
        X,
        {"window_fn": lambda w: w, "method": "taps"},
        ValueError,
        "`method` is 'taps' with a `window_fn`, expected one of auto, patches: 'taps' never forms the windows",
    ),
    "windows of another shape": (
        X,
        {"window_fn": lambda w: w.max((-3, -2))},
        ValueError,
        "`window_fn` returned float32 of shape (2, 5, 5, 4), expected float32 of shape (2, 5, 5, 3, 3, 4)",
    ),
    "windows of another dtype": (
        X,
        {"window_fn": lambda w: w.astype(jnp.int8)},
        ValueError,
        "`window_fn` returned int8 of shape (2, 5, 5, 3, 3, 4), expected float32",
    ),
    "nothing from the window function": (
        X,
        {"window_fn": lambda w: None},
        TypeError,
        "`window_fn` returned a NoneType, expected a JAX",
    ),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(framework, name):
    x, changes, error, message = BAD[name]
    with pytest.raises(error) as caught:
        layer = ours(framework, 0, x, **{"features": 4, "kernel_size": (3, 3), **changes})
        layer.apply(layer.params, x)
    assert message in str(caught.value)
