"""A user's own function as an implementation: `package.module:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bridge.errors import ImplementationError
from bridge.libraries import with_torchvision
from bridge.process import import_named


def load(name: str) -> tuple[Callable[..., Any], str]:
    """Return the function `package.module:function`, and the framework that its module imports: "torch" or "jax".

    Raises:
      ValueError: there is no such function, or its module imports both frameworks or none; the message says so.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = with_torchvision(lambda: import_named(module_name))
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"`implementation` is {name!r}, and {module_name!r} cannot be imported: {_first_line(error)}"
        ) from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(
            f"`implementation` is {name!r}, expected a function: {module_name} has no {attribute!r}{_found(module)}"
        )
    return function, _framework(name, function, module)


def call(
    name: str, function: Callable[..., Any], kind: type, shape: tuple[int, ...], x: Any, kernel: Any, bias: Any
) -> Any:
    """Return f(x, kernel) or f(x, kernel, bias), checked for the framework's array type and the geometry's shape.

    Raises:
      ImplementationError: the function raised, or returned something of another shape; the message has its name.
    """
    try:
        y = function(x, kernel) if bias is None else function(x, kernel, bias)
    except (Exception, SystemExit) as error:
        given = ", ".join(str(tuple(a.shape)) for a in (x, kernel, bias) if a is not None)
        raise ImplementationError(
            f"{name} raised {type(error).__name__} for arrays of shapes {given}: {_first_line(error)}"
        ) from None
    if not isinstance(y, kind):
        raise ImplementationError(f"{name} returned a {type(y).__name__}, expected a {kind.__name__} as it was given")
    given_shape = tuple(getattr(y, "shape", ()))
    if given_shape != shape:
        returned = f"shape {given_shape}"
        raise ImplementationError(
            f"{name} returned {returned}, expected shape {shape}: does it stride and pad as the case does?"
        )
    return y


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _found(module: ModuleType) -> str:
    """Return where the module was found, if not in the current folder: the user may mean another of that name."""
    file = getattr(module, "__file__", None)
    return "" if file and Path(file).is_relative_to(Path.cwd()) else f"; it is {file or 'built into Python'}"


def _framework(name: str, function: Callable[..., Any], module: ModuleType) -> str:
    defined_in = inspect.getmodule(function) or module
    imported = {
        value.__name__.partition(".")[0] for value in vars(defined_in).values() if isinstance(value, ModuleType)
    } | {getattr(value, "__module__", None) or "" for value in vars(defined_in).values() if callable(value)}
    found = {framework for framework in ("torch", "jax") if any(m.partition(".")[0] == framework for m in imported)}
    if len(found) != 1:
        both = " and ".join(sorted(found)) or "neither torch nor jax"
        raise ValueError(
            f"`implementation` is {name!r}, whose module imports {both}, "
            "expected one of them, since it decides what the function is given. "
            "torch: tensors, channels first; jax: arrays, channels last"
        )
    return found.pop()
