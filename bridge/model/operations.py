"""The operations of a PyTorch model that ran, in NumPy, channels last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation that ran. What only moves elements is no operation: views, copies and padding.

    Attributes:
      kind: "convolution", "linear", "batch norm", "relu", "relu6", "hard swish", "hard sigmoid", "gelu (tanh)",
        "mean", "add" or "multiply"; PyTorch's own name for any other.
      layer: the path of the layer whose parameters it used; empty for none.
      operands: as the operation received them, padded where PyTorch pads beforehand.
      output: its result.
      parameters: of the layer: "weight", "bias", "running_mean", "running_var", in PyTorch's layout.
      settings: of a convolution "stride", "padding", "dilation" and "groups"; of a normalization "eps" and "momentum".
      layout: of its first operand in memory: "contiguous", "channels_last" or "other"; empty for two axes or fewer.
      run: the same operation on other numbers of the same shapes, in the same layout: takes x channels last, and the
        weight and the bias in PyTorch's layout where it has them; None where it is no sum of products.
    """

    kind: str
    layer: str
    operands: tuple[np.ndarray, ...]
    output: np.ndarray
    parameters: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    layout: str = ""
    run: Callable[..., np.ndarray] | None = None
