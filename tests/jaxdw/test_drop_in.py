"""conv_general_dilated against lax's, whose results, dtypes and errors it has; accelerate on models."""

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import flax.linen
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdw
from tests import oracle
from tests.programs import release_programs
from tests.strategies import problems

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def taken(monkeypatch):
    """The output shape of every call that went to jaxdw."""
    shapes = []
    run = jaxdw.depthwise_conv

    def spy(*args, **options):
        y = run(*args, **options)
        shapes.append(y.shape)
        return y

    monkeypatch.setattr("jaxdw.drop_in.depthwise_conv", spy)
    return shapes


def small_integers(rng, shape, dtype=np.float32):
    """So small that no sum of 64 products leaves the integers that bfloat16 holds: every order gives the same bits."""
    return rng.integers(-2, 3, shape).astype(dtype)


def outcome(function, *args, **options):
    """The result of a function, or the type and message of its error, without the place in the compiled program."""
    try:
        return function(*args, **options)
    except Exception as error:
        return type(error), str(error).split("\tat loc(")[0]


def assert_equal(actual, expected):
    """Equal types, and equal values: of exact integers, whose zeros may differ in sign."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if isinstance(b, jax.Array):
            assert isinstance(a, jax.Array), actual
            assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
            assert np.array_equal(a, b)
        else:
            assert a == b


def assert_same_bits(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        assert a == b if not isinstance(b, jax.Array) else (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of lax.conv_general_dilated; prints as something to paste."""

    lhs_shape: tuple
    rhs_shape: tuple
    options: dict
    depthwise: bool
    seed: int

    def run(self, function, lhs, rhs):
        return function(lhs, rhs, **self.options)

    def integers(self, dtype=np.float32):
        rng = np.random.default_rng(self.seed)
        return small_integers(rng, self.lhs_shape, dtype), small_integers(rng, self.rhs_shape, dtype)

    def normals(self):
        rng = np.random.default_rng(self.seed)
        return rng.standard_normal(self.lhs_shape, np.float32), rng.standard_normal(self.rhs_shape, np.float32)


