"""Axes of size zero, of the arrays or of `vmap`: results and derivatives are empty or zero, and never an error."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import PartitionSpec

import jaxdw
from jaxdw import sharding
from jaxdw.methods import METHODS
from tests.programs import release_programs


def drop_in(x, kernel, bias):
    axes = "DHW"[3 - x.ndim + 2 :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    y = jaxdw.conv_general_dilated(
        x, kernel, (1,) * len(axes), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )
    return y + jnp.broadcast_to(bias, y.shape)


def on_a_mesh(x, kernel, bias):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    return sharding.depthwise_conv(x, kernel, bias, spec=PartitionSpec(None, "rows"), mesh=mesh)


def contracted(extraction):
    return lambda x, kernel, bias: jaxdw.contract(
        jaxdw.unfold(x, kernel.shape[:-2], method=extraction, strides=2), kernel, bias
    )


def folded(x, kernel, bias):
    windows = jaxdw.unfold(x, kernel.shape[:-2], padding=1)
    weights = jnp.broadcast_to(kernel[..., 0, : x.shape[-1]], windows.shape)
    y = jaxdw.fold(windows * weights, x.shape[1:-1], padding=1)
    return y + jnp.broadcast_to(bias[: x.shape[-1]], y.shape)


def mapped_over_rows(x, kernel, bias):
    def fn(windows):
        return jaxdw.contract(windows, kernel, bias)

    return jaxdw.map_windows(fn, x, kernel.shape[:-2], rows_per_step=2)


def causal(packed):
    """Rows of an image are sequences, too."""

    def run(x, kernel, bias):
        ids = jnp.zeros(x.shape[:-1], np.int32) if packed else None
        return jaxdw.causal_conv1d(x, kernel.reshape(-1, *kernel.shape[-2:])[:3], bias, segment_ids=ids)

    return run


def one_step(x, kernel, bias):
    taps = kernel.reshape(-1, *kernel.shape[-2:])[:3]
    state = jnp.ones((*x.shape[:-2], 2, x.shape[-1]), x.dtype)
    return jaxdw.causal_conv1d_step(x[..., 0, :], state, taps, bias)[0]


def with_epilogue(x, kernel, bias):
    epilogue = jaxdw.Epilogue(bias, bias, None, "silu")
    return jaxdw.depthwise_conv(x, kernel, None, epilogue=epilogue)


#: Each takes x `(batch, *spatial, C)`, kernel and bias.
FUNCTIONS = {
    **{
        f"depthwise_conv by {method}": lambda x, kernel, bias, method=method: jaxdw.depthwise_conv(
            x, kernel, bias, method=method, padding=1, strides=2
        )
        for method in ("auto", *METHODS)
    },
    "windowed_conv": lambda x, kernel, bias: jaxdw.windowed_conv(lambda w: w * abs(w), x, kernel, bias),
    "unfold and contract": contracted("slices"),
    "patches and contract": contracted("patches"),
    "fold": folded,
    "transposed": lambda *arrays: jaxdw.depthwise_conv_transpose(*arrays, strides=2, padding=1),
    "transposed, circular": lambda *arrays: jaxdw.depthwise_conv_transpose(*arrays, strides=2, padding="CIRCULAR"),
    "causal": causal(packed=False),
    "causal, packed": causal(packed=True),
    "one step": one_step,
    "epilogue": with_epilogue,
    "map_windows": mapped_over_rows,
    "drop-in": drop_in,
    "sharded": on_a_mesh,
}


@st.composite
def empty_arrays(draw):
    """x, kernel and bias of ones with the axes that `vmap` maps, at least one of size zero; the batch may be too."""
    rank = draw(st.integers(1, 2))
    channels, multiplier = draw(st.sampled_from([2, 9])), draw(st.integers(1, 2))
    batch, count = draw(st.sampled_from([(0, 3), (1, 0), (2, 0), (0, 0)]))
    spatial = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    shapes = (batch, *spatial, channels), (*(3,) * rank, 1, channels * multiplier), (channels * multiplier,)
    mapped = draw(st.sampled_from([m for m in np.ndindex(2, 2, 2) if any(m)]))
    axes = [draw(st.integers(0, len(shape))) if m else None for shape, m in zip(shapes, mapped)]
    arrays = [
        np.ones(shape if axis is None else (*shape[:axis], count, *shape[axis:]), np.float32)
        for shape, axis in zip(shapes, axes)
    ]
    return arrays, axes, shapes, count


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_to_sum_gives_zeros_and_empty_arrays(name, full):
    fn = FUNCTIONS[name]
    if name == "sharded" and jax.__version_info__ < (0, 9):
        pytest.skip("JAX 0.8 cannot batch the sum over devices in a gradient inside of `shard_map`: docs/versions.md")

    @hypothesis.settings(max_examples=100 if full else 3)
    @given(empty_arrays())
    def check(problem):
        release_programs()
        arrays, axes, shapes, count = problem
        one = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))

        def mapped(*arrays):
            return jax.vmap(fn, axes)(*arrays)

        def value_and_gradients(*arrays):
            tangent = jax.jvp(mapped, arrays, arrays)[1]
            y, pull = jax.vjp(mapped, *arrays)
            # each sample's own gradient, which reaches the batching rules of the derivatives
            of_each = jax.vmap(jax.grad(lambda *arrays: fn(*arrays).sum(), (0, 1, 2)), axes)(*arrays)
            return y, tangent, pull(y), of_each

        y, tangent, gradients, of_each = jax.jit(value_and_gradients)(*arrays)
        assert y.shape == tangent.shape == (count, *one.shape) and y.dtype == tangent.dtype == np.float32
        for array, gradient in zip(arrays, gradients):
            assert (gradient.shape, gradient.dtype) == (array.shape, array.dtype)
            assert not gradient.any()
        for shape, gradient in zip(shapes, of_each):
            assert gradient.shape == (count, *shape)
            assert not gradient.any()

    check()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_second_derivatives_of_no_samples_are_empty(method):
    kernel, x = jnp.ones((3, 1, 2)), jnp.zeros((0, 1, 8, 2))

    def loss(kernel, x):
        return (jaxdw.depthwise_conv(x, kernel, method=method) ** 2).sum()

    of_each = jax.jit(jax.vmap(jax.hessian(loss, (0, 1)), (None, 0)))(kernel, x)
    assert of_each[0][1].shape == (0, 3, 1, 2, 1, 8, 2)
    of_all = jax.jit(jax.hessian(lambda kernel: jax.vmap(loss, (None, 0))(kernel, x).sum()))(kernel)
    assert of_all.shape == (3, 1, 2, 3, 1, 2) and not of_all.any()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_bias_is_all_there_is_where_every_tap_reads_padding(method):
    x, kernel, bias = jnp.ones((2, 0, 9)), jnp.ones((3, 1, 18)), jnp.arange(18.0)
    y = jaxdw.depthwise_conv(x, kernel, bias, padding=2, method=method)
    assert y.shape == (2, 2, 18) and (y == jnp.broadcast_to(bias, y.shape)).all()
    kernels = jnp.ones((0, 3, 1, 18))
    assert jax.vmap(lambda k: jaxdw.depthwise_conv(x, k, bias, padding=2, method=method))(kernels).shape == (
        0,
        2,
        2,
        18,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one sequence", "packed"])
def test_a_sequence_without_a_position_has_gradients_of_zero(packed):
    def loss(x, kernel, bias):
        return causal(packed)(x, kernel, bias).sum()

    arrays = jnp.zeros((2, 0, 3)), jnp.ones((4, 1, 3)), jnp.ones(3)
    for gradient, array in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), arrays):
        assert gradient.shape == array.shape and not gradient.any()
