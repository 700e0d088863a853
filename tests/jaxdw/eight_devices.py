"""The tests that `test_sharding.py` runs in a process with eight virtual CPU devices."""

import functools
import math

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
import jaxdw.linen
import jaxdw.models
import jaxdw.nnx
import jaxdw.sharding
from jaxdw.models.blocks import Block, Conventions, relu6
from jaxdw.models.mobilenet import Architecture, MobileNet
from tests.collectives import collectives, kinds
from tests.programs import release_programs

KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.fixture(autouse=True)
def eight_devices():
    assert jax.device_count() == 8, "XLA_FLAGS must ask for 8 devices: run test_sharding.py"


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def normal(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def whole_numbers(seed, *shapes, dtype=np.float32):
    """So small that every order of summation is exact."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-4, 5, shape).astype(dtype) for shape in shapes]


def same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    return actual.tobytes() == expected.tobytes()


def with_gradients(conv, **options):
    """(y, (dx, dkernel[, dbias])) of x, kernel[, bias] and dy."""

    @jax.jit
    def run(dy, *arrays):
        y, pullback = jax.vjp(lambda *arrays: conv(*arrays, **options), *arrays)
        return y, pullback(dy)

    return run


def check(x_shape, kernel_shape, spec, mesh, *, bias=True, dtype=np.float32, seed=0, **options):
    """The bits of one device: of y, of dx unless the docs say otherwise, and of all gradients where sums are exact."""
    shapes = [x_shape, kernel_shape] + [kernel_shape[-1:]] * bias
    y_shape = jax.eval_shape(
        functools.partial(jaxdw.depthwise_conv, **options), *(jnp.zeros(s, dtype) for s in shapes)
    ).shape
    shared = with_gradients(jaxdw.sharding.depthwise_conv, spec=spec, mesh=mesh, **options)
    alone = with_gradients(jaxdw.depthwise_conv, **options)
    dy, *arrays = normal(seed, y_shape, *shapes, dtype=dtype)
    (y, gradients), (expected, expected_gradients) = shared(dy, *arrays), alone(dy, *arrays)
    assert same_bits(y, expected)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim) or not any(spec)
    fixed = options.get("padding") in ("CIRCULAR", "REFLECT") or kernel_shape[-1] > x_shape[-1]
    assert fixed or same_bits(gradients[0], expected_gradients[0])
    dy, *arrays = whole_numbers(seed, y_shape, *shapes, dtype=dtype)
    (y, gradients), (expected, expected_gradients) = shared(dy, *arrays), alone(dy, *arrays)
    for actual, wanted in zip((y, *gradients), (expected, *expected_gradients), strict=True):
        assert np.array_equal(actual, wanted)


X, Y, XY = P(None, "x"), P(None, None, "y"), P(None, "x", "y")

#: (shape of x, of the kernel, spec, sizes of the mesh, options)
TABLE = {
    "rows": ((2, 16, 6, 8), (3, 3, 1, 8), X, {"x": 8}, {}),
    "corners": ((1, 12, 8, 8), (5, 5, 1, 8), XY, {"x": 4, "y": 2}, {}),
    "two mesh axes on one axis": ((1, 16, 6, 4), (3, 3, 1, 4), P(None, ("y", "x")), {"x": 4, "y": 2}, {}),
    "stride 2": ((1, 32, 16, 8), (3, 3, 1, 8), XY, {"x": 4, "y": 2}, {"strides": 2}),
    "stride 2, symmetric": ((1, 32, 16, 8), (5, 5, 1, 8), XY, {"x": 4, "y": 2}, {"strides": 2, "padding": 2}),
    "stride above the kernel": ((1, 24, 6, 8), (1, 1, 1, 8), X, {"x": 4}, {"strides": 3}),
    "valid": ((1, 12, 11, 8), (9, 3, 1, 8), X, {"x": 2}, {"padding": "VALID"}),
    "full": ((1, 14, 6, 8), (3, 3, 1, 8), X, {"x": 2}, {"padding": ((2, 2), (1, 1))}),
    "cropped": ((1, 16, 6, 8), (3, 3, 1, 8), X, {"x": 4}, {"padding": ((-1, 3), (0, 0))}),
    "padding wider than a shard": ((1, 8, 4, 8), (3, 3, 1, 8), X, {"x": 2}, {"padding": ((9, 9), (1, 1))}),
    "dilated": ((1, 32, 6, 8), (3, 3, 1, 8), X, {"x": 4}, {"kernel_dilation": 4}),
    "input dilation": ((1, 8, 6, 8), (3, 3, 1, 8), X, {"x": 4}, {"input_dilation": 2, "padding": ((1, 2), (1, 2))}),
    "input dilation, drifting": ((1, 8, 6, 8), (4, 3, 1, 8), X, {"x": 4}, {"input_dilation": 2, "padding": "VALID"}),
    "ring": ((1, 16, 8, 8), (5, 3, 1, 8), XY, {"x": 4, "y": 2}, {"padding": "CIRCULAR"}),
    "ring of one axis": ((1, 16, 3, 8), (5, 5, 1, 8), X, {"x": 2}, {"padding": "CIRCULAR", "strides": 2}),
    "reflected": ((1, 16, 8, 8), (5, 3, 1, 8), XY, {"x": 4, "y": 2}, {"padding": "REFLECT"}),
    "reflected, drifting": ((1, 6, 8, 8), (3, 3, 1, 8), X, {"x": 2}, {"padding": "REFLECT", "strides": 4}),
    "causal": ((3, 32, 8), (4, 1, 8), X, {"x": 8}, {"padding": "CAUSAL"}),
    "3-D": ((4, 4, 4, 8), (3, 3, 3, 1, 8), P("x", "y", "z"), {"x": 2, "y": 2, "z": 2}, {}),
    "batch": ((8, 2, 5, 6, 4), (3, 3, 1, 4), P("x", "y"), {"x": 4, "y": 2}, {}),
    "channels": ((2, 6, 5, 16), (3, 3, 1, 32), P(None, None, None, "x"), {"x": 8}, {}),
    "all at once": ((2, 8, 4, 8), (3, 3, 1, 8), P("x", "y", None, "z"), {"x": 2, "y": 2, "z": 2}, {}),
    "rows of the kernel": ((1, 16, 6, 8), (7, 7, 1, 8), X, {"x": 4}, {"method": "rows"}),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", TABLE)
def test_each_kind_of_geometry_has_the_bits_of_one_device(name, seed):
    x_shape, kernel_shape, spec, sizes, options = TABLE[name]
    check(x_shape, kernel_shape, spec, mesh_of(**sizes), seed=seed, **options)


@st.composite
def problems(draw):
    """A mesh, the axes that it shards, and a geometry that divides; its halos may be too wide."""
    sizes = draw(st.sampled_from([{"x": 8}, {"x": 2, "y": 4}, {"x": 4, "y": 2}, {"x": 2, "y": 2, "z": 2}]))
    rank = draw(st.integers(1, 2))
    batch = draw(st.integers(0, 2))
    ndim = batch + rank + 1
    entries = [()] * ndim
    for name in draw(st.permutations(list(sizes))):
        kind = draw(st.sampled_from(["spatial", "spatial", "any", "none"]))
        if kind != "none":
            axis = draw(st.integers(batch, ndim - 2) if kind == "spatial" else st.integers(0, ndim - 1))
            entries[axis] = (*entries[axis], name)
    counts = [math.prod(sizes[name] for name in entry) for entry in entries]
    shape = [count * draw(st.integers(1, 2)) for count in counts[:batch]]
    plain = draw(st.booleans())  # as "SAME" has it: a shard's outputs lie over its inputs
    word = draw(st.sampled_from(["SAME", "SAME_LOWER", "CIRCULAR", "REFLECT", None])) if plain else None
    options = {"strides": [], "kernel_dilation": [], "input_dilation": [], "padding": []}
    kernel_size = []
    for count in counts[batch:-1]:
        taps, dilation, stride = draw(st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(1, 3)))
        zeros = 1 if word else draw(st.sampled_from([1, 1, 2, 3]))
        blocks = draw(st.integers(1, 3))
        size, outputs = (stride * blocks, zeros * blocks) if plain else draw(st.tuples(*[st.integers(1, 6)] * 2))
        span = (taps - 1) * dilation + 1
        low = draw(st.integers(-1, span))
        high = (count * outputs - 1) * stride + span - ((count * size - 1) * zeros + 1) - low
        shape.append(count * size)
        kernel_size.append(taps)
        for name, value in zip(options, (stride, dilation, zeros, (low, high))):
            options[name].append(value)
    channels = counts[-1] * draw(st.integers(1, 9))
    kernel_shape = (*kernel_size, 1, channels * draw(st.sampled_from([1, 1, 2])))
    options |= {"padding": word or options["padding"], "method": draw(st.sampled_from(["taps", "rows"]))}
    spec = P(*(entry or None for entry in entries))
    return (*shape, channels), kernel_shape, spec, sizes, options, draw(st.booleans()), draw(st.integers(0, 2**32 - 1))


def test_random_geometries_have_the_bits_of_one_device(full):
    @hypothesis.settings(max_examples=100 if full else 5)
    @given(problems())
    def run(problem):
        release_programs()
        x_shape, kernel_shape, spec, sizes, options, bias, seed = problem
        mesh = mesh_of(**sizes)
        try:
            jaxdw.sharding.depthwise_conv(jnp.zeros(x_shape), jnp.zeros(kernel_shape), spec=spec, mesh=mesh, **options)
        except ValueError as error:
            assert "the halo is" in str(error)
            hypothesis.reject()
        check(x_shape, kernel_shape, spec, mesh, bias=bias, seed=seed, **options)

    run()


@pytest.mark.parametrize("spec, padding", [(X, 3), (P(None, None, "x"), ((3, 3), (1, 3)))])
def test_the_bias_comes_where_the_whole_geometry_puts_it(spec, padding):
    """PyTorch's order starts from the bias, or adds it last, by the padding: with halos a shard has another."""
    check((1, 12, 12, 8), (3, 3, 1, 8), spec, mesh_of(x=2), padding=padding, kernel_dilation=1)


def test_narrow_dtypes_are_rounded_once():
    check((1, 16, 6, 8), (3, 3, 1, 8), X, mesh_of(x=4), dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize("spec", [P("x", None, None, "y"), P("x", "y")], ids=str)
def test_transforms_are_partitioned_by_hand_and_by_the_compiler(spec, seed):
    """Whole numbers, so rounded results must be those of the taps."""
    rng = np.random.default_rng(seed)
    x, kernel = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((4, 16, 6, 8), (5, 3, 1, 8)))
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def with_gradients(conv):
        return lambda x, kernel: (conv(x, kernel), *jax.vjp(conv, x, kernel)[1](jnp.ones(x.shape)))

    expected = with_gradients(jaxdw.depthwise_conv)(x, kernel)
    by_hand = functools.partial(jaxdw.sharding.depthwise_conv, method="fft", spec=spec, mesh=mesh)
    by_compiler = functools.partial(jaxdw.depthwise_conv, method="fft")
    placed = jax.device_put(x, NamedSharding(mesh, spec)), jax.device_put(kernel, NamedSharding(mesh, P()))
    for conv in (by_hand, by_compiler):
        for ours, exact in zip(jax.jit(with_gradients(conv))(*placed), expected, strict=True):
            assert np.array_equal(np.rint(ours), exact)


@pytest.mark.parametrize("method", ["patches", "grouped"])
def test_every_method_can_be_shared_out(method):
    x, kernel, bias = whole_numbers(0, (2, 8, 8, 4), (3, 3, 1, 8), (8,))
    mesh = mesh_of(x=4, c=2)
    y = jaxdw.sharding.depthwise_conv(x, kernel, bias, spec=P(None, "x", None, "c"), mesh=mesh, method=method)
    assert np.array_equal(y, jaxdw.depthwise_conv(x, kernel, bias, method=method))


def test_auto_is_what_the_whole_geometry_would_take():
    check((1, 16, 6, 8), (7, 7, 1, 8), X, mesh_of(x=4), method="auto")


def test_every_mode_and_order_of_differentiation_works():
    x, kernel, bias, dx, dkernel = whole_numbers(0, (2, 8, 6, 4), (3, 3, 1, 4), (4,), (2, 8, 6, 4), (3, 3, 1, 4))
    mesh = mesh_of(x=4, data=2)

    def derivatives(conv):
        def energy(x, kernel):
            return (conv(x, kernel, bias) ** 2).sum()

        gradient = jax.grad(energy, (0, 1))
        return {
            "jvp": jax.jit(lambda: jax.jvp(lambda x, k: conv(x, k, bias), (x, kernel), (dx, dkernel)))(),
            "hessian-vector product": jax.jit(lambda: jax.jvp(gradient, (x, kernel), (dx, dkernel))[1])(),
            "vmap over x": jax.jit(lambda: jax.vmap(lambda x: conv(x, kernel, bias))(np.stack([x, dx])))(),
            "vmap over the kernel": jax.jit(
                lambda: jax.vmap(lambda k: conv(x, k, bias))(np.stack([kernel, dkernel]))
            )(),
            "checkpoint": jax.jit(lambda: jax.grad(jax.checkpoint(energy))(x, kernel))(),
        }

    shared = derivatives(functools.partial(jaxdw.sharding.depthwise_conv, spec=P("data", "x"), mesh=mesh))
    alone = derivatives(jaxdw.depthwise_conv)
    for name in alone:
        for actual, expected in zip(jax.tree.leaves(shared[name]), jax.tree.leaves(alone[name]), strict=True):
            assert np.array_equal(actual, expected), name


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_mesh_and_spec_are_found_where_they_are_known(kind):
    types = (AxisType.Auto, AxisType.Explicit) if kind == "mixed" else (kind,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "x"), axis_types=types)
    x, kernel = normal(0, (2, 16, 6, 4), (3, 3, 1, 4))
    expected = jaxdw.depthwise_conv(x, kernel)
    spec = P("data", "x")
    placed = jax.device_put(x, NamedSharding(mesh, spec))

    def conv(x, **options):
        y = jaxdw.sharding.depthwise_conv(x, kernel, **options)
        assert same_bits(y, expected) if not isinstance(y, jax.core.Tracer) else True
        return y

    for y in (
        conv(placed),
        conv(placed, spec=spec),
        conv(x, spec=spec, mesh=mesh),
        jax.jit(lambda x: conv(x, spec=spec))(placed),
        jax.jit(lambda x: conv(x, spec=spec, mesh=mesh))(x),
    ):
        assert same_bits(y, expected) and y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    with jax.set_mesh(mesh):
        for y in (conv(x, spec=spec), jax.jit(lambda x: conv(x, spec=spec))(x)):
            assert same_bits(y, expected) and y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
        assert same_bits(jax.jit(lambda x: conv(x, spec=P(None, "x")))(placed), expected)
        assert same_bits(conv(placed, spec=P()), expected)


