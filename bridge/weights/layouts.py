"""Layouts: the axis orders of PyTorch's and Flax's parameters, by the kind of layer."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The two forms of one parameter. Both directions move or reverse axes, and change no bit of an element.

    Attributes:
      name: its name in errors and the manifest: the axes in PyTorch, then in Flax.
      to_flax, to_torch: inverse of each other.
      ranks: numbers of axes that a parameter of PyTorch may have, or None for any.
    """

    name: str
    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    ranks: tuple[int, ...] | None = None

    def flax_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape in Flax for this shape in PyTorch; None where the layout does not fit it."""
        if self.ranks is not None and len(shape) not in self.ranks:
            return None
        try:
            return self.to_flax(np.broadcast_to(np.zeros((), np.bool_), shape)).shape
        except ValueError:
            return None

    def fits_flax(self, shape: tuple[int, ...]) -> bool:
        """Return True where a parameter of Flax with this shape has a form in PyTorch."""
        try:
            torch = self.to_torch(np.broadcast_to(np.zeros((), np.bool_), shape)).shape
        except (ValueError, IndexError):
            return False
        return self.flax_shape(torch) == shape


def _kernel_first(weight: np.ndarray) -> np.ndarray:
    """(O, I, *k) -> (*k, I, O)."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def _channels_first(kernel: np.ndarray) -> np.ndarray:
    """(*k, I, O) -> (O, I, *k)."""
    return kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))


def _same(array: np.ndarray) -> np.ndarray:
    return array


SAME = Layout("as it is", _same, _same)
CONVOLUTION = Layout("OI* -> *IO", _kernel_first, _channels_first, (3, 4, 5))
MATRIX = Layout("OI -> IO", np.transpose, np.transpose, (2,))
POINTWISE = Layout(
    "OI11 -> IO", lambda weight: weight.squeeze((2, 3)).T, lambda kernel: kernel.T[:, :, None, None], (4,)
)


@functools.cache
def depthwise_transpose(multiplier: int = 1, flipped: bool = False) -> Layout:
    """Return the layout of a transposed depthwise kernel: (C, M, *k) in PyTorch, (*k, 1, C*M) in Flax.

    Args:
      multiplier: M.
      flipped: whether the Flax kernel is reversed along its spatial axes (`transpose_kernel=False`).
    """

    def to_flax(weight: np.ndarray) -> np.ndarray:
        channels, per_channel, *kernel_size = weight.shape
        if per_channel != multiplier:
            raise ValueError
        return turned(_kernel_first(weight.reshape(channels * per_channel, 1, *kernel_size)))

    def to_torch(kernel: np.ndarray) -> np.ndarray:
        weight = _channels_first(turned(kernel))
        if weight.shape[1] != 1:
            raise ValueError
        return weight.reshape(-1, multiplier, *weight.shape[2:])

    def turned(kernel: np.ndarray) -> np.ndarray:
        return np.flip(kernel, tuple(range(kernel.ndim - 2))) if flipped else kernel

    name = f"CM* -> *1(CM), M={multiplier}{', flipped' if flipped else ''}"
    return Layout(name, to_flax, to_torch, (3, 4, 5))


def depthwise_transpose_kind(multiplier: int = 1, flipped: bool = False) -> str:
    """Return the kind of a transposed depthwise layer, as `KINDS` has it.

    >>> depthwise_transpose_kind(), depthwise_transpose_kind(2, True)
    ('depthwise_transpose', 'depthwise_transpose:2:flipped')
    """
    return f"depthwise_transpose{f':{multiplier}' if multiplier > 1 else ''}{':flipped' if flipped else ''}"


class _Named(dict[str, _Value]):
    """Values by name, and those of transposed depthwise layers for each multiplier."""

    def __init__(self, values: Mapping[str, _Value], pattern: str, make: Callable[[Layout], _Value]):
        super().__init__(values)
        self._pattern, self._make = re.compile(pattern), make

    def __missing__(self, name: str) -> _Value:
        match = self._pattern.fullmatch(name)
        if match is None:
            raise KeyError(name)
        return self._make(depthwise_transpose(int(match[1] or 1), match[2] is not None))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self._pattern.fullmatch(name) is not None)


#: For each kind of layer its parameters: PyTorch's name -> (Flax's name, layout), or None where Flax has no such thing.
#: A depthwise convolution is a convolution: (C*M, 1, *k) becomes (*k, 1, C*M), output channel c*M + m in both.
#: A transposed depthwise convolution of multiplier M is "depthwise_transpose:M", and that
#: with ":flipped" where the Flax layer has `transpose_kernel=False`.
KINDS: Mapping[str, Mapping[str, tuple[str, Layout] | None]] = _Named(
    {
        "conv": {"weight": ("kernel", CONVOLUTION), "bias": ("bias", SAME)},
        "linear": {"weight": ("kernel", MATRIX), "bias": ("bias", SAME)},
        "pointwise": {"weight": ("kernel", POINTWISE), "bias": ("bias", SAME)},  # a 1x1 convolution held as a matrix
        "batch_norm": {
            "weight": ("scale", SAME),
            "bias": ("bias", SAME),
            "running_mean": ("mean", SAME),
            "running_var": ("var", SAME),
            "num_batches_tracked": None,
        },
        "norm": {"weight": ("scale", SAME), "bias": ("bias", SAME)},  # LayerNorm, GroupNorm, RMSNorm
        "embedding": {"weight": ("embedding", SAME)},
        "array": {"": ("", SAME)},  # a parameter that stands in no layer, such as a layer scale
        "depthwise_transpose": {"weight": ("kernel", depthwise_transpose()), "bias": ("bias", SAME)},
    },
    r"depthwise_transpose(?::([1-9]\d*))?(:flipped)?",
    lambda layout: {"weight": ("kernel", layout), "bias": ("bias", SAME)},
)

LAYOUTS: Mapping[str, Layout] = _Named(
    {layout.name: layout for layout in (SAME, CONVOLUTION, MATRIX, POINTWISE, depthwise_transpose())},
    r"CM\* -> \*1\(CM\), M=([1-9]\d*)(, flipped)?",
    lambda layout: layout,
)
