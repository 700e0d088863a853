"""Ports with a transposed or a causal depthwise layer: one that is right, and one mistake in each."""

import numpy as np
import pytest
import torch
from flax import nnx

import bridge
import jaxdw
from bridge import Verdict
from bridge.report.model import summary, why


class Upsampling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 1)
        self.up = torch.nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6)

    def forward(self, x):
        return torch.relu(self.up(self.conv(x)))


class UpsamplingPort(nnx.Module):
    def __init__(self, rngs, *, flipped=False):
        self.conv = nnx.Conv(3, 6, (1, 1), rngs=rngs)
        self.up = jaxdw.nnx.DepthwiseConvTranspose(6, (4, 4), strides=2, padding=1, rngs=rngs)
        self.flipped = flipped

    def __call__(self, x):
        x = self.conv(x)
        if not self.flipped:
            return nnx.relu(self.up(x))
        kernel, bias = self.up.kernel[...], self.up.bias[...]
        return nnx.relu(jaxdw.depthwise_conv_transpose(x, kernel, bias, strides=2, padding=1, transpose_kernel=False))


class Mixing(torch.nn.Module):
    """The convolution of Mamba: padded at both ends, and cut."""

    def __init__(self):
        super().__init__()
        self.enter = torch.nn.Linear(5, 8)
        self.conv = torch.nn.Conv1d(8, 8, 4, padding=3, groups=8)
        self.leave = torch.nn.Linear(8, 5)

    def forward(self, x):
        hidden = self.conv(self.enter(x).transpose(1, 2))[..., : x.shape[1]]
        return self.leave(torch.nn.functional.silu(hidden).transpose(1, 2))


class MixingPort(nnx.Module):
    def __init__(self, rngs, *, at_the_end=False):
        self.enter, self.leave = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.conv = jaxdw.nnx.CausalConv1d(8, 4, rngs=rngs)
        self.at_the_end = at_the_end

    def __call__(self, x):
        hidden = self.enter(x)
        if self.at_the_end:
            hidden = jaxdw.depthwise_conv(hidden, self.conv.kernel[...], self.conv.bias[...], padding=[(0, 3)])
        else:
            hidden = self.conv(hidden)
        return self.leave(nnx.silu(hidden))


def compared(theirs, ours, shape, seed):
    torch.manual_seed(seed)
    module = theirs().eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32)))
    weights, manifest = bridge.to_flax(module, ours, settings=False)
    nnx.update(ours, weights)
    x = rng.standard_normal(shape).astype(np.float32)
    return bridge.model_parity(module, ours, x, weights=manifest)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "theirs, ours, shape, names",
    [
        (Upsampling, UpsamplingPort, (2, 7, 7, 3), ["conv", "up"]),
        (Mixing, MixingPort, (2, 9, 5), ["enter", "conv"]),
    ],
)
def test_a_port_with_the_layer_passes(theirs, ours, shape, names, seed):
    found = compared(theirs, ours(nnx.Rngs(0)), shape, seed)
    assert found.verdict.passes and not found.left and not found.not_compared, summary(found)
    assert [layer.name for layer in found.layers][:2] == names


@pytest.mark.parametrize(
    "theirs, ours, shape, layer, said",
    [
        (Upsampling, UpsamplingPort(nnx.Rngs(0), flipped=True), (2, 7, 7, 3), "up", "flipped"),
        (Mixing, MixingPort(nnx.Rngs(0), at_the_end=True), (2, 9, 5), "conv", "the padding at the end"),
    ],
)
def test_a_mistake_in_the_layer_is_named(theirs, ours, shape, layer, said, seed):
    found = compared(theirs, ours, shape, seed)
    assert found.first_wrong is not None and found.first_wrong.name == layer, summary(found)
    assert found.first_wrong.verdict is Verdict.CONVENTION and said in why(found.first_wrong), why(found.first_wrong)
