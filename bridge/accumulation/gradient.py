"""The gradient by the input as a convolution of its own, so that its order of addition can be revealed and replayed.

With multiplier 1 and zero padding, dx is the depthwise convolution of dy with the flipped kernel: strides and input
dilation change places, and the padding is what makes every dy meet the inputs that it came from. Its taps count in the
flipped kernel.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bridge.accumulation._reveal import reveal
from bridge.accumulation.order import AccumulationOrder
from bridge.accumulation.probe import Runs
from bridge.case import Case
from bridge.implementations import Implementation


def has_input_gradient_case(case: Case) -> bool:
    """Whether the gradient by the input is a depthwise convolution: multiplier 1, and padding that is zeros."""
    return case.geometry.multiplier == 1 and case.geometry.padding_mode == "zeros"


def input_gradient_case(case: Case, dy: np.ndarray) -> Case:
    """The convolution whose output is the gradient of sum(dy y) by x.

    Raises:
      ValueError: a channel multiplier above 1, or circular or reflecting padding: those gradients are no depthwise
        convolution.

    >>> x, kernel = np.ones((1, 5, 1), np.float32), np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    >>> case = Case(x, kernel, padding="VALID", strides=2)
    >>> adjoint = input_gradient_case(case, np.ones((1, 2, 1), np.float32))
    >>> adjoint.geometry.input_dilation, adjoint.geometry.padding, adjoint.geometry.output_shape
    ((2,), ((2, 2),), (1, 5, 1))
    """
    g = case.geometry
    if not has_input_gradient_case(case):
        raise ValueError(
            f"`case` has multiplier {g.multiplier} and {g.padding_mode} padding, expected 1 and zeros: "
            "another gradient by the input is no depthwise convolution"
        )
    if dy.shape != g.output_shape or dy.dtype != case.dtype:
        raise ValueError(f"`dy` is {dy.dtype} {dy.shape}, expected {case.dtype} {g.output_shape}")
    padding = []
    for n, out, stride, spread, span, (low, _) in zip(
        g.spatial, g.output_spatial, g.strides, g.input_dilation, g.spans, g.padding
    ):
        before = span - 1 - low
        padding.append((before, (n - 1) * spread + span - ((out - 1) * stride + 1) - before))
    return Case(
        dy,
        np.ascontiguousarray(np.flip(case.kernel, tuple(range(g.rank)))),
        strides=g.input_dilation,
        padding=tuple(padding),
        kernel_dilation=g.kernel_dilation,
        input_dilation=g.strides,
        name=f"gradient by the input of {case.name or 'a convolution'}",
    )


@dataclasses.dataclass(frozen=True)
class InputGradient:
    """An implementation's gradient by the input, to be revealed like an implementation of its own."""

    implementation: Implementation
    case: Case

    @property
    def name(self) -> str:
        return self.implementation.name

    def run(self, adjoint: Case) -> np.ndarray:
        """dx for the kernel and the dy that the convolution `adjoint` holds."""
        g = self.case.geometry
        kernel = np.ascontiguousarray(np.flip(adjoint.kernel, tuple(range(g.rank))))
        bias = None if self.case.bias is None else np.zeros_like(self.case.bias)
        forward = self.case.replace(x=np.zeros_like(self.case.x), kernel=kernel, bias=bias)
        return self.implementation.input_gradient(forward, adjoint.x)


def reveal_input_gradient(implementation: Implementation, case: Case, dy: np.ndarray) -> AccumulationOrder:
    """In which order an implementation adds the gradient by the input; replay it on `input_gradient_case(case, dy)`."""
    gradient: Runs = InputGradient(implementation, case)
    return reveal(gradient, input_gradient_case(case, dy))
