"""Everything that can run a Case, by name: `torch.conv2d`, `jax.taps`, `torch.conv2d[mkldnn=off]`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bridge._implementations import user
from bridge._implementations.algorithm import Algorithm, Emulation, Knob
from bridge.case import Case
from bridge.errors import ImplementationError
from bridge.memory import check_fits, check_starts, lack_of_memory
from bridge.numerics import Arithmetic, format_of
from bridge.process import printing_to_stderr

#: The module of each framework's implementations; it is imported when one of them is used.
FRAMEWORKS = {
    "torch": "bridge._implementations.torch_",
    "jax": "bridge._implementations.jax_",
    "numpy": "bridge._implementations.numpy_",
}


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

    @property
    def base(self) -> str:
        """The name without its knobs."""
        return self.name.partition("[")[0]

    @property
    def is_exact(self) -> bool:
        """Return whether it rounds the exact sum once, so that it has no accumulation order."""
        return self.algorithm.family == "exact"

    @property
    def called(self) -> str:
        """How a user's function was called, in words, once it was; empty for all others."""
        return self.algorithm.function.told if self.algorithm.function else ""

    @property
    def isolated(self) -> bool:
        """Return whether it runs in a process of its own."""
        return self.knobs.get("xla", "default") != "default"

    @property
    def emulation(self) -> Emulation | None:
        """The platform and the setting that it emulates, if it does."""
        known = knobs(self.framework)
        return next((e for knob, value in self.knobs.items() if (e := known[knob].emulated.get(value))), None)

    def on(self, platform: str, **values: str) -> Implementation:
        """Return it on an emulated platform ("" for none), with these knobs and all others at their defaults."""
        known = knobs(self.framework)
        there = {knob: spec.on(platform, values.get(knob, spec.default)) for knob, spec in known.items()}
        return self.changed(**there)

    def run(self, case: Case) -> np.ndarray:
        """Return the output `(*batch, *output_spatial, C*M)` of the case, of the case's dtype.

        Raises:
          ImplementationError: the framework or a user's function failed, there is not memory enough, or the output
            has another shape or dtype.
        """
        if 0 in case.geometry.output_shape:
            return np.zeros(case.geometry.output_shape, case.dtype)
        with self._failures_named(case):
            y = self.algorithm.compute(case, **self.knobs)
        if y.shape != case.geometry.output_shape or y.dtype != case.dtype:
            raise ImplementationError(
                f"{self.name} returned {y.dtype} {y.shape}, expected {case.dtype} {case.geometry.output_shape}"
            )
        return y

    def input_gradient(self, case: Case, dy: np.ndarray) -> np.ndarray:
        """Return the gradient of sum(dy y) by x, of x's shape and dtype, from the framework's own differentiation."""
        if 0 in case.geometry.output_shape or 0 in case.geometry.x_shape:
            return np.zeros(case.geometry.x_shape, case.dtype)
        with self._failures_named(case):
            return self.algorithm.input_gradient(case, dy, **self.knobs)

    def seconds(self, case: Case, repetitions: int = 1) -> list[float]:
        """Return the seconds of each repetition, with arrays at hand, until the result is ready."""
        with self._failures_named(case):
            return self.algorithm.seconds(case, repetitions, **self.knobs)

    @contextlib.contextmanager
    def _failures_named(self, case: Case) -> Iterator[None]:
        """Turn whatever a framework raises into an ImplementationError; check first that the work can fit."""
        g = case.geometry
        windows = math.prod(g.batch) * math.prod(g.output_spatial) * g.channels * g.taps
        padded = math.prod(g.batch) * math.prod(g.padded_spatial) * g.channels
        try:
            elements = max(case.x.size, padded) + 2 * math.prod(g.output_shape) + self.algorithm.window_copies * windows
            check_fits(f"{self.name} on {_shapes(case)}", elements * case.dtype.itemsize)
            with printing_to_stderr() if self.algorithm.function else contextlib.nullcontext():
                yield
        except (ValueError, TypeError, OSError, ImplementationError):  # of the settings, or named already
            raise
        except Exception as error:
            if isinstance(error, MemoryError) and self.name in str(error):
                raise ImplementationError(str(error)) from None
            said = lack_of_memory(error) or f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise ImplementationError(f"{self.name} failed on {_shapes(case)}: {said}") from error

    def arithmetic(self, case: Case, quantity: str = "y") -> Arithmetic:
        """Return the arithmetic that this implementation declares for the case. Its bound is computed from it.

        For a gradient ("dx") in float16 or bfloat16, partial sums may be rounded to that dtype.
        """
        if quantity == "y":
            return self.algorithm.arithmetic(case, **self.knobs)
        declared = self.algorithm.arithmetic(case.replace(bias=None), **self.knobs)
        if case.dtype.itemsize > 2:
            return declared
        return dataclasses.replace(declared, product=declared.output, accumulator=declared.output)

    def input_bits(self, case: Case) -> int:
        """Return the bits of the significands that operands of products are left with."""
        bits = self.algorithm.input_bits(case, **self.knobs)
        if bits is None:
            declared = self.arithmetic(case).input
            bits = (declared or format_of(case.dtype)).precision
        return bits

    def changed(self, **values: str) -> Implementation:
        """Return it with some knobs at other values.

        >>> implementation("torch.conv2d[threads=1]").changed(mkldnn="off").name
        'torch.conv2d[mkldnn=off,threads=1]'
        """
        known = knobs(self.framework)
        for knob, value in values.items():
            if knob not in known:
                raise ValueError(f"`{knob}` is no knob of {self.framework}, expected one of {', '.join(known)}")
            known[knob].check(knob, value)
        return _with_knobs(self.base, self.framework, self.algorithm, {**self.knobs, **values})