@st.composite
def calls(draw, depthwise):
    """Any geometry in any dimension numbers; groups of channels or of the batch, or none, where not depthwise."""
    rank = draw(st.integers(1, 3))

    def each(elements):
        return tuple(draw(elements) for _ in range(rank))

    batch, groups, batch_groups = draw(st.integers(0, 3)), 1, 1
    if depthwise:
        channels = groups = draw(st.integers(2, 4))
    else:
        kind = draw(st.sampled_from(["ordinary", "groups", "batch groups"]))
        groups = draw(st.integers(2, 3)) if kind == "groups" else 1
        channels = groups * draw(st.integers(2, 3)) if kind == "groups" else draw(st.integers(1, 3))
        batch_groups = draw(st.integers(2, 3)) if kind == "batch groups" else 1
        batch *= batch_groups
    features = groups * batch_groups * draw(st.integers(1, 3))

    letters = "XYZ"[:rank]
    form = draw(st.sampled_from(["none", "strings", "list", "numbers"]))
    names = [f"NC{letters}", f"OI{letters}", f"NC{letters}"]
    if form != "none":
        names = ["".join(draw(st.permutations(name))) for name in names]
    spatial = dict(zip(letters, each(st.integers(0, {1: 9, 2: 7, 3: 4}[rank]))))
    window = dict(zip(letters, each(st.integers(1, {1: 7, 2: 4, 3: 2}[rank]))))
    lhs_shape = tuple({"N": batch, "C": channels, **spatial}[letter] for letter in names[0])
    rhs_shape = tuple({"O": features, "I": channels // groups, **window}[letter] for letter in names[1])
    numbers = {
        "none": None,
        "strings": tuple(names),
        "list": names,
        "numbers": lax.conv_dimension_numbers(lhs_shape, rhs_shape, tuple(names)),
    }[form]

    word = draw(st.sampled_from(["SAME", "SAME_LOWER", "VALID", "same", None, None, None]))
    amount = st.integers(-2, 4)
    return Call(
        lhs_shape,
        rhs_shape,
        {
            "window_strides": each(st.integers(1, 3)),
            "padding": word or tuple(zip(each(amount), each(amount))),
            "lhs_dilation": draw(st.sampled_from([None, (1,) * rank] + [each(st.integers(1, 3))] * 2)),
            "rhs_dilation": draw(st.sampled_from([None] + [each(st.integers(1, 3))] * 2)),
            "dimension_numbers": numbers,
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        },
        depthwise,
        draw(st.integers(0, 2**32 - 1)),
    )


def test_the_signature_is_that_of_lax():
    mine, theirs = (inspect.signature(f).parameters for f in (jaxdw.conv_general_dilated, lax.conv_general_dilated))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_depthwise_call_is_exact_on_integers_and_errs_as_lax_does(dtype, taken, x64, full):
    @hypothesis.settings(max_examples=400 if full else 5)
    @given(calls(depthwise=True))
    def check(call):
        release_programs()
        taken.clear()
        arrays = call.integers(DTYPES[dtype])
        expected = outcome(call.run, lax.conv_general_dilated, *arrays)
        assert_equal(outcome(call.run, jaxdw.conv_general_dilated, *arrays), expected)
        assert len(taken) == isinstance(expected, jax.Array)

    check()


def test_any_other_call_is_lax_s_to_the_bit(taken, full):
    @hypothesis.settings(max_examples=500 if full else 10)
    @given(calls(depthwise=False))
    def check(call):
        release_programs()
        arrays = call.normals()
        expected = outcome(call.run, lax.conv_general_dilated, *arrays)
        assert_same_bits(outcome(call.run, jaxdw.conv_general_dilated, *arrays), expected)
        assert not taken

    check()


def test_a_depthwise_call_is_within_its_bound_of_the_loop(taken, full):
    @hypothesis.settings(max_examples=500 if full else 6)
    @given(problems(min_channels=2, max_batch_axes=1, words=("SAME", "SAME_LOWER", "VALID")))
    def check(problem):
        release_programs()
        x, kernel, _ = problem.arrays(np.float32)
        rank = problem.rank
        x = x if x.ndim == rank + 2 else x[None]
        strides, dilation, spread = (
            (v,) * rank if isinstance(v, int) else v
            for v in (problem.options[k] for k in ("strides", "kernel_dilation", "input_dilation"))
        )
        padding = problem.options["padding"]
        if padding == "VALID":
            padding = 0
        if not isinstance(padding, str):
            pairs = (padding,) * rank if isinstance(padding, int) else padding
            padding = tuple((p, p) if isinstance(p, int) else p for p in pairs)
            for n, d, (low, high) in zip(x.shape[1:-1], spread, padding):
                hypothesis.assume((n - 1) * d + 1 + low + high >= 0 if n else low + high >= 0)  # lax refuses
        spatial = "XYZ"[:rank]
        actual = jaxdw.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=spread,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=x.shape[-1],
        )
        expected = oracle.depthwise(x, kernel, **problem.options)
        assert taken.pop() == actual.shape == expected.y.shape
        error, bound = abs(np.asarray(actual, np.float64) - expected.y), expected.bound(np.float32)
        assert (error <= bound).all(), (error / bound).max()

    check()


def test_gradients_are_exact_on_integers(full):
    @hypothesis.settings(max_examples=200 if full else 5)
    @given(calls(depthwise=True))
    def check(call):
        release_programs()
        lhs, rhs = call.integers()
        expected = outcome(jax.vjp, lambda *arrays: call.run(lax.conv_general_dilated, *arrays), lhs, rhs)
        actual = outcome(jax.vjp, lambda *arrays: call.run(jaxdw.conv_general_dilated, *arrays), lhs, rhs)
        if isinstance(expected[0], type):
            assert actual == expected
        else:
            assert_equal(actual[0], expected[0])
            dy = jnp.asarray(small_integers(np.random.default_rng(call.seed + 1), expected[0].shape))
            assert_equal(actual[1](dy), expected[1](dy))

    check()


def nchw(function, x, kernel):
    """Stride, dilation and multiplier 2, in the layout of PyTorch."""
    return function(x, kernel, (2, 1), ((1, 2), (0, 1)), rhs_dilation=(1, 2), feature_group_count=3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (1, 3), (0, -1)])
