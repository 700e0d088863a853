"""A user's own function or layer as an implementation: `package.module:name`, or an object of a Python program."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import numpy as np

from bridge._implementations.arguments import ArgumentError, bind, described, takes
from bridge.errors import ImplementationError, first_line
from bridge.libraries import users_module
from jaxdw.geometry import Geometry

#: The two orders of axes of an input, an output and a kernel; the first is PyTorch's, the second Flax's.
AXES = ("channels_first", "channels_last")

#: What a user can say of a function in brackets, with the values.
SETTINGS: Mapping[str, tuple[str, ...]] = {"axes": AXES, "framework": ("torch", "jax", "numpy")}

#: The modules whose presence in a function, or in its module, says what it is given.
_FRAMEWORKS = {"torch": "torch", "jax": "jax", "flax": "jax", "jaxdw": "jax"}


class NoGradient(ImplementationError):
    """A function whose result cannot be differentiated."""


class Results(NamedTuple):
    """The results of one call of a function.

    Attributes:
      outputs: what it returned.
      gradients: of sum(dy y) by each argument, y being the first output; None where there is none; empty without dy.
      arguments: the arguments after the call.
    """

    outputs: list[np.ndarray]
    gradients: list[np.ndarray | None]
    arguments: list[np.ndarray]


#: Runs a function of a framework's arrays on NumPy arrays, and differentiates it where the second, dy, is not None.
#: `Arrays.program` makes it from the function, and from the keywords `differentiate`, `form` (one of `FORMS`), `device`
#: (its name, or "" for the framework's own choice), and `jit` (whether JAX compiles it).
Program = Callable[[Sequence[np.ndarray], np.ndarray | None], Results]

#: How arguments may lie in memory: in order; with unused elements between them; with the channels last, or first where
#: they are last; and dy as one element that is repeated.
FORMS = ("contiguous", "strided", "moved", "expanded")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What a framework does to the arrays that a user's function takes and returns.

    Attributes:
      framework: "torch", "jax" or "numpy".
      kind: the type of its arrays.
      native: the order of axes of the arrays that `UserFunction.call` is given.
      moveaxis: as `numpy.moveaxis`; the result is contiguous.
      padded: takes x in the native order and a geometry; returns x padded and dilated as it says.
      layer: takes a layer of the framework; returns a function of x, kernel and bias, the kernel in the native order.
      program: takes a function of the framework's arrays that returns a tuple of them, and keywords: `Program`.
      keys: what the class of a layer needs beside its sizes.
      views: as `moveaxis`, but the result shares its memory.
    """

    framework: str
    kind: type[Any]
    native: str
    moveaxis: Callable[..., Any]
    padded: Callable[[Any, Geometry], Any]
    layer: Callable[[Any, Geometry], Callable[..., Any]]
    program: Callable[..., Program]
    views: Callable[..., Any]
    keys: Callable[[], Mapping[str, Any]] = dict


