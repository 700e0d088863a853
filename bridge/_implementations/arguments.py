"""The arguments of a user's function or layer: what each parameter takes, found by its name."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from typing import Any

from jaxdw.geometry import Geometry

#: Names of parameters, by what they take, in lower case.
NAMES: Mapping[str, tuple[str, ...]] = {
    "x": ("x", "input", "inputs", "inp", "image", "images", "img", "data", "lhs", "input_tensor"),
    "kernel": ("weight", "kernel", "weights", "kernels", "w", "filter", "filters", "rhs"),
    "bias": ("bias", "biases"),
    "strides": ("stride", "strides", "window_strides"),
    "padding": ("padding", "pad", "paddings", "pads"),
    "kernel_dilation": ("dilation", "kernel_dilation", "rhs_dilation", "dilations", "dilation_rate"),
    "input_dilation": ("input_dilation", "lhs_dilation"),
    "output_padding": ("output_padding",),
    "groups": ("groups", "feature_group_count", "num_groups"),
    "multiplier": ("channel_multiplier", "multiplier", "depth_multiplier"),
    "kernel_size": ("kernel_size", "ksize"),
}

#: The same of a class that makes a layer.
LAYER_NAMES: Mapping[str, tuple[str, ...]] = {
    **{role: names for role, names in NAMES.items() if role not in ("x", "kernel", "bias")},
    "channels": ("in_channels", "in_features", "channels", "num_channels", "in_planes", "nin", "dim", "c"),
    "features": ("out_channels", "out_features", "features", "out_planes", "nout"),
    "use_bias": ("bias", "use_bias"),
    "kernel_size": (*NAMES["kernel_size"], "kernel", "k"),
    "rngs": ("rngs",),
}

#: The names under which `**kwargs` is given settings.
_KEYWORDS = {
    "torch": {"strides": "stride", "padding": "padding", "kernel_dilation": "dilation", "groups": "groups"},
    "jax": {"strides": "strides", "padding": "padding", "kernel_dilation": "kernel_dilation"},
    "numpy": {"strides": "stride", "padding": "padding", "kernel_dilation": "dilation"},
}

#: The same of a class whose `**kwargs` makes a layer.
_LAYER_KEYWORDS = {
    "torch": {
        "channels": "in_channels",
        "features": "out_channels",
        "kernel_size": "kernel_size",
        **_KEYWORDS["torch"],
        "use_bias": "bias",
    },
    "jax": {
        "channels": "in_features",
        "features": "out_features",
        "kernel_size": "kernel_size",
        **_KEYWORDS["jax"],
        "groups": "feature_group_count",
        "use_bias": "use_bias",
        "rngs": "rngs",
    },
}

#: The packages whose classes take no settings in `**kwargs` but those of a class above them.
_LIBRARIES = ("torch", "flax", "jaxdw", "builtins")

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


class ArgumentError(TypeError):
    """A required parameter whose name is not known, or a bias that no parameter takes."""


def bind(function: Callable[..., Any], given: Mapping[str, Any], g: Geometry, framework: str) -> inspect.BoundArguments:
    """Return the arguments with which to call a function, or the class of a layer, for a geometry.

    A parameter whose default is right is left out. If x and the kernel have other names, they are the first two.

    Args:
      function: what is called.
      given: the arrays x, kernel, and bias where the case has one; for a layer use_bias and rngs.
      g: the geometry; its padding is one that the function can be told.
      framework: "torch", "jax" or "numpy". It decides how settings are written where the default does not.

    Raises:
      ArgumentError: a required parameter of unknown name, or a bias that the function cannot take.
    """
    signature = signature_of(function)
    names = NAMES if "x" in given else LAYER_NAMES
    roles = _roles(function, signature, names)
    values: dict[str, Any] = {}
    for name, role in roles.items():
        default = signature.parameters[name].default
        value = given.get(role) if role in (*given, "bias") else _value(role, default, g, framework)
        if role == "features" and "multiplier" in roles.values():
            value = g.channels
        if default is Parameter.empty or not _same(value, default):
            values[name] = value
    missing = {role: array for role, array in given.items() if role not in roles.values()}
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            if names is NAMES:
                values[parameter.name] = tuple(missing.values())
                missing = {}
        elif parameter.kind is Parameter.VAR_KEYWORD:
            taken = set(roles.values())
            if names is NAMES:
                values[parameter.name] = missing | _keywords(function, taken, g, framework)
            else:
                keywords = _LAYER_KEYWORDS[framework].items()
                settings = {name: role for role, name in keywords if role not in taken}
                values[parameter.name] = {
                    name: given[role] if role in given else _value(role, Parameter.empty, g, framework)
                    for name, role in settings.items()
                    if role in given or role not in ("use_bias", "rngs")
                }
            missing = {}
        elif parameter.name not in roles and parameter.default is Parameter.empty:
            known = ", ".join(each[0] for each in names.values())
            raise ArgumentError(
                f"nothing is known to pass as `{parameter.name}`; give it a default, or one of the names {known}"
            )
    if "bias" in missing:
        raise ArgumentError("the case has a bias, and no parameter takes it: add a parameter `bias`")
    positional = [each.name for each in signature.parameters.values() if each.kind is Parameter.POSITIONAL_ONLY]
    while positional and positional[-1] not in values:
        positional.pop()
    values = {name: signature.parameters[name].default for name in positional} | values
    bound = signature.bind_partial()
    bound.arguments.update({name: values[name] for name in signature.parameters if name in values})
    return bound


def takes(function: Callable[..., Any], role: str) -> bool:
    """Return whether a call can tell the function that setting; not where `functools.partial` has fixed it."""
    parameters = signature_of(function).parameters.values()
    named = {each.name.lower() for each in parameters}
    anything = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
    return (anything or bool(named & set(NAMES[role]))) and not _fixed(function) & set(NAMES[role])


def described(bound: inspect.BoundArguments) -> str:
    """Return the arguments in a line: arrays by name, all others by name and value.

    >>> import numpy as np
    >>> described(inspect.signature(lambda input, stride=1: 0).bind(np.zeros(3), stride=2))
    'input, stride=2'
    """
    parts = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        named = {name: value}
        if kind is Parameter.VAR_KEYWORD:
            named = value
        elif kind is Parameter.VAR_POSITIONAL:
            named = dict(zip(("x", "kernel", "bias"), value))
        parts += [key if hasattr(each, "shape") else f"{key}={each!r}" for key, each in named.items()]
    return ", ".join(parts)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature, of a built-in function of PyTorch from its docstring; (*arguments) if there is none."""
    try:
        if isinstance(function, type):  # a metaclass may hide the parameters
            return inspect.Signature(_of_class(function))
        return inspect.signature(function)
    except (ValueError, TypeError):
        pass
    if isinstance(function, functools.partial):
        inner = list(signature_of(function.func).parameters.values())[len(function.args) :]
        return inspect.Signature([each for each in inner if each.name not in function.keywords])
    name = getattr(function, "__name__", "")
    head = re.search(rf"^{re.escape(name)}(\(.*?\)) ->", getattr(function, "__doc__", None) or "", re.MULTILINE)
    try:
        (parsed,) = ast.parse(f"def f{head[1] if head else '()'}: ...").body
        assert head is not None and isinstance(parsed, ast.FunctionDef)
        defaults: list[Any] = [ast.literal_eval(each) for each in parsed.args.defaults]
    except (SyntaxError, ValueError, AssertionError):
        return inspect.Signature([Parameter("arguments", Parameter.VAR_POSITIONAL)])
    given = [each.arg for each in parsed.args.args]
    defaults = [Parameter.empty] * (len(given) - len(defaults)) + defaults
    kind = Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([Parameter(name, kind, default=default) for name, default in zip(given, defaults)])