def test_vmap_and_jit_are_exact_on_integers(in_axes, taken):
    rng = np.random.default_rng(0)
    x, kernel = small_integers(rng, (2, 3, 7, 6)), small_integers(rng, (6, 1, 3, 2))
    x, kernel = (
        a if axis is None else jnp.stack([a, a + 1], axis) for a, axis in zip((x, kernel), in_axes, strict=True)
    )
    expected = jax.vmap(lambda *arrays: nchw(lax.conv_general_dilated, *arrays), in_axes)(x, kernel)
    batched = jax.vmap(lambda *arrays: nchw(jaxdw.conv_general_dilated, *arrays), in_axes)
    assert_equal(batched(x, kernel), expected)
    assert_equal(jax.jit(batched)(x, kernel), expected)
    assert taken[0] == (2, 4, 5, 6)


def test_hessian_vector_products_are_exact_on_integers():
    rng = np.random.default_rng(1)
    shapes = (1, 3, 5, 4), (6, 1, 2, 2)
    arrays, tangents = (tuple(small_integers(rng, shape) for shape in shapes) for _ in range(2))

    def product(function):
        gradient = jax.grad(lambda *arrays: (nchw(function, *arrays) ** 2).sum(), (0, 1))
        return jax.jvp(gradient, arrays, tangents)

    # Operation by operation: jaxlib 0.8.0 and 0.8.1 make wrong integers of lax's program of constants.
    expected = product(lax.conv_general_dilated)
    assert_equal(product(jaxdw.conv_general_dilated), expected)
    assert_equal(jax.jit(lambda: product(jaxdw.conv_general_dilated))(), expected)


def test_output_channel_c_times_m_plus_m_reads_input_channel_c():
    x = np.array([[[1.0, 10.0]]], np.float32)
    kernel = np.array([[[1.0, 2.0, 3.0, 4.0]]], np.float32)
    for function in (jaxdw.conv_general_dilated, lax.conv_general_dilated):
        y = function(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2)
        assert y.tolist() == [[[1.0, 2.0, 30.0, 40.0]]]


X, K = np.ones((2, 6, 5, 4), np.float32), np.ones((3, 3, 1, 8), np.float32)
DEPTHWISE = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC, "feature_group_count": 4}


def call(function, *arrays, **changes):
    return function(*(arrays or (X, K)), **{**DEPTHWISE, **changes})


STILL_DEPTHWISE = {
    "NumPy ints": {"window_strides": np.array([2, 1]), "feature_group_count": np.int64(4)},
    "lists": {"window_strides": [1, 1], "padding": [[1, 1], [0, 2]], "dimension_numbers": list(NHWC)},
    "pairs of NumPy ints": {"padding": np.array([[1, 1], [-1, 2]])},
    "transposed": {"padding": ((1, 2), (1, 2)), "lhs_dilation": [2, 2]},
    "precision": {"precision": "highest"},
    "an enum": {"precision": lax.Precision.HIGH},
    "two precisions": {"precision": ["float32", "default"]},
    "an older name": {"precision": "tensorfloat32"},
    "the dtype it has": {"preferred_element_type": "float32"},
    "a wider dtype": {"preferred_element_type": jnp.float64},
    "Python's float": {"preferred_element_type": float},
    "an empty output": {"padding": "VALID", "rhs_dilation": (9, 1)},
}


@pytest.mark.parametrize("name", STILL_DEPTHWISE)
def test_every_form_of_an_argument_is_taken(name, taken, x64):
    changes = STILL_DEPTHWISE[name]
    assert_equal(call(jaxdw.conv_general_dilated, **changes), call(lax.conv_general_dilated, **changes))
    assert len(taken) == 1


def test_arguments_may_be_positional(taken):
    args = (X, K, (1, 1), "SAME", None, (1, 1), NHWC, 4, 1, None, None, None)
    assert_equal(jaxdw.conv_general_dilated(*args), lax.conv_general_dilated(*args))
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arrays_and_their_gradients_in_float32(dtype, taken):
    rng = np.random.default_rng(2)
    x, kernel = small_integers(rng, X.shape, dtype), small_integers(rng, K.shape, dtype)

    def both(function):
        y, pullback = jax.vjp(lambda *arrays: call(function, *arrays, preferred_element_type=np.float32), x, kernel)
        assert y.dtype == np.float32
        return y, pullback(y)

    def widened(array):  # first, as lax in JAX 0.8 has no such gradients
        return array.astype(np.float32)

    y, pullback = jax.vjp(lambda *arrays: call(lax.conv_general_dilated, *map(widened, arrays)), x, kernel)
    assert_equal(both(jaxdw.conv_general_dilated), (y, pullback(y)))
    assert len(taken) == 1


