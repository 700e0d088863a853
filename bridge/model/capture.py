"""Capture every operation of a live PyTorch model as it runs, with the very tensors that it received and gave.

Operands are recognized by their memory. A view of an operation's result, a copy, a padded copy and a tensor changed in
place count as that result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bridge._implementations.torch_ import to_numpy
from bridge.model.operations import INPUT, Operation
from bridge.torch_models import Recorder, by_name, channels_last, evaluating, on_device

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

#: Clamps between two numbers that have a name.
_CLAMPS: Mapping[tuple[Any, Any], str] = {(0, 6): "relu6", (0, None): "relu"}

#: Operators that are elementwise although PyTorch does not tag them so.
_ELEMENTWISE = {"hardswish"}

#: Arguments that are kept.
_SETTINGS = ("stride", "padding", "dilation", "groups", "eps", "momentum")

#: Operators that move elements, or add zeros around them.
_MOVES = {"clone", "_to_copy", "copy", "constant_pad_nd", "contiguous", "_unsafe_view", "as_strided"}


#: The layouts of images and weights in memory.
LAYOUTS: Mapping[str, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def layout_of(module: torch.nn.Module) -> str:
    """Return the layout of a model: "channels_last" where a weight of several taps and channels is stored so."""
    kernels = [each for each in module.parameters() if each.ndim == 4 and not each.is_contiguous()]
    return (
        "channels_last"
        if any(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
        else ("contiguous")
    )


def check_layout(layout: str | None) -> None:
    """Raise where a layout is neither None nor one of `LAYOUTS`."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}, expected one of {', '.join(LAYOUTS)}")


def in_layout(module: torch.nn.Module, layout: str | None) -> torch.nn.Module:
    """Return a copy of a model in a layout; the model itself where it has that layout, or None is asked for.

    Raises:
      ValueError: an unknown layout.
    """
    check_layout(layout)
    if layout is None or layout == layout_of(module):
        return module
    return copy.deepcopy(module).to(memory_format=LAYOUTS[layout])


def operations(
    module: torch.nn.Module, images: np.ndarray, layout: str | None = None
) -> tuple[list[Operation], np.ndarray]:
    """Run a model once, in eval mode and without gradients.

    Args:
      module: the model; its training flags are as before afterwards.
      images: `(N, H, W, C)`.
      layout: of weights and images in memory; None: that of the model.

    Returns:
      Its operations in the order in which they ran, and its output; of a model of transformers, the logits.

    Raises:
      ValueError: its forward fails.
    """
    module = in_layout(module, layout)
    x = _images(module, images)
    recorder = _OperationRecorder(module, x)
    return recorder.done, _logits(recorder.run(x))


def eager(module: torch.nn.Module, images: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Return the output of a model that runs as its user runs it, in eval mode, with nothing recorded."""
    module = in_layout(module, layout)
    with evaluating(module), torch.no_grad():
        return _logits(module(_images(module, images)))


def _images(module: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    x = on_device(module, np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    return x.contiguous(memory_format=LAYOUTS[layout_of(module)])


def _logits(y: Any) -> np.ndarray:
    return to_numpy(getattr(y, "logits", y).cpu())


class _OperationRecorder(Recorder):
    """Note each operation, and which operation wrote each tensor's memory."""

    def __init__(self, module: torch.nn.Module, x: torch.Tensor) -> None:
        super().__init__(module)
        self.done: list[Operation] = []
        self._writers = {_memory(x): INPUT}
        self._alive = [x]  # else another tensor could take the memory, and the writer with it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = by_name(func, args, kwargs)
        tracked = [v for v in given.values() if isinstance(v, torch.Tensor) and _memory(v) in self._writers]
        operands = tuple(map(channels_last, tracked))
        producers = tuple(self._writers[_memory(value)] for value in tracked)
        result = func(*args, **(kwargs or {}))
        y = result[0] if isinstance(result, (tuple, list)) else result
        if not tracked or not isinstance(y, torch.Tensor) or not y.is_floating_point():
            return result
        is_view = not func._schema.is_mutable and _memory(y) in map(_memory, tracked)
        if is_view:
            return result
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
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
                self.running[-1].name,
                producers,
                operands,
                channels_last(y),
                parameters,
                {key: given[key] for key in _SETTINGS if given.get(key) is not None},
                torch.Tag.pointwise in func.tags or name in _ELEMENTWISE,
                memory_layout(tracked[0]),
                again(func, given),
            )
        )
        return result

    def _parameters(self, given: Mapping[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
        """Return the layer whose parameters are among the arguments, and all parameters and buffers that it has."""
        named = (self.names.get(value.data_ptr()) for value in given.values() if isinstance(value, torch.Tensor))
        if (name := next(filter(None, named), None)) is None:
            return "", {}
        layer = name.rpartition(".")[0]
        own = self.module.get_submodule(layer)
        tensors = (*own.named_parameters(recurse=False), *own.named_buffers(recurse=False))
        return layer, {n: to_numpy(t.cpu()) for n, t in tensors if t.is_floating_point()}


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


def memory_layout(x: torch.Tensor) -> str:
    """Return "contiguous", "channels_last" or "other"; nothing for two axes or fewer."""
    if x.ndim < 3:
        return ""
    return "contiguous" if x.is_contiguous() else "channels_last" if x.stride(1) == 1 else "other"


#: Operators that run again on other numbers, and the names of their input, weight and bias.
_OPERANDS: Mapping[str, Sequence[str]] = {
    "convolution": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2"),
    "mean": ("self",),
    "sigmoid": ("self",),
    "silu": ("self",),
}


def again(func: Any, given: Mapping[str, Any]) -> Callable[..., np.ndarray] | None:
    """Return the operator as a function of new numbers, which stand in memory as those that it was given."""
    name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
    names = _OPERANDS.get(name)
    if names is None or any(given.get(factor, 1) != 1 for factor in ("alpha", "beta")):
        return None
    kept = {name: each for name, each in given.items() if name not in names}
    forms = {
        name: (each.shape, each.stride(), each.device)
        for name in names
        if isinstance(each := given.get(name), torch.Tensor)
    }

    def run(x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
        if name in ("addmm", "mm") and weight is not None:
            weight = weight.T
        arrays = (np.moveaxis(x, -1, 1) if x.ndim > 2 else x, weight, bias)
        new: dict[str, torch.Tensor | None] = {name: None for name in names if name in given}
        for name_of, array in zip(names, arrays):
            if array is not None:
                shape, strides, device = forms[name_of]
                empty = torch.empty_strided(shape, strides, device=device)
                new[name_of] = empty.copy_(torch.from_numpy(np.asarray(array)))
        with torch.no_grad():
            y = func(**kept, **new)
        return to_numpy((y.movedim(1, -1) if y.ndim > 2 else y).cpu())

    return run


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