def test_axes_that_the_spec_does_not_name_stay_as_they_are():
    mesh = mesh_of(data=2, x=4)
    x, kernel = (jnp.asarray(a) for a in normal(0, (2, 16, 6, 4), (3, 3, 1, 4)))
    placed = jax.device_put(x, NamedSharding(mesh, P("data", "x")))
    conv = functools.partial(jaxdw.sharding.depthwise_conv, mesh=mesh)
    run = jax.jit(lambda x, kernel: conv(x, kernel, spec=P(None, "x")))
    assert kinds(run.lower(placed, kernel).compile()) == {"collective-permute"}
    inside = jax.shard_map(
        lambda x: conv(x, kernel, spec=P(None, "x")),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    for y in (run(placed, kernel), jax.jit(inside)(x)):
        assert same_bits(y, jaxdw.depthwise_conv(x, kernel))
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "x")), 4)


def test_no_outputs_and_no_inputs_are_as_on_one_device():
    mesh = mesh_of(x=2)
    kernel, bias = normal(0, (3, 3, 1, 4), (4,))
    for shape, padding in (((0, 4, 4, 4), 1), ((1, 2, 2, 4), "VALID"), ((1, 0, 4, 4), 2)):
        x = jnp.zeros(shape)
        y = jaxdw.sharding.depthwise_conv(x, kernel, bias, spec=X, mesh=mesh, padding=padding)
        assert same_bits(y, jaxdw.depthwise_conv(x, kernel, bias, padding=padding))