#: Arrays and changes that stay with lax though lax takes them: not depthwise, or not for `depthwise_conv`.
LAX = {
    "one channel": ((X[..., :1], K), {"feature_group_count": 1}),
    "two channels a group": ((X, np.ones((3, 3, 2, 8), np.float32)), {"feature_group_count": 2}),
    "batch groups": ((X, np.ones((3, 3, 4, 8), np.float32)), {"feature_group_count": 1, "batch_group_count": 2}),
    "integers": ((X.astype(np.int32), K.astype(np.int32)), {}),
    "float8": ((X.astype(jnp.float8_e4m3fn), K.astype(jnp.float8_e4m3fn)), {}),
    "complex": ((X.astype(np.complex64), K.astype(np.complex64)), {}),
    "integers from narrower ones": ((X.astype(np.int8), K.astype(np.int8)), {"preferred_element_type": np.int32}),
    "float16 from bfloat16": (
        (X.astype(jnp.bfloat16), K.astype(jnp.bfloat16)),
        {"preferred_element_type": np.float16},
    ),
    "no spatial axes": (
        (X[0, 0], np.ones((8, 4), np.float32)),
        {"feature_group_count": 1, "dimension_numbers": None, "window_strides": (), "padding": ()},
    ),
    "no spatial axes, in groups": (
        (X[0, 0], np.ones((8, 1), np.float32)),
        {"dimension_numbers": None, "window_strides": (), "padding": ()},
    ),
    "four spatial axes": (
        (np.ones((1, 4, 3, 3, 3, 3), np.float32), np.ones((4, 1, 2, 2, 2, 2), np.float32)),
        {"dimension_numbers": None, "window_strides": (1,) * 4},
    ),
    "a dot algorithm": ((X, K), {"precision": lax.DotAlgorithmPreset.F32_F32_F32}),
    "its name": ((X, K), {"precision": "F32_F32_F32"}),
    "a group count in floating point": ((X, K), {"feature_group_count": 4.0}),
    "no output channels": ((X, K[..., :0]), {}),
    "weak types": ((jnp.broadcast_to(1.0, X.shape), jnp.broadcast_to(2.0, K.shape)), {}),
}


@pytest.mark.parametrize("name", LAX)
def test_what_is_lax_s_reaches_lax_with_the_same_arguments(name, taken):
    arrays, changes = LAX[name]
    programs = [
        jax.make_jaxpr(lambda *arrays, function=function: call(function, *arrays, **changes))(*arrays)
        for function in (jaxdw.conv_general_dilated, lax.conv_general_dilated)
    ]
    assert str(programs[0]) == str(programs[1])
    assert_equal(
        outcome(call, jaxdw.conv_general_dilated, *arrays, **changes),
        outcome(call, lax.conv_general_dilated, *arrays, **changes),
    )
    assert not taken


def test_iterators_are_read_once(taken):
    for changes in ({"padding": zip((1, 1), (1, 1))}, {"window_strides": iter((1, 1)), "padding": ((1, 1), (1, 1))}):
        assert_equal(call(jaxdw.conv_general_dilated, **changes), call(lax.conv_general_dilated))
    assert not taken


def test_symbolic_shapes_export(taken):
    (batch,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(lambda x: call(jaxdw.conv_general_dilated, x, K)))(
        jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype)
    )
    assert_equal(exported.call(X), call(lax.conv_general_dilated))
    assert not taken


