"""`jaxdw.nnx.DepthwiseConv` in Flax NNX: state, transformations, metadata, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdw.nnx import DepthwiseConv

X = np.random.default_rng(0).integers(-3, 4, (2, 6, 5, 3)).astype(np.float32)


def integers(key, shape, dtype):
    """Small integers: every sum is exact, so there is one right answer."""
    return jax.random.randint(key, shape, -3, 4).astype(dtype)


def layer(seed=0, **options):
    return DepthwiseConv(3, (3, 3), kernel_init=integers, bias_init=integers, rngs=nnx.Rngs(seed), **options)


def flax_layer(seed=0, **options):
    return nnx.Conv(
        3, 3, (3, 3), feature_group_count=3, kernel_init=integers, bias_init=integers, rngs=nnx.Rngs(seed), **options
    )


@pytest.mark.parametrize(
    "options", [{}, {"use_bias": False}, {"mask": np.eye(9, 3, dtype=np.float32).reshape(3, 3, 1, 3)}]
)
def test_the_state_of_one_loads_into_the_other(options):
    mine, flax = layer(1, **options), flax_layer(2, **options)
    expected, expected_flax = flax(X), mine(X)
    states = nnx.state(mine), nnx.state(flax)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    states = jax.tree.map(jnp.copy, states)
    nnx.update(mine, states[1])
    nnx.update(flax, states[0])
    assert np.array_equal(mine(X), expected) and np.array_equal(flax(X), expected_flax)


def test_the_layer_and_flax_agree_under_jit():
    run = nnx.jit(lambda layer, x: layer(x))
    assert np.array_equal(run(layer(), X), run(flax_layer(), X))


def test_gradients_are_those_of_flax_and_leave_the_mask_alone():
    mask = jnp.asarray(np.arange(27).reshape(3, 3, 1, 3) % 3 > 0, jnp.float32)
    gradient = nnx.jit(nnx.grad(lambda layer, x: layer(x).sum()))
    mine, flax = gradient(layer(mask=mask), X), gradient(flax_layer(mask=mask), X)
    assert sorted(mine) == ["bias", "kernel"]
    for name in mine:
        assert np.array_equal(mine[name][...], flax[name][...])
    assert (np.asarray(mine["kernel"][...])[np.asarray(mask) == 0] == 0).all()


def test_split_and_merge_give_the_layer_back():
    mine = layer(strides=(2, 1), padding=((1, 0), 1), channel_multiplier=2)
    graph, state = nnx.split(mine)
    assert hash(graph) == hash(nnx.split(layer(strides=(2, 1), padding=((1, 0), 1), channel_multiplier=2))[0])
    assert np.array_equal(nnx.merge(graph, state)(X), mine(X))


def test_a_layer_without_bias_can_be_given_one():
    mine = layer(use_bias=False)
    without = mine(X)
    mine.bias = nnx.Param(jnp.array([1.0, 2.0, 3.0]))
    assert np.array_equal(mine(X), without + jnp.array([[[[1.0, 2.0, 3.0]]]]))


def test_eval_shape_makes_no_arrays():
    shapes = nnx.eval_shape(lambda: layer(channel_multiplier=2))
    assert shapes.kernel.shape == (3, 3, 1, 6) and isinstance(shapes.kernel.get_value(), jax.ShapeDtypeStruct)


def test_an_ensemble_is_a_vmap_of_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def ensemble(key):
        return DepthwiseConv(3, (3, 3), kernel_init=integers, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 4)
    members = ensemble(keys)
    assert members.kernel.shape == (4, 3, 3, 1, 3)
    y = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(members, X)
    for key, member_y in zip(keys, y):
        assert np.array_equal(DepthwiseConv(3, (3, 3), kernel_init=integers, rngs=nnx.Rngs(key))(X), member_y)


def test_layers_scan():
    @nnx.vmap
    def stack(key):
        return DepthwiseConv(3, (3, 3), kernel_init=integers, rngs=nnx.Rngs(key))

    keys = jax.random.split(jax.random.key(0), 2)
    stacked = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, stack(keys))
    one, two = (DepthwiseConv(3, (3, 3), kernel_init=integers, rngs=nnx.Rngs(key)) for key in keys)
    assert np.array_equal(stacked, two(one(X)))


def test_the_window_function_may_be_a_module_with_parameters():
    class Scale(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.full((3, 3, 3), 2.0))

        def __call__(self, windows):
            return windows * jnp.broadcast_to(self.scale[...], windows.shape)

    mine = layer(window_fn=Scale(), use_bias=False)
    assert np.array_equal(mine(X), 2 * layer(use_bias=False)(X))
    gradient = nnx.grad(lambda layer, x: layer(x).sum())(mine, X)
    # y is linear in scale * kernel, so scale dL/dscale = kernel dL/dkernel
    kernel = mine.kernel[...][:, :, 0]
    assert np.array_equal(2 * gradient.window_fn.scale[...], kernel * gradient.kernel[...][:, :, 0])


def test_the_representation_tells_what_the_layer_does():
    text = repr(layer(strides=2, method="patches", channel_multiplier=2))
    for part in (
        "DepthwiseConv(",
        "features=3",
        "kernel_size=(3, 3)",
        "strides=2",
        "channel_multiplier=2",
        "'patches'",
    ):
        assert part in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharding_metadata_passes_through(kind):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(kind,))
    metadata = {
        "kernel_metadata": {"out_sharding": (None, None, None, "model"), "note": "kernel"},
        "bias_metadata": {"out_sharding": ("model",)},
    }
    with jax.set_mesh(mesh):
        mine, flax = layer(**metadata), flax_layer(**metadata)
        specs = nnx.get_partition_spec(nnx.state(mine))
        assert specs == nnx.get_partition_spec(nnx.state(flax))
        assert specs["kernel"].get_value() == P(None, None, None, "model") and specs["bias"].get_value() == P("model")
        assert mine.kernel[...].sharding == flax.kernel[...].sharding
    assert mine.kernel.get_metadata() == flax.kernel.get_metadata()
    assert mine.kernel.get_metadata()["note"] == "kernel"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_out_sharding_places_the_output(kind, jit, named):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P("data")) if named else P("data")

    def run(layer, x):
        y = layer(x, out_sharding=sharding)
        if kind == AxisType.Explicit:
            assert jax.typeof(y).sharding.spec == P("data", None, None, None)
        return y

    with jax.set_mesh(mesh):
        mine = layer()
        y = (nnx.jit(run) if jit else run)(mine, jnp.asarray(X))
        assert np.array_equal(y, mine(X))
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), y.ndim)


def test_a_spec_without_a_mesh_is_refused_as_in_flax():
    for run in (layer(), flax_layer()):
        with pytest.raises(ValueError, match="mesh context"):
            run(X, out_sharding=P("data"))