BAD = {
    "an axis that does not exist": (
        {"spec": P("rows")},
        "which names 'rows', expected the axes of the mesh: 'data', 'x'",
    ),
    "an axis twice": ({"spec": P("x", "x")}, "which names 'x' twice"),
    "too many entries": ({"spec": P(*[None] * 4, "x")}, "of 5 entries, expected at most 4, one per axis of `x`"),
    "no mesh": ({"mesh": None}, "`mesh` is None, expected a mesh: `x` is on none"),
    "no spec": ({"spec": None}, "`spec` is None, expected a PartitionSpec"),
    "batch": (
        {"shape": (3, 16, 8, 8), "spec": P("data")},
        "`x` has shape (3, 16, 8, 8) and the result (3, 16, 8, 8): x has 3 on axis 0 (batch), "
        "expected a multiple of 2, the devices that 'data' of `spec` names",
    ),
    "channels": ({"spec": P(None, None, None, ("data", "x")), "shape": (2, 4, 4, 12)}, "12 on axis 3 (channels)"),
    "rows": ({"shape": (1, 18, 8, 8)}, "x has 18 on axis 1 (spatial), expected a multiple of 4"),
    "outputs": (
        {"strides": 3, "shape": (1, 16, 8, 8)},
        "the result has 6 on axis 1 (spatial), expected a multiple of 4",
    ),
    "halo": (
        {"kernel_size": (11, 3)},
        "on axis 1 of `x` the halo is 5 wide and a shard 4 (16 over the 4 devices that 'x' of `spec` names), "
        "expected a halo of at most 4: use fewer devices on this axis",
    ),
    "reflected halo": (
        {"kernel_size": (9, 3), "padding": "REFLECT"},
        "expected a halo of at most 3, what a shard can reflect",
    ),
    "method": ({"method": "fast"}, "`method` is 'fast', expected one of auto, taps"),
    "padding": ({"padding": "FULL"}, "`padding` is 'FULL'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(name):
    given, message = BAD[name]
    options = {"spec": X, "mesh": mesh_of(data=2, x=4), "shape": (2, 16, 8, 8), "kernel_size": (3, 3), **given}
    shape, kernel_size = options.pop("shape"), options.pop("kernel_size")
    with pytest.raises(ValueError) as caught:
        jaxdw.sharding.depthwise_conv(jnp.zeros(shape), jnp.zeros((*kernel_size, 1, shape[-1])), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name, value", [("spec", ("x",)), ("mesh", "x")])
def test_what_is_no_spec_and_no_mesh_is_refused(name, value):
    options = {"spec": X, "mesh": mesh_of(x=4), name: value}
    with pytest.raises(TypeError, match=rf"^`{name}` is .*, expected a jax\.sharding\."):
        jaxdw.sharding.depthwise_conv(jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)), **options)


def test_an_axis_that_a_shard_map_has_taken_is_refused():
    mesh = mesh_of(x=4)
    inner = functools.partial(jaxdw.sharding.depthwise_conv, spec=X, mesh=mesh)
    run = jax.shard_map(lambda x: inner(x, jnp.zeros((3, 3, 1, 4))), mesh=mesh, in_specs=X, out_specs=X)
    with pytest.raises(ValueError, match="expected axes that are free: the `shard_map` around this call"):
        run(jnp.zeros((1, 8, 8, 4)))


@pytest.mark.parametrize(
    "options, halos",
    [({}, (2, 2)), ({"strides": 2}, (1, 1)), ({"kernel_dilation": 2}, (4, 4)), ({"padding": "CIRCULAR"}, (2, 2))],
)
def test_the_program_moves_halos_and_nothing_else(options, halos):
    """Blocks of (2, 8, 6, 4): so many rows of 6, then so many columns of 8 + the rows."""
    mesh = mesh_of(data=2, x=2, y=2)
    spec = P("data", "x", "y")
    x = jax.ShapeDtypeStruct((4, 16, 12, 4), np.float32, sharding=NamedSharding(mesh, spec))
    kernel, bias = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 3, 1, 4), (4,)))
    conv = functools.partial(jaxdw.sharding.depthwise_conv, spec=spec, mesh=mesh, **options)
    found = collectives(jax.jit(conv).lower(x, kernel, bias).compile())
    assert {kind for kind, _ in found} == {"collective-permute"}
    rows, columns = halos
    assert sum(size for _, size in found) == 2 * 4 * (rows * 6 + columns * (8 + rows)) * 4

    def gradient(x, kernel, bias):
        y, pullback = jax.vjp(conv, x, kernel, bias)
        return pullback(y)

    found = collectives(jax.jit(gradient).lower(x, kernel, bias).compile())
    assert {kind for kind, _ in found} == {"collective-permute", "all-reduce"}
    summed = [size for kind, size in found if kind == "all-reduce"]
    assert sum(summed) <= (9 * 4 + 4) * 4  # the gradients of kernel and bias


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_with_sharding_metadata_shares_out_its_channels(kind, multiplier):
    mesh = mesh_of(kind, data=2, model=4)
    with jax.set_mesh(mesh):
        layer = jaxdw.nnx.DepthwiseConv(
            32,
            (3, 3),
            channel_multiplier=multiplier,
            kernel_init=lambda key, shape, dtype: jax.random.randint(key, shape, -4, 5).astype(dtype),
            kernel_metadata={"out_sharding": (None, None, None, "model")},
            bias_metadata={"out_sharding": ("model",)},
            rngs=nnx.Rngs(0),
        )
        assert layer.kernel[...].sharding.spec == P(None, None, None, "model")
        graph, state = nnx.split(layer)
        (x,) = whole_numbers(0, (4, 8, 8, 32))
        placed = jax.device_put(x, NamedSharding(mesh, P("data", None, None, "model")))
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, placed).compile()
        assert not collectives(run)
        y = run(state, placed)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, None, "model")), 4)
    assert np.array_equal(y, jaxdw.depthwise_conv(x, np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])))