@dataclasses.dataclass
class UserFunction:
    """A function, or a layer whose weights are replaced by the case's.

    Attributes:
      name: what to call it, without settings.
      target: a function, a layer, or the class of one.
      said: the settings that the user gave, by name: `SETTINGS`.
      framework: "torch", "jax" or "numpy"; empty if neither the user nor the code says it.
      told: how it was called, in words; empty before the first call.
    """

    name: str
    target: Any
    said: Mapping[str, str] = dataclasses.field(default_factory=dict)
    framework: str = ""
    told: str = ""
    _taken: tuple[str, str, bool] | None = None

    def __post_init__(self) -> None:
        if not callable(self.target):
            raise TypeError(f"{self.name} is {self.target!r}, expected a function or a layer")
        self.framework = self.framework or framework_of(self.target)

    @property
    def axes(self) -> str:
        """The order of axes that it takes, where the user said it."""
        return self.said.get("axes", "")

    @property
    def taken_axes(self) -> str:
        """The order of axes of x that it took in the last call; empty before the first."""
        return self._taken[0] if self._taken else ""

    @property
    def spelled(self) -> str:
        """The name with its settings."""
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.said.items()))
        return f"{self.name}[{settings}]" if settings else self.name

    def told_to(self, said: Mapping[str, str]) -> UserFunction:
        """Return it with the settings that a user gives in brackets.

        Raises:
          ValueError: a value that a setting has not.
        """
        for key, value in said.items():
            if value not in SETTINGS[key]:
                raise ValueError(f"`{key}` is {value!r}, expected one of {', '.join(SETTINGS[key])}")
        framework = said.get("framework", "") or self.framework
        return UserFunction(self.name, self.target, said, framework)

    def call(self, arrays: Arrays, x: Any, kernel: Any, bias: Any, geometry: Geometry) -> Any:
        """Return the output `(N, ...)` in the native order of axes.

        The orders of axes of x and of the kernel are those of the first call that gives the geometry's output shape:
        the framework's own are tried first, then the other's, then a kernel without its axis of one input channel.

        Args:
          arrays: the framework.
          x, kernel, bias: in the native order; x has one batch axis.
          geometry: of one batch axis.

        Raises:
          ImplementationError: the function raised, or returned another type or shape, or numbers that are not real
            floating ones; the message has its name.
        """
        failure: ImplementationError | None = None
        for orders in [self._taken] if self._taken else self._orders(arrays.native):
            try:
                y = self._attempt(arrays, x, kernel, bias, geometry, *orders)
            except ImplementationError as error:
                failure = failure or error
                continue
            dtype = str(y.dtype).rpartition(".")[2]
            if not dtype.startswith(("float", "bfloat")):
                given = str(x.dtype).rpartition(".")[2]
                raise ImplementationError(
                    f"{self.name} returned dtype {dtype}, expected a real floating dtype: it was given {given}"
                )
            self._taken = orders
            return y
        assert failure is not None
        raise failure

    def _orders(self, native: str) -> Iterator[tuple[str, str, bool]]:
        """Yield orders of axes of x and of the kernel, and whether the kernel has its axis of one input channel."""
        other = {AXES[0]: AXES[1], AXES[1]: AXES[0]}
        ranked = [self.axes] if self.axes else [native, other[native]]
        yield from ((of_x, of_x, True) for of_x in ranked)
        yield from ((of_x, other[of_x], True) for of_x in reversed(ranked))
        yield from ((of_x, of_x, False) for of_x in ranked)
        yield from ((of_x, other[of_x], False) for of_x in ranked)

    def _attempt(
        self, arrays: Arrays, x: Any, kernel: Any, bias: Any, g: Geometry, of_x: str, of_kernel: str, one: bool
    ) -> Any:
        """Call it with these orders of axes; raise ImplementationError if the result does not suit them."""
        function, made = self.target, ""
        if layer_framework(self.target):
            function, made = self._layer(arrays, g, bias)
        if takes(function, "padding") and not _can_be_told(function, g, arrays.framework):
            x = arrays.padded(x, g)
            g = dataclasses.replace(
                g,
                spatial=g.padded_spatial,
                padding=((0, 0),) * g.rank,
                padding_mode="zeros",
                input_dilation=(1,) * g.rank,
            )
        if of_x != arrays.native:
            x = arrays.moveaxis(x, *_MOVES[of_x])
        if of_kernel != arrays.native:
            kernel = arrays.moveaxis(kernel, *_KERNEL_MOVES[of_kernel])
        if not one:
            kernel = kernel.squeeze(1 if of_kernel == AXES[0] else -2)
        given: dict[str, Any] = {"x": x, "kernel": kernel} | ({} if bias is None else {"bias": bias})
        shapes = ", ".join(str(tuple(array.shape)) for array in (x, kernel, bias) if array is not None)
        called = ""
        try:
            bound = bind(function, given, g, arrays.framework)
            called = made or f"{self.name}({described(bound)})"
            y = function(*bound.args, **bound.kwargs)
        except (Exception, SystemExit) as error:
            if isinstance(error, ArgumentError):
                raise ImplementationError(f"{self.name} cannot be called: {error}") from None
            traced = "Tracer" in type(error).__name__
            hint = f"; as {self.name}[jit=off] it is not traced by jax.jit" if traced else ""
            raise ImplementationError(
                f"{self.name} raised {first_line(error)} (called as {called or self.name} with arrays of shapes "
                f"{shapes}){hint}"
            ) from None
        if not isinstance(y, arrays.kind):
            raise ImplementationError(
                f"{self.name} returned a {type(y).__name__}, expected a {arrays.kind.__name__} as it was given"
            )
        expected = _shape(g, of_x, output=True)
        if tuple(y.shape) != expected:
            raise ImplementationError(
                f"{self.name} returned shape {tuple(y.shape)}, expected shape {expected}: "
                f"does it stride and pad as the case does? It was called as {called}"
            )
        self.told = f"{called}: {_WORDS[arrays.framework]}, {self._in_words(g, of_x, of_kernel, kernel.shape)}"
        return y if of_x == arrays.native else arrays.moveaxis(y, *_MOVES[arrays.native])

    def _layer(self, arrays: Arrays, g: Geometry, bias: Any) -> tuple[Callable[..., Any], str]:
        """Return a function of x, kernel and bias from the layer or its class, and how it was made in words."""
        layer, made = self.target, f"{self.name} with the case's weights"
        if isinstance(layer, type):
            given = {"use_bias": bias is not None, **arrays.keys()}
            try:
                bound = bind(layer, given, g, arrays.framework)
                layer, made = layer(*bound.args, **bound.kwargs), f"{self.name}({described(bound)})"
            except (Exception, SystemExit) as error:
                raise ImplementationError(f"{self.name} cannot be made: {first_line(error)}") from None
        return arrays.layer(layer, g), made

    def _in_words(self, g: Geometry, of_x: str, of_kernel: str, kernel_shape: Sequence[int]) -> str:
        words = of_x.replace("_", " ")
        if of_kernel != of_x:
            words += f", the kernel {of_kernel.replace('_', ' ')}"
        elif len(kernel_shape) == g.rank + 1:
            words += f", the kernel of shape {tuple(kernel_shape)}"
        other = next(axes for axes in AXES if axes != of_x)
        if not self.axes and all(
            _shape(g, of_x, output=each) == _shape(g, other, output=each) for each in (False, True)
        ):
            words += f" (the shapes do not tell: {self.name}[axes={other}] takes the other order)"
        return words


