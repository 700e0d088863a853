"""The compiled kernels of jaxdw as operations of PyTorch: the same bits in both frameworks, forward and backward.

docs/arithmetic.md states each sum. The operations run on CPU tensors, under `torch.compile` and autograd too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from jaxdw.native import calls
from jaxdw.primitive import adjoint


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Return the depthwise convolution that `jaxdw.depthwise_conv(..., method="taps")` computes, bit for bit.

    Args:
      x: `(N, C, *spatial)` with 1 to 3 spatial axes: float32, float64, bfloat16 or float16, on the CPU. Channels-last
        memory costs no copy.
      weight: `(C, 1, *kernel_size)`, of the same dtype.
      bias: `(C,)` or None.
      stride, padding, dilation: as of `torch.nn.functional.conv2d`.

    Returns:
      `(N, C, *output_spatial)`, channels last in memory.

    Raises:
      ValueError, TypeError: a tensor or a number that does not fit.
      jaxdw.native.UnavailableError: jaxdw has no compiled kernels here.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> depthwise_conv(x, torch.ones(1, 1, 3, 3))[0, 0]
    tensor([[45., 54.],
            [81., 90.]])
    """
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected (N, C, *spatial) with 1 to 3 spatial axes")
    if weight.dim() != x.dim() or tuple(weight.shape[:2]) != (x.shape[1], 1):
        raise ValueError(
            f"`weight` has shape {tuple(weight.shape)}, expected ({x.shape[1]}, 1, *kernel_size) with {rank} sizes: "
            "one output per channel"
        )
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or _dtype(tensor) not in calls.TYPES or tensor.dtype != x.dtype:
            raise TypeError(
                f"`{name}` is {tensor.dtype} on {tensor.device}, expected the dtype of `x` on the CPU, "
                f"one of {', '.join(calls.TYPES)}"
            )
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}, expected ({x.shape[1]},)")
    numbers = [list(v) if isinstance(v, Sequence) else [v] * rank for v in (stride, padding, dilation)]
    geometry = _geometry(x.shape, weight.shape, *numbers)  # raises what does not fit
    if 0 in geometry.output_shape + geometry.x_shape:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected at least one input and one output")
    return _conv(x, weight, bias, *numbers)


@torch.library.custom_op("jaxdw::depthwise_conv", mutates_args=())
def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    geometry = _geometry(x.shape, weight.shape, stride, padding, dilation)
    last = not bias_comes_first(geometry)
    return _run_conv(_channels_last(x), _kernel(weight), bias, geometry, last).movedim(-1, 1)


@torch.library.custom_op("jaxdw::depthwise_conv_input_gradient", mutates_args=())
def _input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    geometry = adjoint(_geometry(size, weight.shape, stride, padding, dilation))
    flipped = _kernel(weight.flip(tuple(range(2, weight.dim()))))
    return _run_conv(_channels_last(dy), flipped, None, geometry, False).movedim(-1, 1)


@torch.library.custom_op("jaxdw::depthwise_conv_weight_gradient", mutates_args=())
def _weight_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    geometry = _geometry(x.shape, size, stride, padding, dilation)
    x, dy = _channels_last(x), _channels_last(dy)
    gradient = x.new_empty(geometry.kernel_shape)
    calls.kernel_gradient(
        x.data_ptr(), dy.data_ptr(), gradient.data_ptr(), geometry, _dtype(x), threads=torch.get_num_threads()
    )
    return gradient.movedim((-1, -2), (0, 1)).contiguous()


@_conv.register_fake
def _(x, weight, bias, stride, padding, dilation):
    shape = _geometry(x.shape, weight.shape, stride, padding, dilation).output_shape
    return x.new_empty(shape).movedim(-1, 1)


@_input_gradient.register_fake
def _(dy, weight, size, stride, padding, dilation):
    return dy.new_empty((size[0], *size[2:], size[1])).movedim(-1, 1)


@_weight_gradient.register_fake
def _(x, dy, size, stride, padding, dilation):
    return x.new_empty(size)


def _save(ctx, inputs, output) -> None:
    x, weight, _, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = _input_gradient(dy, weight, list(x.shape), *ctx.numbers) if needs_x else None
    dweight = _weight_gradient(x, dy, list(weight.shape), *ctx.numbers) if needs_weight else None
    dbias = dy.sum((0, *range(2, dy.dim()))) if needs_bias else None
    return dx, dweight, dbias, None, None, None


_conv.register_autograd(_backward, setup_context=_save)


def _geometry(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Geometry:
    batch, channels, *spatial = map(int, x_shape)
    features, one, *kernel_size = map(int, weight_shape)
    return Geometry.of(
        (batch, *spatial, channels),
        (*kernel_size, one, features),
        strides=list(stride),
        padding=list(padding),
        kernel_dilation=list(dilation),
    )


def _run_conv(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, bias_last: bool
) -> torch.Tensor:
    y = x.new_empty(geometry.output_shape)
    bias = None if bias is None else bias.contiguous()
    calls.conv(
        x.data_ptr(),
        kernel.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        geometry,
        _dtype(x),
        bias_last=bias_last,
        threads=torch.get_num_threads(),
    )
    return y


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous()


def _kernel(weight: torch.Tensor) -> torch.Tensor:
    """Return `(C, 1, *kernel_size)` as `(*kernel_size, 1, C)`."""
    return weight.movedim((0, 1), (-1, -2)).contiguous()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