def test_over_explicit_axes_the_plain_function_follows_the_types():
    x, kernel, bias = normal(0, (4, 16, 8, 16), (3, 3, 1, 16), (16,))
    expected = jaxdw.depthwise_conv(x, kernel, bias, strides=2)
    mesh = mesh_of(AxisType.Explicit, data=2, x=2, c=2)
    kernel_placed = jax.device_put(kernel, NamedSharding(mesh, P(None, None, None, "c")))
    for spec in (P("data"), P("data", "x"), P(None, None, None, "c"), P("data", "x", None, "c"), P()):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        for conv in (jaxdw.depthwise_conv, jax.jit(jaxdw.depthwise_conv, static_argnames="strides")):
            y = conv(placed, kernel, bias, strides=2)
            assert same_bits(y, expected)
            assert jax.typeof(y).sharding.spec == P(*spec, *[None] * (4 - len(spec)))
            y = conv(placed, kernel_placed, bias, strides=2)
            assert same_bits(y, expected)
            assert jax.typeof(y).sharding.spec[:-1] == jax.typeof(placed).sharding.spec[:-1]
            assert jax.typeof(y).sharding.spec[-1] == "c"
    with pytest.raises(ValueError, match="the result has 14 on axis 1"):
        jaxdw.depthwise_conv(jax.device_put(x, NamedSharding(mesh, P(None, ("data", "x")))), kernel, padding=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", [P("data"), P("data", "x"), P(None, "x", None, "c"), P()])
@pytest.mark.parametrize("method", ["taps", "grouped"])
def test_an_epilogue_is_shared_out_as_the_result(spec, method, seed, full):
    """In a sample over one kind of axes, the other one where the method is another."""
    kinds = [AxisType.Auto, AxisType.Explicit]
    for kind in kinds if full else [kinds[(seed + len(spec) + (method == "taps")) % 2]]:
        assert_that_an_epilogue_is_shared_out(kind, spec, method)


def assert_that_an_epilogue_is_shared_out(kind, spec, method):
    x, kernel, bias, scale, shift = whole_numbers(0, (4, 16, 8, 16), (3, 3, 1, 16), (16,), (16,), (16,))
    epilogue = jaxdw.Epilogue(scale, shift, x, "relu6")
    mesh = mesh_of(kind, data=2, x=2, c=2)

    def with_gradients(conv, *arrays):
        y, pull = jax.vjp(lambda *arrays: conv(*arrays[:-1], method=method, epilogue=arrays[-1]), *arrays)
        return y, pull(y)

    expected = with_gradients(jaxdw.depthwise_conv, x, kernel, bias, epilogue)
    over = functools.partial(jaxdw.sharding.depthwise_conv, spec=spec, mesh=mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        for conv in [over] if kind == AxisType.Auto else [over, jaxdw.depthwise_conv]:
            actual = jax.jit(functools.partial(with_gradients, conv))(placed, kernel, bias, epilogue)
            assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (actual, expected))))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_module_takes_the_function_that_convolves(framework):
    mesh = mesh_of(x=4)
    over = jaxdw.sharding.Over(X, mesh)
    (x,) = normal(0, (1, 16, 8, 4))
    if framework == "nnx":
        layer = jaxdw.nnx.DepthwiseConv(4, (3, 3), depthwise_conv=over, rngs=nnx.Rngs(0))
        y, expected = nnx.jit(lambda layer, x: layer(x))(layer, x), (layer.kernel[...], layer.bias[...])
    else:
        layer = jaxdw.linen.DepthwiseConv(4, (3, 3), depthwise_conv=over)
        variables = layer.init(jax.random.key(0), x)
        y, expected = layer.apply(variables, x), (variables["params"]["kernel"], variables["params"]["bias"])
    assert same_bits(y, jaxdw.depthwise_conv(x, *map(np.asarray, expected)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, X), 4)


