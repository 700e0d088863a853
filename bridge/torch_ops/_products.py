"""Matrix products in an order that is given, and what is computed by them: full convolution, linear layer, mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from bridge.torch_ops._tensors import as_numpy, channels_last, check_tensor, refuse_forward_mode
from jaxdw.geometry import Geometry
from jaxdw.matmul import ROWS_IN_CHAIN
from jaxdw.native import calls
from jaxdw.sum_order import SumOrder


def ordered_matmul(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, *, order: SumOrder | None = None
) -> torch.Tensor:
    """Return x w + bias, `(*batch, N)`, with the bits of `jaxdw.ordered_matmul`, in its gradients too.

    Args:
      x: `(*batch, K)`: float32, float64, bfloat16 or float16, on the CPU.
      w: `(K, N)`, of the same dtype, with any strides.
      bias: `(N,)` or None.
      order: how K products, and the bias, are added; None is one chain. A bias that the order does not have is added
        last.

    Raises:
      ValueError, TypeError: an argument that does not fit.
      NotImplementedError: forward-mode differentiation.
      jaxdw.native.UnavailableError: jaxdw has no compiled kernels here.

    >>> ordered_matmul(torch.ones(2, 4), torch.ones(4, 3), torch.ones(3)).tolist()
    [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]
    """
    for name, tensor in (("x", x), ("w", w), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or name != "bias"):
            raise TypeError(f"`{name}` is a {type(tensor).__name__}, expected a tensor")
    refuse_forward_mode({"x": x, "w": w, "bias": bias})
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"`x` and `w` have shapes {tuple(x.shape)} and {tuple(w.shape)}, expected (*batch, K) and (K, N)"
        )
    check_tensor("x", x, x.dtype)
    check_tensor("w", w, x.dtype)
    check_tensor("bias", bias, x.dtype, (w.shape[1],))
    if order is not None and not isinstance(order, SumOrder):
        raise TypeError(f"`order` is a {type(order).__name__}, expected a `jaxdw.SumOrder` or None")
    if order is not None and order.terms != w.shape[0]:
        raise ValueError(f"`order` has {order.terms} terms, expected {w.shape[0]}")
    if order is not None and order.has_bias and bias is None:
        raise ValueError("`order` has a bias, and `bias` is None; use `order.without_bias()`, or give a bias")
    y = _matmul(x.reshape(-1, x.shape[-1]), w, bias, None if order is None else list(order.steps), 0)
    return y.reshape(*x.shape[:-1], w.shape[1])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `F.linear(x, weight, bias)` by `ordered_matmul`: one chain over the inputs, and then the bias."""
    return ordered_matmul(x, weight.t(), bias)


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Return the convolution over all channels as windows and one `ordered_matmul`.

    Each output is one chain over the taps in raster order and, for each tap, over the input channels; then the bias.
    Padding is multiplied. The gradient by x adds the gradients of the windows as `F.fold` does.

    Args:
      x: `(N, C, H, W)`; weight: `(F, C, kh, kw)`; bias: `(F,)` or None.
      stride, padding, dilation: as of `torch.nn.functional.conv2d`.

    Returns:
      `(N, F, rows, columns)`, channels last in memory.

    Raises:
      as `ordered_matmul`.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"`x` and `weight` have shapes {tuple(x.shape)} and {tuple(weight.shape)}, expected (N, C, H, W) and "
            "(F, C, kh, kw)"
        )
    refuse_forward_mode({"x": x, "weight": weight, "bias": bias})
    batch, channels, *spatial = x.shape
    features, _, *kernel = weight.shape
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in numbers.items():
        if isinstance(value, str):
            raise TypeError(f"`{name}` is {value!r}, expected an int, or one for each spatial axis")
    steps, low, apart = ([*v] if isinstance(v, Sequence) else [v] * 2 for v in numbers.values())
    geometry = Geometry.of(
        (batch, *spatial, 1), (*kernel, 1, 1), strides=steps, padding=low, kernel_dilation=apart
    )  # raises what does not fit
    rows, columns = geometry.output_spatial
    if kernel == [1, 1] and low == [0, 0]:
        flat = x[:, :, :: steps[0], :: steps[1]].permute(0, 2, 3, 1).reshape(-1, channels)
    else:
        windows = F.unfold(x, kernel, dilation=apart, padding=low, stride=steps)  # (N, C * taps, positions)
        taps = kernel[0] * kernel[1]
        flat = windows.unflatten(1, (channels, taps)).permute(0, 3, 2, 1).reshape(-1, taps * channels)
    w = weight.permute(2, 3, 1, 0).reshape(-1, features)
    return ordered_matmul(flat, w, bias).reshape(batch, rows, columns, features).permute(0, 3, 1, 2)


