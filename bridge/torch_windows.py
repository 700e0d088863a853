"""Work on the windows of a depthwise convolution in PyTorch, and keep the bits of `F.conv1d`, `F.conv2d`, `F.conv3d`.

The windows are laid side by side as an image, and the same convolution of PyTorch adds them up: one window per output,
no padding. So the same kernel of the same library adds the same products in the same order. Needs PyTorch alone.
docs/pytorch.md says where the bits were compared, and which kernels PyTorch chooses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from jaxdw import onednn

#: Bytes of windows in one step if `rows_per_step` is None.
STEP_BYTES = 8 << 20

WindowFn = Callable[[torch.Tensor], torch.Tensor]


def windowed_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    window_fn: WindowFn | None = None,
    *,
    rows_per_step: int | None = None,
) -> torch.Tensor:
    """Return `F.conv1d(x, weight, bias, stride, padding, dilation, groups=C)` of the windows that `window_fn` returns.

    x is `(N, C, L)` or `(C, L)`, weight `(C*M, 1, k)`, the windows `(N, C, k, positions)`. See `windowed_conv2d`.

    >>> x, weight = torch.arange(6.0).reshape(1, 1, 6), torch.ones(1, 1, 3)
    >>> windowed_conv1d(x, weight, window_fn=lambda windows: windows - windows.mean(2, keepdim=True))
    tensor([[[0., 0., 0., 0.]]])
    """
    return _windowed_conv(1, x, weight, bias, stride, padding, dilation, window_fn, rows_per_step)


def windowed_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    window_fn: WindowFn | None = None,
    *,
    rows_per_step: int | None = None,
) -> torch.Tensor:
    """Return `F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)` of the windows that `window_fn` returns.

    Without `window_fn`, or if it returns what it gets, the bits are those of `F.conv2d` (docs/pytorch.md has the
    exceptions). Where the compiled kernels of jaxdw are built and no window is needed, `bridge.torch_ops` is faster.

    Args:
      x: `(N, C, H, W)` or `(C, H, W)`, contiguous or channels last in memory; the output has the same layout.
      weight: `(C*M, 1, kh, kw)`, of x's dtype; output channel c*M + m reads input channel c.
      bias: `(C*M,)` or None.
      stride, padding, dilation: as of `F.conv2d`; "valid" and "same" too.
      window_fn: any differentiable function of windows `(N, C, kh, kw, rows, columns)`, zero where they reach into the
        padding. `F.unfold(x, ...).view(N, C, kh, kw, rows, columns)` are the same windows. It returns a tensor of the
        same shape and dtype. It is called for some output rows at a time, so it must treat all rows alike.
      rows_per_step: output rows per call of `window_fn`. None is as many as fit in 8 MiB of windows; it is all of them
        where steps could change the last bits: in float64, and with a channel multiplier. With steps, gradients
        compute the windows again, so that memory never holds all of them.

    Returns:
      `(N, C*M, rows, columns)`, or without N if x has none.

    Raises:
      ValueError, TypeError: an argument that does not fit, or a result of `window_fn` of another shape or dtype.

    >>> x, weight = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3)
    >>> torch.equal(windowed_conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1, groups=3))
    True

    Only the three largest values of each window:

    >>> def largest(windows):
    ...     third = windows.flatten(2, 3).topk(3, dim=2).values[:, :, -1, None, None]
    ...     return torch.where(windows >= third, windows, 0)
    >>> windowed_conv2d(x, weight, padding=1, window_fn=largest).shape
    torch.Size([2, 3, 5, 5])
    """
    return _windowed_conv(2, x, weight, bias, stride, padding, dilation, window_fn, rows_per_step)


def windowed_conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    window_fn: WindowFn | None = None,
    *,
    rows_per_step: int | None = None,
) -> torch.Tensor:
    """Return `F.conv3d(x, weight, bias, stride, padding, dilation, groups=C)` of the windows that `window_fn` returns.

    x is `(N, C, D, H, W)` or `(C, D, H, W)`, weight `(C*M, 1, kd, kh, kw)`, the windows
    `(N, C, kd, kh, kw, planes, rows, columns)`; here a step takes some planes. See `windowed_conv2d`.
    """
    return _windowed_conv(3, x, weight, bias, stride, padding, dilation, window_fn, rows_per_step)


class _Problem(NamedTuple):
    """The sizes of one convolution, as PyTorch's `F.conv` gets them. All tuples have one int per spatial axis.

    Attributes:
      low, high: the zeros before and after x.
      padding: what PyTorch passes on to its kernels: an asymmetric rest of "same" is padded beforehand.
      outputs: output positions.
      in_onednn: True if oneDNN computes it, False if PyTorch itself does.
      form: the layout in memory that PyTorch computes in.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    padding: tuple[int, ...]
    outputs: tuple[int, ...]
    multiplier: int
    elements: int
    in_onednn: bool
    form: torch.memory_format

    @property
    def spans(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation))

    @property
    def is_wide(self) -> bool:
        """True if the padding is too wide for oneDNN's depthwise kernels, and another kernel takes their place.

        A product of matrices, for a multiplier in contiguous layout, is for padding of any width.
        """
        if self.multiplier == 1:
            fits = onednn.padding_fits(self.padding, self.spans, self.outputs[-1])
        else:
            narrow = all(amount < span for amount, span in zip(self.padding, self.spans))
            fits = self.form == torch.contiguous_format or (narrow and self.padding[-1] <= self.outputs[-1])
        return self.in_onednn and not fits

    @property
    def is_tap_by_tap(self) -> bool:
        """True if the image is laid out tap by tap, for a dilated kernel, and False if it is window by window.

        PyTorch asks whether a kernel is dilated. oneDNN's depthwise kernel has the same bits for both in contiguous
        layout, and a tap is copied in longer runs: 8x32x112x112, 3x3, took 0.7 of the time.
        """
        contiguous = self.in_onednn and self.form == torch.contiguous_format
        if contiguous and self.multiplier == 1 and len(self.outputs) < 3:
            return not self.is_wide and max(self.kernel_size) > 1
        # a product of matrices depends on the size of the image, and not on dilation
        return not self.is_wide and max(self.dilation) > 1 and not (contiguous and self.multiplier > 1)

    @property
    def memory_order(self) -> tuple[int, ...]:
        """The axes of windows `(N, C, *kernel_size, *outputs)` in the order in which the image has them in memory."""
        rank = len(self.outputs)
        pairs = [(2 + axis, 2 + rank + axis) for axis in range(rank)]
        spatial = [
            axis for taps, outputs in pairs for axis in ((taps, outputs) if self.is_tap_by_tap else (outputs, taps))
        ]
        return (0, 1, *spatial) if self.form == torch.contiguous_format else (0, *spatial, 1)

    @property
    def is_a_plain_loop(self) -> bool:
        """True if oneDNN runs its reference loop: where it would multiply matrices, and has no memory for it."""
        dilated = max(self.dilation) > 1
        if self.form == torch.contiguous_format:
            is_product = self.multiplier > 1 or self.is_wide or (len(self.outputs) == 3 and dilated)
        else:
            is_product = self.multiplier == 1 and self.is_wide and dilated
        large = onednn.is_a_plain_loop(math.prod(self.kernel_size), self.outputs, self.elements)
        return self.in_onednn and is_product and large


