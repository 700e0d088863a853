"""Batch normalization: in training by the compiled kernels of `jaxdw.batch_norm`, in evaluation as scale and shift."""

from __future__ import annotations

import torch

from bridge.torch_ops._depthwise import depthwise_conv
from bridge.torch_ops._elementwise import axpby
from bridge.torch_ops._tensors import (
    channels_last,
    check_tensor,
    dtype_name,
    empty_channels_last,
    refuse_forward_mode,
    wide_dtype,
)
from jaxdw.native import calls


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """Return `F.batch_norm` of the same arguments, and an activation, with the bits of `jaxdw.batch_norm`.

    In training the statistics are those of the batch, and the running ones become
    `axpby(momentum, statistic, 1 - momentum, running)`; momentum is multiplied by n / (n - 1) for the variance of n
    values. In evaluation the running statistics are a scale and a shift, as of `jaxdw.Epilogue.batch_norm`.

    Args:
      x: `(N, C, *spatial)`: float32, float64, bfloat16 or float16, on the CPU.
      running_mean, running_var, weight, bias: `(C,)`, float64 for float64, else float32; or None.
      activation: "relu", "relu6" or None.

    Raises:
      ValueError, TypeError: a tensor or a number that does not fit.
      NotImplementedError: forward-mode differentiation.
      jaxdw.native.UnavailableError: jaxdw has no compiled kernels here.
    """
    named = {"x": x, "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    refuse_forward_mode(named)
    check_tensor("x", x, x.dtype)
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected (N, C, *spatial), none of them 0")
    channels, wide = x.shape[1], wide_dtype(x)
    for name, tensor in list(named.items())[1:]:
        check_tensor(name, tensor, wide, (channels,))
    if activation not in (None, "relu", "relu6"):
        raise ValueError(f"`activation` is {activation!r}, expected None, 'relu' or 'relu6'")
    weight = torch.ones(channels, dtype=wide) if weight is None else weight
    bias = torch.zeros(channels, dtype=wide) if bias is None else bias
    if not training and running_mean is not None and running_var is not None:
        scale = 1 / torch.sqrt(running_var + torch.tensor(eps, dtype=wide)) * weight
        shift = depthwise_conv(-running_mean[None, :, None], scale[:, None, None], bias).reshape(-1)
        flat = x.reshape(*x.shape[:2], -1).to(wide)
        y = depthwise_conv(flat, scale[:, None, None], shift, activation=activation)  # one tap: fma(x, scale, shift)
        return y.reshape(x.shape).to(x.dtype)
    count = x.numel() // channels
    if count < 2 and training:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected more than one value per channel in training")
    y, mean, var = _norm(x, weight, bias, eps, activation)
    if training:
        for running, statistic, share in (
            (running_mean, mean, momentum),
            (running_var, var, momentum * count / (count - 1)),
        ):
            if running is not None:
                running.copy_(axpby(share, statistic, 1 - momentum, running))
    return y


@torch.library.custom_op("jaxdw::batch_norm", mutates_args=())
def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    last = channels_last(x)
    y, mean, var = empty_channels_last(x, x.shape), torch.empty_like(weight), torch.empty_like(weight)
    given = (last, weight.contiguous(), bias.contiguous(), y, mean, var)
    calls.batch_norm(
        [t.data_ptr() for t in given],
        (last.numel() // last.shape[-1], last.shape[-1]),
        dtype_name(x),
        epsilon=eps,
        activation=activation,
        threads=torch.get_num_threads(),
    )
    return y, mean, var


@torch.library.custom_op("jaxdw::batch_norm_gradient", mutates_args=())
def _norm_gradient(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    last, dy = channels_last(x), channels_last(dy)
    dx, dweight, dbias = empty_channels_last(x, x.shape), torch.empty_like(mean), torch.empty_like(mean)
    given = (last, weight.contiguous(), bias.contiguous(), mean, var, dy, dx, dweight, dbias)
    calls.batch_norm_gradient(
        [t.data_ptr() for t in given],
        (last.numel() // last.shape[-1], last.shape[-1]),
        dtype_name(x),
        epsilon=eps,
        activation=activation,
        threads=torch.get_num_threads(),
    )
    return dx, dweight, dbias


@_norm.register_fake
def _(x, weight, bias, eps, activation):
    rows = empty_channels_last(x, x.shape)
    return rows, torch.empty_like(weight), torch.empty_like(weight)


@_norm_gradient.register_fake
def _(x, weight, bias, mean, var, dy, eps, activation):
    rows = empty_channels_last(x, x.shape)
    return rows, torch.empty_like(mean), torch.empty_like(mean)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, ctx.activation = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, bias, mean, var)


def _backward(ctx, dy, dmean, dvar):
    gradients = _norm_gradient(*ctx.saved_tensors, dy, ctx.eps, ctx.activation)
    wanted = (gradient if needs else None for gradient, needs in zip(gradients, ctx.needs_input_grad))
    return *wanted, None, None


_norm.register_autograd(_backward, setup_context=_save)