def with_kernels(make, draw):
    """A model in eval mode with drawn kernels, and normalizations and biases that change nothing."""
    model = nnx.eval_shape(make)

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        if "kernel" in name:
            return draw(leaf.shape)
        return np.full(leaf.shape, "scale" in name or "var" in name, leaf.dtype)

    nnx.update(model, jax.tree.map_with_path(value, nnx.state(model)))
    model.eval()
    return model


def small_network():
    """A stem and three blocks whose kernels are small whole numbers: every order is exact."""
    blocks = (Block(8, 8, 8, relu6), Block(8, 16, 8, relu6, stride=2, kernel=5), Block(8, 16, 8, relu6))
    conventions = Conventions("SYMMETRIC", bn_epsilon=0.0, bn_momentum=0.9)
    draw = np.random.default_rng(0).integers
    return with_kernels(
        lambda: MobileNet(Architecture(blocks, relu6), conventions, num_classes=4, rngs=nnx.Rngs(0)),
        lambda shape: draw(-1, 2, shape).astype(np.float32),
    )


def compiled(model, mesh, spec, x):
    """The program of a model whose parameters are everywhere, and its result for images that are sharded by spec."""
    graph, state = nnx.split(model)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, P()))
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, placed).compile()
        return program, np.asarray(program(state, placed))