def _windowed_conv(
    rank: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    window_fn: WindowFn | None,
    rows_per_step: int | None,
) -> torch.Tensor:
    _check(rank, x, weight, bias, window_fn, rows_per_step)
    if x.dim() == rank + 1:
        batch = x.unsqueeze(0)
        return _windowed_conv(rank, batch, weight, bias, stride, padding, dilation, window_fn, rows_per_step)[0]
    problem = _problem(x, weight, stride, padding, dilation)
    if len(x) == 0:
        nothing = x.new_zeros((0, len(weight), *problem.outputs)) * (weight.sum() + x.sum())
        return nothing if bias is None else nothing + bias.sum()
    rows = problem.outputs[0]
    step = _rows_per_step(x, problem) if rows_per_step is None else min(rows_per_step, rows)
    padded = F.pad(x, [amount for pair in zip(reversed(problem.low), reversed(problem.high)) for amount in pair])
    windows = _windows(padded, problem)
    if step >= rows:
        return _sum_of_windows(windows, weight, bias, problem, window_fn)
    compute = functools.partial(_sum_of_windows, problem=problem, window_fn=window_fn)
    if torch.is_grad_enabled():  # else autograd would keep the windows of all steps
        compute = functools.partial(checkpoint, compute, use_reentrant=False)
    axis = 2 + rank
    return torch.cat([compute(part, weight, bias) for part in windows.split(step, axis)], 2)


