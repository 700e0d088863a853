"""Sizes, strides, padding and dilations of a depthwise convolution, normalised and checked once."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import core, export

Padding = str | int | Sequence[int | tuple[int, int]]

_WORDS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")
_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}


class Axis(NamedTuple):
    """One spatial axis of a `Geometry`.

    Output o reads under tap t the input (o * stride + t * dilation - low) / input_dilation, if that is a whole number.
    """

    size: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    input_dilation: int
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything about a depthwise convolution but its data. Hashable, so it can be static under `jax.jit`.

    Build one with `Geometry.of`, which takes what users write ("SAME", one int for all axes) and checks it;
    the fields hold the normalised form.

    Attributes:
      batch: sizes of the leading axes of x; any number of them, zero allowed.
      spatial: sizes of the 1 to 3 spatial axes of x. They and those of `batch` may be symbolic (`jax.export`).
      channels: C, input channels.
      multiplier: M, output channels per input channel; output channel c*M + m reads input channel c.
      kernel_size: taps along each spatial axis.
      strides, kernel_dilation, input_dilation: one positive int per spatial axis.
      padding: (low, high) for each spatial axis, applied after input dilation; negative crops.
      padding_mode: what the padding holds: "zeros", "circular" (periodic) or "reflect".
      from_last_tap: add the taps from the last to the first, and then the bias. This is the order of PyTorch's
        transposed convolutions, and of its gradients by x. Only on CPUs it has an effect.

    >>> g = Geometry.of((8, 56, 56, 144), (3, 3, 1, 144), strides=2, padding="SAME")
    >>> g.padding, g.output_shape
    (((0, 1), (0, 1)), (8, 28, 28, 144))
    """

    batch: tuple[int, ...]
    spatial: tuple[int, ...]
    channels: int
    multiplier: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    from_last_tap: bool = False

    @classmethod
    def of(
        cls,
        x_shape: Sequence[int],
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        strides: int | Sequence[int] | None = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        input_dilation: int | Sequence[int] | None = 1,
    ) -> Geometry:
        """Return the geometry of x `(*batch, *spatial, C)` with kernel `(*kernel_size, 1, C*M)` and bias `(C*M,)`.

        Raises:
          ValueError: a shape, stride, dilation or padding that cannot be; the message names it.
          TypeError: a stride, dilation or padding of another type.
        """
        kernel_shape = tuple(kernel_shape)
        rank = len(kernel_shape) - 2
        if not 1 <= rank <= 3:
            raise ValueError(
                f"`kernel` has shape {kernel_shape}, expected (*kernel_size, 1, features) with 1 to 3 spatial axes"
            )
        geometry = cls.of_windows(
            x_shape,
            kernel_shape[:rank],
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            input_dilation=input_dilation,
        )
        per_group, features = kernel_shape[rank:]
        channels = geometry.channels
        if per_group != 1:
            expected = (*kernel_shape[:rank], 1, features)
            raise ValueError(
                f"`kernel` has shape {kernel_shape}, expected {expected}: "
                "a depthwise kernel has one input channel per group"
            )
        if features % channels or features == 0:
            raise ValueError(
                f"`kernel` has {features} output channels, expected a positive multiple of the "
                f"{channels} channels of `x` (shape {tuple(x_shape)})"
            )
        if bias_shape is not None and tuple(bias_shape) != (features,):
            raise ValueError(
                f"`bias` has shape {tuple(bias_shape)}, expected {(features,)}: one value per output channel"
            )
        return dataclasses.replace(geometry, multiplier=features // channels)

    @classmethod
    def of_windows(
        cls,
        x_shape: Sequence[int],
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] | None = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        input_dilation: int | Sequence[int] | None = 1,
    ) -> Geometry:
        """Return the geometry of the windows of x (multiplier 1), which `unfold` needs."""
        x_shape = tuple(x_shape)
        kernel_size = spatial_tuple("kernel_size", kernel_size)
        rank = len(kernel_size)
        if len(x_shape) < rank + 1:
            raise ValueError(
                f"`x` has shape {x_shape}, expected (*batch, *spatial, channels) with {rank} spatial axes "
                f"for a kernel of size {kernel_size}"
            )
        batch, spatial, channels = x_shape[: -rank - 1], x_shape[-rank - 1 : -1], x_shape[-1]
        if channels == 0:
            raise ValueError(f"`x` has shape {x_shape}, expected at least one channel on the last axis")
        dilation = per_axis("kernel_dilation", kernel_dilation, rank)
        zeros = per_axis("input_dilation", input_dilation, rank)
        steps = per_axis("strides", strides, rank)
        spans = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))
        pads, mode = _normalise_padding(padding, spatial, spans, steps, zeros)
        return cls(batch, spatial, channels, 1, kernel_size, steps, pads, mode, dilation, zeros)

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial)

    @property
    def features(self) -> int:
        """Output channels, C*M."""
        return self.channels * self.multiplier

    @property
    def taps(self) -> int:
        """Kernel positions, the product of `kernel_size`."""
        return math.prod(self.kernel_size)

    @property
    def spans(self) -> tuple[int, ...]:
        """Extent of a dilated kernel along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.kernel_dilation))

    @property
    def padded_spatial(self) -> tuple[int, ...]:
        """Spatial sizes after input dilation and padding."""
        return tuple(
            core.max_dim(0, _dilate(n, d) + low + high)
            for n, d, (low, high) in zip(self.spatial, self.input_dilation, self.padding)
        )

    @property
    def output_spatial(self) -> tuple[int, ...]:
        """Output positions along each axis; 0 where no window fits."""
        return tuple(
            core.max_dim(0, (n - span) // step + 1)
            for n, span, step in zip(self.padded_spatial, self.spans, self.strides)
        )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The same sizes and steps, by spatial axis."""
        steps = self.strides, self.kernel_dilation, self.input_dilation
        return tuple(map(Axis, self.spatial, self.output_spatial, self.kernel_size, *steps, *zip(*self.padding)))

    @property
    def is_symbolic(self) -> bool:
        """True if a size is not known before the program runs: a dimension of `jax.export.symbolic_shape`."""
        return any(map(export.is_symbolic_dim, self.batch + self.spatial))

    @property
    def has_symbolic_axes(self) -> bool:
        """True if a spatial size is symbolic; then there are no `sources`."""
        return any(map(export.is_symbolic_dim, self.spatial))

    @property
    def is_empty(self) -> bool:
        """True if a size is 0, so that no tap reads an element of x."""
        return 0 in self.x_shape + self.output_shape

    @functools.cached_property
    def with_room(self) -> Geometry:
        """The same with zeros after symbolic axes, so that a window fits even where their size is too small for one.

        The first outputs are those of this geometry.
        """
        padding = tuple(
            (low, high + max(0, span - 1 - low - high))
            if export.is_symbolic_dim(size) and _are_ints(low, high)
            else pair
            for size, span, pair in zip(self.spatial, self.spans, self.padding)
            for low, high in [pair]
        )
        return dataclasses.replace(self, padding=padding)

    @property
    def mirrored(self) -> Geometry:
        """The geometry of the same result by the flipped kernel from x reversed along its spatial axes, reversed too.

        It adds from the first tap where this one adds from the last.
        """
        padding = []
        for size, span, step, (low, high) in zip(self.padded_spatial, self.spans, self.strides, self.padding):
            unread = 0 if step == 1 else (size - span) % step
            padding.append((high - unread, low))
        return dataclasses.replace(self, padding=tuple(padding), from_last_tap=not self.from_last_tap)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*self.batch, *self.spatial, self.channels)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return (*self.kernel_size, 1, self.features)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (*self.batch, *self.output_spatial, self.features)

    @property
    def windows_shape(self) -> tuple[int, ...]:
        return (*self.batch, *self.output_spatial, *self.kernel_size, self.channels)

    @property
    def symmetric_padding(self) -> tuple[int, ...] | None:
        """The padding of each axis if PyTorch's `padding=` can express it, the same zeros at both ends; else None."""
        plain = self.padding_mode == "zeros" and max(self.input_dilation) == 1
        if plain and all(low == high >= 0 for low, high in self.padding):
            return tuple(low for low, _ in self.padding)
        return None

    @functools.cached_property
    def sources(self) -> tuple[np.ndarray, ...]:
        """For each axis, the input index under (output position, tap): shape (out, k), -1 where there is none.

        This is the only definition of which input a tap reads, for every kind of padding and dilation.
        """
        return tuple(self._sources(axis) for axis in range(self.rank))

    def _sources(self, axis: int) -> np.ndarray:
        out = np.arange(self.output_spatial[axis]) * self.strides[axis]
        tap = np.arange(self.kernel_size[axis]) * self.kernel_dilation[axis]
        return self._source_at(axis, out[:, None] + tap[None, :])

    def padded_sources(self, axis: int) -> np.ndarray:
        """Return the input index at each position of the padded axis, -1 at a zero of padding or dilation."""
        return self._source_at(axis, np.arange(self.padded_spatial[axis]))

    def _source_at(self, axis: int, position: np.ndarray) -> np.ndarray:
        size, dilation = self.spatial[axis], self.input_dilation[axis]
        position = position - self.padding[axis][0]
        if self.padding_mode == "circular":
            return position % max(size, 1)
        if self.padding_mode == "reflect":
            position = position % max(2 * size - 2, 1)  # one period: to the last input and back
            return np.minimum(position, 2 * size - 2 - position)
        inside = (position >= 0) & (position < _dilate(size, dilation)) & (position % dilation == 0)
        return np.where(inside, position // dilation, -1)

    def valid_taps(self) -> np.ndarray:
        """Return where a tap reads the input and not padding: bool `(*output_spatial, *kernel_size)`."""
        mask = np.ones((), bool)
        for source in self.sources:
            mask = np.logical_and.outer(mask, source >= 0)
        out_axes, tap_axes = range(0, 2 * self.rank, 2), range(1, 2 * self.rank, 2)
        return mask.transpose(*out_axes, *tap_axes)


def spatial_tuple(name: str, value: Any, smallest: int = 1) -> tuple[int, ...]:
    """Return a sequence of 1 to 3 ints. A bare int is an error, since it would silently mean one dimension."""
    if isinstance(value, (int, np.integer)):
        raise TypeError(
            f"`{name}` is {value!r}, expected a tuple with one int per spatial axis, "
            f"such as ({value},) for 1-D or ({value}, {value}) for images"
        )
    sizes = _ints(name, value)
    if not 1 <= len(sizes) <= 3 or any(size < smallest for size in sizes):
        kind = "positive" if smallest == 1 else "non-negative"
        raise ValueError(f"`{name}` is {value!r}, expected 1 to 3 {kind} integers")
    return sizes


def per_axis(name: str, value: Any, rank: int, smallest: int = 1) -> tuple[int, ...]:
    """Return one int per spatial axis; one int is for all axes, None is `smallest`, as in Flax."""
    if value is None:
        return (smallest,) * rank
    sizes = _ints(name, value)
    if not isinstance(value, (Sequence, np.ndarray)):
        sizes *= rank
    if len(sizes) != rank or min(sizes) < smallest:
        kind = "positive" if smallest == 1 else "non-negative"
        raise ValueError(f"`{name}` is {value!r}, expected a {kind} int or {rank} of them, one per spatial axis")
    return sizes


def _ints(name: str, value: Any) -> tuple[int, ...]:
    try:
        items = tuple(value) if isinstance(value, (Sequence, np.ndarray)) else (value,)
        if isinstance(value, str) or any(isinstance(item, (bool, np.bool_)) for item in items):
            raise TypeError
        return tuple(item if export.is_symbolic_dim(item) else operator.index(item) for item in items)
    except TypeError:
        raise TypeError(f"`{name}` is {value!r}, expected integers") from None


def _are_ints(*sizes: Any) -> bool:
    return not any(map(export.is_symbolic_dim, sizes))


def _dilate(size: int, dilation: int) -> int:
    return 0 if size == 0 else (size - 1) * dilation + 1


def _normalise_padding(
    padding: Any,
    spatial: tuple[int, ...],
    spans: tuple[int, ...],
    strides: tuple[int, ...],
    input_dilation: tuple[int, ...],
) -> tuple[tuple[tuple[int, int], ...], str]:
    """Return (low, high) of each axis, and the mode."""
    if not isinstance(padding, str):
        return explicit_padding(padding, len(spatial), _WORDS), "zeros"
    if padding not in _WORDS:
        raise ValueError(
            f"`padding` is {padding!r}, expected one of {', '.join(_WORDS)}, an int, or one int or (low, high) per axis"
        )
    if padding == "VALID":
        return ((0, 0),) * len(spatial), "zeros"
    if max(input_dilation) > 1:
        raise ValueError(
            f"`padding` is {padding!r} with `input_dilation` {input_dilation}, expected explicit (low, high) pairs: "
            "a word does not say what to pad when the input is dilated (lax refuses it too)"
        )
    if padding == "CAUSAL":
        if len(spatial) != 1:
            raise ValueError(f"`padding` is 'CAUSAL' with {len(spatial)} spatial axes, expected 1")
        return ((spans[0] - 1, 0),), "zeros"
    if padding in _MODES:
        if 0 in spatial:
            raise ValueError(f"`padding` is {padding!r} with spatial sizes {spatial}, expected at least 1 on each axis")
        return tuple(((span - 1) // 2, span // 2) for span in spans), _MODES[padding]
    totals = tuple(
        core.max_dim(0, (-(-n // step) - 1) * step + span - n) for n, span, step in zip(spatial, spans, strides)
    )
    if padding == "SAME":
        return tuple((total // 2, total - total // 2) for total in totals), "zeros"
    return tuple((total - total // 2, total // 2) for total in totals), "zeros"


def explicit_padding(padding: Any, rank: int, words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return one (low, high) per spatial axis of padding that is none of the words, which an error names."""
    expected = f"an int, {rank} ints or {rank} (low, high) pairs, or one of {', '.join(words)}"
    try:
        if isinstance(padding, (int, np.integer)) and not isinstance(padding, bool):
            return ((int(padding), int(padding)),) * rank
        pairs = tuple(
            _ints("padding", pair) if isinstance(pair, (Sequence, np.ndarray)) else _ints("padding", (pair, pair))
            for pair in padding
        )
    except TypeError:
        raise TypeError(f"`padding` is {padding!r}, expected {expected}") from None
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"`padding` is {padding!r}, expected {expected}")
    return tuple((low, high) for low, high in pairs)