#: Arrays and changes that lax refuses, at once or when it compiles.
BAD = {
    "ranks": ((X[0], K), {}),
    "lists": (([1.0], K), {}),
    "dtypes": ((X.astype(jnp.bfloat16), K), {}),
    "objects": ((X.astype(object), K), {}),
    "groups that do not divide": ((X, K), {"feature_group_count": 3}),
    "channels": ((X[..., :3], K), {}),
    "no channels": ((X[..., :0], K), {"feature_group_count": 0}),
    "output channels": ((X, K[..., :6]), {}),
    "both groups": ((X, K), {"batch_group_count": 2}),
    "negative groups": ((X, K), {"batch_group_count": -1}),
    "empty kernel": ((X, K[:0]), {"padding": "VALID"}),
    "long strides": ((X, K), {"window_strides": (1, 1, 1)}),
    "one stride": ((X, K), {"window_strides": 1}),
    "zero stride": ((X, K), {"window_strides": (0, 1), "padding": "VALID"}),
    "negative stride": ((X, K), {"window_strides": (-1, 1)}),
    "float stride": ((X, K), {"window_strides": (1.0, 1.0)}),
    "zero dilation": ((X, K), {"rhs_dilation": (0, 1)}),
    "long dilation": ((X, K), {"rhs_dilation": (1, 1, 1)}),
    "long input dilation": ((X, K), {"lhs_dilation": (1, 1, 1), "padding": ((1, 1), (1, 1))}),
    "words and input dilation": ((X, K), {"lhs_dilation": (2, 2)}),
    "VALID and input dilation": ((X, K), {"lhs_dilation": (1, 2), "padding": "VALID"}),
    "Flax's padding": ((X, K), {"padding": "CIRCULAR"}),
    "an int": ((X, K), {"padding": 1}),
    "ints": ((X, K), {"padding": (1, 1)}),
    "short padding": ((X, K), {"padding": ((1, 1),)}),
    "float padding": ((X, K), {"padding": ((1.0, 1.0), (1, 1))}),
    "more than there is": ((X, K), {"padding": ((-4, -4), (0, 0))}),
    "two names": ((X, K), {"dimension_numbers": NHWC[:2]}),
    "short names": ((X, K), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    "other names": ((X, K), {"dimension_numbers": ("NHWC", "HWIO", "NXYC")}),
    "one name": ((X, K), {"dimension_numbers": "NHWC"}),
    "positions twice": (
        (X, K),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 3, 1, 1), (3, 2, 0, 1), (0, 3, 1, 2))},
    ),
    "positions from the end": (
        (X, K),
        {"dimension_numbers": lax.ConvDimensionNumbers((0, -1, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))},
    ),
    "positions in lists": (
        (X, K),
        {"dimension_numbers": lax.ConvDimensionNumbers([0, 3, 1, 2], [3, 2, 0, 1], [0, 3, 1, 2])},
    ),
    "short positions": ((X, K), {"dimension_numbers": lax.ConvDimensionNumbers((0, 1), (0, 1), (0, 1))}),
    "precision": ((X, K), {"precision": "most"}),
    "mixed precisions": ((X, K), {"precision": ("highest", lax.Precision.HIGH)}),
    "a narrower result": ((X, K), {"preferred_element_type": jnp.bfloat16}),
    "an integer result": ((X, K), {"preferred_element_type": np.int32}),
    "no dtype": ((X, K), {"preferred_element_type": "float"}),
    "an unknown dtype": ((X, K), {"preferred_element_type": "fp32"}),
    "a wider result than is enabled": ((X, K), {"preferred_element_type": np.float64}),
    "sharding": ((X, K), {"out_sharding": "data"}),
    "sharding without a mesh": ((X, K), {"out_sharding": P("data")}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_err_as_lax_does(name, taken):
    arrays, changes = BAD[name]
    expected = outcome(call, lax.conv_general_dilated, *arrays, **changes)
    assert isinstance(expected[0], type), "lax takes it"
    assert outcome(call, jaxdw.conv_general_dilated, *arrays, **changes) == expected
    assert not taken


@pytest.mark.parametrize("function", [jaxdw.conv_general_dilated, lax.conv_general_dilated])
def test_a_dtype_that_is_not_enabled_warns_every_time(function):
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = call(function, preferred_element_type=np.float64)
        assert y.dtype == np.float32 and len(caught) == 1 and "float64" in str(caught[0].message)


def test_the_same_call_again_after_enabling_float64(taken):
    """The decision for one setting of JAX is not kept for another."""
    x, kernel = X.astype(np.float64), K.astype(np.float64)
    for enabled in (False, True, False):
        with jax.enable_x64(enabled):
            assert_equal(call(jaxdw.conv_general_dilated, x, kernel), call(lax.conv_general_dilated, x, kernel))
    assert len(taken) == 3


@pytest.mark.parametrize("axis", range(4))
def test_explicit_sharding_of_results_and_gradients_is_that_of_lax(axis, taken):
    """Depthwise where only the batch is sharded; else lax decides, and refuses to guess for channels."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))

    def training(function, x):
        y, pullback = jax.vjp(lambda *arrays: call(function, *arrays), x, jnp.asarray(K))
        return y, pullback(y)

    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P(*[None] * axis, "data")))
        expected = outcome(training, lax.conv_general_dilated, x)
        actual = outcome(training, jaxdw.conv_general_dilated, x)
        assert len(taken) == (axis == 0)
        refused = isinstance(expected[0], type)
        if axis == 0 and refused:  # JAX 0.8: lax leaves the kernel's gradient undecided
            assert_equal(actual, training(lax.conv_general_dilated, jnp.asarray(X)))
        else:
            assert refused == (axis == 3)
            assert_equal(actual, expected)
        if axis < 3:
            assert refused or jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)
            y = call(jaxdw.conv_general_dilated, x, K, out_sharding=P("data"))
            assert jax.typeof(y).sharding.spec == P("data", None, None, None)


def test_shard_map_is_exact_on_integers(taken):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel = (small_integers(np.random.default_rng(3), shape) for shape in (X.shape, K.shape))

    def loss(function):
        def run(x, kernel):
            return call(function, x, kernel)

        mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        return jax.jit(jax.value_and_grad(lambda x, kernel: (mapped(x, kernel) ** 2).sum(), (0, 1)))(x, kernel)

    assert_equal(loss(jaxdw.conv_general_dilated), loss(lax.conv_general_dilated))
    assert taken


def integers(key, shape, dtype):
    """-1, 0 and 1 by NumPy: JAX would compile a program for every shape."""
    del key
    return jnp.asarray(np.random.default_rng(shape).integers(-1, 2, shape), dtype)


#: Spatial axes, and arguments of flax's Conv for a depthwise layer.
LAYERS = {
    "SAME": (2, {"strides": 2}),
    "VALID": (2, {"padding": "VALID", "kernel_dilation": (1, 2)}),
    "CIRCULAR": (2, {"padding": "CIRCULAR"}),
    "REFLECT": (2, {"padding": "REFLECT", "strides": (1, 2)}),
    "CAUSAL": (1, {"padding": "CAUSAL", "kernel_dilation": 2}),
    "an int": (2, {"padding": 1, "precision": "highest"}),
    "ints": (2, {"padding": (1, (0, 2)), "use_bias": False}),
    "transposed": (2, {"padding": ((2, 1), (1, 1)), "input_dilation": (2, 3)}),
    "3-D": (3, {"strides": (1, 2, 1)}),
    "bfloat16": (2, {"dtype": jnp.bfloat16}),
    "a mask": (1, {"mask": jnp.asarray(np.arange(24).reshape(3, 1, 8) % 3 > 0, jnp.float32)}),
}


def inputs(rank, leading=(2,)):
    return small_integers(np.random.default_rng(4), (*leading, *(7, 6, 5)[:rank], 4))


@pytest.mark.parametrize("name, leading", [*((name, (2,)) for name in LAYERS), ("SAME", ()), ("SAME", (2, 1))])
def test_flax_nnx_takes_it_by_one_argument(name, leading, taken):
    rank, options = LAYERS[name]

    def layer(**extra):
        return nnx.Conv(
            4,
            8,
            (3,) * rank,
            feature_group_count=4,
            kernel_init=integers,
            bias_init=integers,
            rngs=nnx.Rngs(0),
            **options,
            **extra,
        )

    x = inputs(rank, leading)
    assert_equal(layer(conv_general_dilated=jaxdw.conv_general_dilated)(x), layer()(x))
    assert len(taken) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_flax_linen_takes_it_by_one_argument(name, taken):
    rank, options = LAYERS[name]

    def layer(**extra):
        return flax.linen.Conv(
            8,
            (3,) * rank,
            feature_group_count=4,
            kernel_init=integers,
            bias_init=integers,
            **options,
            **extra,
        )

    x = inputs(rank)
    mine = layer(conv_general_dilated=jaxdw.conv_general_dilated)
    parameters = layer().init(jax.random.key(0), x)
    assert_equal(mine.apply(parameters, x), layer().apply(parameters, x))
    assert len(taken) == 1


def own_convolution(*args, **options):
    return lax.conv_general_dilated(*args, **options)


class Scaled(nnx.Conv):
    """A layer of the user's."""

    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs, out_sharding)