#: `moveaxis` of x or the output to an order of axes from the other, and of the kernel.
_MOVES = {"channels_first": (-1, 1), "channels_last": (1, -1)}
_KERNEL_MOVES = {"channels_first": ((-1, -2), (0, 1)), "channels_last": ((0, 1), (-1, -2))}

_WORDS = {"torch": "PyTorch tensors", "jax": "JAX arrays", "numpy": "NumPy arrays"}


def load(name: str) -> UserFunction:
    """Return the function or layer `package.module:name`.

    Raises:
      ValueError: there is no such function; the message says so.
    """
    module_name, _, attribute = name.partition(":")
    module = users_module("implementation", name)
    try:
        target = getattr(module, attribute)
    except AttributeError:
        raise ValueError(
            f"`implementation` is {name!r}, expected a function: {module_name} has no {attribute!r}{_found(module)}"
        ) from None
    if not callable(target):
        raise ValueError(
            f"`implementation` is {name!r}, of type {type(target).__name__}, expected a function, a layer, or the "
            f"class of one{_found(module)}"
        )
    return UserFunction(name, target, framework=framework_of(target, module))


def framework_of(target: Any, module: ModuleType | None = None) -> str:
    """Return the framework that a function's code, or else its module, names: "torch" or "jax"; "" for both or none."""
    if found := layer_framework(target):
        return found
    function = target
    while hasattr(function, "func") or hasattr(function, "__wrapped__") or hasattr(function, "__func__"):
        function = next(
            getattr(function, name) for name in ("func", "__wrapped__", "__func__") if hasattr(function, name)
        )
    if inspect.isbuiltin(function):
        named = _frameworks([function])
        return named.pop() if len(named) == 1 else ""
    if not hasattr(function, "__code__"):  # an object that is called
        function = type(function).__call__
    named = _frameworks(getattr(function, "__globals__", {}).get(name, name) for name in _names(function))
    if len(named) != 1:
        named = _frameworks(vars(inspect.getmodule(function) or module or sys).values())
    return named.pop() if len(named) == 1 else ""


def layer_framework(target: Any) -> str:
    """Return the framework of a layer or its class: "torch" for `torch.nn`, "jax" for Flax; "" for all else."""
    for module, framework in (("torch.nn", "torch"), ("flax.nnx", "jax"), ("flax.linen", "jax")):
        kind = getattr(sys.modules.get(module), "Module", None)  # without the import there is none of its objects
        if kind is not None and (isinstance(target, kind) or (isinstance(target, type) and issubclass(target, kind))):
            return framework
    return ""


def _names(function: Any) -> Iterator[str]:
    """Yield the names that a function's code refers to, modules that it imports included."""
    codes = [function.__code__] if isinstance(getattr(function, "__code__", None), CodeType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]


def _frameworks(values: Iterator[Any] | Any) -> set[str]:
    """Return the frameworks of modules, of their functions, and of modules' names."""
    names = (
        value
        if isinstance(value, str)
        else getattr(value, "__name__" if isinstance(value, ModuleType) else "__module__", "")
        for value in values
    )
    tops = {str(name or "").partition(".")[0] for name in names}
    return {framework for top, framework in _FRAMEWORKS.items() if top in tops}


def _can_be_told(function: Callable[..., Any], g: Geometry, framework: str) -> bool:
    """Return whether the function's `padding` and `input_dilation` can express the geometry's."""
    if max(g.input_dilation) > 1 and not takes(function, "input_dilation"):
        return False
    return g.padding_mode == "zeros" and (framework == "jax" or g.symmetric_padding is not None)


def _shape(g: Geometry, axes: str, *, output: bool) -> tuple[int, ...]:
    batch, *spatial, channels = g.output_shape if output else g.x_shape
    return (batch, *spatial, channels) if axes == "channels_last" else (batch, channels, *spatial)


def _found(module: ModuleType) -> str:
    """Return where the module was found, if not in the current folder: the user may mean another of that name."""
    file = getattr(module, "__file__", None)
    return "" if file and Path(file).is_relative_to(Path.cwd()) else f"; it is {file or 'built into Python'}"
