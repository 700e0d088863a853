"""The gradient by the input as a convolution of its own, so that its accumulation order can be revealed and replayed.

With multiplier 1 and zero padding, dx is the depthwise convolution of dy with the flipped kernel. Strides and input
dilation change places. The padding lets every dy meet the inputs that it came from. Taps count in the flipped kernel.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # they import JAX, and this package needs NumPy alone
    from bridge._implementations import Implementation
    from bridge.case import Case


def has_input_gradient_case(case: Case) -> bool:
    """Return whether the gradient by the input is a depthwise convolution: multiplier 1, and padding that is zeros."""
    return case.geometry.multiplier == 1 and case.geometry.padding_mode == "zeros"


def input_gradient_case(case: Case, dy: np.ndarray) -> Case:
    """Return the convolution whose output is the gradient of sum(dy y) by x.

    Raises:
      ValueError: a channel multiplier above 1, or circular or reflecting padding: those gradients are no depthwise
        convolution.

    >>> from bridge import Case
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
    for n, out, stride, dilation, span, (low, _) in zip(
        g.spatial, g.output_spatial, g.strides, g.input_dilation, g.spans, g.padding
    ):
        before = span - 1 - low
        padding.append((before, (n - 1) * dilation + span - ((out - 1) * stride + 1) - before))
    return case.replace(
        x=dy,
        kernel=np.ascontiguousarray(np.flip(case.kernel, tuple(range(g.rank)))),
        bias=None,
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
        """Return dx for the kernel and the dy that the convolution `adjoint` holds."""
        g = self.case.geometry
        kernel = np.ascontiguousarray(np.flip(adjoint.kernel, tuple(range(g.rank))))
        bias = None if self.case.bias is None else np.zeros_like(self.case.bias)
        forward = self.case.replace(x=np.zeros_like(self.case.x), kernel=kernel, bias=bias)
        return self.implementation.input_gradient(forward, adjoint.x)