def implementation(
    name: str, case: Case | None = None, *, function: Callable[..., Any] | None = None
) -> Implementation:
    """Return the implementation of that name; `package.module:function` is a user's own.

    A user's function has two settings more: `axes=channels_first` or `channels_last` is the order of axes that it
    takes, and `framework=torch`, `jax` or `numpy` the arrays. Without them both are found from its code and by trial.

    Args:
      name: of an implementation, with its settings in brackets.
      case: what a user's function is tried with, where its code does not say which arrays it takes.
      function: a user's function or layer, which then has that name.

    Raises:
      ValueError: no such implementation, knob or value; the message lists what there is.

    >>> implementation("torch.conv2d[mkldnn=off]").knobs["mkldnn"]
    'off'
    """
    pattern = r"(?P<base>[\w.]+(:\w+)?)" if function is None else r"(?P<base>[^\[\]]+)"
    match = re.fullmatch(pattern + r"(\[(?P<knobs>[^\[\]]*)\])?", name)
    base = match["base"] if match else name
    items = list(filter(None, (match["knobs"] or "").split(","))) if match else []
    if function is not None or ":" in base:
        own = user.load(base) if function is None else user.UserFunction(base, function)
        said = dict(filter(None, (_said(own, item) for item in items)))
        items = [item for item in items if _said(own, item) is None]
        own = own.told_to(said)
        framework = own.framework or _framework_by_trial(own, case or _question())
        algorithm = importlib.import_module(FRAMEWORKS[framework]).user_algorithm(own)
    else:
        framework, algorithm = _algorithm(name, base)
    known = _tables(framework)[1]
    given: dict[str, str] = {}
    for item in items:
        knob, equals, value = (part.strip() for part in item.partition("="))
        if not equals or knob not in known:
            names = [*known, *(user.SETTINGS if algorithm.function else ())]
            expected = f"one of {', '.join(names)}" if names else "no knob"
            raise ValueError(f"`implementation` is {name!r} with knob {item!r}, expected {expected}")
        given[knob] = known[knob].check(knob, value)
    return _with_knobs(base, framework, algorithm, given)


def is_exact(name: str) -> bool:
    """Return whether the implementation of that name is exact; False for a name that is not known here.

    >>> is_exact("numpy.exact"), is_exact("jax.taps"), is_exact("my own object")
    (True, False, False)
    """
    try:
        return implementation(name).is_exact
    except ValueError:
        return False


