"""Pairs of models that a user's function makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridge.libraries import users_module, with_torchvision
from bridge.weights.manifest import WeightsManifest


class PortPair(NamedTuple):
    """A PyTorch module, the JAX model with the same weights, their inputs, and the manifest or None."""

    module: Any
    model: Any
    inputs: Any
    manifest: WeightsManifest | None


def made_by(name: str) -> PortPair:
    """Call the function `package.module:function` without arguments, and return what it makes.

    It returns `(module, model, inputs)`, and as a fourth the manifest of the conversion if it has one; each as
    `bridge.model_parity` takes it.

    Raises:
      ValueError: no such module or function, or one that returns something else; the message says which.
    """
    made = _called("network", name)
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        given = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise ValueError(
            f"`network` is {name!r}, which returned {given}, expected (torch_module, jax_model, inputs) or these and "
            "the manifest of the conversion"
        )
    if len(made) == 4 and not isinstance(made[3], (WeightsManifest, type(None))):
        raise ValueError(
            f"`network` is {name!r}, whose fourth result is a {type(made[3]).__name__}, expected a manifest or None"
        )
    return PortPair(*made, *[None] * (4 - len(made)))


def flax_model_of(name: str) -> Any:
    """Call the function `package.module:function`, and return the Flax model that it makes.

    It returns the model, or what `made_by` takes. Of `(linen_module, variables)` the variables are returned.

    Raises:
      ValueError: no such module or function, or one that returns something else; the message says which.
    """
    made = _called("like", name)
    model = made[1] if isinstance(made, tuple) and len(made) in (3, 4) else made
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], Mapping):
        model = model[1]
    if type(model).__module__ == "builtins" and not isinstance(model, Mapping):
        raise ValueError(
            f"`like` is {name!r}, which returned a {type(model).__name__}, expected a Flax model, or "
            "(torch_module, jax_model, inputs) or these and the manifest of the conversion"
        )
    return model


def _called(argument: str, name: str) -> Any:
    """Return what the function of this name makes; `argument` is what the user calls the name."""
    source, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"`{argument}` is {name!r}, expected package.module:function")
    factory = getattr(users_module(argument, name), attribute, None)
    if not callable(factory):
        raise ValueError(f"`{argument}` is {name!r}, and {source} has no function {attribute!r}")
    return with_torchvision(factory)
