"""jax.taps has the very bits of PyTorch's convolution on CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from bridge import Case
from bridge.implementations import implementation
from bridge.implementations.jax_ import method
from bridge.numerics import same_bits
from bridge.selftest import random_case, taps_against_torch
from jaxdw.methods.taps import bias_comes_first
from tests import oracle


@pytest.mark.parametrize("rank, sample", [(1, 20), (2, 60), (3, 20)])
def test_taps_equals_torch_on_random_convolutions(rank, sample, seed, full):
    result = taps_against_torch(5 * sample if full else sample, seed, rank=rank)
    assert result.equal == result.elements > 0, "\n".join(result.misses)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_taps_is_the_chain_of_fused_multiply_adds_it_says_it_is(rank, multiplier, seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(40 if full else 8):
        case = random_case(rng, rank=rank, multiplier=multiplier)
        chain = oracle.fma_chain(case, bias_first=bias_comes_first(case.geometry))
        assert same_bits(implementation("jax.taps").run(case), chain).all(), case.geometry


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "SAME", "strides": 2},
        {"padding": 3},  # as wide as the kernel: PyTorch leaves oneDNN's depthwise kernel
        {"padding": ((0, 2), (3, 1))},
        {"padding": ((-1, 2), (1, -1))},
        {"padding": "CIRCULAR"},
        {"padding": "REFLECT", "kernel_dilation": 2},
        {"padding": 2, "input_dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_taps_equals_torch_with_every_kind_of_padding(options, bias, multiplier, seed):
    rng = np.random.default_rng(seed)
    case = Case(
        rng.standard_normal((2, 12, 11, 6), np.float32),
        rng.standard_normal((3, 3, 1, 6 * multiplier), np.float32),
        rng.standard_normal(6 * multiplier, np.float32) if bias else None,
        **options,
    )
    assert same_bits(implementation("jax.taps").run(case), implementation("torch.conv2d").run(case)).all()


#: What a program may do next with y, and XLA fuse with it.
FOLLOWING = {
    "scaled": lambda y: y * 2,
    "channels reversed": lambda y: y[..., ::-1],
    "channels repeated": lambda y: jnp.repeat(y, 2, -1),
    "channels first": lambda y: jnp.moveaxis(y, -1, 1),
    "stacked": lambda y: jnp.stack([y, -y], -1),
    "columns and channels exchanged": lambda y: jnp.swapaxes(y, -1, -2),
}


@pytest.mark.parametrize("following", FOLLOWING.values(), ids=FOLLOWING)
def test_taps_has_the_same_bits_whatever_follows_in_the_program(following, seed, full):
    rng = np.random.default_rng(seed)
    for number in range(100 if full else 6):
        case = random_case(rng, rank=number % 3 + 1, multiplier=1 + number % 2)
        taps = functools.partial(method("taps"), bias=case.bias, geometry=case.geometry, precision=None)
        alone = jax.jit(taps)(case.x, case.kernel)
        inside = jax.jit(lambda x, kernel, taps=taps: following(taps(x, kernel)))(case.x, case.kernel)
        assert same_bits(np.asarray(inside), np.asarray(following(alone))).all(), case.geometry


def test_products_that_two_boxes_share_are_fused_in_both(seed):
    """Seen with two outputs a channel: their loop held all boxes, and LLVM computed the common product before them."""
    rng = np.random.default_rng(seed)
    case = Case(
        rng.standard_normal((1, 6, 6, 4, 64), np.float32),
        rng.standard_normal((1, 2, 2, 1, 128), np.float32),
        strides=(1, 1, 3),
        padding=((2, 2), (2, 2), (0, 0)),
        kernel_dilation=2,
    )
    assert same_bits(implementation("jax.taps").run(case), oracle.fma_chain(case, bias_first=False)).all()


def test_taps_has_the_same_bits_inside_a_larger_jitted_program(seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 14, 14, 8), np.float32), rng.standard_normal((3, 3, 1, 8), np.float32)
    alone = jaxdw.depthwise_conv(x, kernel, method="taps")
    inside = jax.jit(lambda x, k: jaxdw.depthwise_conv(x * 1.0, k, method="taps") * 2.0)(x, kernel)
    assert (np.asarray(inside) == 2 * np.asarray(alone)).all()