class Model(nnx.Module):
    """Ordinary, grouped and depthwise layers, one of them shared, in all the places where a model keeps layers."""

    def __init__(self, rngs):
        drawn = {"kernel_init": integers, "bias_init": integers, "param_dtype": jnp.float64, "rngs": rngs}

        def conv(features_in, features, groups=1, kind=nnx.Conv, **options):
            return kind(features_in, features, (3, 3), feature_group_count=groups, **drawn, **options)

        self.single = conv(1, 4)
        self.depthwise = conv(4, 8, 4, strides=2)
        self.blocks = nnx.List([conv(8, 8, 8, padding="CIRCULAR"), conv(8, 8, 2), self.depthwise])
        self.named = nnx.Dict(
            own=conv(8, 8, 8, conv_general_dilated=own_convolution), scaled=conv(8, 8, 8, kind=Scaled)
        )
        self.head = nnx.Sequential(nnx.relu, conv(8, 4), conv(4, 4, 4, use_bias=False), nnx.Linear(4, 2, **drawn))

    def __call__(self, x):
        x = self.depthwise(self.single(x))
        for layer in (*self.blocks[:2], *self.named.values()):
            x = jnp.clip(layer(x), -4, 4)
        return self.head(x)


def test_accelerate_replaces_the_depthwise_layers_and_nothing_else(taken, x64):
    model = Model(nnx.Rngs(0))
    x = small_integers(np.random.default_rng(5), (2, 12, 12, 1), np.float64)
    state, expected = jax.tree.map(jnp.copy, nnx.state(model)), model(x)
    assert not taken
    assert jaxdw.accelerate(model) is model
    replaced = {
        path
        for path, layer in nnx.iter_modules(model)
        if getattr(layer, "conv_general_dilated", None) is jaxdw.conv_general_dilated
    }
    assert replaced == {("blocks", 0), ("blocks", 2), ("named", "scaled"), ("head", "layers", 2)}
    assert model.named.own.conv_general_dilated is own_convolution
    assert_equal(model(x), expected)
    assert len(taken) == 4
    assert_equal(nnx.state(model), state)


