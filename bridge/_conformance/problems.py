"""Problems that a kernel under test must solve: their geometry, their data, and what the kernel is told of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from bridge.case import DTYPES, Case
from bridge.diagnosis.integers import integer_case, largest_integer
from bridge.numerics import Arithmetic
from jaxdw.geometry import Geometry

#: The kinds of kernels, and what each one computes.
KINDS = {
    "depthwise": "a depthwise convolution, as `jaxdw.depthwise_conv` and `F.conv2d(groups=C)`",
    "causal": "a causal depthwise convolution along time, as `jaxdw.causal_conv1d`",
    "transpose": "a transposed depthwise convolution, as `F.conv_transpose2d(groups=C)`",
}


@dataclasses.dataclass(frozen=True)
class TransposedCall(Geometry):
    """The arguments of a transposed convolution: strides and padding are those of PyTorch."""

    output_padding: tuple[int, ...] = ()

    @property
    def output_spatial(self) -> tuple[int, ...]:
        sizes = zip(self.spatial, self.strides, self.padding, self.spans, self.output_padding)
        return tuple(max(0, (n - 1) * s - low - high + span + more) for n, s, (low, high), span, more in sizes)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The geometry of one call.

    Attributes:
      kind: a key of `KINDS`.
      batch: samples; spatial: sizes of the spatial axes.
      channels, multiplier, kernel_size, strides, dilation: as in `Geometry`.
      padding: (low, high) per axis; of a transposed convolution what is cut off.
      output_padding: of a transposed convolution, per axis.
      bias: True if the call has one.
      state: True if the call has the K-1 inputs before x.
      dtype: its name.
    """

    kind: str
    batch: int
    spatial: tuple[int, ...]
    channels: int
    multiplier: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    bias: bool = False
    state: bool = False
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        return len(self.spatial)

    @property
    def spans(self) -> tuple[int, ...]:
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation))

    @functools.cached_property
    def call(self) -> Geometry:
        """What the kernel is told."""
        told = Geometry(
            (self.batch,),
            self.spatial,
            self.channels,
            self.multiplier,
            self.kernel_size,
            self.strides,
            self.padding,
            "zeros",
            self.dilation,
            (1,) * self.rank,
        )
        if self.kind != "transpose":
            return told
        return TransposedCall(**vars(told), output_padding=self.output_padding)

    @property
    def is_empty(self) -> bool:
        return 0 in self.call.x_shape + self.call.output_shape

    @property
    def before(self) -> int:
        """The number of inputs in the state."""
        return self.spans[0] - 1 if self.state else 0

    def case(self, x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> Case:
        """Return the case of arrays in the layout of `Case`; a state lies before x along time.

        Args:
          kernel: as the kernel under test is given it: not flipped for a transposed convolution.
        """
        g = self.call
        if self.kind == "transpose":
            cut, more = g.padding, self.output_padding
            return Case.transposed(
                x, kernel, bias, strides=g.strides, padding=cut, output_padding=more, kernel_dilation=g.kernel_dilation
            )
        padding = ((0, 0),) if self.state else g.padding
        return Case(x, kernel, bias, strides=g.strides, padding=padding, kernel_dilation=g.kernel_dilation)

    def kernel_of(self, case: Case) -> np.ndarray:
        """Return the kernel of a case, or its gradient, as the kernel under test is given it."""
        return self.unflipped(case.kernel)

    def unflipped(self, kernel: np.ndarray) -> np.ndarray:
        """Return a kernel in the other direction if the kind is a transposed convolution; it is its own inverse."""
        return np.flip(kernel, tuple(range(self.rank))) if self.kind == "transpose" else kernel

    def zeros(self) -> Case:
        """Return the case with zeros for its data."""
        g = self.call
        x = np.zeros((self.batch, *(n + self.before for n in self.spatial), self.channels), DTYPES[self.dtype])
        kernel = np.zeros(g.kernel_shape, x.dtype)
        return self.case(x, kernel, np.zeros(g.features, x.dtype) if self.bias else None)

    def integers(self, arithmetic: Arithmetic, seed: int, terms: int = 0) -> Case:
        """Return the case with integers for its data, none of them 0, whose sums in the arithmetic are exact.

        Args:
          terms: the number of products of a sum if it is more than the number of taps.
        """
        return integer_case(self.zeros(), arithmetic, seed, terms)

    def normal(self, seed: int) -> Case:
        """Return the case with normal random numbers for its data."""
        rng, zeros = np.random.default_rng(seed), self.zeros()

        def draw(array: np.ndarray) -> np.ndarray:
            return rng.standard_normal(array.shape).astype(array.dtype)

        bias = None if zeros.bias is None else draw(zeros.bias)
        return zeros.replace(x=draw(zeros.x), kernel=draw(zeros.kernel), bias=bias)

    @property
    def terms_of_gradients(self) -> int:
        """A number that is not below the number of products in an element of any gradient."""
        g = self.call
        positions = max(math.prod(g.spatial) + self.before, math.prod(g.output_spatial))
        return max(g.taps * self.multiplier, self.batch * positions, 1)

    def integer_gradient(self, arithmetic: Arithmetic, seed: int) -> np.ndarray:
        """Return integers for dy, none of them 0, whose sums of products with those of `integers` are exact."""
        most = largest_integer(arithmetic, self.terms_of_gradients)
        rng = np.random.default_rng(seed)
        shape = self.call.output_shape
        dy = rng.integers(1, most + 1, shape) * (2 * rng.integers(0, 2, shape) - 1)
        return dy.astype(DTYPES[self.dtype])

    def smaller(self) -> Iterator[Problem]:
        """Yield problems that are simpler in one respect, the greatest step first."""
        for size in dict.fromkeys((1, self.batch // 2, self.batch - 1)):
            if 0 < size < self.batch:
                yield dataclasses.replace(self, batch=size)
        for size in dict.fromkeys((1, 2, self.channels // 2, self.channels - 1)):
            if 0 < size < self.channels:
                yield dataclasses.replace(self, channels=size)
        if self.multiplier > 1:
            yield dataclasses.replace(self, multiplier=1)
        if self.bias:
            yield dataclasses.replace(self, bias=False)
        if self.state:
            yield dataclasses.replace(self, state=False)
        for name, least in (("spatial", 1), ("kernel_size", 1), ("strides", 1), ("dilation", 1), ("output_padding", 0)):
            for axis, value in enumerate(getattr(self, name)):
                for new in dict.fromkeys((least, value // 2, value - 1)):
                    if least <= new < value:
                        yield from self._with(name, axis, new)
        for axis, (low, high) in enumerate(self.padding if self.kind != "causal" else ()):
            for less in {low, 1} if low == high > 0 else ():
                yield from self._with("padding", axis, (low - less, high - less))

    def _with(self, name: str, axis: int, new: int | tuple[int, int]) -> Iterator[Problem]:
        """Yield the problem with another number for one axis, if it is possible."""
        changed: Any = tuple(new if a == axis else value for a, value in enumerate(getattr(self, name)))
        other = dataclasses.replace(self, **{name: changed})
        if self.kind == "causal":
            other = dataclasses.replace(other, padding=((other.spans[0] - 1, 0),))
        most = (max(pair) - 1 for pair in zip(other.strides, other.dilation))
        other = dataclasses.replace(other, output_padding=tuple(map(min, other.output_padding, most)))
        if 0 not in other.call.output_shape or self.is_empty:
            yield other
