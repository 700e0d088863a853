"""Windows in PyTorch: the bits of its own convolutions, any function of windows, gradients, bounded memory."""

import ctypes
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import torch_windows

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ROOT = Path(__file__).parent.parent.parent

WINDOWED = {
    1: torch_windows.windowed_conv1d,
    2: torch_windows.windowed_conv2d,
    3: torch_windows.windowed_conv3d,
}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}


def draw(rng, rank, dtype, form):
    """Draw the arguments of a convolution: kernels of 1 to 8 (1 to 6, 1 to 3), strides and dilation 1 to 3, padding
    from none to more than the kernel or a word, multiplier 1 to 3, with and without a bias.
    """
    while True:
        kernel = [rng.randint(1, {1: 8, 2: 6, 3: 3}[rank]) for _ in range(rank)]
        stride, dilation = ([rng.choice([1, 1, 2, 3]) for _ in range(rank)] for _ in range(2))
        padding = [rng.choice([0, k // 2, k // 2 * d, rng.randint(0, k + 1)]) for k, d in zip(kernel, dilation)]
        if max(stride) == 1 and rng.random() < 0.2:
            padding = rng.choice(["same", "valid"])
        channels, multiplier = rng.choice([2, 3, 4, 8, 15, 16, 17, 32, 48]), rng.choice([1, 1, 1, 2, 3])
        if (rank, dtype, form) == (3, torch.bfloat16, torch.channels_last_3d):
            multiplier = 1  # F.conv3d of torch 2.13 crashes for some paddings with another
        size = {1: 50, 2: 24, 3: 8}[rank]
        spatial = [rng.randint(1, size) for _ in range(rank)]
        amounts = [0] * rank if padding == "valid" else [10**6] * rank if padding == "same" else padding
        if all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(spatial, amounts, dilation, kernel)):
            break
    x = torch.randn(rng.choice([1, 1, 2, 3, 16]), channels, *spatial).to(dtype)
    weight = torch.randn(channels * multiplier, 1, *kernel).to(dtype)
    if form != torch.contiguous_format:
        x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    bias = torch.randn(channels * multiplier).to(dtype) if rng.random() < 0.6 else None
    return x, weight, bias, stride, padding, dilation


def same_bits(a, b):
    """Return whether two tensors of one dtype have the same bits: -0 and 0 differ, and NaN equals itself."""
    of = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(of), b.contiguous().view(of))


def compare(rank, layout, dtype, count, seed):
    """Return the cases that have other bits than PyTorch's convolution, each with the kernels that oneDNN ran."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    form = FORMS[rank] if layout == "channels last" else torch.contiguous_format
    misses = []
    with torch.inference_mode():
        for _ in range(count):
            x, weight, bias, *numbers = draw(rng, rank, dtype, form)
            y = WINDOWED[rank](x, weight, bias, *numbers)
            expected = CONV[rank](x, weight, bias, *numbers, x.shape[1])
            assert y.shape == expected.shape and y.is_contiguous() == expected.is_contiguous()
            if not same_bits(y, expected):
                kernels = kernels_of(lambda: CONV[rank](x, weight, bias, *numbers, x.shape[1]))  # noqa: B023
                misses.append((kernels, len(weight) // x.shape[1], x.shape, weight.shape, bias is not None, *numbers))
    return misses


def kernels_of(call):
    """Return the kernels that oneDNN runs for convolutions, by what it prints itself."""
    libc = ctypes.CDLL(None)
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        libc.fflush(None)
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                call()
        finally:
            libc.fflush(None)
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return re.findall(r",exec,cpu,convolution,([^,]+),", file.read().decode())


def unexplained(misses, layout, dtype):
    """Drop the misses that docs/pytorch.md lists, by the kernel that oneDNN ran."""

    def is_known(kernels, multiplier, x_shape):
        gemm = ("x64:gemm:",) if len(x_shape) == 5 else ()
        if layout != "channels last":
            amx = HAS_AMX and dtype == torch.bfloat16 and multiplier > 1 and bool(kernels)
            return amx and all(name.startswith(gemm) or name.endswith("_amx") for name in kernels)
        known = ("brg_conv_fwd:",) if multiplier > 1 else ("jit_bf16:", *gemm)
        return all(name.startswith(known) for name in kernels)

    return [miss for miss in misses if not is_known(*miss[:3])]


CPUS = Path("/proc/cpuinfo")
HAS_AMX = CPUS.exists() and "amx_bf16" in CPUS.read_text()
KINDS = [(1, "contiguous"), (2, "contiguous"), (2, "channels last"), (3, "contiguous"), (3, "channels last")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, layout", KINDS)
def test_windows_have_the_bits_of_pytorchs_convolution(rank, layout, dtype, seed, full):
    misses = compare(rank, layout, dtype, 2000 if full else 6, seed)
    print(f"{len(misses)} with other bits, all by a kernel that is known to")
    assert unexplained(misses, layout, dtype) == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("limits", [("AVX2", "avx2"), ("SSE41", "default")], ids=str)
def test_processors_without_avx512_are_followed(limits, full):
    """In a process of its own, since oneDNN and PyTorch read their limits when they start."""
    program = (
        "import torch\n"
        "from tests.bridge.test_torch_windows import KINDS, compare, unexplained\n"
        f"for rank, layout in KINDS[:3]:\n"
        f"    misses = compare(rank, layout, torch.float32, {500 if full else 12}, 1)\n"
        "    assert unexplained(misses, layout, torch.float32) == [], misses\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limits[0], "ATEN_CPU_CAPABILITY": limits[1]}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)


#: x, kernel_size, stride, padding, multiplier: what PyTorch or oneDNN decides by size.
DECISIONS = {
    "1x1 with a stride": ((1, 3, 9, 9), (1, 1), 2, 0, 1),
    "oneDNN's plain loop": ((1, 2, 7, 7), (7, 7), 1, 7, 1),
    "oneDNN's plain loop, multiplier": ((1, 2, 14, 14), (13, 13), 1, 6, 2),
    "one output": ((1, 4, 3, 3), (3, 3), 1, 0, 1),
    "one channel": ((1, 1, 9, 9), (3, 3), 1, 1, 1),
    "one channel, many images": ((16, 1, 30, 30), (3, 3), 1, 1, 1),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", DECISIONS)
def test_the_bits_are_kept_where_pytorch_decides_by_size(name, threads, seed):
    x_shape, kernel, stride, padding, multiplier = DECISIONS[name]
    torch.manual_seed(seed)
    features = x_shape[1] * multiplier
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dilation in (1, 2) if x_shape[2] == 9 else (1,):
            x, weight, bias = torch.randn(x_shape), torch.randn(features, 1, *kernel), torch.randn(features)
            y = torch_windows.windowed_conv2d(x, weight, bias, stride, padding, dilation)
            assert same_bits(y, F.conv2d(x, weight, bias, stride, padding, dilation, x_shape[1])), dilation
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows_per_step", [None, 1, 4])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_window_fn_gets_the_windows_of_unfold(form, rows_per_step, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 3, 9, 8, dtype=torch.float64).contiguous(memory_format=form), torch.randn(6, 1, 3, 2)
    weight, options = weight.double(), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    seen = []

    def scaled(windows):
        seen.append(windows)
        return windows * windows.abs().amax((2, 3), keepdim=True)

    y = torch_windows.windowed_conv2d(x, weight, **options, window_fn=scaled, rows_per_step=rows_per_step)
    columns = F.unfold(x, (3, 2), **options).view(2, 3, 3, 2, *y.shape[2:])
    assert torch.equal(torch.cat(seen, 4), columns)
    expected = torch.einsum("nchwop,cmhw->ncmop", scaled(columns), weight.view(3, 2, 3, 2)).reshape(y.shape)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_window_fn_may_write_to_its_windows(form, dilation, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 3, 9, 8).contiguous(memory_format=form), torch.randn(3, 1, 3, 3)
    before = x.clone()
    y = torch_windows.windowed_conv2d(x, weight, None, 1, 1, dilation, lambda windows: windows.mul_(2))
    assert same_bits(y, F.conv2d(2 * x, weight, None, 1, 1, dilation, 3)) and same_bits(x, before)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("rows_per_step", [None, 2])
def test_gradients_pass_through_windows_and_steps(rank, rows_per_step, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(1, 2, *(5, 3, 3)[:rank]).double(), torch.randn(4, 1, *(3, 2, 2)[:rank]).double()
    inputs = [tensor.requires_grad_() for tensor in (x, weight, torch.randn(4).double())]

    def squares(*tensors):
        return WINDOWED[rank](*tensors, padding=1, window_fn=torch.square, rows_per_step=rows_per_step)

    assert torch.autograd.gradcheck(squares, inputs, fast_mode=True)


def test_gradients_without_a_function_are_those_of_the_convolution(seed):
    torch.manual_seed(seed)
    inputs = [torch.randn(shape).double().requires_grad_() for shape in ((2, 3, 8, 9), (3, 1, 3, 3), (3,))]
    y = torch_windows.windowed_conv2d(*inputs, stride=2, padding=1)
    expected = F.conv2d(*inputs, stride=2, padding=1, groups=3)
    dy = torch.randn_like(y)
    for own, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_steps_change_no_bit_and_bound_memory(form, seed, monkeypatch):
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(2, 8, 40, 33).contiguous(memory_format=form), torch.randn(8, 1, 5, 5), torch.randn(8)
    monkeypatch.setattr(torch_windows, "STEP_BYTES", 2 * 8 * 25 * 33 * 4 * 3)
    rows = []

    def same(windows):
        rows.append(windows.shape[4])
        return windows

    y = torch_windows.windowed_conv2d(x, weight, bias, padding=2, window_fn=same)
    assert rows == [3] * 13 + [1]
    assert same_bits(y, F.conv2d(x, weight, bias, padding=2, groups=8)) and y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_module_loads_the_state_of_pytorchs_and_has_its_bits(rank, padding_mode, seed):
    torch.manual_seed(seed)
    own = {
        1: torch_windows.WindowedDepthwiseConv1d,
        2: torch_windows.WindowedDepthwiseConv2d,
        3: torch_windows.WindowedDepthwiseConv3d,
    }[rank]
    theirs = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    conv = theirs(4, 8, 3, padding="same", dilation=2, groups=4, padding_mode=padding_mode)
    layer = own(4, 8, 3, padding="same", dilation=2, padding_mode=padding_mode)
    layer.load_state_dict(conv.state_dict())
    x = torch.randn(3, 4, *(11, 10, 9)[:rank])
    assert same_bits(layer(x), conv(x)) and same_bits(layer(x[0]), conv(x[0]))
    layer.window_fn = torch.square
    assert not torch.equal(layer(x), conv(x))


def test_a_module_as_window_fn_is_trained_with_the_layer():
    layer = torch_windows.WindowedDepthwiseConv2d(4, 4, 3, window_fn=nn.PReLU(4), rows_per_step=2)
    layer(torch.randn(2, 4, 8, 8)).sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == {
        "weight",
        "bias",
        "window_fn.weight",
    }


REFUSED = {
    "`x` has shape (3, 3)": {"x": torch.ones(3, 3)},
    "`x` is a list": {"x": [1.0]},
    "`x` has dtype torch.int64": {
        "x": torch.ones(1, 2, 5, 5, dtype=torch.int64),
        "weight": torch.ones(2, 1, 3, 3).long(),
    },
    "`weight` has shape (2, 2, 3, 3), expected (C*M, 1, *kernel_size)": {"weight": torch.ones(2, 2, 3, 3)},
    "`weight` is torch.float64 on cpu, expected torch.float32 on cpu": {"weight": torch.ones(2, 1, 3, 3).double()},
    "`bias` has shape (3,), expected (2,)": {"bias": torch.ones(3)},
    "`stride` is 0, expected a positive int or 2 of them": {"stride": 0},
    "`dilation` is 1.5, expected integers": {"dilation": 1.5},
    "`stride` is None, expected integers": {"stride": None},
    "`padding` is [1, None], expected integers": {"padding": [1, None]},
    "`padding` is (1, 2, 3), expected an int of at least 0 or 2 of them": {"padding": (1, 2, 3)},
    "`padding` is 'same' with `stride` (2, 2)": {"padding": "same", "stride": 2},
    "`padding` is 'full'": {"padding": "full"},
    "`x` has shape (1, 2, 5, 5), with padding (5, 5)": {"dilation": 3},
    "`window_fn` is 3, expected a function": {"window_fn": 3},
    "`window_fn` returned torch.float32 of shape (1, 2, 3, 3, 3), expected": {"window_fn": lambda w: w[..., 0]},
    "`window_fn` returned a NoneType, expected a tensor": {"window_fn": lambda w: None},
    "`rows_per_step` is 0, expected a positive int or None": {"rows_per_step": 0},
}


def test_no_image_gives_no_output_and_gradients_of_zero():
    x, weight, bias = torch.ones(0, 2, 5, 5), torch.ones(2, 1, 3, 3, requires_grad=True), torch.ones(2)
    y = torch_windows.windowed_conv2d(x, weight, bias, padding=1)
    y.sum().backward()
    assert y.shape == (0, 2, 5, 5) and not weight.grad.any()


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_by_name(message):
    arguments = {"x": torch.ones(1, 2, 5, 5), "weight": torch.ones(2, 1, 3, 3), **REFUSED[message]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        torch_windows.windowed_conv2d(**arguments)


def test_groups_of_another_number_are_refused():
    with pytest.raises(ValueError, match="`groups` is 1, expected 4"):
        torch_windows.WindowedDepthwiseConv2d(4, 4, 3, groups=1)


def test_it_runs_without_jax():
    program = (
        "import sys, torch\n"
        "from bridge.torch_windows import WindowedDepthwiseConv2d\n"
        "WindowedDepthwiseConv2d(4, 4, 3, padding=4, window_fn=torch.abs)(torch.ones(1, 4, 8, 8))\n"
        "print({'jax', 'jaxlib', 'flax', 'ml_dtypes'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
