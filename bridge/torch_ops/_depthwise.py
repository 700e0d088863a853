"""The depthwise convolution of the compiled kernels, with its epilogue, and its derivatives of every order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

from bridge.torch_ops._tensors import (
    address,
    channels_last,
    check_tensor,
    dtype_name,
    empty_channels_last,
    refuse_forward_mode,
    wide_dtype,
)
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from jaxdw.native import calls
from jaxdw.primitive import adjoint

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
}


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Return the depthwise convolution that `jaxdw.depthwise_conv(..., method="taps")` computes, bit for bit.

    Args:
      x: `(N, C, *spatial)` with 1 to 3 spatial axes: float32, float64, bfloat16 or float16, on the CPU. Channels-last
        memory costs no copy.
      weight: `(C*M, 1, *kernel_size)`, of the same dtype, for a channel multiplier M.
      bias: `(C*M,)` or None.
      stride, padding, dilation: as of `torch.nn.functional.conv2d`.
      scale, shift, residual, activation: what follows the convolution, as of `jaxdw.Epilogue`. scale and shift `(C*M,)`
        are float64 for float64, else float32; the residual has the result's shape and the dtype of x. Without
        gradients it is computed in the same pass, with the same bits.

    Returns:
      `(N, C*M, *output_spatial)`, channels last in memory.

    Raises:
      ValueError, TypeError: a tensor or a number that does not fit.
      NotImplementedError: forward-mode differentiation (`torch.func.jvp`, `jacfwd`), which PyTorch has no rule for
        here.
      jaxdw.native.UnavailableError: jaxdw has no compiled kernels here.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> depthwise_conv(x, torch.ones(1, 1, 3, 3))[0, 0]
    tensor([[45., 54.],
            [81., 90.]])
    """
    named = {"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name in ("x", "weight")):
            expected = "a tensor" if name in ("x", "weight") else "a tensor or None"
            raise TypeError(f"`{name}` is a {type(tensor).__name__}, expected {expected}")
    refuse_forward_mode(named)
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected (N, C, *spatial) with 1 to 3 spatial axes")
    channels, features = x.shape[1], weight.shape[0]
    if weight.dim() != x.dim() or weight.shape[1] != 1 or not channels or features % channels or not features:
        raise ValueError(
            f"`weight` has shape {tuple(weight.shape)}, expected (C*M, 1, *kernel_size) with C = {channels} channels, "
            f"one or more outputs M for each, and {rank} sizes"
        )
    check_tensor("x", x, x.dtype)
    check_tensor("weight", weight, x.dtype)
    check_tensor("bias", bias, x.dtype, (features,))
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in options.items():
        if isinstance(value, str):
            raise TypeError(f"`{name}` is {value!r}, expected an int, or one for each spatial axis")
    numbers = [list(v) if isinstance(v, Sequence) else [v] * rank for v in options.values()]
    geometry = _geometry(x.shape, weight.shape, *numbers)  # raises what does not fit
    if 0 in geometry.output_shape + geometry.x_shape:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected at least one input and one output")
    wide = wide_dtype(x)
    check_tensor("scale", scale, wide, (features,))
    check_tensor("shift", shift, wide, (features,))
    check_tensor("residual", residual, x.dtype, (x.shape[0], features, *geometry.output_spatial))
    if activation is not None and (not isinstance(activation, str) or activation not in _ACTIVATIONS):
        raise ValueError(f"`activation` is {activation!r}, expected None or one of {', '.join(_ACTIVATIONS)}")
    if scale is None and shift is None and residual is None and activation is None:
        return _conv(x, weight, bias, *numbers)
    if scale is not None or shift is not None:
        scale = torch.ones(features, dtype=wide) if scale is None else scale
        shift = torch.zeros(features, dtype=wide) if shift is None else shift
    tensors = (x, weight, bias, scale, shift, residual)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _defined(*tensors, activation, *numbers)
    return _finished(*tensors, activation, *numbers)


def _defined(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """Compute the convolution in float32 or wider, and then each step, as operations that autograd knows."""
    wide = wide_dtype(x)
    operands = (x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = _conv(*operands, stride, padding, dilation)
    if scale is not None:  # a convolution of one tap, along one axis, is a fused multiply-add
        flat = _conv(y.flatten(2), scale.reshape(-1, 1, 1), shift, [1], [0], [1])
        y = flat.reshape(y.shape)
    if residual is not None:
        y = y + residual.to(wide)
    return (y if activation is None else _ACTIVATIONS[activation](y)).to(x.dtype)


@torch.library.custom_op("jaxdw::depthwise_conv_with_epilogue", mutates_args=())
def _finished(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    geometry = _geometry(x.shape, weight.shape, stride, padding, dilation)
    epilogue = (scale, shift, None if residual is None else channels_last(residual))
    return _run_conv(x, _kernel(weight), bias, geometry, not bias_comes_first(geometry), epilogue, activation)


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
    return _run_conv(x, _kernel(weight), bias, geometry, not bias_comes_first(geometry))


@torch.library.custom_op("jaxdw::depthwise_conv_input_gradient", mutates_args=())
def _input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    geometry = _geometry(size, weight.shape, stride, padding, dilation)
    flipped = _kernel(weight.flip(tuple(range(2, weight.dim()))))
    of_each = _run_conv(dy, flipped, None, adjoint(geometry), False)
    if geometry.multiplier == 1:
        return of_each
    dx, *others = of_each.unflatten(1, (-1, geometry.multiplier)).to(wide_dtype(dy)).unbind(2)
    for other in others:  # in this order, as XLA adds them
        dx = dx + other
    return dx.to(dy.dtype)


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
    x, dy = _repeated(x, geometry), channels_last(dy)
    geometry = dataclasses.replace(geometry, channels=geometry.features, multiplier=1)
    gradient = x.new_empty(geometry.kernel_shape)
    calls.kernel_gradient(
        x.data_ptr(), dy.data_ptr(), gradient.data_ptr(), geometry, dtype_name(x), threads=torch.get_num_threads()
    )
    return gradient.movedim((-1, -2), (0, 1)).contiguous()


@_conv.register_fake
def _(x, weight, bias, stride, padding, dilation):
    shape = _geometry(x.shape, weight.shape, stride, padding, dilation).output_shape
    return empty_channels_last(x, (shape[0], shape[-1], *shape[1:-1]))


@_finished.register_fake
def _(x, weight, bias, scale, shift, residual, activation, stride, padding, dilation):
    shape = _geometry(x.shape, weight.shape, stride, padding, dilation).output_shape
    return empty_channels_last(x, (shape[0], shape[-1], *shape[1:-1]))


@_input_gradient.register_fake
def _(dy, weight, size, stride, padding, dilation):
    return empty_channels_last(dy, size)


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


def _save_two(ctx, inputs, output) -> None:
    a, b, _, *ctx.numbers = inputs
    ctx.save_for_backward(a, b)


def _input_gradient_backward(ctx, ddx):
    dy, weight = ctx.saved_tensors
    needs_dy, needs_weight, *_ = ctx.needs_input_grad
    back = _conv(ddx, weight, None, *ctx.numbers) if needs_dy else None
    dweight = _weight_gradient(ddx, dy, list(weight.shape), *ctx.numbers) if needs_weight else None
    return back, dweight, None, None, None, None


def _weight_gradient_backward(ctx, ddweight):
    x, dy = ctx.saved_tensors
    needs_x, needs_dy, *_ = ctx.needs_input_grad
    dx = _input_gradient(dy, ddweight, list(x.shape), *ctx.numbers) if needs_x else None
    back = _conv(x, ddweight, None, *ctx.numbers) if needs_dy else None
    return dx, back, None, None, None, None


_conv.register_autograd(_backward, setup_context=_save)
_input_gradient.register_autograd(_input_gradient_backward, setup_context=_save_two)
_weight_gradient.register_autograd(_weight_gradient_backward, setup_context=_save_two)


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
    x: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    bias_last: bool,
    epilogue: tuple[torch.Tensor | None, ...] = (None, None, None),
    activation: str | None = None,
) -> torch.Tensor:
    x = _repeated(x, geometry)
    y = empty_channels_last(x, (x.shape[0], geometry.features, *geometry.output_spatial))
    bias, scale, shift, residual = (None if t is None else t.contiguous() for t in (bias, *epilogue))
    calls.conv(
        x.data_ptr(),
        kernel.data_ptr(),
        address(bias),
        y.data_ptr(),
        dataclasses.replace(geometry, channels=geometry.features, multiplier=1),
        dtype_name(x),
        bias_last=bias_last,
        scale=address(scale),
        shift=address(shift),
        residual=address(residual),
        activation=activation,
        threads=torch.get_num_threads(),
    )
    return y


def _repeated(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Return `(N, C, *spatial)` as `(N, *spatial, C*M)`, each channel once for each output channel that reads it."""
    x = channels_last(x)
    return x if geometry.multiplier == 1 else x.repeat_interleave(geometry.multiplier, dim=-1)


def _kernel(weight: torch.Tensor) -> torch.Tensor:
    """Return `(C, 1, *kernel_size)` as `(*kernel_size, 1, C)`."""
    return weight.movedim((0, 1), (-1, -2)).contiguous()
