"""Convolutions, windows and resizing in float64, channels last: any rank, groups, strides, dilations and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def convolution(
    x: np.ndarray,
    w: np.ndarray,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    input_dilation: Sequence[int] | None = None,
    groups: int = 1,
) -> np.ndarray:
    """Return the correlation of x `(N, *spatial, C)` with w `(*kernel, C / groups, O)`: `(N, *out, O)`."""
    rank = x.ndim - 2
    x = _dilated(x, input_dilation or (1,) * rank)
    x = _padded(x, padding)
    kernel, per_group, features = w.shape[:rank], w.shape[-2], w.shape[-1]
    sizes = [max(0, (n - (k - 1) * d - 1) // s + 1) for n, k, d, s in zip(x.shape[1:-1], kernel, dilation, strides)]
    y = np.zeros((len(x), *sizes, features))
    if not y.size:
        return y
    depthwise = per_group == 1 and groups == x.shape[-1]
    for tap in np.ndindex(*kernel):
        seen = x[(slice(None), *_places(tap, sizes, strides, dilation))]
        if depthwise:
            y += np.repeat(seen, features // groups, axis=-1) * w[tap][0] if features != groups else seen * w[tap][0]
        elif groups == 1:
            y += seen @ w[tap]
        else:
            parts = seen.reshape(*seen.shape[:-1], groups, per_group)
            weights = w[tap].reshape(per_group, groups, features // groups)
            y += np.einsum("...gi,igo->...go", parts, weights, optimize=True).reshape(y.shape)
    return y


def kernel_gradient(
    x: np.ndarray,
    dy: np.ndarray,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
) -> np.ndarray:
    """Return the gradient of `convolution` by w: `(*kernel, C / groups, O)`, for x `(N, *spatial, C)` and its dy."""
    x = _padded(x, padding)
    sizes, per_group, features = dy.shape[1:-1], x.shape[-1] // groups, dy.shape[-1]
    right = dy.reshape(-1, groups, features // groups).transpose(1, 0, 2)
    w = np.zeros((*kernel, per_group, features))
    for tap in np.ndindex(*kernel):
        seen = x[(slice(None), *_places(tap, sizes, strides, dilation))]
        left = seen.reshape(-1, groups, per_group).transpose(1, 2, 0)
        w[tap] = (left @ right).transpose(1, 0, 2).reshape(per_group, features)
    return w


def _places(
    tap: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Iterator[slice]:
    for t, n, s, d in zip(tap, sizes, strides, dilation):
        yield slice(t * d, t * d + (n - 1) * s + 1, s)


def windows_reduced(
    x: np.ndarray,
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray],
    start: float,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    fill: float | None = None,
) -> np.ndarray:
    """Return a reduction over windows of every axis of x; what lies outside is `fill`, by default `start`."""
    outside = start if fill is None else fill
    x = np.pad(x, [(max(a, 0), max(b, 0)) for a, b in padding], constant_values=outside)
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape, window, dilation, strides)]
    y = np.full(sizes, start, x.dtype)
    for tap in np.ndindex(*window):
        y = combine(y, x[tuple(_places(tap, sizes, strides, dilation))])
    return y


def interpolation(n: int, out: int, mode: str, scale: float | None, align_corners: bool = False) -> np.ndarray:
    """Return the matrix `(out, n)` of a resize along one axis, as PyTorch defines it."""
    matrix = np.zeros((out, n))
    ratio = 1 / scale if scale else n / out
    for i in range(out):
        if mode == "nearest":
            matrix[i, min(math.floor(i * ratio), n - 1)] = 1.0
            continue
        at = i * ((n - 1) / (out - 1) if out > 1 else 0.0) if align_corners else max((i + 0.5) * ratio - 0.5, 0.0)
        low = min(int(at), n - 1)
        matrix[i, low] += 1 - (at - low)
        matrix[i, min(low + 1, n - 1)] += at - low
    return matrix


def _dilated(x: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    if set(dilation) == {1}:
        return x
    sizes = [(n - 1) * d + 1 if n else 0 for n, d in zip(x.shape[1:-1], dilation)]
    wide = np.zeros((len(x), *sizes, x.shape[-1]), x.dtype)
    wide[(slice(None), *(slice(None, None, d) for d in dilation))] = x
    return wide


def _padded(x: np.ndarray, padding: Sequence[tuple[int, int]]) -> np.ndarray:
    x = np.pad(x, ((0, 0), *((max(a, 0), max(b, 0)) for a, b in padding), (0, 0)))
    cut = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(padding, x.shape[1:-1])]
    return x[(slice(None), *cut)]
