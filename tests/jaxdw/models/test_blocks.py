"""The parts of a MobileNet that Flax has otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdw.epilogue import hard_swish
from jaxdw.models.blocks import BatchNorm, Conventions, ConvNormAct, relu6
from jaxdw.models.layers import GlobalAveragePool
from jaxdw.native import is_available

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
    assert GlobalAveragePool()(x).tolist() == [[[5.0, 6.0], [17.0, 18.0]]]


@pytest.mark.skipif(not is_available(), reason="without the kernels XLA flushes subnormal numbers")
@pytest.mark.parametrize("activation, name", [(relu6, "relu6"), (nnx.relu, "relu"), (hard_swish, "hardswish")])
def test_a_depthwise_unit_in_inference_has_the_bits_of_pytorch(activation, name, seed):
    rng = np.random.default_rng(seed)
    options = {"kernel": 3, "stride": 2, "depthwise": True, "activation": activation, "rngs": nnx.Rngs(0)}
    unit = ConvNormAct(24, 24, Conventions("SYMMETRIC", bn_epsilon=1e-3, bn_momentum=0.9), **options)
    unit.eval()
    layer = torch.nn.Sequential(
        torch.nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), torch.nn.BatchNorm2d(24, eps=1e-3)
    ).eval()
    names = {"running_mean": "mean", "running_var": "var", "weight": "scale", "bias": "bias"}
    for theirs, ours in names.items():
        values = abs(rng.standard_normal(24, np.float32))
        getattr(unit.norm, ours)[...] = jnp.asarray(values)
        getattr(layer[1], theirs).data = torch.tensor(values)
    layer[0].weight.data = torch.tensor(np.asarray(unit.conv.kernel[...])).permute(3, 2, 0, 1)
    x = rng.standard_normal((2, 15, 14, 24), np.float32)
    with torch.inference_mode():
        expected = getattr(torch.nn.functional, name)(layer(torch.tensor(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert np.array_equal(np.asarray(nnx.jit(lambda unit, x: unit(x))(unit, x)), expected.numpy())
