"""Layouts: the axis orders of PyTorch's and Flax's parameters, by the kind of layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """The two forms of one parameter. Both directions move axes only, and change no bit of an element.

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

#: For each kind of layer its parameters: PyTorch's name -> (Flax's name, layout), or None where Flax has no such thing.
#: A depthwise convolution is a convolution: (C*M, 1, *k) becomes (*k, 1, C*M), output channel c*M + m in both.
KINDS: Mapping[str, Mapping[str, tuple[str, Layout] | None]] = {
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
}

LAYOUTS = {layout.name: layout for layout in (SAME, CONVOLUTION, MATRIX, POINTWISE)}