def test_an_accelerated_model_has_the_gradients_it_had(taken):
    drawn = {"kernel_init": integers, "bias_init": integers, "rngs": nnx.Rngs(0)}
    model = nnx.Sequential(nnx.Conv(1, 4, (1, 1), **drawn), nnx.Conv(4, 8, (3, 3), feature_group_count=4, **drawn))
    x = small_integers(np.random.default_rng(6), (2, 6, 6, 1))
    gradient = nnx.jit(nnx.grad(lambda model, x: model(x).sum()))
    expected = gradient(model, x)
    assert_equal(gradient(jaxdw.accelerate(model), x), expected)
    assert taken == [(2, 6, 6, 8)]


def test_accelerate_twice_is_once_and_survives_copies(x64):
    model = jaxdw.accelerate(jaxdw.accelerate(Model(nnx.Rngs(0))))
    for twin in (copy.deepcopy(model), nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert twin.depthwise.conv_general_dilated is jaxdw.conv_general_dilated
        assert twin.single.conv_general_dilated is lax.conv_general_dilated
    assert pickle.loads(pickle.dumps(jaxdw.conv_general_dilated)) is jaxdw.conv_general_dilated


def test_accelerate_takes_a_layer_and_shapes_alone():
    layer = nnx.eval_shape(lambda: nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=nnx.Rngs(0)))
    assert jaxdw.accelerate(layer).conv_general_dilated is jaxdw.conv_general_dilated


@pytest.mark.parametrize(
    "model, kind",
    [
        (flax.linen.Conv(8, (3, 3), feature_group_count=8), "a Conv"),
        ([nnx.Conv(1, 1, (3,), rngs=nnx.Rngs(0))], "a list"),
        (nnx.Conv, "the class Conv"),
        (None, "a NoneType"),
    ],
)
def test_accelerate_refuses_what_is_no_nnx_module(model, kind):
    with pytest.raises(TypeError) as caught:
        jaxdw.accelerate(model)
    assert str(caught.value).startswith(f"`model` is {kind}, expected a flax.nnx.Module;")


def test_importing_jaxdw_does_not_import_flax():
    code = "import sys, jaxdw; assert jaxdw.accelerate and jaxdw.conv_general_dilated; print('flax' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "False\n"
