"""Algorithms of a framework, the knobs that they take, and the arithmetic that they declare."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np

from bridge._implementations.user import UserFunction
from bridge.case import DTYPES, Case
from bridge.numerics import Arithmetic, format_of


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One algorithm of a framework.

    Attributes:
      compute: takes a Case and every knob, returns the output.
      arithmetic: takes a Case and every knob, returns the declared arithmetic.
      family: "convolution" (the framework's own), "convolution of windows" (the same, of windows side by side),
        "windows" (then one einsum over the taps), "channel loop" (windows, then a matrix product per channel), "taps"
        (shifted multiply-add, tap by tap), "fused taps" (an operation for both), "exact", or the name of a user's own
        function. Algorithms of one family differ in their framework alone.
      code: how to write it in the user's own code.
      seconds: takes a Case, how often to repeat, and every knob; returns the seconds of each repetition, with arrays
        at hand, until the result is ready.
      input_gradient: takes a Case, the gradient dy by the output, and every knob; returns the gradient by x.
      input_bits: takes a Case and every knob, returns bits of the significands that operands of products are left with,
        where the declared arithmetic does not say it: where a platform is emulated.
      tried: False where it runs only if it is named: a CPU interprets it, or it never has the bits of another.
      window_copies: how many copies of all windows are in memory at once, for the estimate of what cannot fit.
      function: the user's function or layer that it runs; None for our own.
    """

    compute: Callable[..., np.ndarray]
    arithmetic: Callable[..., Arithmetic]
    family: str
    code: str
    seconds: Callable[..., list[float]]
    input_gradient: Callable[..., np.ndarray]
    input_bits: Callable[..., int | None] = lambda case, **knobs: None
    tried: bool = True
    window_copies: int = 0
    function: UserFunction | None = None


@dataclasses.dataclass(frozen=True)
class Emulation:
    """The meaning of a knob's value on a platform that need not be there.

    Attributes:
      platform: "tpu" or "gpu"; about: in words.
      value: the knob's value there; code: how to write it.
    """

    platform: str
    about: str
    value: str
    code: str

    def __str__(self) -> str:
        return (
            f"{self.code} on {self.about} (emulated on this machine: operands rounded as there, added in the order of "
            "here)"
        )


@dataclasses.dataclass(frozen=True)
class Knob:
    """A setting that an implementation takes in brackets.

    Attributes:
      kind: "precision", "layout", "threads" or "flag".
      default: what it is when it is not named.
      code: the values it may have, each with how to write it in the user's own code; a template means a positive
        integer.
      emulated: further values, that stand for a value on a platform that is not there.
      tried: False where another value is used only if it is named: it compiles for seconds, or needs several devices.
    """

    kind: str
    default: str
    code: Mapping[str, str] | str
    emulated: Mapping[str, Emulation] = dataclasses.field(default_factory=dict)
    tried: bool = True

    def check(self, name: str, value: str) -> str:
        if isinstance(self.code, str):
            if value != self.default and (not value.isdecimal() or not 1 <= int(value) <= 256):
                raise ValueError(f"`{name}` is {value!r}, expected a positive integer, at most 256")
        elif value not in self.code and value not in self.emulated:
            raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join([*self.code, *self.emulated])}")
        return value

    def platform(self, value: str) -> str:
        """Return the platform that the value emulates; empty for none."""
        return self.emulated[value].platform if value in self.emulated else ""

    def on(self, platform: str, value: str) -> str:
        """Return the value on an emulated platform ("" for none); the value itself if it is the same there."""
        there = (key for key, each in self.emulated.items() if (each.platform, each.value) == (platform, value))
        return next(there, value)

    def how_to(self, value: str) -> str:
        """Return how to write the value in the user's own code."""
        if isinstance(self.code, str):
            return f"without {self.code.format('...')}" if value == self.default else self.code.format(value)
        return str(self.emulated[value]) if value in self.emulated else self.code[value]

    def others(self, value: str) -> list[str]:
        """Return the other values worth a try: all of a list on the same platform, and 1 of the integers.

        A setting does not change the platform, so no platform is tried in place of another.
        """
        if not self.tried:
            return []
        if isinstance(self.code, str):
            known = [self.default, "1"]
        else:
            known = [each for each in (*self.code, *self.emulated) if self.platform(each) == self.platform(value)]
        return [other for other in known if other != value]


def time_calls(call: Callable[[], object], repetitions: int) -> list[float]:
    """Return the seconds of each of several calls."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def declared(case: Case, dtype: str, *, flushes_subnormals: bool, output_roundings: int) -> Arithmetic:
    """Return the conventional arithmetic of an implementation that computes in a dtype; "same" is the case's dtype.

    A narrower dtype rounds the inputs first. A wider one rounds the result to the case's dtype last.
    """
    given, working = format_of(case.dtype), format_of(case.dtype if dtype == "same" else DTYPES[dtype])
    arithmetic = Arithmetic.of(working.dtype, flushes_subnormals=flushes_subnormals, output_roundings=output_roundings)
    if working.holds(given):
        return dataclasses.replace(arithmetic, output=given)
    if given.holds(working):
        return dataclasses.replace(arithmetic, input=working)
    raise ValueError(f"`dtype` is {dtype!r} for a {given.name} case, expected a dtype wider or narrower than it")
