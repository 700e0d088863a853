"""Gradients of any pair: right ones pass, and a mistake in the backward pass is named where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge
from bridge import Verdict
from bridge.report.model import summary, why


class Theirs(torch.nn.Module):
    """A convolution with its norm, and tokens through a gated branch."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = torch.nn.BatchNorm2d(8, momentum=0.1)
        self.ln = torch.nn.LayerNorm(8)
        self.qkv = torch.nn.Linear(8, 24)
        self.up = torch.nn.Linear(8, 8)
        self.gamma = torch.nn.Parameter(torch.ones(8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.nn.functional.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        x = x + torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        x = x + self.gamma * torch.nn.functional.gelu(self.up(x))
        return self.head(x.mean(1))


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def normalized(x, axes, epsilon=1e-5, stop=False):
    m, v = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    m, v = jax.lax.stop_gradient((m, v)) if stop else (m, v)
    return (x - m) * jax.lax.rsqrt(v + epsilon)


@jax.custom_vjp
def doubled(x):
    return jax.nn.gelu(x, approximate=False)


doubled.defvjp(
    lambda x: jax.vjp(functools.partial(jax.nn.gelu, approximate=False), x), lambda back, dy: (back(2 * dy)[0],)
)


def ours(p, x, training=False, planted=""):
    w = p["conv.weight"].transpose(2, 3, 1, 0)
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, w, (2, 2), [(1, 1)] * 2, dimension_numbers=layout) + p["conv.bias"]
    if training:
        x = normalized(x, (0, 1, 2), stop=planted == "statistics")
    else:
        x = (x - p["bn.running_mean"]) * jax.lax.rsqrt(p["bn.running_var"] + 1e-5)
    x = jax.nn.relu(x * p["bn.weight"] + p["bn.bias"])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1, 8)
    y = normalized(x, -1, stop=planted == "norm") * p["ln.weight"] + p["ln.bias"]
    q, k, v = jnp.split(linear(p, "qkv", y), 3, -1)
    y = jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
    x = x + (jax.lax.stop_gradient(y) if planted == "branch" else y)
    y = (doubled if planted == "custom" else functools.partial(jax.nn.gelu, approximate=False))(linear(p, "up", x))
    gamma = p["gamma"]
    if planted == "scale":
        gamma = gamma + 0.5 * (gamma - jax.lax.stop_gradient(gamma))
    return linear(p, "head", (x + gamma * y).mean(1))


def compared(seed, training=False, planted=""):
    generator = torch.Generator().manual_seed(seed)
    theirs = Theirs()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(drawn + 0.5 if name.endswith(("var", "bn.weight", "ln.weight")) else 2 * drawn - 1)
    p = {name: jnp.asarray(value.numpy()) for name, value in theirs.state_dict().items()}
    x = np.random.default_rng(seed).standard_normal((2, 12, 12, 3), np.float32)
    kept = {name: value.clone() for name, value in theirs.state_dict().items()}
    with jax.numpy_rank_promotion("allow"):
        function = functools.partial(ours, training=training, planted=planted)
        found = bridge.model_parity(theirs, (function, p), x, gradients=True, training=training)
    assert all(torch.equal(value, kept[name]) for name, value in theirs.state_dict().items())
    assert theirs.training and theirs.gamma.requires_grad and theirs.gamma.grad is None
    return found


PARAMETERS = [name for name, _ in Theirs().named_parameters()]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("training", [False, True])
def test_every_gradient_of_a_right_port_passes(training, seed):
    found = compared(seed, training)
    assert found.gradients and found.verdict.passes and not found.left and not found.not_compared, summary(found)
    named = {layer.name for layer in found.layers}
    assert {f"gradient of {name}" for name in PARAMETERS} <= named


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("planted", "training", "where", "said"),
    [
        ("branch", False, "gradient", "JAX stops gradients in the model itself"),
        ("norm", False, "gradient through ln", "JAX stops gradients in the model itself"),
        ("statistics", True, "gradient through bn", "JAX's gradient is another one than PyTorch's batch norm gradient"),
        ("custom", False, "gradient through head.multiply", "JAX's gradient is 2 times PyTorch's"),
        ("scale", False, "gradient of gamma", "JAX's gradient is 1.5 times PyTorch's"),
    ],
)
def test_a_mistake_of_the_backward_pass_is_named(planted, training, where, said, seed):
    found = compared(seed, training, planted)
    first = found.first_wrong
    assert first is not None and first.verdict is Verdict.BUG, summary(found)
    assert first.name.startswith(where) and said in why(first), (first.name, why(first))
