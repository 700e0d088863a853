"""How far rounding can move the outputs of a PyTorch model in float64: each operation's bound, carried to the outputs.

Let operation l of a network compute, in floating point, its exact result on the inputs it was given plus an error e_l,
|e_l| <= b_l element by element. To first order output o then moves by sum_l <do/dy_l, e_l>, y_l being the result of
operation l, so by at most

    sum_l sum_i |do/dy_l,i| b_l,i                                                                               (*)

Two implementations with errors within b_l differ by at most twice (*). The tests allow twice that: what is left out is
of second order in u = 2^-53, 10^-16 of what is kept.

b_l is a count of roundings times u times the same operation on absolute values. A sum of n products, any order: n + 2
(`bridge.numerics.bounds`; 2 for the evaluation of b_l itself). Batch normalization with statistics given: 8, for
alpha = scale / sqrt(var + eps) and (x - mean) alpha + bias or x alpha + (bias - mean alpha). With the statistics of a
batch of n values, the mean's relative error n + 2 and the variance's n + 8 enter too; the mean's own error moves the
variance only in second order. Hard swish, hard sigmoid: 8. Sums and products of two: 1. ReLU and ReLU6 are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch.overrides import TorchFunctionMode

UNIT_ROUNDOFF = 2.0**-53

#: Move elements or drop them, or answer about shapes.
_EXACT = {
    "relu",
    "relu_",
    "relu6",
    "hardtanh",
    "flatten",
    "view",
    "reshape",
    "pad",
    "dropout",
    "size",
    "dim",
    "identity",
}
_PAIRWISE = {"add", "add_", "__add__", "__iadd__", "mul", "mul_", "__mul__"}
_GATES = {"hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_"}


@dataclasses.dataclass(frozen=True)
class Output:
    """The result of a model, and the largest distance of another implementation in the same arithmetic."""

    value: torch.Tensor
    bound: torch.Tensor


class _Ledger(TorchFunctionMode):
    """Adds to every result a zero, with respect to which one can differentiate, and notes the result's bound."""

    def __init__(self):
        self.zeros: list[torch.Tensor] = []
        self.bounds: list[torch.Tensor] = []
        #: For each running statistic in training: the old one, the new one as a function of the input, its bound.
        self.statistics: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        bound = None
        if name == "conv2d" or name == "linear":
            bound = _of_products(func, *args, **kwargs)
        elif name == "batch_norm":
            bound = self._of_normalization(*args, **kwargs)
        elif name == "adaptive_avg_pool2d" or name == "mean":
            bound = (args[0].shape[-2:].numel() + 2) * func(args[0].detach().abs(), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or not result.is_floating_point() or name in _EXACT:
            return result
        if name in _PAIRWISE:
            bound = result.detach().abs()
        elif name in _GATES:
            bound = 8 * result.detach().abs()
        elif bound is None:
            raise NotImplementedError(f"no bound is known for {name}")
        zero = torch.zeros_like(result, requires_grad=True)
        self.zeros.append(zero)
        self.bounds.append(bound.detach() * UNIT_ROUNDOFF)
        return result + zero

    def _of_normalization(self, x, mean, var, weight, bias, training, momentum, eps):
        size = x.detach().abs()
        if training:
            n = x.numel() // x.shape[1]
            self.statistics += [
                _running(mean, x.mean((0, 2, 3)), size.mean((0, 2, 3)), momentum, n),
                _running(var, x.var((0, 2, 3)), x.detach().var((0, 2, 3)), momentum, n),
            ]
            mean, var = size.mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
            roundings = n + 16
        else:
            roundings = 8
        alpha = weight.abs() / (var + eps).sqrt()
        return roundings * ((size + _channels(mean.abs())) * _channels(alpha) + _channels(bias.abs()))


def propagated(
    model: torch.nn.Module, x: torch.Tensor, statistics: Collection[str] = ()
) -> tuple[Output, dict[str, torch.Tensor]]:
    """The output (N, features) of a model in float64; in training, the bounds of those new running `statistics`.

    A statistic's bound is of its scalar product with `mixture`, since the way back through the network is gone once
    for each number. A model in training has its statistics updated.
    """
    with _Ledger() as ledger:
        y = model(x)
        y = getattr(y, "logits", y)
    bounds = [_bound(ledger, element) for element in y.flatten()]
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    of_statistics = {}
    for old, new, local in ledger.statistics:
        if (name := names[id(old)]) in statistics:
            weights = mixture(len(new))
            product = (len(new) + 2) * UNIT_ROUNDOFF * new.detach().abs()
            of_statistics[name] = _bound(ledger, new @ weights) + 4 * (local + product) @ weights
    return Output(y.detach(), torch.stack(bounds).reshape(y.shape)), of_statistics


def mixture(features: int) -> torch.Tensor:
    """Weights from 1 to 2, one per feature: exchanged features change the scalar product."""
    return torch.linspace(1, 2, features, dtype=torch.float64)


def _bound(ledger: _Ledger, output: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(output, ledger.zeros, retain_graph=True, allow_unused=True)
    return 4 * sum((g.abs() * b).sum() for g, b in zip(gradients, ledger.bounds) if g is not None)


def _of_products(func, x, weight, bias=None, *args, **kwargs):
    products = weight[0].numel()
    return (products + 2) * func(x.detach().abs(), weight.abs(), None if bias is None else bias.abs(), *args, **kwargs)


def _running(old, batch, size, momentum, n):
    new = (1 - momentum) * old.clone() + momentum * batch
    return old, new, (n + 12) * UNIT_ROUNDOFF * ((1 - momentum) * old.abs() + momentum * size.abs())


def _channels(x):
    return x[:, None, None]
