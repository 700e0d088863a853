"""What the operations share: checks of tensors, their dtypes, and how the kernels see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import torch
from torch.autograd import forward_ad

from jaxdw.native import calls


def refuse_forward_mode(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise where a tensor carries a tangent: an operation of one's own would lose it without a word."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"`{name}` has a tangent: forward-mode differentiation is not supported")


def check_tensor(
    name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None = None
) -> None:
    if tensor is None:
        return
    if tensor.device.type != "cpu" or dtype_name(tensor) not in calls.TYPES or tensor.dtype != dtype:
        expected = f"one of {', '.join(calls.TYPES)}" if name == "x" else str(dtype)
        raise TypeError(f"`{name}` is {tensor.dtype} on {tensor.device}, expected {expected} on the CPU")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}, expected {shape}")


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous()


def empty_channels_last(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a new tensor `(N, C, *spatial)` whose memory is `(N, *spatial, C)`, and no view."""
    strides, size = [1] * len(shape), shape[1]
    for axis in (*range(len(shape) - 1, 1, -1), 0):
        strides[axis] = size
        size *= shape[axis]
    return like.new_empty_strided(shape, strides)


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return the tensor's numbers, with its strides and without a copy."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such numbers of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