def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    """Return the mean `(N, C)` over the pixels of x `(N, C, *spatial)`: one chain in raster order, and one division.

    Raises:
      as `ordered_matmul`.
    """
    refuse_forward_mode({"x": x})
    check_tensor("x", x, x.dtype)
    if x.dim() < 3 or 0 in x.shape:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, expected (N, C, *spatial), none of them 0")
    return _mean(x)


@functools.lru_cache(maxsize=256)
def _order(terms: int, block: int, biased: bool) -> SumOrder:
    ends = (*range(block, terms, block), terms) if block else (terms,)
    return SumOrder.blocks(ends, bias="last" if biased else None)


@torch.library.custom_op("jaxdw::ordered_matmul", mutates_args=())
def _matmul(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, steps: list[int] | None, block: int
) -> torch.Tensor:
    """Return `(rows, columns)` in the order of these steps, or in chains of `block` terms, of all for 0."""
    if steps is None:
        order = _order(x.shape[1], block, bias is not None)
    else:
        order = SumOrder(tuple(steps))
        order = order if bias is None else order.with_bias()
    y = x.new_empty((x.shape[0], w.shape[1]))
    start = None if bias is None else as_numpy(bias.contiguous())
    calls.matmul(as_numpy(x), as_numpy(w), start, as_numpy(y), order, threads=torch.get_num_threads())
    return y


@_matmul.register_fake
def _(x, w, bias, steps, block):
    return x.new_empty((x.shape[0], w.shape[1]))


def _save_product(ctx, inputs, output) -> None:
    x, w, *_ = inputs
    ctx.save_for_backward(x, w)


def _product_backward(ctx, dy):
    x, w = ctx.saved_tensors
    needs_x, needs_w, needs_bias, *_ = ctx.needs_input_grad
    dx = _matmul(dy, w.t(), None, None, 0) if needs_x else None
    dw = _matmul(x.t(), dy, None, None, ROWS_IN_CHAIN) if needs_w else None
    dbias = _matmul(dy.new_ones((1, len(dy))), dy, None, None, ROWS_IN_CHAIN)[0] if needs_bias else None
    return dx, dw, dbias, None, None


_matmul.register_autograd(_product_backward, setup_context=_save_product)


@torch.library.custom_op("jaxdw::global_average_pool", mutates_args=())
def _mean(x: torch.Tensor) -> torch.Tensor:
    pixels = channels_last(x).flatten(1, -2)
    y = x.new_empty((pixels.shape[0], 1, pixels.shape[2]))
    terms = pixels.shape[1]
    ones = x.new_ones((1, terms))
    order = _order(terms, 0, False)
    calls.matmul(
        as_numpy(ones), as_numpy(pixels), None, as_numpy(y), order, divisor=terms, threads=torch.get_num_threads()
    )
    return y[:, 0]


@_mean.register_fake
def _(x):
    return x.new_empty(x.shape[:2])


def _save_shape(ctx, inputs, output) -> None:
    ctx.shape = inputs[0].shape


def _mean_backward(ctx, dy):
    count = ctx.shape[2:].numel()
    return (dy / count).reshape(*dy.shape, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape)


_mean.register_autograd(_mean_backward, setup_context=_save_shape)