def _of_class(kind: type) -> list[Parameter]:
    """Return the parameters of a class; those of the classes above it stand for `**kwargs`, as keywords.

    A required one of them is left to a class with parameters of its own, which passes it on. `**kwargs` stays where a
    class of the user hands it to something else.
    """
    owners = [each for each in kind.__mro__ if "__init__" in vars(each)]
    signatures = [list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:] for each in owners]
    parameters = signatures[0]
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    own = [each for each in parameters if each.kind not in variadic]
    above: dict[str, Parameter] = {}
    for signature in signatures[1:] if parameters and parameters[-1].kind is Parameter.VAR_KEYWORD else []:
        named = [each for each in signature if each.kind not in (*variadic, Parameter.POSITIONAL_ONLY)]
        above |= {each.name: each.replace(kind=Parameter.KEYWORD_ONLY) for each in named if each.name not in above}
        if not signature or signature[-1].kind is not Parameter.VAR_KEYWORD:
            break
    names = {each.name for each in own}
    passed = [e for e in above.values() if e.name not in names and not (own and e.default is Parameter.empty)]
    if not above and owners[0].__module__.partition(".")[0] not in _LIBRARIES:
        return parameters
    return own + passed


def _fixed(function: Callable[..., Any]) -> set[str]:
    return set(function.keywords) if isinstance(function, functools.partial) else set()