def counterpart(framework: str, family: str) -> Implementation | None:
    """Return the framework's implementation of that family, at its default knobs; None if it has none.

    >>> counterpart("torch", "taps").name
    'torch.taps'
    """
    names = (f"{framework}.{name}" for name, each in _tables(framework)[0].items() if each.family == family)
    return next(map(implementation, names), None)


def implementations(*, untried: bool = True) -> list[str]:
    """Return the names of all implementations, without knobs; with or without those that only run if they are named."""
    return [
        f"{framework}.{name}"
        for framework in FRAMEWORKS
        for name, algorithm in _tables(framework)[0].items()
        if untried or algorithm.tried
    ]


def knobs(framework: str) -> Mapping[str, Knob]:
    """Return the knobs that the implementations of a framework take."""
    return _tables(framework)[1]


def _algorithm(name: str, base: str) -> tuple[str, Algorithm]:
    """Return the framework and the algorithm of a name without its knobs."""
    framework, _, algorithm = base.partition(".")
    if framework not in FRAMEWORKS or algorithm not in _tables(framework)[0]:
        raise ValueError(
            f"`implementation` is {name!r}, expected a function of your own as package.module:function, or one of "
            f"{', '.join(implementations())}"
        )
    return framework, _tables(framework)[0][algorithm]


def _said(function: user.UserFunction, item: str) -> tuple[str, str] | None:
    """Return what an item in brackets says of a user's function: name and value; None for a knob of the framework.

    `layout=channels_first` is the order of axes; `layout=channels_last` too, but in PyTorch, where it is the format in
    memory.
    """
    key, _, value = (part.strip() for part in item.partition("="))
    if key == "layout" and (value == user.AXES[0] or (value == user.AXES[1] and function.framework != "torch")):
        key = "axes"
    return (key, value) if key in user.SETTINGS else None


#: The framework that was found for a function by trial, by its name; the function tells two of one name apart.
_found: dict[str, tuple[object, str]] = {}


def _framework_by_trial(function: user.UserFunction, case: Case) -> str:
    """Return the framework whose arrays a function takes and returns."""
    known, framework = _found.get(function.spelled, (None, ""))
    if known is function.target and framework:
        return framework
    reasons = []
    for framework, module in FRAMEWORKS.items():
        algorithm = importlib.import_module(module).user_algorithm(function)
        try:
            with printing_to_stderr():
                algorithm.compute(case, **{knob: spec.default for knob, spec in knobs(framework).items()})
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            if isinstance(error, ImplementationError) and "cannot be called" in reason:
                raise
            reasons.append(f"{framework}: {reason}")
            continue
        _found[function.spelled] = function.target, framework
        return framework
    raise ValueError(
        f"`implementation` is {function.name!r}, whose code does not say which arrays it takes, and it takes none of "
        f"these ({'; '.join(reasons)}); say it as {function.name}[framework=torch]"
    )


def _question() -> Case:
    """Return the question's own case."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((2, 5, 5, 3), (3, 3, 1, 3)))
    return Case(x, kernel, padding=1)


def _shapes(case: Case) -> str:
    return f"input {'x'.join(map(str, case.x.shape))} and kernel {'x'.join(map(str, case.kernel.shape))}"


@functools.cache
def _tables(framework: str) -> tuple[Mapping[str, Algorithm], Mapping[str, Knob]]:
    check_starts()
    module = importlib.import_module(FRAMEWORKS[framework])
    return module.ALGORITHMS, module.KNOBS


def _with_knobs(base: str, framework: str, algorithm: Algorithm, given: Mapping[str, str]) -> Implementation:
    known = knobs(framework)
    values = {knob: given.get(knob, spec.default) for knob, spec in known.items()}
    changed = {knob: value for knob, value in values.items() if value != known[knob].default}
    changed |= algorithm.function.said if algorithm.function else {}
    brackets = ",".join(f"{knob}={value}" for knob, value in sorted(changed.items()))
    return Implementation(base + (f"[{brackets}]" if brackets else ""), framework, values, algorithm)
