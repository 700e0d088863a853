"""The functions of PyTorch that a network calls, exchanged for those with a defined arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bridge.torch_ops._depthwise import depthwise_conv
from bridge.torch_ops._elementwise import cross_entropy
from bridge.torch_ops._norm import batch_norm
from bridge.torch_ops._products import conv, global_average_pool, linear


class jaxdw_arithmetic(TorchFunctionMode):
    """Compute a network of PyTorch with the compiled kernels of jaxdw, unchanged: a context manager.

    Inside of it convolutions (depthwise, 1x1 and over all channels), `F.linear`, `F.batch_norm`, global average pooling
    and `F.cross_entropy` have the arithmetic of docs/arithmetic.md, in their gradients too: the bits of `jaxdw.models`
    with `arithmetic="jaxdw"`. ReLU, ReLU6, the sum of two tensors and what only moves numbers have one result anyway.
    The gradient may be computed outside.

    Raises:
      NotImplementedError: a function whose arithmetic is PyTorch's own, such as `torch.matmul` or `F.softmax`, or an
        option that the kernels do not have.

    >>> layer = torch.nn.Linear(3, 2)
    >>> with jaxdw_arithmetic():
    ...     y = layer(torch.ones(1, 3))
    >>> y.shape
    torch.Size([1, 2])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        if func in _OTHERS:
            raise NotImplementedError(
                f"`{_OTHERS[func]}` has no arithmetic of jaxdw: its sums or functions are PyTorch's own"
            )
        return func(*args, **kwargs)


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    rank = input.dim() - 2
    if isinstance(padding, str):
        sizes = [padding, dilation] if not isinstance(dilation, int) else [padding, (dilation,) * rank]
        padding = _named_padding(sizes[0], weight.shape[2:], sizes[1], stride)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if groups == input.shape[1] and groups > 1:
        return depthwise_conv(input, weight, bias, **options)
    if groups != 1:
        raise NotImplementedError(
            f"`groups` is {groups}, expected 1 or the number of channels, {input.shape[1]}: others have no kernels"
        )
    if rank != 2:
        raise NotImplementedError(f"`input` has {rank} spatial axes, expected 2 for a convolution over all channels")
    return conv(input, weight, bias, **options)


def _named_padding(name: str, kernel: Any, dilation: Any, stride: Any) -> Any:
    if name == "valid":
        return 0
    spans = [(k - 1) * d for k, d in zip(kernel, dilation)]
    if any(span % 2 for span in spans):
        raise NotImplementedError(
            f"`padding` is {name!r} for a kernel of even span, expected equal padding at both ends"
        )
    return [span // 2 for span in spans]


def _cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean", label_smoothing=0.0
):
    given = {"weight": weight, "size_average": size_average, "reduce": reduce}
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"`{name}` is {value!r}, expected None")
    if reduction != "mean" or label_smoothing:
        raise NotImplementedError(
            f"`reduction` is {reduction!r} and `label_smoothing` {label_smoothing!r}, expected 'mean' and 0"
        )
    return cross_entropy(input, target)


def _average_pool(input, output_size):
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    if any(size != 1 for size in sizes):
        raise NotImplementedError(f"`output_size` is {output_size!r}, expected 1: there is a global average pool alone")
    return global_average_pool(input)[(..., *(None,) * (input.dim() - 2))]


def _mean(input, dim=None, keepdim=False, *, dtype=None, **others):
    dims = [dim] if isinstance(dim, int) else list(range(input.dim()) if dim is None else dim)
    spatial = list(range(2, input.dim()))
    if sorted(d % input.dim() for d in dims) != spatial or not spatial or dtype is not None or others:
        raise NotImplementedError(
            f"`dim` is {dim!r}, expected all spatial axes, {spatial}, of a tensor (N, C, *spatial)"
        )
    y = global_average_pool(input)
    return y[(..., *(None,) * len(spatial))] if keepdim else y


def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_OWN: dict[Any, Callable[..., Any]] = {
    F.conv1d: _conv2d,
    F.conv2d: _conv2d,
    F.conv3d: _conv2d,
    F.linear: linear,
    F.batch_norm: _batch_norm,
    F.cross_entropy: _cross_entropy,
    F.adaptive_avg_pool1d: _average_pool,
    F.adaptive_avg_pool2d: _average_pool,
    F.adaptive_avg_pool3d: _average_pool,
    torch.mean: _mean,
    torch.Tensor.mean: _mean,
}

#: Functions whose sums, or whose exponentials, are PyTorch's own.
_OTHERS = {
    getattr(module, name): f"{label}.{name}"
    for module, label, names in (
        (
            torch,
            "torch",
            "matmul mm bmm addmm einsum mv dot sum var std var_mean exp log sigmoid tanh softmax log_softmax norm prod",
        ),
        (
            torch.Tensor,
            "torch.Tensor",
            "matmul __matmul__ mm bmm mv dot sum var std exp log sigmoid tanh softmax log_softmax norm prod",
        ),
        (
            F,
            "F",
            "conv_transpose1d conv_transpose2d conv_transpose3d bilinear avg_pool1d avg_pool2d avg_pool3d layer_norm "
            "group_norm instance_norm local_response_norm softmax log_softmax gelu silu mish sigmoid tanh softplus elu "
            "nll_loss mse_loss l1_loss binary_cross_entropy interpolate scaled_dot_product_attention",
        ),
    )
    for name in names.split()
}