def _sum_of_windows(
    windows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    problem: _Problem,
    window_fn: WindowFn | None,
) -> torch.Tensor:
    """Return the sums over windows `(N, C, *kernel_size, *outputs)`, with some of all output rows."""
    if window_fn is not None:
        order = problem.memory_order
        copy = windows.permute(order).contiguous()  # the function may write to it, and it is the image already
        windows = _applied(window_fn, copy.permute([order.index(axis) for axis in range(windows.dim())]))
    if problem.is_a_plain_loop:
        return _plain_loop(windows, weight, bias, problem)
    if problem.is_wide:
        return _convolve_wide(windows, weight, bias, problem)
    if problem.is_tap_by_tap:
        return _convolve_tap_by_tap(windows, weight, bias, problem)
    return _convolve(windows, weight, bias, problem)


def _convolve(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem, *, padded: bool = False
) -> torch.Tensor:
    """Convolve windows side by side: window (o, p) is at rows o*kh to o*kh + kh - 1, and columns p*kw on."""
    rank = len(problem.outputs)
    if math.prod(problem.kernel_size) == 1 < max(problem.stride + problem.dilation):  # PyTorch asks it of a 1x1 kernel
        windows = F.pad(windows, (0, 0) * rank + (0, 1))
    cells = windows.shape[2 : 2 + rank]
    padding = [cell if padded and amount else 0 for cell, amount in zip(cells, problem.padding)]
    return _CONV[rank](_image(windows, problem), weight, bias, cells, padding, 1, windows.shape[1])


def _convolve_tap_by_tap(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
) -> torch.Tensor:
    """Convolve tap by tap side by side, so that the kernel is dilated: PyTorch asks for that when it chooses a kernel.

    Tap (i, j) of window (o, p) is at row i * rows + o and column j * columns + p.
    """
    rank = len(problem.outputs)
    outputs = windows.shape[2 + rank :]
    if max(outputs) > 1:
        return _CONV[rank](_image(windows, problem), weight, bias, 1, 0, outputs, windows.shape[1])
    # one output: taps with a column between them
    image = _image(F.pad(windows, (0, 1)), problem)[..., :-1].contiguous(memory_format=problem.form)
    return _CONV[rank](image, weight, bias, 1, 0, (*outputs[1:], 2), windows.shape[1])


def _convolve_wide(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
) -> torch.Tensor:
    """Convolve an image that is padded by whole windows, so that oneDNN leaves its depthwise kernels here too."""
    dilated = max(problem.dilation) > 1  # then there is no channels-last depthwise kernel
    form = torch.contiguous_format if dilated and problem.multiplier == 1 else problem.form
    y = _convolve(windows, weight, bias, problem._replace(form=form), padded=True)
    inside = (slice(None), slice(None), *(slice(1, -1) if amount else slice(None) for amount in problem.padding))
    return y[inside].contiguous(memory_format=problem.form)


def _plain_loop(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
) -> torch.Tensor:
    """Add products that are rounded, tap by tap, and the bias last, as oneDNN's reference loop does."""
    rank = len(problem.outputs)
    accumulator = torch.float32 if windows.dtype.itemsize == 2 else windows.dtype
    taps = windows.flatten(2, 1 + rank).to(accumulator).repeat_interleave(problem.multiplier, 1).unbind(2)
    weights = weight.reshape(len(weight), -1, *(1,) * rank).to(accumulator).unbind(1)
    y = torch.zeros_like(taps[0])
    for tap, w in zip(taps, weights):
        y = y + tap * w
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * rank).to(accumulator)
    return y.to(windows.dtype).contiguous(memory_format=problem.form)


