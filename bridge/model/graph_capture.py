"""Record every operator that a live PyTorch model calls, with the very tensors, as a graph.

A tensor that is changed in place, or through a view, gets a new number where it is read again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bridge._implementations.torch_ import to_numpy
from bridge.model.model_inputs import INFERENCE, Mode, ModelInputs
from bridge.model.results import named
from bridge.model.torch_graph import UNITS, Call, Ref, Rerun, TorchGraph, without_repeats
from bridge.torch_models import Recorder, by_name, check_memory, evaluating, on_device

#: How many times the results of a network are in memory: PyTorch's, JAX's, and what bounds and orders are found from.
#: Measured by the peaks of `jaxdw model mobilenet_v2 --batch 2` and `--batch 10`.
_COPIES = 6

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


def graph(
    module: torch.nn.Module, inputs: ModelInputs, mode: Mode = INFERENCE, layout: str | None = None
) -> TorchGraph:
    """Run a model once, and return every operator that it called.

    Args:
      module: the model; its parameters, buffers and flags are as before afterwards.
      inputs: with NumPy arrays in PyTorch's layout.
      mode: of running: inference without gradients, unless it says otherwise.
      layout: of images and weights in memory, "contiguous" or "channels_last"; None: that of the model.

    Raises:
      ValueError: its forward fails, or an unknown layout.
    """
    module, given = _prepared(module, inputs, layout)
    args, kwargs = inputs.split(given)
    check_memory(module, args, kwargs, _COPIES * (1 + mode.gradients))
    recorder = _GraphRecorder(module, mode)
    recorder.inputs = [recorder.new(tensor) for tensor in given]
    with _without_fast_path(), _as_before(module):
        if mode.gradients:
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        y = recorder.run(*args, **kwargs)
        if mode.gradients:
            recorder.run_back(y)
    return recorder.graph(y)


def eager(module: torch.nn.Module, inputs: ModelInputs, layout: str | None = None) -> dict[str, np.ndarray]:
    """Return the results of a model by name that runs as its user runs it, in inference, with nothing recorded.

    Args: those of `graph`.
    """
    module, given = _prepared(module, inputs, layout)
    args, kwargs = inputs.split(given)
    with _without_fast_path(), evaluating(module), torch.no_grad():
        results = named(module(*args, **kwargs))
        return {name: to_numpy(y.cpu()) for name, y in results if isinstance(y, torch.Tensor)}


def _prepared(
    module: torch.nn.Module, inputs: ModelInputs, layout: str | None
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Return a model and its inputs in a layout."""
    module = in_layout(module, layout)
    given = [on_device(module, np.ascontiguousarray(each)) for each in inputs.arrays]
    memory = LAYOUTS[layout_of(module)]
    return module, [x.contiguous(memory_format=memory) if x.ndim == 4 and x.is_floating_point() else x for x in given]


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Run attention as several operators: one would hide all of it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _as_before(module: torch.nn.Module) -> Iterator[None]:
    """Restore buffers, which training changes, and which parameters have gradients."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags[name])


class _GraphRecorder(Recorder):
    """Number each tensor, and note each operator."""

    def __init__(self, module: torch.nn.Module, mode: Mode) -> None:
        super().__init__(module)
        self.mode = mode
        self.incoming: dict[str, int] = {}
        self.gradients: dict[str, int] = {}
        self.calls: list[Call] = []
        self.values: dict[int, np.ndarray] = {}
        self.lower: dict[int, str] = {}
        self.runs: dict[int, Rerun] = {}
        self.parameters: dict[int, str] = {}
        self.inputs: list[int] = []
        self._numbers: dict[int, int] = {}
        self._stale: dict[int, int] = {}  # tensors that were changed through another one, and by which value
        self._alive: list[torch.Tensor] = []
        self._sharing: dict[int, list[torch.Tensor]] = {}
        self._own = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        training = {each: each.training for each in self.module.modules()}
        for each in training:
            each.training = self.mode.training
        try:
            with self._following(), torch.set_grad_enabled(self.mode.gradients), self:
                yield
        finally:
            for each, flag in training.items():
                each.training = flag

    def run_back(self, result: Any) -> None:
        """Record the backward pass of all parameters, from gradients of the results that are drawn."""
        results = {name: y for name, y in named(result) if isinstance(y, torch.Tensor) and y.is_floating_point()}
        rng = np.random.default_rng(0)
        drawn = {name: torch.tensor(rng.standard_normal(y.shape), dtype=y.dtype) for name, y in results.items()}
        self.incoming = {name: self.new(each.to(results[name].device)) for name, each in drawn.items()}
        some = [name for name, y in results.items() if y.requires_grad]
        owners = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        with self:
            found = torch.autograd.grad(
                [results[name] for name in some],
                list(owners.values()),
                [drawn[name] for name in some],
                allow_unused=True,
            )
        self.gradients = {name: self.number(g) for name, g in zip(owners, found) if g is not None}

    def new(self, tensor: torch.Tensor) -> int:
        """Number a tensor, as it is now."""
        number = len(self.values)
        array = to_numpy(tensor.detach().cpu()).copy()
        if array.dtype.name in UNITS:
            self.lower[number] = array.dtype.name
            array = array.astype(np.float32)
        self.values[number] = array
        self._numbers[id(tensor)] = number
        self._stale.pop(id(tensor), None)
        self._alive.append(tensor)  # else another one could take its place and its number
        self._sharing.setdefault(_memory(tensor), []).append(tensor)
        return number

    def number(self, tensor: torch.Tensor) -> int:
        known = self._numbers.get(id(tensor))
        if known is None and (other := self._same_view(tensor)) is not None:
            return self.number(other)
        if known is None:
            known = self.new(tensor)
            name = self._own.get(id(tensor)) or self._by_memory(tensor)
            if name is not None:
                self.parameters[known] = name
        elif id(tensor) in self._stale:
            writer = self._stale[id(tensor)]
            old, known = known, self.new(tensor)
            self.calls.append(Call("written", {"self": Ref(old), "by": Ref(writer)}, (known,), self.running[-1].name))
        return known

    def _same_view(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor that is known, of the same elements in memory: what autograd keeps is another object."""
        if not tensor.numel() or id(tensor) in self._own:
            return None
        form = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        for other in reversed(self._sharing.get(_memory(tensor), ())):
            if (other.storage_offset(), other.shape, other.stride(), other.dtype) == form:
                return other
        return None

    def _by_memory(self, tensor: torch.Tensor) -> str | None:
        name = self.names.get(tensor.data_ptr())
        if name is None or tensor.numel() == 0:
            return None
        own = self.module.get_parameter(name) if _is_parameter(self.module, name) else self.module.get_buffer(name)
        return name if own.shape == tensor.shape and own.stride() == tensor.stride() else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = by_name(func, args, kwargs)
        arguments = {name: self._referred(value) for name, value in given.items()}
        result = func(*args, **(kwargs or {}))
        results = [
            y for y in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(y, torch.Tensor)
        ]
        written = {
            id(given[each.name])
            for each in func._schema.arguments
            if each.alias_info is not None and each.alias_info.is_write and each.name in given
        }
        outputs = tuple(self.new(y) for y in results)
        if not self.mode.gradients and (run := _again(func, given)) is not None:
            first = max((x for x in given.values() if isinstance(x, torch.Tensor)), key=lambda x: x.ndim)
            self.runs[outputs[0]] = Rerun(run, _memory_layout(first))
        for y, number in zip(results, outputs):
            if id(y) in written:
                for other in self._sharing[_memory(y)]:
                    if other is not y:
                        self._stale[id(other)] = number
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        self.calls.append(Call(name, arguments, outputs, self.running[-1].name))
        return result

    def _referred(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return Ref(self.number(value))
        if isinstance(value, (list, tuple)):
            return type(value)(self._referred(each) for each in value) if type(value) in (list, tuple) else value
        return value

    def graph(self, result: Any) -> TorchGraph:
        found = [(name, self.number(y)) for name, y in named(result) if isinstance(y, torch.Tensor)]
        layers: dict[str, dict[str, np.ndarray]] = {}
        for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            if tensor.is_floating_point():
                layer, _, own = name.rpartition(".")
                array = to_numpy(tensor.detach().cpu())
                layers.setdefault(layer, {})[own] = array.astype(np.float32) if array.dtype.name in UNITS else array
        calls, same = without_repeats(self.calls, self.values)
        outputs = [same.get(number, number) for _, number in found]
        results = [name for name, _ in found]
        gradients = {name: same.get(number, number) for name, number in self.gradients.items()}
        return TorchGraph(
            calls,
            self.values,
            self.parameters,
            self.inputs,
            outputs,
            layers,
            results,
            self.incoming,
            gradients,
            self.lower,
            self.runs,
        )


def _memory_layout(x: torch.Tensor) -> str:
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


def _again(func: Any, given: Mapping[str, Any]) -> Callable[..., np.ndarray] | None:
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


def _is_parameter(module: torch.nn.Module, name: str) -> bool:
    layer, _, own = name.rpartition(".")
    return own in module.get_submodule(layer)._parameters


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
