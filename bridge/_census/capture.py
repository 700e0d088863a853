"""Capture what the depthwise convolutions of a live PyTorch model really receive and give, in one forward pass."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge._census.calls import Capture, CapturedCall, named_padding
from bridge._implementations.torch_ import to_numpy
from bridge.case import DTYPES
from bridge.diagnosis.runs import digest
from bridge.torch_models import Recorder, by_name, channels_last, check_memory, on_device
from bridge.weights.layouts import CONVOLUTION, depthwise_transpose
from bridge.weights.safetensors_ import write_safetensors
from jaxdw.conv_transpose import transposed_padding
from jaxdw.geometry import Geometry, Padding

#: What a convolution becomes; a traced model has the second, with the same parameters first.
_OPERATORS = (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default)

_LAYERS = (
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)


def capture(module: torch.nn.Module, inputs: Any, folder: Path) -> Capture:
    """Run the model once, in eval mode and without gradients, and save its depthwise convolutions in a folder.

    Args:
      module: the model; its training flags are as before afterwards.
      inputs: what its forward takes, arrays or tensors: one, a sequence of them by place, or a mapping by name.
      folder: an empty one; it gets one file per call.

    Raises:
      TypeError: `module` is no `nn.Module`.
      ValueError: its forward fails; the message says in which layer.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`module` is a {type(module).__name__}, expected a torch.nn.Module")
    recorder = _Recorder(module, folder)
    args, kwargs = [], {}
    if isinstance(inputs, Mapping):
        kwargs = {name: on_device(module, each) for name, each in inputs.items()}
    else:
        every = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        args = [on_device(module, each) for each in every]
    check_memory(module, args, kwargs, copies=0)
    recorder.run(*args, **kwargs)
    idle = [
        name
        for name, each in module.named_modules()
        if isinstance(each, _LAYERS) and each.groups == each.in_channels > 1 and not recorder.ran[name]
    ]
    return Capture(list(recorder.calls.values()), idle, recorder.passed_over, recorder.convolutions)


class _Recorder(Recorder):
    """Save each depthwise convolution as it runs. One call's arrays are in memory at a time."""

    def __init__(self, module: torch.nn.Module, folder: Path) -> None:
        super().__init__(module)
        self.folder = folder
        self.calls: dict[tuple, CapturedCall] = {}  # by what was computed
        self.ran: collections.Counter[str] = collections.Counter()
        self.passed_over: list[str] = []
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if func in _OPERATORS:
            self.convolutions += 1
            self._record(y, by_name(func, args, kwargs))
        return y

    def _record(self, y: torch.Tensor, given: Mapping[str, Any]) -> None:
        x, weight = given["input"], given["weight"]
        if not given["groups"] == x.shape[1] > 1:
            return
        name = self._label(weight)
        if reason := _incomparable(x):
            self.passed_over.append(f"{name}: {reason}")
            return
        rank = x.ndim - 2
        strides, pads, dilations = (
            tuple(given[key]) * (rank // len(given[key])) for key in ("stride", "padding", "dilation")
        )
        arrays = {"x": channels_last(x)}
        if given["bias"] is not None:
            arrays["bias"] = to_numpy(given["bias"].cpu())
        padded: Padding
        input_dilation, note = None, ""
        if given["transposed"]:
            layout = depthwise_transpose(weight.shape[1], flipped=True)
            arrays["kernel"] = np.ascontiguousarray(layout.to_flax(to_numpy(weight.cpu())))
            added = tuple(given["output_padding"]) * (rank // len(given["output_padding"]))
            padded, input_dilation = transposed_padding(weight.shape[2:], strides, pads, added, dilations)
            strides = (1,) * rank
        else:
            arrays["kernel"] = CONVOLUTION.to_flax(to_numpy(weight.cpu()))
            window = Geometry.of_windows(
                arrays["x"].shape, arrays["kernel"].shape[:-2], strides=strides, kernel_dilation=dilations
            )
            arrays["x"], padded, note = self._as_given(arrays["x"], pads, window)
        key = (strides, padded, dilations, input_dilation, *(digest(arrays[each]) for each in sorted(arrays)))
        if key in self.calls:
            self.calls[key].also.append(name)
            return
        path = self.folder / f"{len(self.calls)}.safetensors"
        write_safetensors(path, {**arrays, "y": channels_last(y)})
        kind = type(self.running[-1].module).__name__
        self.calls[key] = CapturedCall(
            name, kind, path, strides, padded, dilations, _layout(y), note, input_dilation=input_dilation
        )

    def _label(self, weight: torch.Tensor) -> str:
        """Return the layer's name, with the number of its call after the first."""
        name = self.names.get(weight.data_ptr())
        owner = self.running[-1].name if name is None else name.rpartition(".")[0]
        self.ran[owner] += 1
        again = f" (call {self.ran[owner]})" if self.ran[owner] > 1 else ""
        return (owner or "the model itself") + again

    def _as_given(
        self, received: np.ndarray, pads: tuple[int, ...], window: Geometry
    ) -> tuple[np.ndarray, Padding, str]:
        """Return the layer's own input and its padding's name where that is proved; else what the convolution saw.

        The third is a note: what a reader must know of how it was captured.
        """
        _, module, given = self.running[-1]
        if given is not None and given.ndim == received.ndim:
            x = channels_last(given)
            if name := named_padding(x, received, pads, window):
                return x, name, ""
        mode = getattr(module, "padding_mode", "zeros")
        if mode == "zeros":
            return received, pads, ""
        return received, pads, f"padding_mode={mode!r} has no name here: the input was captured after its padding"


def _incomparable(x: torch.Tensor) -> str:
    """Return why a depthwise convolution cannot be a Case; empty if it can."""
    word = str(x.dtype).removeprefix("torch.")
    return "" if word in DTYPES else f"dtype {word}, expected one of {', '.join(DTYPES)}"


def _layout(y: torch.Tensor) -> str:
    """Return the layout that PyTorch computed in: it gives the output the one that it takes the operands to have."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.ndim)
    last = form is not None and y.is_contiguous(memory_format=form) and not y.is_contiguous()
    return "channels_last" if last else "contiguous"
