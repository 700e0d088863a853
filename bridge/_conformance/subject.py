"""The kernel under test: which problems it accepts, and its results for one of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bridge._conformance.problems import Problem
from bridge._implementations import FRAMEWORKS, user
from bridge._implementations.arguments import signature_of
from bridge.case import Case
from bridge.errors import ImplementationError
from bridge.process import printing_to_stderr

#: Names of the parameters that only a causal convolution has, by what they take.
CAUSAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "state": ("state", "initial_state", "initial_states", "conv_state", "cache"),
    "return_state": ("return_state", "return_final_state", "return_final_states", "output_final_state"),
    "activation": ("activation", "act"),
}

#: Errors that Python raises where code is wrong; a kernel that refuses a problem raises others.
_FAULTS = ("IndexError", "KeyError", "ZeroDivisionError", "AttributeError", "UnboundLocalError")


class Refused(Exception):
    """The kernel raised an error for a problem; the message is its first line."""


class Crashed(Exception):
    """The kernel returned no result, and not because it refuses the problem; the message is the reason."""


class WrongShape(Crashed):
    """The kernel returned an output of another shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """The results of one call, in the layout of `Case`.

    Attributes:
      y: the output, in the dtype of the problem; dtype: the name of the dtype that it had.
      state: `(N, K-1, C)`, if it was asked for.
      gradients: by name: x, kernel, bias; None where there is none.
      changed: the arguments that the kernel changed in place, by name.
    """

    y: np.ndarray
    dtype: str
    state: np.ndarray | None
    gradients: Mapping[str, np.ndarray | None]
    changed: tuple[str, ...]


