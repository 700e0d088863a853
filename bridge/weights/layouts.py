"""Layouts: the axis orders of PyTorch's and Flax's parameters, by the kind of layer."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

_Value = TypeVar("_Value")

#: How a name ends that stands for one of several equal parts of a tensor, along its first axis: `weight[0/3]`.
PART = r"\[\d/[2-9]\]"


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
        features, one, *kernel_size = weight.shape
        if one != 1 or features % multiplier:
            raise ValueError
        return weight.reshape(features // multiplier, multiplier, *kernel_size)

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


def _to_heads(heads: int) -> Layout:
    """Return the layout of a projection to heads: (H D, I) in PyTorch, (I, H, D) in Flax."""
    return Layout(
        f"(HD)I -> IHD, H={heads}",
        lambda weight: weight.T.reshape(weight.shape[1], heads, -1),
        lambda kernel: kernel.reshape(kernel.shape[0], -1).T,
        (2,),
    )


def _bias_of_heads(heads: int) -> Layout:
    return Layout(f"(HD) -> HD, H={heads}", lambda bias: bias.reshape(heads, -1), lambda bias: bias.reshape(-1), (1,))


def _from_heads(heads: int) -> Layout:
    """Return the layout of a projection from heads: (O, H D) in PyTorch, (H, D, O) in Flax."""
    return Layout(
        f"O(HD) -> HDO, H={heads}",
        lambda weight: weight.T.reshape(heads, -1, weight.shape[0]),
        lambda kernel: kernel.reshape(-1, kernel.shape[-1]).T,
        (2,),
    )


#: A transposed convolution with `transpose_kernel=False`: (I, O, *k) in PyTorch, (*k, I, O) reversed in space in Flax.
FLIPPED = Layout(
    "IO* -> *IO, flipped",
    lambda weight: np.flip(weight, tuple(range(2, weight.ndim))).transpose(*range(2, weight.ndim), 0, 1),
    lambda kernel: np.flip(kernel, tuple(range(kernel.ndim - 2))).transpose(
        kernel.ndim - 2, kernel.ndim - 1, *range(kernel.ndim - 2)
    ),
    (3, 4, 5),
)


class _Named(dict[str, _Value]):
    """Values by name; those of a pattern are made when they are asked for."""

    def __init__(self, values: Mapping[str, _Value], makers: Mapping[str, Callable[[re.Match[str]], _Value]]):
        super().__init__(values)
        self._makers = {re.compile(pattern): make for pattern, make in makers.items()}

    def __missing__(self, name: str) -> _Value:
        for pattern, make in self._makers.items():
            if match := pattern.fullmatch(name):
                return make(match)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        is_made = isinstance(name, str) and any(pattern.fullmatch(name) for pattern in self._makers)
        return super().__contains__(name) or is_made


_Parameters = Mapping[str, tuple[str, Layout] | None]


def _depthwise_transpose(match: re.Match[str]) -> Layout:
    return depthwise_transpose(int(match[1] or 1), match[2] is not None)


def _fused(match: re.Match[str]) -> _Parameters:
    return {f"weight{match[1]}": ("kernel", MATRIX), f"bias{match[1]}": ("bias", SAME)}


def _of_heads(match: re.Match[str]) -> _Parameters:
    heads, part = int(match[1]), match[2] or ""
    return {f"weight{part}": ("kernel", _to_heads(heads)), f"bias{part}": ("bias", _bias_of_heads(heads))}


def _in_projection(match: re.Match[str]) -> _Parameters:
    return {f"in_proj_{name}": place for name, place in _of_heads(match).items()}


#: For each kind of layer its parameters: PyTorch's name -> (Flax's name, layout), or None where Flax has no such thing.
#: A depthwise convolution is a convolution: (C*M, 1, *k) becomes (*k, 1, C*M), output channel c*M + m in both.
#: A transposed depthwise convolution of multiplier M is "depthwise_transpose:M", and that
#: with ":flipped" where the Flax layer has `transpose_kernel=False`.
#: "linear[0/3]" takes the first third of a fused layer. "to_heads:H" and "from_heads:H" are the projections of H heads,
#: "to_heads:H[0/3]" those of a fused layer, and "in_projection:H[0/3]" those of `nn.MultiheadAttention`.
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
        "conv_transpose": {"weight": ("kernel", CONVOLUTION), "bias": ("bias", SAME)},
        "conv_transpose:flipped": {"weight": ("kernel", FLIPPED), "bias": ("bias", SAME)},
    },
    {
        r"depthwise_transpose(?::([1-9]\d*))?(:flipped)?": lambda match: {
            "weight": ("kernel", _depthwise_transpose(match)),
            "bias": ("bias", SAME),
        },
        rf"linear({PART})": _fused,
        rf"to_heads:([1-9]\d*)({PART})?": _of_heads,
        rf"in_projection:([1-9]\d*)({PART})": _in_projection,
        r"from_heads:([1-9]\d*)": lambda match: {
            "weight": ("kernel", _from_heads(int(match[1]))),
            "bias": ("bias", SAME),
        },
    },
)

LAYOUTS: Mapping[str, Layout] = _Named(
    {layout.name: layout for layout in (SAME, CONVOLUTION, MATRIX, POINTWISE, FLIPPED, depthwise_transpose())},
    {
        r"CM\* -> \*1\(CM\), M=([1-9]\d*)(, flipped)?": _depthwise_transpose,
        r"\(HD\)I -> IHD, H=([1-9]\d*)": lambda match: _to_heads(int(match[1])),
        r"\(HD\) -> HD, H=([1-9]\d*)": lambda match: _bias_of_heads(int(match[1])),
        r"O\(HD\) -> HDO, H=([1-9]\d*)": lambda match: _from_heads(int(match[1])),
    },
)
