"""What the depthwise convolutions of a live PyTorch model really receive and give, in one forward pass.

PyTorch brings every convolution, whoever calls it - `nn.Conv2d`, a subclass that pads by itself, `F.conv2d`, a compiled
or exported model - to one operator, `aten::convolution`; a dispatch mode sees each call of it with the very tensors.
Hooks only tell which module is running, and what that was given.
"""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge._census.calls import Capture, CapturedCall, padding_word
from bridge.case import DTYPES
from bridge.diagnosis.runs import digest
from bridge.implementations.torch_ import to_numpy, to_tensor
from bridge.weights.layouts import CONVOLUTION
from bridge.weights.safetensors_ import write_safetensors
from jaxdw.geometry import Geometry, Padding

#: What a convolution becomes; a traced model has the second, with the same parameters first.
_OPERATORS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)
_PARAMETERS = [argument.name for argument in _OPERATORS[0]._schema.arguments]


def capture(module: torch.nn.Module, inputs: Any, folder: Path) -> Capture:
    """Runs the model once, in eval mode and without gradients, and saves its depthwise convolutions in a folder.

    Args:
      module: the model; its training flags are as before afterwards.
      inputs: what its forward takes, arrays or tensors: one, a sequence of them by place, or a mapping by name.
      folder: an empty one; a file for each call.

    Raises:
      TypeError: `module` is no `nn.Module`.
      ValueError: its forward fails; the message says in which layer.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`module` is a {type(module).__name__}, expected a torch.nn.Module")
    recorder = _Recorder(module, folder)
    places, names = _arguments(module, inputs)
    try:
        with _evaluating(module), recorder.following(module), torch.no_grad(), recorder:
            module(*places, **names)
    except OSError:  # the disk is full: no fault of the model
        raise
    except Exception as error:
        given = ", ".join(str(tuple(each.shape)) for each in (*places, *names.values()) if hasattr(each, "shape"))
        raise ValueError(
            f"the forward of {type(module).__name__} on `inputs` of shape {given} failed in "
            f"{recorder.running[-1].name or 'the model itself'}: {type(error).__name__}: {error}"
        ) from error
    idle = [
        name
        for name, each in module.named_modules()
        if isinstance(each, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))
        and each.groups == each.in_channels > 1
        and not recorder.ran[name]
    ]
    return Capture(list(recorder.calls.values()), idle, recorder.passed_over, recorder.convolutions)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of PyTorch and Python from a seed; their state is as before afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


class _Running(NamedTuple):
    """A module whose forward runs: its name, itself, and its first tensor."""

    name: str
    module: torch.nn.Module | None
    given: torch.Tensor | None


class _Recorder(TorchDispatchMode):
    """Saves each depthwise convolution as it runs. One call's arrays are in memory at a time."""

    def __init__(self, module: torch.nn.Module, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.calls: dict[tuple, CapturedCall] = {}  # by what was computed
        self.ran: collections.Counter[str] = collections.Counter()
        self.passed_over: list[str] = []
        self.convolutions = 0
        self.running = [_Running("", module, None)]
        self.owners = {
            parameter.data_ptr(): name.rpartition(".")[0]
            for name, parameter in module.named_parameters()
            if not isinstance(parameter, torch.nn.parameter.UninitializedParameter)
        }

    @contextlib.contextmanager
    def following(self, module: torch.nn.Module) -> Iterator[None]:
        """Keeps `running` up to date. TorchScript takes no such hooks: the module that calls it stays the one."""
        with contextlib.ExitStack() as stack:
            for name, each in module.named_modules():
                if not isinstance(each, torch.jit.ScriptModule):
                    for handle in self._hooks(name, each):
                        stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: torch.nn.Module) -> Sequence[torch.utils.hooks.RemovableHandle]:
        def enter(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            self.running.append(_Running(name, module, next(tensors, None)))

        def leave(module: torch.nn.Module, args: tuple, output: Any) -> None:
            while self.running.pop().module is not module:
                pass  # modules that failed within, and whose error was caught

        return module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func in _OPERATORS:
            self.convolutions += 1
            named = dict(zip(_PARAMETERS, args)) | (kwargs or {})
            self._record(y, **{name: named[name] for name in _PARAMETERS})
        return y

    def _record(
        self,
        y: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> None:
        if not groups == input.shape[1] > 1:
            return
        name, kind = self._label(weight)
        if reason := _incomparable(input, transposed):
            self.passed_over.append(f"{name}: {reason}")
            return
        rank = input.ndim - 2
        strides, pads, dilations = (tuple(each) * (rank // len(each)) for each in (stride, padding, dilation))
        arrays = {"x": _channels_last(input), "kernel": CONVOLUTION.to_flax(to_numpy(weight.cpu()))}
        if bias is not None:
            arrays["bias"] = to_numpy(bias.cpu())
        window = Geometry.of_windows(
            arrays["x"].shape, arrays["kernel"].shape[:-2], strides=strides, kernel_dilation=dilations
        )
        arrays["x"], padded, note = self._as_given(arrays["x"], pads, window)
        key = (strides, padded, dilations, *(digest(arrays[each]) for each in sorted(arrays)))
        if key in self.calls:
            self.calls[key].also.append(name)
            return
        path = self.folder / f"{len(self.calls)}.safetensors"
        write_safetensors(path, {**arrays, "y": _channels_last(y)})
        self.calls[key] = CapturedCall(name, kind, path, strides, padded, dilations, _layout(y), note)

    def _label(self, weight: torch.Tensor) -> tuple[str, str]:
        """The layer's name, with the number of its call after the first, and the class of the running module."""
        running = self.running[-1]
        owner = self.owners.get(weight.data_ptr(), running.name)
        self.ran[owner] += 1
        again = f" (call {self.ran[owner]})" if self.ran[owner] > 1 else ""
        return (owner or "the model itself") + again, type(running.module).__name__

    def _as_given(
        self, received: np.ndarray, pads: tuple[int, ...], window: Geometry
    ) -> tuple[np.ndarray, Padding, str]:
        """The layer's own input and the word for its padding where that is proved; else what the convolution saw."""
        module, given = self.running[-1].module, self.running[-1].given
        if given is not None and given.ndim == received.ndim:
            x = _channels_last(given)
            if word := padding_word(x, received, pads, window):
                return x, word, ""
        mode = getattr(module, "padding_mode", "zeros")
        if mode == "zeros":
            return received, pads, ""
        return received, pads, f"padding_mode={mode!r} has no word here: the input was captured after its padding"


def _incomparable(x: torch.Tensor, transposed: bool) -> str:
    """Why a depthwise convolution cannot be a Case; empty if it can."""
    if transposed:
        return "a transposed convolution"
    word = str(x.dtype).removeprefix("torch.")
    return "" if word in DTYPES else f"dtype {word}, expected one of {', '.join(DTYPES)}"


def _layout(y: torch.Tensor) -> str:
    """Which layout PyTorch computed in: it gives the output the one that it takes the operands to have."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    last = form is not None and y.is_contiguous(memory_format=form) and not y.is_contiguous()
    return "channels_last" if last else "contiguous"


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(to_numpy(tensor.cpu()), 1, -1)


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    for each in training:  # not by `eval()`, which exported models refuse
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _arguments(module: torch.nn.Module, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """`inputs` by place and by name, as tensors where the model is."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def tensor(each: Any) -> Any:
        if isinstance(each, np.ndarray):
            each = to_tensor(each)
        return each.to(device) if isinstance(each, torch.Tensor) else each

    if isinstance(inputs, Mapping):
        return [], {name: tensor(each) for name, each in inputs.items()}
    return [tensor(each) for each in (inputs if isinstance(inputs, (list, tuple)) else [inputs])], {}