def _roles(
    function: Callable[..., Any], signature: inspect.Signature, names: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Return what each parameter takes, by its name; a parameter of unknown name is left out."""
    fixed = _fixed(function)
    parameters = [each for each in signature.parameters.values() if each.name not in fixed]
    found: dict[str, str] = {}
    for parameter in parameters:
        role = next((role for role, known in names.items() if parameter.name.lower() in known), None)
        if role is not None and role not in found.values():
            found[parameter.name] = role
    unknown = [each for each in parameters if each.kind in _POSITIONAL and each.name not in found]
    if names is not NAMES:
        return found
    unnamed = [role for role in ("x", "kernel") if role not in found.values()]
    for role in unnamed[: len(unknown)]:
        found[unknown.pop(0).name] = role
    third = [each for each in parameters if each.kind in _POSITIONAL][2:3]
    for each in unknown:  # of functions without names, the third is the bias
        required = each.default is Parameter.empty or (each.default is None and each in third)
        if "bias" not in found.values() and (each.name == "b" or (unnamed and required)):
            found[each.name] = "bias"
    return found


def _keywords(function: Callable[..., Any], taken: set[str], g: Geometry, framework: str) -> dict[str, Any]:
    """Return the settings that `**kwargs` is given: those that have no parameter, but for steps of 1."""
    fixed = _fixed(function)
    values = {
        name: _value(role, Parameter.empty, g, framework)
        for role, name in _KEYWORDS[framework].items()
        if role not in taken and not fixed & set(NAMES[role])
    }
    ones = (1, (1,) * g.rank)
    return {name: value for name, value in values.items() if name in ("padding", "groups") or value not in ones}


def _value(role: str, default: Any, g: Geometry, framework: str) -> Any:
    """Return a setting of the geometry, written as the default of its parameter is."""
    if role == "padding":
        return _padding(default, g, framework)
    if role in ("strides", "kernel_dilation", "input_dilation", "kernel_size", "output_padding"):
        sizes = getattr(g, role, (0,) * g.rank)  # only a transposed convolution has output padding
        return None if default is None and set(sizes) == {1} else _one_or_each(sizes, default, framework)
    return {"groups": g.channels, "channels": g.channels, "features": g.features, "multiplier": g.multiplier}[role]


def _one_or_each(sizes: Sequence[int], default: Any, framework: str) -> Any:
    """Return one number for equal ones, unless the default has several or JAX's customs ask for them."""
    one = isinstance(default, int) or (framework != "jax" and not isinstance(default, (tuple, list)))
    return sizes[0] if one and len(set(sizes)) == 1 else tuple(sizes)


def _padding(default: Any, g: Geometry, framework: str) -> Any:
    """Return the padding as a word where the default is one, as ints where both ends are equal, else as pairs.

    JAX's functions take pairs, unless their default is an int or a sequence of ints.
    """
    if isinstance(default, str) and (word := _word(g)):
        return word.lower() if default.islower() else word
    several = default if isinstance(default, (tuple, list)) else [default]
    if g.symmetric_padding is not None and (framework != "jax" or all(isinstance(each, int) for each in several)):
        return _one_or_each(g.symmetric_padding, default, framework)
    return g.padding


def _word(g: Geometry) -> str:
    """Return the word for the padding; empty if there is none."""
    if g.padding_mode != "zeros":
        return g.padding_mode.upper()
    steps = {"strides": g.strides, "kernel_dilation": g.kernel_dilation}
    words = ("VALID", "SAME") if max(g.input_dilation) == 1 else ()
    same = (w for w in words if Geometry.of(g.x_shape, g.kernel_shape, padding=w, **steps).padding == g.padding)
    return next(same, "")


def _same(value: Any, default: Any) -> bool:
    """Return whether the default of a parameter is this value."""
    if value is None or default is None or hasattr(value, "shape"):
        return value is default
    return type(value) is type(default) and bool(value == default)
