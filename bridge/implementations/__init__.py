"""Everything that can run a Case, by name: `torch.conv2d`, `jax.taps`, `torch.conv2d[mkldnn=off]`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from bridge.case import DTYPES, Case
from bridge.numerics import Arithmetic, format_of

#: Where each framework's implementations are; a framework is imported when one of its own is asked for.
FRAMEWORKS = {
    "torch": "bridge.implementations.torch_",
    "jax": "bridge.implementations.jax_",
    "numpy": "bridge.implementations.numpy_",
}


class ImplementationError(RuntimeError):
    """An implementation failed, or returned something of another shape or dtype; the message names it."""


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of a framework's table.

    Attributes:
      compute: takes a Case and every knob, returns the output.
      arithmetic: takes a Case and every knob, returns the declared arithmetic.
      about: one line for a listing.
    """

    compute: Callable[..., np.ndarray]
    arithmetic: Callable[..., Arithmetic]
    about: str


@dataclasses.dataclass(frozen=True)
class Knob:
    """A setting that an implementation takes in brackets.

    Attributes:
      default: what it is when it is not named.
      choices: the values it may have; None for a positive integer.
    """

    default: str
    choices: tuple[str, ...] | None

    def check(self, name: str, value: str) -> str:
        if self.choices is None:
            if value != self.default and (not value.isdecimal() or int(value) < 1):
                raise ValueError(f"`{name}` is {value!r}, expected a positive integer")
        elif value not in self.choices:
            raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(self.choices)}")
        return value


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A method in a framework with its knobs.

    Attributes:
      name: `framework.algorithm[knob=value,...]`, with the knobs that are not at their defaults.
      framework: "torch", "jax" or "numpy".
      knobs: every knob's value.
    """

    name: str
    framework: str
    knobs: Mapping[str, str] = dataclasses.field(hash=False)
    algorithm: Algorithm = dataclasses.field(repr=False, hash=False)

    def run(self, case: Case) -> np.ndarray:
        """The output `(*batch, *output_spatial, C*M)` of the case, of the case's dtype.

        Raises:
          ImplementationError: a user's function failed, or the output has another shape or dtype.
        """
        if 0 in case.geometry.output_shape:
            return np.zeros(case.geometry.output_shape, case.dtype)
        y = self.algorithm.compute(case, **self.knobs)
        if y.shape != case.geometry.output_shape or y.dtype != case.dtype:
            raise ImplementationError(
                f"{self.name} returned {y.dtype} {y.shape}, expected {case.dtype} {case.geometry.output_shape}"
            )
        return y

    def arithmetic(self, case: Case) -> Arithmetic:
        """The arithmetic that this implementation declares for the case: what its bound is computed from."""
        return self.algorithm.arithmetic(case, **self.knobs)


def implementation(name: str) -> Implementation:
    """The implementation of that name; `package.module:function` is a user's own, in PyTorch or JAX.

    Raises:
      ValueError: no such implementation, knob or value; the message lists what there is.

    >>> implementation("torch.conv2d[mkldnn=off]").knobs["mkldnn"]
    'off'
    """
    match = re.fullmatch(r"(?P<base>[\w.]+(:\w+)?)(\[(?P<knobs>[^\[\]]*)\])?", name)
    base = match["base"] if match else name
    framework, algorithm = _algorithm(name, base)
    known = _tables(framework)[1]
    given: dict[str, str] = {}
    for item in filter(None, (match["knobs"] or "").split(",")) if match else ():
        knob, equals, value = (part.strip() for part in item.partition("="))
        if not equals or knob not in known:
            raise ValueError(f"`implementation` is {name!r} with knob {item!r}, expected one of {', '.join(known)}")
        given[knob] = known[knob].check(knob, value)
    changed = {knob: value for knob, value in given.items() if value != known[knob].default}
    brackets = f"[{','.join(f'{knob}={value}' for knob, value in sorted(changed.items()))}]" if changed else ""
    knobs = {knob: given.get(knob, spec.default) for knob, spec in known.items()}
    return Implementation(base + brackets, framework, knobs, algorithm)


def implementations() -> list[str]:
    """The names of all implementations, without knobs."""
    return [f"{framework}.{algorithm}" for framework in FRAMEWORKS for algorithm in _tables(framework)[0]]


def knobs(framework: str) -> Mapping[str, Knob]:
    """The knobs that the implementations of a framework take."""
    return _tables(framework)[1]


def declared(case: Case, dtype: str, *, flushes_subnormals: bool, output_roundings: int) -> Arithmetic:
    """The conventional arithmetic of an implementation that computes in the dtype named, "same" being the case's.

    In a narrower dtype the inputs are rounded to it first; in a wider one the result is rounded to the case's last.
    """
    given, working = format_of(case.dtype), format_of(case.dtype if dtype == "same" else DTYPES[dtype])
    arithmetic = Arithmetic.of(working.dtype, flushes_subnormals=flushes_subnormals, output_roundings=output_roundings)
    if working.holds(given):
        return dataclasses.replace(arithmetic, output=given)
    if given.holds(working):
        return dataclasses.replace(arithmetic, input=working)
    raise ValueError(f"`dtype` is {dtype!r} for a {given.name} case, expected a dtype wider or narrower than it")


def _algorithm(name: str, base: str) -> tuple[str, Algorithm]:
    """The framework and the algorithm of a name without its knobs."""
    if ":" in base:
        from bridge.implementations import user

        function, framework = user.load(base)
        return framework, importlib.import_module(FRAMEWORKS[framework]).user_algorithm(base, function)
    framework, _, algorithm = base.partition(".")
    if framework not in FRAMEWORKS or algorithm not in _tables(framework)[0]:
        raise ValueError(
            f"`implementation` is {name!r}, expected one of {', '.join(implementations())}, "
            "or a function of your own as package.module:function"
        )
    return framework, _tables(framework)[0][algorithm]


@functools.cache
def _tables(framework: str) -> tuple[Mapping[str, Algorithm], Mapping[str, Knob]]:
    module = importlib.import_module(FRAMEWORKS[framework])
    return module.ALGORITHMS, module.KNOBS
