"""The sums of products of a depthwise convolution: its taps are the terms, its cases are the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge.accumulation.sums import Change, Operands, SumsOfProducts
from bridge.accumulation.tree import Leaf
from bridge.numerics import exact, format_of

if TYPE_CHECKING:  # they import JAX, and this package needs NumPy alone
    from bridge.case import Case
    from jaxdw.geometry import Geometry

#: Taps of the largest window that the commands reveal unless they are told otherwise: 11x11 takes half a minute.
MOST_TAPS = 128


def check_taps(option: str, geometry: Geometry, most: int) -> None:
    """Refuse, before the work, to reveal an order that would take too long.

    Args:
      option: what asked for it.
      geometry: whose windows count.
      most: the most taps, `MOST_TAPS` unless the user lifts it.

    Raises:
      ValueError: a window has more.
    """
    if geometry.taps > most:
        raise ValueError(
            f"`{option}` on windows of {geometry.taps} taps: an accumulation order takes one run per tap, and one "
            f"replay per set of taps that an output has, which may be hours; expected at most {most} taps, or "
            f"`--max-taps {geometry.taps}`"
        )


class ConvolutionSums(SumsOfProducts):
    """The sums of a case: `data` is the case, its taps in raster order are the terms, its geometry is the layout."""

    @classmethod
    def of(cls, case: Case) -> ConvolutionSums:
        g = case.geometry
        weights, reads = case.kernel.reshape(g.taps, g.features), g.valid_taps().reshape(*g.output_spatial, 1, g.taps)
        return cls(case, g, case.dtype, g.output_shape, weights, reads, case.bias is not None)

    def uniform(self, x: float, weights: np.ndarray) -> ConvolutionSums:
        g, bias = self.layout, self.data.bias
        kernel = np.empty_like(self.data.kernel)
        kernel.reshape(g.taps, g.features)[:] = weights[: g.taps, None].astype(self.dtype)
        return self._with(
            np.full_like(self.data.x, x), kernel, None if bias is None else np.full_like(bias, weights[-1])
        )

    def changed(self, x: Change, w: Change) -> ConvolutionSums:
        case = self.data
        return self._with(x(case.x), w(case.kernel), None if case.bias is None else w(case.bias))

    def _with(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> ConvolutionSums:
        case = self.data.replace(x=x, kernel=kernel, bias=bias)
        return dataclasses.replace(self, data=case, weights=kernel.reshape(self.weights.shape))

    def exact(self) -> np.ndarray:
        return exact(self.data).value

    def operands(self, at: tuple) -> Operands:
        """Views of x where `at` are slices and the window's inputs ascend evenly, copies where not."""
        case, g = self.data, self.layout
        batch, spatial, feature = at[: len(g.batch)], at[len(g.batch) : -1], at[-1]
        weights, one = self.weights, np.ones((), case.dtype)
        sliced = isinstance(feature, slice)
        channel = np.arange(g.features)[feature] // g.multiplier if g.multiplier > 1 else feature
        x = case.x[(*batch, ..., channel)] if sliced else case.x

        def operands(leaf: Leaf | None) -> tuple[np.ndarray, np.ndarray]:
            if not isinstance(leaf, int):
                return (np.zeros(g.features, case.dtype) if case.bias is None else case.bias)[feature], one
            taps = np.unravel_index(leaf, g.kernel_size)
            sources = [source[rows, tap] for source, tap, rows in zip(g.sources, taps, spatial)]
            if not sliced:
                return x[(*batch, *sources, channel)], weights[leaf, feature]
            window = x
            for axis, source in enumerate(sources, start=len(batch)):
                window = window[(*(slice(None),) * axis, _as_slice(source))]
            return window, weights[leaf, feature]

        return operands

    def transform(self, output: Callable[[ConvolutionSums], np.ndarray]) -> str:
        """Name the transform by the outputs that a number reaches and should not reach."""
        g = self.layout
        if 0 in g.x_shape:
            return ""
        position = tuple(n // 2 for n in g.spatial)
        image: tuple[Any, ...] = (0,) * len(g.batch)
        reads = np.ones((), bool)
        for source, at in zip(g.sources, position):
            reads = np.logical_and.outer(reads, (source == at).any(axis=1))

        def impulse(background: float, height: float, first_weight: float) -> tuple[np.ndarray, np.ndarray]:
            """Return `(actual, exact)` of the first image and channel, where one input and the first tap differ."""
            x, kernel = np.full(g.x_shape, background), np.ones(g.kernel_shape)
            x[(*image, *position, 0)] = height
            kernel.reshape(g.taps, g.features)[0] = first_weight
            bias = np.zeros(g.features, self.dtype) if self.has_bias else None
            sums = self._with(x.astype(self.dtype), kernel.astype(self.dtype), bias)
            return output(sums)[(*image, ..., 0)], sums.exact()[(*image, ..., 0)]

        touched = ~np.isfinite(impulse(1.0, np.inf, 1.0)[0])
        if touched.all() and not reads.all():
            return "; one infinite input reaches every output of its image, as through an FFT"
        large = 2.0 ** (format_of(self.dtype).precision + 4)
        if (touched & ~reads).any() or not np.array_equal(*impulse(0.0, 1.0, large)):
            return "; inputs or weights are mixed before they are multiplied, as by Winograd's transforms"
        return ""


def as_sums(data: Case | SumsOfProducts) -> SumsOfProducts:
    """Return sums as they are, and those of a case."""
    return data if isinstance(data, SumsOfProducts) else ConvolutionSums.of(data)


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    """Return an index that ascends evenly as a slice, which copies nothing."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if step > 0 and (np.diff(index) == step).all():
        return slice(int(index[0]), int(index[-1]) + 1, step)
    return index