class Subject:
    """A kernel under test.

    Attributes:
      function: the user's function or layer.
      arrays: its framework.
      framework: "torch", "jax" or "numpy".
      causal: the parameters that only a causal convolution has: their names, by what they take.
      told: how it was called last, in words.
    """

    def __init__(self, function: user.UserFunction, framework: str, *, device: str = "", jit: bool = True) -> None:
        self.function, self.framework, self.device, self.jit = function, framework, device, jit
        arrays: user.Arrays = importlib.import_module(FRAMEWORKS[framework]).ARRAYS
        self.arrays = dataclasses.replace(arrays, moveaxis=arrays.views)
        self.is_layer = bool(user.layer_framework(function.target))
        parameters = {} if self.is_layer else signature_of(function.target).parameters
        self.causal = {role: name for role, names in CAUSAL_NAMES.items() for name in names if name in parameters}
        self.told = ""
        self._programs: dict[tuple[Any, ...], user.Program] = {}
        self._words: dict[tuple[Any, ...], str] = {}

    def forget(self) -> None:
        """Release the programs that were compiled."""
        self._programs.clear()
        self._words.clear()

    def run(
        self,
        problem: Problem,
        case: Case,
        dy: np.ndarray | None = None,
        *,
        form: str = "contiguous",
        return_state: bool = False,
        activation: str = "",
    ) -> Result:
        """Return the results of one call.

        Args:
          problem: its geometry.
          case: its data; a state is in front of x.
          dy: the gradient by the output, to differentiate; None for the output alone.
          form: how the arguments lie in memory, one of `user.FORMS`.
          return_state: ask for the state after x.
          activation: its name; empty to leave the argument out.

        Raises:
          Refused: it raised an error; Crashed: it raised one of a fault in its code, or returned something else.
          NoGradient: the result cannot be differentiated.
        """
        named = self._named(problem, case)
        settings: dict[str, Any] = {self.causal["return_state"]: True} if return_state else {}
        settings |= {self.causal["activation"]: activation} if activation else {}
        given = [self._to_native(problem, name, each) for name, each in named.items()]
        native_dy = None if dy is None else self._to_native(problem, "x", dy)
        key = (problem, tuple(named), tuple(settings.items()), dy is not None, form)
        program = self._program(*key)
        try:
            with printing_to_stderr():
                results = program(given, native_dy)
            self.told = self._words.setdefault(key, self.function.told)  # a compiled program does not say it again
        except user.NoGradient:
            raise
        except Exception as error:
            raise _sorted(error) from error
        return self._result(problem, named, given, results, return_state)

    def _named(self, problem: Problem, case: Case) -> dict[str, np.ndarray]:
        named = {"x": case.x, "kernel": np.ascontiguousarray(problem.kernel_of(case))}
        if case.bias is not None:
            named["bias"] = case.bias
        if problem.state:
            named["state"], named["x"] = case.x[:, : problem.before], case.x[:, problem.before :]
        return named

    def _result(
        self,
        problem: Problem,
        named: Mapping[str, np.ndarray],
        given: list[np.ndarray],
        results: user.Results,
        return_state: bool,
    ) -> Result:
        y = self._from_native(problem, "x", results.outputs[0])
        state = None
        if return_state:
            if len(results.outputs) != 2:
                raise Crashed(f"returned {len(results.outputs)} arrays, expected the output and the state")
            state = self._from_native(problem, "x", results.outputs[1])
        gradients = {
            name: None if each is None else self._from_native(problem, name, each)
            for name, each in zip(named, results.gradients)
        }
        if "state" in gradients:
            before, rest = gradients.pop("state"), gradients["x"]
            gradients["x"] = None if before is None or rest is None else np.concatenate([before, rest], axis=1)
        if (of_kernel := gradients.get("kernel")) is not None:
            gradients["kernel"] = problem.unflipped(of_kernel)
        changed = tuple(
            name
            for name, before, after in zip(named, given, results.arguments)
            if name != "state" and before.tobytes() != np.ascontiguousarray(after).tobytes()
        )
        dtype = named["x"].dtype
        return Result(y.astype(dtype), y.dtype.name, state, gradients, changed)

    def _program(
        self,
        problem: Problem,
        names: tuple[str, ...],
        settings: tuple[tuple[str, Any], ...],
        differentiate: bool,
        form: str,
    ) -> user.Program:
        key = (problem, names, settings, differentiate, form)
        if key not in self._programs:
            call = functools.partial(self._call, problem, names, dict(settings))
            self._programs[key] = self.arrays.program(
                call, differentiate=differentiate, form=form, device=self.device, jit=self.jit
            )
        return self._programs[key]

    def _call(self, problem: Problem, names: tuple[str, ...], settings: Mapping[str, Any], *arrays: Any) -> Any:
        """Call the kernel on arrays of its framework; return its output, and what it returned beside it."""
        given = dict(zip(names, arrays))
        settings = dict(settings)
        if "state" in given:
            state = given["state"]
            if self.function.taken_axes not in ("", self.arrays.native):
                state = self.arrays.views(state, *((-1, 1) if self.arrays.native == "channels_last" else (1, -1)))
            settings[self.causal["state"]] = state
        others: list[Any] = []
        target = self.function.target if self.is_layer else _with_settings(self.function.target, settings, others)
        own = dataclasses.replace(self.function, target=target)
        y = own.call(self.arrays, given["x"], given["kernel"], given.get("bias"), problem.call)
        self.function._taken, self.function.told = own._taken, own.told
        if self.function.taken_axes != self.arrays.native:
            moves = (-1, 1) if self.arrays.native == "channels_first" else (1, -1)
            others = [self.arrays.views(each, *moves) for each in others]
        return (y, *others)

    def _to_native(self, problem: Problem, name: str, array: np.ndarray) -> np.ndarray:
        """Return an array of the layout of `Case` in the framework's own order of axes."""
        if self.arrays.native == "channels_first" and name != "bias":
            array = np.moveaxis(array, -1, 1) if name != "kernel" else np.moveaxis(array, (-1, -2), (0, 1))
            if name == "kernel" and problem.kind == "transpose":
                array = array.reshape(problem.channels, problem.multiplier, *problem.kernel_size)
        return np.ascontiguousarray(array)

    def _from_native(self, problem: Problem, name: str, array: np.ndarray) -> np.ndarray:
        if self.arrays.native == "channels_last" or name == "bias":
            return array
        if name != "kernel":
            return np.moveaxis(array, 1, -1)
        return np.moveaxis(array.reshape(-1, 1, *problem.kernel_size), (0, 1), (-1, -2))


def _with_settings(target: Callable[..., Any], settings: Mapping[str, Any], others: list[Any]) -> Callable[..., Any]:
    """Return the function with some settings given; what it returns beside its first result goes to `others`."""

    def called(*args: Any, **kwargs: Any) -> Any:
        found = target(*args, **kwargs, **settings)
        if isinstance(found, (tuple, list)) and found:
            others.extend(each for each in found[1:] if each is not None)
            return found[0]
        return found

    signature = signature_of(target)
    kept = [each for each in signature.parameters.values() if each.name not in settings]
    called.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return called


def _sorted(error: BaseException) -> Exception:
    """Return the error as one of a kernel that refuses a problem, or of one that is wrong."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    raised = re.search(r" raised (\w+)", line)
    kind = raised[1] if raised else type(error).__name__
    line = re.sub(r" \(called as .*", "", line[raised.start() + 1 :] if raised else line)
    if isinstance(error, ImplementationError) and not raised and " returned " in line:
        return WrongShape(line) if " returned shape " in line else Crashed(line)
    return Crashed(line) if kind in _FAULTS else Refused(line)
