"""Each kind of operation in a small port: it passes, and one mistake in it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

import bridge
from tests.bridge.model.test_ports import drawn, of


class Module(torch.nn.Module):
    """A function of the input and of named layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def transposed(p, x, kernel=lambda w: w[::-1, ::-1]):
    w = kernel(p["a.weight"].transpose(2, 3, 0, 1))
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, w, (1, 1), [(1, 2)] * 2, lhs_dilation=(2, 2), dimension_numbers=layout)
    return y + p["a.bias"]


def group_norm(p, x, groups=2):
    y = x.reshape(*x.shape[:3], groups, -1)
    m, v = y.mean((1, 2, 4), keepdims=True), y.var((1, 2, 4), keepdims=True)
    return ((y - m) * jax.lax.rsqrt(v + 1e-5)).reshape(x.shape) * p["a.weight"] + p["a.bias"]


def rms_norm(p, x, epsilon=1e-6):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon) * p["a.weight"]


def pooled(x, window=2, padding=0):
    sizes = (1, window, window, 1), (1, 2, 2, 1), ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, *sizes) / window**2


def scanned(p, x, decay=0.5):
    def step(h, row):
        h = decay * h + row @ p["a.weight"].T + p["a.bias"]
        return h, h

    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros((len(x), 4)), jnp.moveaxis(x, 1, 0))[1], 0, 1)


def looped(self, x):
    h, rows = torch.zeros(len(x), 4), []
    for row in x.unbind(1):
        h = 0.5 * h + self.a(row)
        rows.append(h)
    return torch.stack(rows, 1)


def masked(x, keep):
    return jax.nn.dot_product_attention(x[:, :, None], x[:, :, None], x[:, :, None], mask=keep)[:, :, 0]


KEEP = np.tri(5, dtype=bool)


def resized(method):
    return lambda p, x: jax.image.resize(x, (len(x), 12, 12, x.shape[3]), method)


def interpolated(**settings):
    return Module(lambda self, x: functional.interpolate(x, scale_factor=2, **settings))


IMAGES, TOKENS = (2, 6, 6, 4), (2, 5, 8)

#: PyTorch's module, the shape of the input, its port, a wrong port, and what is said of that.
RULES = {
    "transposed convolution": (
        lambda: Module(lambda self, x: self.a(x), a=torch.nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1)),
        IMAGES,
        transposed,
        lambda p, x: transposed(p, x, lambda w: w),
        "flipped in space",
    ),
    "group norm": (
        lambda: Module(lambda self, x: self.a(x), a=torch.nn.GroupNorm(2, 4)),
        IMAGES,
        group_norm,
        lambda p, x: group_norm(p, x, 4),
        "JAX has 4 groups, and PyTorch 2",
    ),
    "rms norm": (
        lambda: Module(lambda self, x: self.a(x), a=torch.nn.RMSNorm(8, eps=1e-6)),
        TOKENS,
        rms_norm,
        lambda p, x: rms_norm(p, x, 1e-3),
        "",
    ),
    "resize (nearest)": (
        lambda: interpolated(mode="nearest"),
        IMAGES,
        resized("nearest"),
        resized("bilinear"),
        "where PyTorch computes resize (nearest)",
    ),
    "resize (bilinear)": (
        lambda: interpolated(mode="bilinear"),
        IMAGES,
        resized("bilinear"),
        resized("bicubic"),
        "where PyTorch computes resize (bilinear)",
    ),
    "average pool": (
        lambda: Module(lambda self, x: functional.avg_pool2d(x, 2)),
        IMAGES,
        lambda p, x: pooled(x),
        lambda p, x: pooled(x, 4, 1),
        "where PyTorch computes average pool",
    ),
    "scan": (
        lambda: Module(looped, a=torch.nn.Linear(8, 4)),
        TOKENS,
        scanned,
        lambda p, x: scanned(p, x, 0.25),
        "JAX computes matrix product where PyTorch computes",
    ),
    "einsum": (
        lambda: Module(lambda self, x: torch.einsum("nlc,nmc->nlm", x, x)),
        TOKENS,
        lambda p, x: jnp.einsum("nlc,nmc->nlm", x, x),
        lambda p, x: jnp.einsum("nlc,nmc->nlm", x, x) / np.sqrt(8, dtype=np.float32),
        "where PyTorch computes nothing",
    ),
    "attention with a mask": (
        lambda: Module(
            lambda self, x: functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.from_numpy(KEEP))
        ),
        TOKENS,
        lambda p, x: masked(x, KEEP[None, None]),
        lambda p, x: masked(x, None),
        # and JAX the rest of the softmax, or nothing; PyTorch 2.15 computes attention as a whole
        ("where PyTorch computes add", "where PyTorch computes attention"),
    ),
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", RULES)
def test_a_right_operation_passes_and_a_wrong_one_is_named(name, seed):
    make, shape, right, wrong, said = RULES[name]
    theirs = drawn(make(), seed)
    p = of(theirs) or {"none": jnp.ones(1)}
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    with jax.numpy_rank_promotion("allow"):
        found = bridge.model_parity(theirs, (right, p), x)
        assert found.verdict.passes and not found.left and not found.not_compared, found.layers
        first = bridge.model_parity(theirs, (wrong, p), x).first_wrong
    words = (said,) if isinstance(said, str) else said
    assert first is not None and any(each in first.cause for each in words), first and first.cause