def test_a_model_under_data_parallelism_does_not_communicate_and_has_the_bits_of_each_share():
    draw = np.random.default_rng(0).standard_normal
    model = with_kernels(
        lambda: jaxdw.models.mobilenet_v2(8, width=0.25, rngs=nnx.Rngs(0)),
        lambda shape: draw(shape, np.float32) / np.float32(8),
    )
    (x,) = normal(0, (16, 32, 32, 3))
    program, logits = compiled(model, mesh_of(data=8), P("data"), x)
    assert not collectives(program)
    graph, state = nnx.split(model)
    alone = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    shares = [alone(state, x[i : i + 2]) for i in range(0, 16, 2)]
    assert np.any(logits) and same_bits(logits, np.concatenate(shares))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_over_pieces_of_images_moves_halos_and_means_alone(kind):
    model = small_network()
    (x,) = whole_numbers(0, (2, 64, 32, 3))
    mesh = mesh_of(kind, x=4, y=2)
    expected = compiled(model, mesh_of(one=1), P(), x)[1]
    if kind == AxisType.Auto:
        assert jaxdw.models.shard_layers(model, XY) is model
    program, logits = compiled(model, mesh, XY, x)
    assert kinds(program) == {"collective-permute", "all-reduce"}
    largest = 2 * 2 * (16 // 2 + 4) * 16 * 4  # two images, two rows of a half of the image with halos, 16 channels
    assert max(size for _, size in collectives(program)) <= largest
    assert np.any(expected) and np.array_equal(logits, expected)


def test_layers_of_another_kind_stay_as_they_are():
    model = nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), jaxdw.nnx.DepthwiseConv(4, (3,), rngs=nnx.Rngs(0)))
    jaxdw.models.shard_layers(model, X)
    assert model.layers[0].conv_general_dilated is lax.conv_general_dilated
    assert model.layers[1].depthwise_conv == jaxdw.sharding.Over(X)
    with pytest.raises(TypeError, match=r"`model` is a list, expected a flax\.nnx\.Module"):
        jaxdw.models.shard_layers([model], X)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P(), P("data"), P(None, "rows"), P("data", "rows")], ids=str)
