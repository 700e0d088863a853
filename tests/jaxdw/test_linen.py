"""`jaxdw.linen.DepthwiseConv` in Flax Linen: scopes, partitioning metadata, submodules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxdw.linen import DepthwiseConv

X = np.random.default_rng(0).integers(-3, 4, (2, 6, 5, 3)).astype(np.float32)


def integers(key, shape, dtype):
    """Small integers: every sum is exact, so there is one right answer."""
    return jax.random.randint(key, shape, -3, 4).astype(dtype)


def test_a_checkpoint_of_a_model_with_flax_layers_loads_where_the_name_is_kept():
    class Model(nn.Module):
        depthwise: bool

        @nn.compact
        def __call__(self, x):
            options = {"kernel_init": integers, "strides": 2, "padding": 1}
            if self.depthwise:
                x = DepthwiseConv(3, (3, 3), name="Conv_0", **options)(x)
            else:
                x = nn.Conv(3, (3, 3), feature_group_count=3, **options)(x)
            return nn.Conv(4, (1, 1), name="pointwise", kernel_init=integers)(x)

    mine, flax = Model(True), Model(False)
    variables = flax.init(jax.random.key(0), X)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, mine.init(jax.random.key(0), X)))
    assert np.array_equal(mine.apply(variables, X), flax.apply(variables, X))


def test_partitioning_metadata_passes_through():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    bias_init = nn.with_partitioning(nn.initializers.zeros_init(), ("model",))
    options = {"kernel_init": kernel_init, "bias_init": bias_init}
    variables = DepthwiseConv(3, (3, 3), **options).init(jax.random.key(0), X)
    assert nn.get_partition_spec(variables) == {"params": {"kernel": P(None, None, None, "model"), "bias": P("model")}}
    flax = nn.Conv(3, (3, 3), feature_group_count=3, **options).init(jax.random.key(0), X)
    assert jax.tree.structure(variables) == jax.tree.structure(flax)
    plain = DepthwiseConv(3, (3, 3)).apply(nn.unbox(variables), X)
    assert np.array_equal(DepthwiseConv(3, (3, 3), **options).apply(variables, X), plain)


def test_shapes_are_known_without_arrays():
    shapes = jax.eval_shape(DepthwiseConv(3, (3, 3), channel_multiplier=2).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == {"params": {"kernel": (3, 3, 1, 6), "bias": (6,)}}


def test_an_ensemble_is_a_vmap_of_layers():
    members = nn.vmap(
        DepthwiseConv, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
    )
    y, variables = members(3, (3, 3), kernel_init=integers).init_with_output(jax.random.key(0), X)
    for index, member_y in enumerate(y):
        member = jax.tree.map(lambda array, index=index: array[index], variables)
        assert np.array_equal(DepthwiseConv(3, (3, 3)).apply(member, X), member_y)


def test_the_window_function_may_be_a_module_with_parameters():
    class Scale(nn.Module):
        @nn.compact
        def __call__(self, windows):
            scale = self.param("scale", nn.initializers.constant(2.0), (3, 3, 3))
            return windows * jnp.broadcast_to(scale, windows.shape)

    options = {"kernel_init": integers}
    layer = DepthwiseConv(3, (3, 3), window_fn=Scale(), **options)
    y, variables = layer.init_with_output(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables["params"]["window_fn"]) == {"scale": (3, 3, 3)}
    kernel = {"params": {"kernel": variables["params"]["kernel"], "bias": variables["params"]["bias"]}}
    assert np.array_equal(y, 2 * DepthwiseConv(3, (3, 3)).apply(kernel, X))
