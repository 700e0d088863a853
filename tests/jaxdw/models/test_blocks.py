"""The parts of a MobileNet that Flax has otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdw.models.blocks import BatchNorm, Conventions, global_average_pool, relu6

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'jaxdw[bridge]'")

KINKS = np.array([-np.inf, -1, -0.0, 0.0, 1e-45, 3, 6, 6.0000005, 7, np.inf, np.nan], np.float32)


def test_relu6_and_its_slope_are_those_of_pytorch():
    x = torch.tensor(KINKS, requires_grad=True)
    expected = torch.nn.functional.relu6(x)
    expected.sum().backward()
    # XLA on CPU takes subnormal numbers for zero
    values, expected_values = np.asarray(relu6(jnp.asarray(KINKS))), expected.detach().numpy()
    normal = ~(np.abs(KINKS) < np.finfo(np.float32).tiny) | (KINKS == 0)
    assert np.array_equal(values[normal], expected_values[normal], equal_nan=True)
    finite = normal & ~np.isnan(KINKS)
    slopes = np.asarray(jax.vmap(jax.grad(relu6))(jnp.asarray(KINKS)))
    assert np.array_equal(slopes[finite], x.grad.numpy()[finite])


@pytest.mark.parametrize("n", [2, 3, 17])
def test_the_running_variance_averages_the_unbiased_variance(n):
    # Exact in float32: powers of two, and deviations whose squares add up to n (n - 1).
    x = np.zeros((n, 1), np.float32)
    x[0] = n
    norm = BatchNorm(1, Conventions("SAME", bn_epsilon=1.0, bn_momentum=0.5), rngs=nnx.Rngs(0))
    layer = torch.nn.BatchNorm1d(1, eps=1.0, momentum=0.5)
    norm(jnp.asarray(x))
    layer(torch.from_numpy(x))
    assert norm.mean[...] == 0.5 == layer.running_mean.item()
    unbiased = n  # ((n - 1)^2 + (n - 1)) / (n - 1)
    assert norm.var[...] == (1 + unbiased) / 2 == layer.running_var.item()


def test_the_variance_survives_a_large_mean():
    x = jnp.asarray([[4096.0], [4098.0]], jnp.float32)  # squares do not fit in 24 bits
    norm = BatchNorm(1, Conventions("SAME", bn_epsilon=0.0, bn_momentum=0.0), rngs=nnx.Rngs(0))
    assert norm(x).tolist() == [[-1.0], [1.0]]
    assert norm.var[...] == 2.0


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    norm = BatchNorm(2, Conventions("SAME", bn_epsilon=0.0, bn_momentum=0.9), rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = jnp.asarray([1.0, 2.0]), jnp.asarray([4.0, 16.0])
    norm.eval()
    assert norm(jnp.asarray([[3.0, 6.0]])).tolist() == [[1.0, 1.0]]
    assert norm.mean[...].tolist() == [1.0, 2.0] and norm.var[...].tolist() == [4.0, 16.0]


def test_pooling_keeps_the_batch_axes():
    x = jnp.arange(24.0).reshape(1, 2, 2, 3, 2)
    assert global_average_pool(x).tolist() == [[[5.0, 6.0], [17.0, 18.0]]]
