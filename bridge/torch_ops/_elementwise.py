"""a x + b y, the loss, and the optimizer of a training step, with the bits of `jaxdw.training`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bridge.torch_ops._tensors import check_tensor, dtype_name, refuse_forward_mode, wide_dtype
from jaxdw.native import calls


def axpby(a: float, x: torch.Tensor, b: float, y: torch.Tensor) -> torch.Tensor:
    """Return a x + b y, as `jaxdw.training.axpby`, without derivatives."""
    check_tensor("x", x, x.dtype)
    check_tensor("y", y, x.dtype, tuple(x.shape))
    x, y = x.detach().contiguous(), y.detach().contiguous()
    factors, result = torch.tensor([a, b], dtype=wide_dtype(x)), torch.empty_like(x)
    if x.numel():
        given = (factors, x, y, result)
        calls.axpby([t.data_ptr() for t in given], x.numel(), dtype_name(x), threads=torch.get_num_threads())
    return result


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of logits `(N, classes)` and labels `(N,)`, as `jaxdw.cross_entropy`.

    Raises:
      ValueError, TypeError: a tensor that does not fit, or a label that is no class.
      NotImplementedError: forward-mode differentiation.
      jaxdw.native.UnavailableError: jaxdw has no compiled kernels here.
    """
    refuse_forward_mode({"logits": logits})
    check_tensor("logits", logits, logits.dtype)
    if logits.dim() != 2 or 0 in logits.shape or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"`logits` and `labels` have shapes {tuple(logits.shape)} and {tuple(labels.shape)}, expected "
            "(N, classes) and (N,), none of them 0"
        )
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`labels` has dtype {labels.dtype}, expected int32 or int64")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"`labels` has {labels.min()} to {labels.max()}, expected 0 to {logits.shape[1] - 1}")
    return _cross_entropy(logits, labels)


@torch.library.custom_op("jaxdw::cross_entropy", mutates_args=())
def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _run(logits, labels, None, logits.new_empty(()))


@torch.library.custom_op("jaxdw::cross_entropy_gradient", mutates_args=())
def _cross_entropy_gradient(logits: torch.Tensor, labels: torch.Tensor, ct: torch.Tensor) -> torch.Tensor:
    return _run(logits, labels, ct.contiguous(), logits.new_empty(logits.shape))


def _run(logits: torch.Tensor, labels: torch.Tensor, ct: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    logits, labels = logits.contiguous(), labels.to(torch.int32).contiguous()
    ct_address = None if ct is None else ct.data_ptr()
    shape = (logits.shape[0], logits.shape[1])
    calls.cross_entropy(logits.data_ptr(), labels.data_ptr(), ct_address, result.data_ptr(), shape, dtype_name(logits))
    return result


@_cross_entropy.register_fake
def _(logits, labels):
    return logits.new_empty(())


@_cross_entropy_gradient.register_fake
def _(logits, labels, ct):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, ct):
    return _cross_entropy_gradient(*ctx.saved_tensors, ct), None


_cross_entropy.register_autograd(_backward, setup_context=_save)


class SGD(torch.optim.Optimizer):
    """`torch.optim.SGD` with the bits of `jaxdw.training.sgd`, which states each rounding.

    Args:
      params: as of `torch.optim.SGD`; float32, float64, bfloat16 or float16, on the CPU.
      lr, momentum, weight_decay, nesterov: as there.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = SGD([weight], lr=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.tolist()
    [0.5, 0.5]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if isinstance(value, torch.Tensor) or not value >= 0:
                raise ValueError(f"`{name}` is {value!r}, expected a number from 0 on")
        if nesterov and not momentum:
            raise ValueError(f"`nesterov` is {nesterov!r}, expected False without momentum")
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        g = axpby(group["weight_decay"], p, 1, p.grad)
        m = axpby(1, g, group["momentum"], state["momentum_buffer"])
        g = axpby(group["momentum"], m, 1, g) if group["nesterov"] else m
        state["momentum_buffer"].copy_(m)
        p.copy_(axpby(-group["lr"], g, 1, p))
