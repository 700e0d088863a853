"""jax.taps has the very bits of PyTorch's convolution on CPU."""

import numpy as np
import pytest

from bridge import Case
from bridge.implementations import implementation
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


def test_taps_has_the_same_bits_inside_a_larger_jitted_program(seed):
    import jax

    import jaxdw

    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 14, 14, 8), np.float32), rng.standard_normal((3, 3, 1, 8), np.float32)
    alone = jaxdw.depthwise_conv(x, kernel, method="taps")
    inside = jax.jit(lambda x, k: jaxdw.depthwise_conv(x * 1.0, k, method="taps") * 2.0)(x, kernel)
    assert (np.asarray(inside) == 2 * np.asarray(alone)).all()
