"""Remedies: how to have the bits of the reference and keep the windows, in the framework of what differs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bridge._implementations import implementation, implementations
from bridge.case import Case
from bridge.diagnosis.runs import CaseRuns, Unrunnable, another_draw
from bridge.numerics import same_bits
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry

#: Characters of a line of code: it is printed after four blanks.
_WIDTH = 76

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
        given = _settings(settings)
        plain = f'y = jaxdw.depthwise_conv(x, kernel{bias}{given}, method="taps")'
        if case.bias is None or not bias_comes_first(g):
            return _lines("import jaxdw", plain, f"y = jaxdw.windowed_conv(fn, x, kernel{bias}{given})")
        at = len(g.batch)
        image = (*g.batch, *(n * k for n, k in zip(g.output_spatial, g.kernel_size)), g.channels)
        moved = f".swapaxes({at + 1}, {at + 2})" if g.rank == 2 else ""
        side_by_side = f'strides={g.kernel_size}, padding="VALID", method="taps"'
        return _lines(
            "import jaxdw",
            plain,
            f"windows = fn(jaxdw.unfold(x, {g.kernel_size}{given})){moved}",
            f"y = jaxdw.depthwise_conv(windows.reshape{image}, kernel, bias, {side_by_side})",
        )
    if g.padding_mode != "zeros" or max(g.input_dilation) > 1:
        return ""
    name = f"windowed_conv{g.rank}d"
    padded = []
    if g.symmetric_padding is None:
        ends = tuple(amount for pair in reversed(g.padding) for amount in pair)
        padded = ["import torch.nn.functional as F", f"x = F.pad(x, {ends})"]
    settings = {"stride": _short(g.strides), "padding": _short(g.symmetric_padding or (0,))}
    settings |= {"dilation": _short(g.kernel_dilation)}
    return _lines(
        f"from bridge.torch_windows import {name}",
        *padded,
        f"y = {name}(x, weight{bias}{_settings(settings)}, window_fn=fn)",
    )


def _lines(*statements: str) -> str:
    """Return the statements, those too long for a terminal on several lines."""
    return "\n".join(
        line
        for each in statements
        for line in textwrap.wrap(each, _WIDTH, subsequent_indent=" " * (each.find("(") + 1), break_on_hyphens=False)
    )


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