def test_programs_for_tpus_have_kernels_only_where_each_is_one_devices_own(kind, spec):
    mesh = mesh_of(kind, data=2, rows=2)
    x, kernel = (
        jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, axes))
        for shape, axes in (((4, 8, 8, 4), spec), ((3, 3, 1, 4), P()))
    )

    def kernels(conv, method):
        def gradients(x, kernel):
            y, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, method=method), x, kernel)
            return y, *pullback(y)

        text = jax.jit(gradients).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("custom_call @tpu_custom_call")

    over = functools.partial(jaxdw.sharding.depthwise_conv, spec=spec, mesh=mesh)
    own = set(jax.tree.leaves(tuple(spec))) == {"data", "rows"}
    for conv in (jaxdw.depthwise_conv, over) if kind is AxisType.Explicit else (over,):
        assert kernels(conv, "auto") == 0
        assert not own or kernels(conv, "pallas") > 0
    if not own:
        with pytest.raises(ValueError, match="`method='pallas'` on TPUs needs mesh axes that are all manual"):
            kernels(over, "pallas")


@pytest.mark.parametrize("spec", [P("data"), P(None, "x"), P("data", "x", None, "c"), P(None, None, None, "c")])
def test_a_transposed_convolution_is_sharded_as_its_types_say(spec):
    mesh = mesh_of(AxisType.Explicit, data=2, x=2, c=2)
    x, kernel, bias, dy = normal(0, (4, 8, 6, 4), (3, 3, 1, 4), (4,), (4, 16, 12, 4))
    conv = functools.partial(jaxdw.depthwise_conv_transpose, strides=2, padding=1, output_padding=1)
    y, gradients = with_gradients(conv)(dy, x, kernel, bias)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        shared = jax.jit(conv)(placed, kernel, bias)
        assert same_bits(shared, y) and jax.typeof(shared).sharding.spec == jax.typeof(placed).sharding.spec
        dx = jax.jit(jax.grad(lambda x: (conv(x, kernel, bias) * jax.device_put(dy, NamedSharding(mesh, spec))).sum()))
        assert same_bits(dx(placed), gradients[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P("data"), P(None, None, "c"), P("data", "x", "c")])
