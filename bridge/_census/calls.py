"""One depthwise convolution as a model calls it: its data wait in a file until they are diagnosed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bridge.case import Case
from bridge.numerics import same_bits
from bridge.weights.safetensors_ import read_safetensors
from jaxdw.geometry import Geometry, Padding

#: Paddings that have a name, in the order in which they are tried.
_NAMES = ("SAME", "REFLECT", "CIRCULAR", "SAME_LOWER")


@dataclasses.dataclass(frozen=True)
class CapturedCall:
    """A depthwise convolution that ran.

    Attributes:
      layer: the name of the module that owns the weight; "features.0 (call 2)" where it ran before.
      kind: the class of the module that was running.
      path: a .safetensors file with `x`, `kernel`, `y` and perhaps `bias`, in the layout of `Case`.
      strides, padding, dilation: as `Case` takes them.
      layout: the memory layout in which PyTorch computed, as the knob of `torch.conv2d` calls it.
      note: a remark on how it was captured, or empty.
      also: later calls with the same geometry and the same data.
      input_dilation: the stride of a transposed convolution, which is None for another one.
    """

    layer: str
    kind: str
    path: Path
    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    layout: str
    note: str = ""
    also: list[str] = dataclasses.field(default_factory=list)
    input_dilation: tuple[int, ...] | None = None

    def load(self) -> tuple[Case, np.ndarray]:
        """Return the case, and the model's own output."""
        arrays = read_safetensors(self.path)
        case = Case(
            arrays["x"],
            arrays["kernel"],
            arrays.get("bias"),
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.dilation,
            input_dilation=self.input_dilation,
            name=self.layer,
        )
        return case, arrays["y"]


@dataclasses.dataclass(frozen=True)
class Capture:
    """One forward pass of a model.

    Attributes:
      calls: its depthwise convolutions in the order in which they ran; equal geometries with equal data are one call.
      idle: depthwise layers of the model that did not run.
      passed_over: depthwise convolutions of a kind that cannot be compared, each with the reason.
      convolutions: the number of convolutions that ran, depthwise or not.
    """

    calls: Sequence[CapturedCall]
    idle: Sequence[str]
    passed_over: Sequence[str]
    convolutions: int


def named_padding(given: np.ndarray, received: np.ndarray, padding: Sequence[int], window: Geometry) -> str | None:
    """Return the named padding that turns a layer's input into its convolution's input, bit for bit; None for none.

    PyTorch's layers pad by themselves for `padding_mode="reflect"` or `"circular"`, and for TensorFlow's SAME, whose
    amount depends on the input's size. The convolution then receives a larger input.

    Args:
      given, received: `(N, *spatial, C)`, the inputs of the layer and of its convolution.
      padding: the zeros that the convolution itself adds at both ends of each axis.
      window: the geometry that has kernel size, strides and dilation.

    >>> x = np.arange(1, 6, dtype=np.float32).reshape(1, 5, 1)
    >>> window = Geometry.of_windows(x.shape, (2,), strides=2)
    >>> named_padding(x, np.pad(x, ((0, 0), (0, 1), (0, 0))), (0,), window)
    'SAME'
    """
    if given.ndim != received.ndim or given.shape[0] != received.shape[0] or given.shape[-1] != received.shape[-1]:
        return None
    if given.shape == received.shape or given.dtype != received.dtype or 0 in given.shape:
        return None
    seen = np.pad(received, ((0, 0), *((each, each) for each in padding), (0, 0)))
    for name in _NAMES:
        geometry = Geometry.of_windows(
            given.shape,
            window.kernel_size,
            strides=window.strides,
            padding=name,
            kernel_dilation=window.kernel_dilation,
        )
        if geometry.padded_spatial == seen.shape[1:-1] and same_bits(_padded(given, geometry), seen).all():
            return name
    return None


def _padded(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    for axis in range(geometry.rank):
        source = geometry.padded_sources(axis)
        inside = np.expand_dims(source >= 0, (*range(axis + 1), *range(axis + 2, x.ndim)))
        x = np.where(inside, np.take(x, source, axis + 1), x.dtype.type(0))
    return x
