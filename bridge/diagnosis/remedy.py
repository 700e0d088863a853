"""Remedies: how to have the bits of the reference and keep the windows, in the framework of what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bridge._implementations import implementation, implementations
from bridge.case import Case
from bridge.diagnosis.runs import CaseRuns, Unrunnable, another_draw
from bridge.numerics import same_bits
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry

#: The implementation of each framework that keeps the windows and adds in raster order.
KEEPS_WINDOWS = {"torch": "torch.windows", "jax": "jax.windows"}


class Runnable(Protocol):
    """`bridge.Implementation`, or anything else with a name that runs a case."""

    @property
    def name(self) -> str: ...

    def run(self, case: Case) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Code that has every bit of the reference, on the case and on another draw of random numbers.

    Attributes:
      name: the implementation that was run.
      framework: its framework, "torch" or "jax".
      code: lines of Python to copy.
    """

    name: str
    framework: str
    code: str


def remedies(
    case: Case, reference: Runnable, outputs: Mapping[str, np.ndarray], differing: Sequence[str]
) -> list[Remedy]:
    """Return a remedy for each framework of the implementations that differ; if none works, for any framework.

    Args:
      case: input, kernel, bias and geometry.
      reference: the implementation whose bits are wanted.
      outputs: by name, the reference's among them.
      differing: names of the implementations that differ from it by rounding.
    """
    frameworks = {framework for framework in KEEPS_WINDOWS if any(_is_of(name, framework) for name in differing)}
    others = [framework for framework in KEEPS_WINDOWS if framework not in frameworks]
    again = another_draw(case)
    for tried in ([f for f in KEEPS_WINDOWS if f in frameworks], others):
        found = [
            Remedy(name, framework, code)
            for framework in tried
            if (name := KEEPS_WINDOWS[framework]) in implementations() and name not in differing
            if (code := code_of(framework, case)) and _has_bits(name, case, again, reference, outputs)
        ]
        if found:
            return found
    return []


def code_of(framework: str, case: Case) -> str:
    """Return lines of Python for a convolution of windows; empty where its padding cannot be written."""
    g = case.geometry
    bias = "" if case.bias is None else ", bias"
    if framework == "jax":
        settings = {"strides": _short(g.strides), "padding": _padding(g)}
        settings |= {"kernel_dilation": _short(g.kernel_dilation), "input_dilation": _short(g.input_dilation)}
        call = f"x, kernel{bias}{_settings(settings)}"
        lines = ["import jaxdw", f'y = jaxdw.depthwise_conv({call}, method="taps")']
        if case.bias is None or not bias_comes_first(g):
            return "\n".join([*lines, f"y = jaxdw.windowed_conv(fn, {call})"])
        at = len(g.batch)
        image = (*g.batch, *(n * k for n, k in zip(g.output_spatial, g.kernel_size)), g.channels)
        moved = f".swapaxes({at + 1}, {at + 2})" if g.rank == 2 else ""
        lines += [
            f"windows = jaxdw.unfold(x, {g.kernel_size}{_settings(settings)})",
            f"image = fn(windows){moved}.reshape{image}",
            f'y = jaxdw.depthwise_conv(image, kernel, bias, strides={g.kernel_size}, padding="VALID", method="taps")',
        ]
        return "\n".join(lines)
    if g.symmetric_padding is None:
        return ""
    name = f"windowed_conv{g.rank}d"
    settings = {"stride": _short(g.strides), "padding": _short(g.symmetric_padding)}
    settings |= {"dilation": _short(g.kernel_dilation)}
    given = f"x, weight{bias}{_settings(settings)}"
    return f"from bridge.torch_windows import {name}\ny = {name}({given})\ny = {name}({given}, window_fn=fn)"


def _is_of(name: str, framework: str) -> bool:
    try:
        return implementation(name).framework == framework
    except ValueError:  # one that was handed to `parity` as an object
        return False


def _has_bits(name: str, case: Case, again: Case, reference: Runnable, outputs: Mapping[str, np.ndarray]) -> bool:
    runs = CaseRuns(case), CaseRuns(again)
    try:
        here = outputs.get(name)
        here = runs[0].output(implementation(name)) if here is None else here
        if not same_bits(here, outputs[reference.name]).all():
            return False
        return bool(same_bits(runs[1].output(implementation(name)), reference.run(again)).all())
    except (Unrunnable, ValueError, TypeError, RuntimeError):
        return False


def _settings(values: Mapping[str, object]) -> str:
    return "".join(f", {name}={value!r}" for name, value in values.items() if value != 1 or name == "padding")


def _padding(g: Geometry) -> object:
    if g.padding_mode != "zeros":
        return g.padding_mode.upper()
    pairs = [low if low == high else (low, high) for low, high in g.padding]
    return pairs[0] if len(set(pairs)) == 1 and isinstance(pairs[0], int) else tuple(pairs)


def _short(values: Sequence[int]) -> object:
    return values[0] if len(set(values)) == 1 else tuple(values)
