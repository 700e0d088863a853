"""jax.taps has the very bits of PyTorch's convolution on CPU."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

import jaxdw
from bridge import Case
from bridge._implementations import implementation
from bridge._implementations.jax_ import method
from bridge.numerics import same_bits
from bridge.selftest import is_a_plain_loop, random_case, short_case, taps_against_torch
from jaxdw import native
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from tests import oracle


@pytest.mark.parametrize("rank, sample", [(1, 20), (2, 60), (3, 20)])
def test_taps_equals_torch_on_random_convolutions(rank, sample, seed, full):
    result = taps_against_torch(5 * sample if full else sample, seed, rank=rank)
    assert result.equal == result.elements > 0, "\n".join(result.misses)


@pytest.mark.parametrize("rank, sample, count", [(1, 6, 2000), (2, 6, 2000), (3, 3, 1000)])
def test_taps_equals_torch_on_inputs_shorter_than_the_kernel(rank, sample, count, seed, full):
    wanted, at_once = count if full else sample, 200
    for done in range(0, wanted, at_once):
        if done:
            jax.clear_caches()  # a program takes 3 MB
        result = taps_against_torch(min(at_once, wanted - done), seed + done, rank=rank, short=True)
        assert result.equal == result.elements > 0, "\n".join(result.misses)


@pytest.mark.parametrize(
    "rank, name", [(1, "torch.conv2d"), (2, "torch.conv2d"), (2, "torch.conv2d[layout=channels_last]")]
)
def test_the_gradient_by_x_equals_torchs_where_the_kernel_is_not_dilated(rank, name, seed, full):
    rng, ours, theirs = np.random.default_rng(seed), implementation("jax.taps"), implementation(name)
    for number in range(300 if full else 6):
        case = short_case(rng, rank=rank) if number % 2 else random_case(rng, rank=rank, multiplier=1)
        case = dataclasses.replace(case, kernel_dilation=1)
        dy = rng.standard_normal(case.geometry.output_shape, np.float32)
        assert (ours.input_gradient(case, dy) == theirs.input_gradient(case, dy)).all(), case.geometry


#: x, kernel_size, padding, strides, dilation, and whether the sum starts from the bias with AVX-512 and without.
BIASES = {
    "1x1 map, 5x5": ((1, 1, 1, 16), (5, 5), 2, 1, 1, False, False),
    "1-D, padding above the outputs": ((1, 1, 2), (6,), 3, 1, 1, False, False),
    "1-D, as many outputs as padding": ((1, 3, 2), (6,), 2, 1, 1, True, True),
    "1-D, kernel above the length": ((1, 3, 2), (5,), 2, 1, 1, True, True),
    "dilated, padding 5": ((3, 10, 13, 2), (5, 5), 5, 1, 2, True, False),
    "13x13, padding 6": ((1, 14, 14, 3), (13, 13), 6, 1, 1, True, False),
    "15x15, padding 7": ((1, 14, 14, 16), (15, 15), 7, 1, 1, False, False),
    "wide padding along the first axis": ((1, 14, 14, 3), (15, 3), ((7, 7), (1, 1)), 1, 1, True, True),
    "padding as wide as the kernel": ((1, 9, 9, 3), (3, 3), 3, 1, 1, False, False),
    "3-D": ((1, 5, 5, 5, 3), (3, 3, 3), 1, 1, 1, False, False),
    "asymmetric padding is made beforehand": ((1, 2, 2), (6,), ((3, 4),), 1, 1, True, True),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("at_once", [6, 4])
def test_the_sum_starts_from_the_bias_where_onednn_does(name, at_once, monkeypatch):
    x_shape, kernel_size, padding, strides, dilation, wide, narrow = BIASES[name]
    monkeypatch.setattr("jaxdw.onednn.outputs_at_once", lambda: at_once)
    kernel_shape = (*kernel_size, 1, x_shape[-1])
    geometry = Geometry.of(x_shape, kernel_shape, padding=padding, strides=strides, kernel_dilation=dilation)
    assert bias_comes_first(geometry) is (wide if at_once == 6 else narrow)


@pytest.mark.parametrize("name", BIASES)
def test_taps_equals_torch_where_the_place_of_the_bias_is_close(name, seed):
    x_shape, kernel_size, padding, strides, dilation, *_ = BIASES[name]
    rng = np.random.default_rng(seed)
    x, kernel, bias = (
        rng.standard_normal(s, np.float32) for s in (x_shape, (*kernel_size, 1, x_shape[-1]), x_shape[-1:])
    )
    case = Case(x, kernel, bias, padding=padding, strides=strides, kernel_dilation=dilation)
    assert same_bits(implementation("jax.taps").run(case), implementation("torch.conv2d").run(case)).all()


def test_onednns_plain_loop_is_known():
    """Of some wide padding, on both sides of the limit; its bits are others."""
    rng = np.random.default_rng(0)
    kinds = set()
    for size, kernel, channels in ((7, 7, 2), (7, 7, 3), (14, 9, 3), (14, 9, 4)):
        x = rng.standard_normal((1, size, size, channels), np.float32)
        case = Case(x, rng.standard_normal((kernel, kernel, 1, channels), np.float32), padding=kernel)
        same = same_bits(oracle.fma_chain(case, bias_first=False), implementation("torch.conv2d").run(case)).all()
        assert is_a_plain_loop(case.geometry) is not bool(same)
        kinds.add(bool(same))
    assert kinds == {True, False}


def test_onednn_without_avx512_is_followed():
    """In a process of its own, since oneDNN reads its limit when it starts."""
    program = (
        "from bridge.selftest import taps_against_torch\n"
        "result = taps_against_torch(5, 1, rank=1, short=True)\n"
        "assert result.equal == result.elements, result.misses\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_taps_is_the_chain_of_fused_multiply_adds_it_says_it_is(rank, multiplier, seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(40 if full else 5):
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


@pytest.fixture
def by_xla(monkeypatch):
    """Without the compiled kernels: programs that call them are in tests/jaxdw/native/test_programs.py."""
    jax.clear_caches()
    with monkeypatch.context() as patched:
        patched.setattr("jaxdw.primitive.is_available", lambda: False)
        yield
    jax.clear_caches()


#: What a program may do next with y, and XLA fuse with it.
FOLLOWING = {
    "scaled": lambda y: y * 2,
    "channels reversed": lambda y: y[..., ::-1],
    "channels repeated": lambda y: jnp.repeat(y, 2, -1),
    "channels first": lambda y: jnp.moveaxis(y, -1, 1),
    "stacked": lambda y: jnp.stack([y, -y], -1),
    "columns and channels exchanged": lambda y: jnp.swapaxes(y, -1, -2),
}
_KEEP_CHANNELS = (FOLLOWING["scaled"], FOLLOWING["channels repeated"], FOLLOWING["stacked"])


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("following", FOLLOWING.values(), ids=FOLLOWING)
def test_taps_has_the_same_bits_whatever_follows_in_the_program(following, seed, full):
    if jaxlib.version.__version_info__ >= (0, 12) and following not in _KEEP_CHANNELS:
        pytest.skip("an operation that moves channels takes the bits away on jaxlib 0.12: docs/versions.md")
    rng = np.random.default_rng(seed)
    for number in range(100 if full else 6):
        case = random_case(rng, rank=number % 3 + 1, multiplier=1 + number % 2)
        taps = functools.partial(method("taps"), bias=case.bias, geometry=case.geometry, precision=None)
        alone = jax.jit(taps)(case.x, case.kernel)
        inside = jax.jit(lambda x, kernel, taps=taps: following(taps(x, kernel)))(case.x, case.kernel)
        assert same_bits(np.asarray(inside), np.asarray(following(alone))).all(), case.geometry


def _standardised(a: jax.Array) -> jax.Array:
    axes = tuple(range(a.ndim - 1))
    centred = a - a.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + 1e-5)


#: What a program may do before, of x and of the kernel alike.
PRECEDING = {
    "centred": lambda a: a - a.mean(0, keepdims=True),
    "scaled": lambda a: a * 1.7 + 0.3,
    "standardised": _standardised,
    "softmax": lambda a: jax.nn.softmax(a, -1),
    "residual": lambda a: a + a * a * 0.5,
    "broadcast along positions": lambda a: jnp.broadcast_to(a[:, :1] * 1.3, a.shape),
    "repeated along channels": lambda a: jnp.repeat(a[..., : (a.shape[-1] + 1) // 2], 2, -1)[..., : a.shape[-1]] * 1.1,
}


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("preceding", PRECEDING.values(), ids=PRECEDING)
def test_what_the_convolution_reads_is_what_the_program_has(preceding, seed, full):
    """With its gradients; few taps too, of which XLA would compute the operands once for each tap."""
    rng = np.random.default_rng(seed)
    sizes = [((2, 7, 11, 24), (3, 3)), ((2, 40, 24), (2,)), ((2, 6, 5, 4), (2, 3)), ((1, 5, 5, 4, 9), (2, 1, 3))]
    for x_shape, kernel_size in sizes if full else sizes[:1] + [sizes[rng.integers(1, len(sizes))]]:
        x = rng.standard_normal(x_shape, np.float32)
        kernel = rng.standard_normal((*kernel_size, 1, x_shape[-1]), np.float32)
        conv = functools.partial(jaxdw.depthwise_conv, padding="VALID", strides=int(rng.integers(1, 4)), method="taps")

        def program(x, kernel, conv=conv):
            x, kernel = preceding(x), preceding(kernel)
            y, pull = jax.vjp(conv, x, kernel)
            dy = preceding(y)
            return x, kernel, dy, y, pull(dy)[0]

        x, kernel, dy, y, dx = jax.jit(program)(x, kernel)
        assert same_bits(np.asarray(y), np.asarray(conv(x, kernel))).all()
        (alone,) = jax.jit(lambda x, dy, k=kernel, conv=conv: jax.vjp(lambda x: conv(x, k), x)[1](dy))(x, dy)
        assert same_bits(np.asarray(dx), np.asarray(alone)).all()


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("padding", [1, 3])
def test_a_bias_that_is_a_product_is_rounded_first(padding, seed):
    """Padding 3: the bias is added last."""
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 7, 11, 24), np.float32), rng.standard_normal((3, 3, 1, 24), np.float32)
    a, b = rng.standard_normal((2, 24), np.float32)
    conv = functools.partial(jaxdw.depthwise_conv, padding=padding, method="taps")
    y = jax.jit(lambda x, kernel, a, b: conv(x, kernel, a * b))(x, kernel, a, b)
    assert same_bits(np.asarray(y), np.asarray(conv(x, kernel, a * b))).all()


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("channels", [4, 24])
def test_two_convolutions_of_the_same_operands_share_no_product(channels, seed):
    rng = np.random.default_rng(seed)
    x, kernel = (
        rng.standard_normal((1, 6, 7, channels), np.float32),
        rng.standard_normal((3, 3, 1, channels), np.float32),
    )

    def both(x, kernel):
        pads = (((1, 1), (1, 1)), ((2, 0), (0, 2)))
        return sum(jaxdw.depthwise_conv(x, kernel, padding=pad, method="taps") for pad in pads)

    assert same_bits(np.asarray(jax.jit(both)(x, kernel)), np.asarray(both(x, kernel))).all()


@pytest.mark.usefixtures("by_xla")
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


@pytest.mark.skipif(not native.is_available(), reason=native.status())
@pytest.mark.parametrize("special", ["subnormal", "infinite", "not a number", "zeros of both signs"])
def test_taps_equals_torch_on_special_values(special, seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 9, 10, 12), np.float32), rng.standard_normal((3, 3, 1, 12), np.float32)
    if special == "subnormal":
        x, kernel = x * np.float32(2.0**-70), kernel * np.float32(2.0**-72)
    elif special == "zeros of both signs":
        x, kernel = np.copysign(np.float32(0), x), np.round(kernel)
    else:
        kernel[0, 1, 0, ::3] = np.inf if special == "infinite" else np.nan
        x[0, 4, 5, ::2] = -kernel[0, 1, 0, 0]
    case = Case(x, kernel, padding=1)
    actual, expected = implementation("jax.taps").run(case), implementation("torch.conv2d").run(case)
    assert (np.isnan(actual) == np.isnan(expected)).all()
    assert same_bits(actual, expected)[~np.isnan(expected)].all()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("strides", [1, 2])
def test_torchs_gradient_by_x_is_a_chain_over_the_taps_of_the_kernel(rank, strides, seed):
    """docs/arithmetic.md names the order. That of `taps` is the reverse."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *(9,) * rank, 5), np.float32)
    kernel = rng.standard_normal((*(3,) * rank, 1, 5), np.float32)
    case = Case(x, kernel, strides=strides, padding=1)
    outputs = case.geometry.output_spatial
    dy = rng.standard_normal(case.geometry.output_shape, np.float32)
    padded = np.zeros((2, *(11,) * rank, 5), np.float32)
    for tap in np.ndindex(kernel.shape[:rank]):
        at = (slice(None), *(slice(t, t + (n - 1) * strides + 1, strides) for t, n in zip(tap, outputs)))
        padded[at] = oracle.fma(dy, np.broadcast_to(kernel[tap][0], dy.shape), padded[at])
    chain = padded[(slice(None), *(slice(1, -1),) * rank)]
    assert same_bits(implementation("torch.conv2d").input_gradient(case, dy), chain).all()