def test_a_causal_convolution_is_sharded(kind, spec):
    mesh = mesh_of(kind, data=2, x=2, c=2)
    x, kernel, bias, state = normal(0, (4, 16, 4), (4, 1, 4), (4,), (4, 3, 4))
    expected = jaxdw.causal_conv1d(x, kernel, bias)
    after = jaxdw.causal_conv1d(x, kernel, bias, state=state, return_state=True)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        if kind is AxisType.Explicit or "x" not in str(spec):  # over automatic axes the compiler cuts time
            assert same_bits(jax.jit(jaxdw.causal_conv1d)(placed, kernel, bias), expected)
        if "x" not in str(spec):  # a state joins the time axis
            before = jax.device_put(state, NamedSharding(mesh, spec))
            run = jax.jit(functools.partial(jaxdw.causal_conv1d, return_state=True))
            y, last = run(placed, kernel, bias, state=before)
            assert same_bits(y, after[0]) and same_bits(last, after[1])
            ids = jax.device_put(np.repeat([[0] * 5 + [1] * 11], 4, 0), NamedSharding(mesh, P(*spec[:1])))
            packed = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=np.asarray(ids))
            assert same_bits(jax.jit(jaxdw.causal_conv1d)(placed, kernel, bias, segment_ids=ids), packed)
