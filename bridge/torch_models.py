"""Live PyTorch models: run them, record every operator that they call, seed their random numbers.

PyTorch brings every operation, whoever asks for it - an `nn.Module`, a function, a compiled or exported model - to one
operator of `aten`. A dispatch mode sees each call of it with the very tensors. Hooks only tell which module is running,
and which tensor that module was given.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridge._implementations.torch_ import to_numpy, to_tensor
from bridge.memory import CHECKED, check_fits


class Running(NamedTuple):
    """A module whose forward runs: its name, the module, and the first tensor that it was given."""

    name: str
    module: torch.nn.Module
    given: torch.Tensor | None


class Recorder(TorchDispatchMode):
    """Follow one model as it runs. A subclass sees each operator in its `__torch_dispatch__`.

    Attributes:
      module: the model.
      running: the modules whose forward runs, the innermost last.
      names: the name of each parameter and buffer, by the address of its data.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.running = [Running("", module, None)]
        self.names = {
            tensor.data_ptr(): name
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if not torch.nn.parameter.is_lazy(tensor)
        }

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model once, in eval mode and without gradients, and return what it gives.

        Its training flags are as before afterwards.

        Raises:
          ValueError: its forward fails; the message says in which module.
        """
        try:
            with self.context():
                return self.module(*args, **kwargs)
        except OSError:  # the disk is full: no fault of the model
            raise
        except (Exception, SystemExit) as error:
            shapes = [str(tuple(each.shape)) for each in (*args, *kwargs.values()) if hasattr(each, "shape")]
            raise ValueError(
                f"the forward of {type(self.module).__name__} on tensors of shape {', '.join(shapes)} failed in "
                f"{self.running[-1].name or 'the model itself'}: {type(error).__name__}: {error}"
            ) from error

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Return the state in which `run` calls the model."""
        with evaluating(self.module), self._following(), torch.no_grad(), self:
            yield

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """Keep `running` up to date. TorchScript takes no such hooks: the module that calls it stays the innermost."""
        with contextlib.ExitStack() as stack:
            for name, each in self.module.named_modules():
                if not isinstance(each, torch.jit.ScriptModule):
                    for handle in self._hooks(name, each):
                        stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: torch.nn.Module) -> Sequence[torch.utils.hooks.RemovableHandle]:
        def enter(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            self.running.append(Running(name, module, next(tensors, None)))

        def leave(module: torch.nn.Module, args: tuple, output: Any) -> None:
            while self.running.pop().module is not module:
                pass  # modules that failed within, and whose error was caught

        return module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)


class _Sizes(TorchDispatchMode):
    """Add up what operators return.

    Attributes:
      total: bytes of all results that are not views.
      greatest: bytes of the greatest of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.greatest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [each.nbytes for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            self.total, self.greatest = self.total + sum(sizes), max(self.greatest, *sizes, 0)
        return result


def check_memory(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], copies: int) -> None:
    """Refuse to run a model on large inputs whose results cannot fit; the shapes alone tell.

    A model on another device, or whose shapes depend on the numbers, is not checked.

    Args:
      module: the model.
      args, kwargs: what its forward takes.
      copies: how often each operator's result is kept; 0: the two greatest are in memory at once.

    Raises:
      MemoryError: more is needed than is free; the message gives both.
    """
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    if 4 * sum(each.nbytes for each in given) < CHECKED or any(each.device.type != "cpu" for each in given):
        return
    sizes, fake = _Sizes(), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with FakeCopyMode(fake):  # its forward may keep tensors
            copied, args, kwargs = copy.deepcopy((module, args, kwargs))
        with evaluating(copied), torch.no_grad(), fake, sizes:
            copied(*args, **kwargs)
    except (Exception, SystemExit):  # the run itself says why
        return
    shapes = ", ".join(str(tuple(each.shape)) for each in given)
    check_fits(f"{type(module).__name__} on {shapes}", copies * sizes.total or 2 * sizes.greatest)


def by_name(operator: Any, args: Sequence[Any], kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of an operator's call by the names of its schema; those left out are missing."""
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, args)) | (kwargs or {})


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy `(N, *spatial, C)`: a later operation may change the tensor in place."""
    return to_numpy(tensor.cpu().movedim(1, -1) if tensor.ndim > 2 else tensor.cpu()).copy()


def on_device(module: torch.nn.Module, value: Any) -> Any:
    """Return an array or a tensor as a tensor where the model is; anything else as it is."""
    if isinstance(value, np.ndarray):
        value = to_tensor(value)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers of PyTorch and Python from a seed; their state is as before afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    for each in training:  # not by `eval()`, which exported models refuse
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True
