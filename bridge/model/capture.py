"""Every operation of a live PyTorch model as it runs, with the very tensors that it received and gave.

A dispatch mode sees each call of an operator, whoever makes it: an `nn.Module`, a function, an addition in a forward.
Operands are told apart by their memory: whatever shares an operation's result - a view, a tensor changed in place -
is that operation's, and a copy or a padded copy of it counts as it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.implementations.torch_ import to_numpy, to_tensor
from bridge.model.operations import INPUT, Gradient, Operation

_KINDS = {
    "convolution": "convolution",
    "addmm": "linear",
    "mm": "linear",
    "native_batch_norm": "batch norm",
    "_native_batch_norm_legit": "batch norm",
    "_native_batch_norm_legit_no_training": "batch norm",
    "relu": "relu",
    "hardswish": "hard swish",
    "hardsigmoid": "hard sigmoid",
    "mean": "mean",
    "add": "add",
    "mul": "multiply",
}

#: A clamp between two numbers that has a name.
_CLAMPS: Mapping[tuple[Any, Any], str] = {(0, 6): "relu6", (0, None): "relu"}

#: Operators that are elementwise and that PyTorch does not tag so.
_ELEMENTWISE = {"hardswish"}

#: Move elements, or add zeros around them.
_MOVES = {"clone", "_to_copy", "copy", "constant_pad_nd", "contiguous", "_unsafe_view"}


def operations(module: torch.nn.Module, images: np.ndarray) -> tuple[list[Operation], np.ndarray]:
    """Runs a model once, in eval mode and without gradients.

    Args:
      module: the model; its training flags are as before afterwards.
      images: `(N, H, W, C)`.

    Returns:
      Its operations in the order in which they ran, and its output; of a model of transformers, the logits.

    Raises:
      ValueError: its forward fails.
    """
    x = _tensor(module, images)
    recorder = _Recorder(module, x)
    try:
        with _evaluating(module), recorder.following(module), torch.no_grad(), recorder:
            y = module(x)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"the forward of {type(module).__name__} on `images` of shape {images.shape} failed in "
            f"{recorder.running[-1] or 'the model itself'}: {type(error).__name__}: {error}"
        ) from error
    return recorder.done, to_numpy(getattr(y, "logits", y).cpu())


def gradients(module: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> list[Gradient]:
    """The gradients of the mean cross-entropy, convolution by convolution, in the order of the way back.

    The model runs in the mode that it is in; parameters and their `grad` stay, but a model in training has the
    statistics of its normalizations updated.

    Args:
      module: the model.
      images: `(N, H, W, C)`.
      labels: `(N,)`, the classes.
    """
    x = _tensor(module, images)
    before = {parameter: parameter.grad for parameter in module.parameters()}
    y = module(x)
    loss = torch.nn.functional.cross_entropy(getattr(y, "logits", y), to_tensor(labels).to(x.device))
    recorder = _GradientRecorder(module)
    with recorder:
        loss.backward()
    for parameter, gradient in before.items():
        parameter.grad = gradient
    return recorder.done


class _GradientRecorder(TorchDispatchMode):
    """Notes each `aten::convolution_backward`."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.done: list[Gradient] = []
        self._names = {_memory(tensor): name for name, tensor in module.named_parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            dy, x, weight, _, stride, padding, dilation, _, _, groups, _ = args
            dx, dweight, _ = result
            self.done.append(
                Gradient(
                    self._names[_memory(weight)].rpartition(".")[0],
                    _channels_last(x),
                    _channels_last(dy),
                    to_numpy(weight.detach().cpu()).copy(),
                    None if dx is None else _channels_last(dx),
                    to_numpy(dweight.cpu()).copy(),
                    {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
                )
            )
        return result


class _Recorder(TorchDispatchMode):
    """Notes each operation, and who wrote each tensor's memory."""

    def __init__(self, module: torch.nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.done: list[Operation] = []
        self.running = [""]
        self._own = dict(module.state_dict(keep_vars=True))
        self._names = {_memory(tensor): name for name, tensor in self._own.items()}
        self._writers = {_memory(x): INPUT}
        self._alive = [x]  # else another tensor could take the memory, and the writer with it

    @contextlib.contextmanager
    def following(self, module: torch.nn.Module) -> Iterator[None]:
        """Keeps `running`, the path of the innermost module, up to date."""
        with contextlib.ExitStack() as stack:
            for name, each in module.named_modules():
                for handle in self._hooks(name, each):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: torch.nn.Module) -> Sequence[torch.utils.hooks.RemovableHandle]:
        def enter(*_: Any) -> None:
            self.running.append(name)

        def leave(*_: Any) -> None:
            self.running.pop()

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        given = {name: value for name, value in (*zip(names, args), *kwargs.items())}
        tracked = {
            name: value
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and _memory(value) in self._writers
        }
        operands = tuple(_channels_last(value) for value in tracked.values())
        producers = tuple(self._writers[_memory(value)] for value in tracked.values())
        result = func(*args, **kwargs)
        y = result[0] if isinstance(result, (tuple, list)) else result
        if not tracked or not isinstance(y, torch.Tensor) or not y.is_floating_point():
            return result
        own = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        name = own.removesuffix("_")
        is_view = not func._schema.is_mutable and _memory(y) in {_memory(value) for value in tracked.values()}
        if is_view:
            return result
        self._alive.append(y)
        if name in _MOVES:
            self._writers[_memory(y)] = producers[0]
            return result
        self._writers[_memory(y)] = len(self.done)
        layer, parameters = self._parameters(given)
        self.done.append(
            Operation(
                _kind(name, given),
                layer,
                self.running[-1],
                producers,
                operands,
                _channels_last(y),
                parameters,
                {key: given[key] for key in ("stride", "padding", "dilation", "groups", "eps") if key in given},
                torch.Tag.pointwise in func.tags or name in _ELEMENTWISE,
            )
        )
        return result

    def _parameters(self, given: dict[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
        """The layer whose parameters are among the arguments, and all that it has."""
        for value in given.values():
            if isinstance(value, torch.Tensor) and (name := self._names.get(_memory(value))):
                layer, dot, _ = name.rpartition(".")
                of_layer = {
                    n.removeprefix(layer + dot): t for n, t in self._own.items() if n.rpartition(".")[0] == layer
                }
                return layer, {n: to_numpy(t.cpu()) for n, t in of_layer.items() if t.is_floating_point()}
        return "", {}


def _kind(name: str, given: dict[str, Any]) -> str:
    if name == "hardtanh":
        return _CLAMPS.get((given.get("min_val", -1), given.get("max_val", 1)), name)
    if name in ("clamp", "clamp_min"):
        return _CLAMPS.get((given.get("min"), given.get("max")), name)
    if name == "gelu":
        return "gelu (tanh)" if given.get("approximate") == "tanh" else name
    if name == "convolution" and given["transposed"]:
        return "transposed convolution"
    if name in ("add", "mul") and (
        not isinstance(given["other"], torch.Tensor)
        or given["other"].shape[:2] != given["self"].shape[:2]
        or given.get("alpha", 1) != 1
    ):
        return f"{name} with other operands"
    if name == "mean" and {axis % given["self"].ndim for axis in given.get("dim") or ()} != {2, 3}:
        return "mean over other axes"
    return _KINDS.get(name, name)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """A copy, since a later operation may change the tensor in place."""
    tensor = tensor.detach().cpu()
    return to_numpy(tensor.movedim(1, -1) if tensor.ndim > 2 else tensor).copy()


def _tensor(module: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """`(N, H, W, C)` as a tensor `(N, C, H, W)` where the model is."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return to_tensor(np.moveaxis(images, -1, 1)).to(device)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True