_CONV: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _windows(padded: torch.Tensor, problem: _Problem) -> torch.Tensor:
    """Return a view `(N, C, *kernel_size, *outputs)` of x with its padding; it copies nothing."""
    windows = padded
    for axis, (span, stride, dilation) in enumerate(zip(problem.spans, problem.stride, problem.dilation), start=2):
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    rank = len(problem.outputs)
    return windows.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))


def _image(windows: torch.Tensor, problem: _Problem) -> torch.Tensor:
    """Return windows as an image `(N, C, *spatial)`: of each spatial axis, taps and outputs become one axis."""
    order = problem.memory_order
    in_order = windows.permute(order)
    places = [place for place, axis in enumerate(order) if axis > 1]
    sizes = [in_order.shape[a] * in_order.shape[b] for a, b in zip(places[::2], places[1::2])]
    if problem.form == torch.contiguous_format:
        return in_order.reshape(*windows.shape[:2], *sizes).contiguous()
    image = in_order.reshape(len(windows), *sizes, windows.shape[1])
    return image.movedim(-1, 1).contiguous(memory_format=problem.form)


def _applied(window_fn: WindowFn, windows: torch.Tensor) -> torch.Tensor:
    result = window_fn(windows)
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"`window_fn` returned a {type(result).__name__}, expected a tensor")
    if result.shape != windows.shape or result.dtype != windows.dtype:
        raise ValueError(
            f"`window_fn` returned {result.dtype} of shape {tuple(result.shape)}, expected {windows.dtype} of shape "
            f"{tuple(windows.shape)}, as the windows"
        )
    return result


