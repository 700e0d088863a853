"""PyTorch: `F.conv2d`, and the question's own unfold and multiply."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F

from bridge.case import DTYPES, Case
from bridge.implementations import Algorithm, Knob, declared, user
from bridge.numerics import Arithmetic
from jaxdw.geometry import Geometry

KNOBS = {
    "dtype": Knob("same", ("same", *DTYPES)),
    "layout": Knob("contiguous", ("contiguous", "channels_last")),
    "mkldnn": Knob("on", ("on", "off")),
    "threads": Knob("all", None),
}

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Geometry], torch.Tensor]


def run(compute: Compute, case: Case, *, dtype: str, layout: str, mkldnn: str, threads: str) -> np.ndarray:
    """compute(x, weight, bias, geometry) on tensors in PyTorch's own layout and the computation's dtype."""
    g = case.geometry
    working = getattr(torch, case.dtype.name if dtype == "same" else dtype)
    flat = case.x.reshape(-1, *case.x.shape[len(g.batch) :])
    x = to_tensor(np.moveaxis(flat, -1, 1)).to(working)
    weight = to_tensor(np.moveaxis(case.kernel, (-1, -2), (0, 1))).to(working)
    bias = None if case.bias is None else to_tensor(case.bias).to(working)
    if layout == "channels_last":
        if g.rank == 1:
            raise ValueError("`layout` is 'channels_last' in 1-D, expected 'contiguous': PyTorch has no such format")
        form = torch.channels_last if g.rank == 2 else torch.channels_last_3d
        x, weight = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
    with settings(mkldnn, threads), torch.inference_mode():
        y = compute(x, weight, bias, g)
    return to_numpy(y.to(getattr(torch, case.dtype.name)).movedim(1, -1)).reshape(g.output_shape)


@contextlib.contextmanager
def settings(mkldnn: str, threads: str) -> Iterator[None]:
    """PyTorch's global settings for one run; what they were before is restored, after an error too."""
    before = torch.backends.mkldnn.enabled, torch.get_num_threads()
    try:
        torch.backends.mkldnn.enabled = mkldnn == "on"
        if threads != "all":
            torch.set_num_threads(int(threads))
        yield
    finally:
        torch.backends.mkldnn.enabled = before[0]
        torch.set_num_threads(before[1])


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A copy as a contiguous tensor; bfloat16 travels as its bits."""
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous copy as an array; bfloat16 travels as its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def padding_for(x: torch.Tensor, g: Geometry) -> tuple[torch.Tensor, tuple[int, ...]]:
    """x, and the symmetric padding left to PyTorch; what PyTorch's `padding` cannot say is done here by copying."""
    if g.symmetric_padding is not None:
        return x, g.symmetric_padding
    for axis in range(g.rank):
        source = torch.from_numpy(g.padded_sources(axis).copy())
        inside = source >= 0
        shape = list(x.shape)
        shape[2 + axis] = len(source)
        padded = x.new_zeros(shape)
        padded.movedim(2 + axis, 0)[inside] = x.index_select(2 + axis, source[inside]).movedim(2 + axis, 0)
        x = padded
    return x, (0,) * g.rank


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """`F.conv1d`, `F.conv2d` or `F.conv3d` with `groups=C`."""
    x, padding = padding_for(x, g)
    function = (F.conv1d, F.conv2d, F.conv3d)[g.rank - 1]
    return function(x, weight, bias, g.strides, padding, g.kernel_dilation, g.channels)


def unfold(x: torch.Tensor, g: Geometry) -> torch.Tensor:
    """`(N, C, taps, L)`: the windows as columns. `F.unfold` in 1-D and 2-D; in 3-D, which it lacks, `Tensor.unfold`."""
    n, channels = x.shape[:2]
    x, padding = padding_for(x, g)
    if g.rank == 3:
        x = F.pad(x, [amount for low in reversed(padding) for amount in (low, low)])
        for axis, (span, dilation, stride) in enumerate(zip(g.spans, g.kernel_dilation, g.strides)):
            x = x.unfold(2 + axis, span, stride)[..., ::dilation]
        return x.reshape(n, channels, -1, g.taps).transpose(2, 3)
    unit = (1,) * (2 - g.rank)
    image = x.reshape(n, channels, *unit, *x.shape[2:])
    columns = F.unfold(
        image,
        unit + g.kernel_size,
        dilation=unit + g.kernel_dilation,
        padding=(0,) * len(unit) + padding,
        stride=unit + g.strides,
    )
    return columns.reshape(n, channels, g.taps, -1)


def unfold_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """The question's loop: one channel at a time, unfold, multiply the columns by the weights, fold."""
    outputs = []
    for channel in range(g.channels):
        features = slice(channel * g.multiplier, (channel + 1) * g.multiplier)
        columns = unfold(x[:, channel : channel + 1], g)[:, 0]
        y = torch.matmul(weight[features].reshape(g.multiplier, g.taps), columns)
        if bias is not None:
            y = y + bias[features, None]
        outputs.append(y)
    return _fold(torch.cat(outputs, dim=1), g)


def unfold_einsum(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
    """All channels at once: unfold, then one einsum over the taps."""
    y = torch.einsum("nctl,cmt->ncml", unfold(x, g), weight.reshape(g.channels, g.multiplier, g.taps))
    y = y.reshape(len(x), g.features, -1)
    return _fold(y if bias is None else y + bias[:, None], g)


def _fold(y: torch.Tensor, g: Geometry) -> torch.Tensor:
    """Columns `(N, C*M, L)` back to positions. `F.fold` with a 1x1 kernel copies; 3-D, which it lacks, is a reshape."""
    if g.rank == 2:
        return F.fold(y, g.output_spatial, 1)
    return y.reshape(*y.shape[:2], *g.output_spatial)


def _algorithm(compute: Compute, bias_is_rounded_twice: bool, about: str) -> Algorithm:
    def arithmetic(case: Case, *, dtype: str, layout: str, mkldnn: str, threads: str) -> Arithmetic:
        return declared(
            case,
            dtype,
            flushes_subnormals=False,
            output_roundings=2 if bias_is_rounded_twice and case.bias is not None else 1,
        )

    return Algorithm(functools.partial(run, compute), arithmetic, about)


ALGORITHMS = {
    "conv2d": _algorithm(conv, False, "F.conv1d, F.conv2d or F.conv3d with groups = channels"),
    "unfold_matmul": _algorithm(unfold_matmul, True, "a loop over channels: F.unfold, matmul, F.fold"),
    "unfold_einsum": _algorithm(unfold_einsum, True, "F.unfold, then one einsum over the taps"),
}


def user_algorithm(name: str, function: Callable[..., torch.Tensor]) -> Algorithm:
    """A user's function of tensors, channels first: x `(N, C, *spatial)`, weight `(C*M, 1, *kernel_size)`, bias."""

    def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Geometry) -> torch.Tensor:
        return user.call(name, function, (len(x), g.features, *g.output_spatial), x, weight, bias)

    return _algorithm(compute, True, name)


def environment() -> dict[str, str]:
    """What may change PyTorch's bits here."""
    return {
        "torch": torch.__version__,
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch threads": str(torch.get_num_threads()),
        "torch mkldnn": "on" if torch.backends.mkldnn.enabled else "off",
        "torch float32 matmul precision": torch.get_float32_matmul_precision(),
    }