def _rows_per_step(x: torch.Tensor, problem: _Problem) -> int:
    """Return as many rows as fit in STEP_BYTES. Matrix products get all: their order may depend on the outputs."""
    if problem.multiplier > 1 or not problem.in_onednn:
        return problem.outputs[0]
    row = x.shape[0] * x.shape[1] * math.prod(problem.kernel_size) * math.prod(problem.outputs[1:]) * x.dtype.itemsize
    return max(1, STEP_BYTES // max(1, row))


def _problem(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
) -> _Problem:
    rank = x.dim() - 2
    kernel_size, spatial = tuple(weight.shape[2:]), tuple(x.shape[2:])
    strides, dilations = _per_axis("stride", stride, rank, 1), _per_axis("dilation", dilation, rank, 1)
    spans = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilations))
    if isinstance(padding, str):
        if padding not in ("valid", "same") or (padding == "same" and max(strides) > 1):
            raise ValueError(
                f"`padding` is {padding!r} with `stride` {strides}, expected 'valid', integers, or 'same' at stride 1"
            )
        totals = [span - 1 if padding == "same" else 0 for span in spans]
        low = tuple(total // 2 for total in totals)
        high = tuple(total - total // 2 for total in totals)
    else:
        low = high = _per_axis("padding", padding, rank, 0)
    padded = tuple(n + a + b for n, a, b in zip(spatial, low, high))
    if any(span > n for span, n in zip(spans, padded)) or 0 in x.shape[1:]:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, with padding {padded}, expected channels and, along each axis, at least "
            f"one element and the extent of the kernel, {spans}"
        )
    outputs = tuple((n - span) // s + 1 for n, span, s in zip(padded, spans, strides))
    return _Problem(
        kernel_size,
        strides,
        dilations,
        low,
        high,
        low,
        outputs,
        len(weight) // x.shape[1],
        x.numel() + weight.numel() + len(x) * len(weight) * math.prod(outputs),
        _in_onednn(x),
        _memory_format(x, weight),
    )


def _in_onednn(x: torch.Tensor) -> bool:
    """Return whether PyTorch gives a depthwise convolution of x to oneDNN (`use_mkldnn` in its Convolution.cpp)."""
    dtype = torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype
    return x.device.type == "cpu" and _onednn_has(dtype)


@torch.compiler.assume_constant_result
def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _is_autocast(x: torch.Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _memory_format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Return the layout that PyTorch computes in: channels last if x or the weight has it."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if form is None or not (_is_channels_last(x) or _is_channels_last(weight)):
        return torch.contiguous_format
    return form


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Return what PyTorch's `is_channels_last_strides` says: from the strides alone, doubtful ones are not."""
    strides, least = tensor.stride(), 0
    if strides[1] == 0:
        return False
    for axis in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if tensor.shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(1, tensor.shape[axis])
    return True


def _per_axis(name: str, value: int | Sequence[int], rank: int, smallest: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if any(isinstance(size, bool) or not hasattr(size, "__index__") for size in sizes):
        raise TypeError(f"`{name}` is {value!r}, expected integers")
    if len(sizes) == 1:
        sizes *= rank
    if len(sizes) != rank or min(sizes) < smallest:
        kind = "a positive int" if smallest else "an int of at least 0"
        raise ValueError(f"`{name}` is {value!r}, expected {kind} or {rank} of them, one per spatial axis")
    return sizes


def _check(rank: int, x: Any, weight: Any, bias: Any, window_fn: WindowFn | None, rows_per_step: int | None) -> None:
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if not isinstance(tensor, torch.Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"`{name}` is a {type(tensor).__name__}, expected a tensor")
    if x.dim() not in (rank + 1, rank + 2):
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}, expected (N, C, *spatial) or (C, *spatial) with {rank} spatial axes"
        )
    channels = x.shape[-rank - 1]
    if weight.dim() != rank + 2 or weight.shape[1] != 1 or 0 in weight.shape or channels == 0 or len(weight) % channels:
        raise ValueError(
            f"`weight` has shape {tuple(weight.shape)}, expected (C*M, 1, *kernel_size) with {rank} sizes, and C*M a "
            f"multiple of the {channels} channels of `x` (shape {tuple(x.shape)})"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}, expected ({len(weight)},): one per output channel")
    if not _is_autocast(x):
        for name, tensor in {"weight": weight, "bias": bias}.items():
            if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
                raise TypeError(
                    f"`{name}` is {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device}, as `x`"
                )
    if not x.dtype.is_floating_point:
        raise TypeError(f"`x` has dtype {x.dtype}, expected a floating-point one")
    if window_fn is not None and not callable(window_fn):
        raise TypeError(f"`window_fn` is {window_fn!r}, expected a function of windows or None")
    if rows_per_step is not None and (
        isinstance(rows_per_step, bool) or not isinstance(rows_per_step, int) or rows_per_step < 1
    ):
        raise ValueError(f"`rows_per_step` is {rows_per_step!r}, expected a positive int or None")


class _Windowed:
    """The common part of the modules, before `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""

    window_fn: WindowFn | None
    rows_per_step: int | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        window_fn: WindowFn | None = None,
        rows_per_step: int | None = None,
    ):
        if groups not in (None, in_channels):
            raise ValueError(f"`groups` is {groups!r}, expected {in_channels} (`in_channels`): it is depthwise")
        if window_fn is not None and not callable(window_fn):
            raise TypeError(f"`window_fn` is {window_fn!r}, expected a function of windows or None")
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.window_fn = window_fn
        self.rows_per_step = rows_per_step

    def _conv_forward(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        rank = len(self.kernel_size)
        return _windowed_conv(
            rank, input, weight, bias, self.stride, padding, self.dilation, self.window_fn, self.rows_per_step
        )


class WindowedDepthwiseConv1d(_Windowed, nn.Conv1d):
    """An `nn.Conv1d` with `groups=in_channels` and work on its windows. See `WindowedDepthwiseConv2d`."""


class WindowedDepthwiseConv2d(_Windowed, nn.Conv2d):
    """An `nn.Conv2d` with `groups=in_channels`, its parameters and its bits, and work on its windows.

    Args:
      in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype: as of
        `nn.Conv2d`; `out_channels` is a multiple of `in_channels`.
      groups: None or `in_channels`.
      window_fn, rows_per_step: as of `windowed_conv2d`. A module as `window_fn` has its parameters in this one's.

    >>> conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
    >>> layer = WindowedDepthwiseConv2d(8, 8, 3, stride=2, padding=1)
    >>> layer.load_state_dict(conv.state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(4, 8, 32, 32)
    >>> torch.equal(layer(x), conv(x))
    True
    """


class WindowedDepthwiseConv3d(_Windowed, nn.Conv3d):
    """An `nn.Conv3d` with `groups=in_channels` and work on its windows. See `WindowedDepthwiseConv2d`."""
