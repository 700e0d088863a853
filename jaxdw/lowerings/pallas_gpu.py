"""The convolution and its kernel's gradient as two hand-written GPU kernels (Pallas, compiled by Triton).

XLA runs a loop over the taps as one fusion that reads x once per tap and pads it before. cuDNN's grouped convolution
may round float32 to TF32. Here x is read without a copy, and padding is a mask. A program computes a tile of a few
output rows, some columns and some channels, and loads a row of x once for all of its output rows that need it. Products
are added in raster order, in float32 or wider, by one fused multiply-add each: the sum of the method "taps".

The zeros of input dilation are not read. Along an axis with input dilation, output positions form classes (phases) that
read different taps, and each class is a convolution without dilation.

Nobody has run this on a GPU: the sizes of the tiles are derived, not measured.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxdw._compat import struct_like
from jaxdw.geometry import Geometry
from jaxdw.lowerings.ordered_sum import Order
from jaxdw.padding import pad_repeated

THREADS = 4 * 32

#: Bytes that a thread loads at once.
LOAD_BYTES = 16

#: Most unrolled products over the rows and columns of a kernel; with more, a program loops over the taps.
MOST_UNROLLED = 256

#: Most output rows of a program, sums of a thread, and FMAs of a thread with one plane of the kernel; more would spill
#: registers.
MOST_ROWS, MOST_SUMS, MOST_FMAS = 4, 32, 784

#: Most taps of a program of the kernel gradient.
MOST_TAPS = 16

#: Programs that keep a large card busy: eight for each of 132 multiprocessors.
ENOUGH_PROGRAMS = 8 * 132


def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    order: Order,
    compute: np.dtype,
    dtype: np.dtype,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` of dtype `dtype`, added in `compute` from the bias or 0.

    The only `order` is "raster". `interpret` runs the kernel as JAX operations, on any backend.
    """
    x, geometry = pad_repeated(x, geometry)
    volume = _Volume.of(geometry)
    tile = _ConvTile.of(volume, x.dtype.itemsize)
    operands = [x.reshape(volume.images, -1), kernel.reshape(-1)] + ([] if bias is None else [bias])
    arithmetic = _INTERPRETED if interpret else _COMPILED
    program = functools.partial(_conv_program, volume=volume, tile=tile, compute=compute, arithmetic=arithmetic)
    y = _call(
        program,
        operands,
        (volume.images, volume.output_elements),
        dtype,
        programs=volume.images * tile.programs,
        together=None,
        part=lambda index: index // tile.programs,
        interpret=interpret,
    )
    return y.reshape(geometry.output_shape)


def kernel_gradient(
    x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype, dtype: np.dtype, *, interpret: bool = False
) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` of dtype `dtype`: for each tap, the sum in `compute` of what it read times dy.

    Each program adds over some output rows of some images; then the results of the programs are added.
    """
    x, geometry = pad_repeated(x, geometry)
    volume = _Volume.of(geometry)
    tile = _GradientTile.of(volume, compute.itemsize)
    arithmetic = _INTERPRETED if interpret else _COMPILED
    program = functools.partial(_gradient_program, volume=volume, tile=tile, compute=compute, arithmetic=arithmetic)
    found = _call(
        program,
        [x.reshape(volume.images, -1), dy.reshape(volume.images, -1)],
        (tile.parts, tile.groups * tile.taps * volume.features),
        compute,
        programs=tile.parts * tile.programs,
        together=tile.images,
        part=lambda index: index // tile.programs,
        interpret=interpret,
    )
    total = found.sum(axis=0)[: geometry.taps * geometry.features]
    return total.reshape(geometry.kernel_shape).astype(dtype)


_Sums = tuple[jax.Array, ...]


class _Arithmetic(NamedTuple):
    """The start of a sum, and the addition of a product."""

    zeros: Callable[[tuple[int, ...], np.dtype], jax.Array]
    fma: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class _Axis(NamedTuple):
    """One spatial axis: output o reads at tap t the input (o * stride + t * dilation - low) / input_dilation, if whole.

    Outputs `k * period + phase` read input `k * step + base(phase, tap)`, for every k.
    """

    size: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    input_dilation: int
    low: int

    @property
    def period(self) -> int:
        return self.input_dilation // math.gcd(self.stride, self.input_dilation)

    @property
    def step(self) -> int:
        return self.period * self.stride // self.input_dilation

    def base(self, phase: int, tap: int) -> int | None:
        """Return the first input of a phase under a tap, or None if the tap reads a zero of the dilation."""
        position = phase * self.stride + tap * self.dilation - self.low
        return None if position % self.input_dilation else position // self.input_dilation

    def source(self, output: Any, tap: Any) -> tuple[Any, Any]:
        """Return the input that an output reads at a tap, both known only at run time, and if it exists."""
        position = output * self.stride + tap * self.dilation - self.low
        index = position if self.input_dilation == 1 else lax.div(position, jnp.int32(self.input_dilation))
        whole = position == index * self.input_dilation
        return index, (position >= 0) & whole & (index < self.size)


class _Volume(NamedTuple):
    """A geometry with one batch axis and three spatial axes, padded with zeros."""

    images: int
    channels: int
    multiplier: int
    axes: tuple[_Axis, _Axis, _Axis]

    @classmethod
    def of(cls, geometry: Geometry) -> _Volume:
        axes = [_Axis(1, 1, 1, 1, 1, 1, 0)] * (3 - geometry.rank)
        axes += [_Axis(*axis[:-1]) for axis in geometry.axes]
        depth, rows, columns = axes
        return cls(math.prod(geometry.batch), geometry.channels, geometry.multiplier, (depth, rows, columns))

    @property
    def features(self) -> int:
        return self.channels * self.multiplier

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(axis.taps for axis in self.axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(axis.outputs for axis in self.axes)

    @property
    def output_elements(self) -> int:
        """Number per image."""
        return math.prod(self.outputs) * self.features

    def channel(self, feature: jax.Array) -> jax.Array:
        return feature if self.multiplier == 1 else lax.div(feature, jnp.int32(self.multiplier))


class _ConvTile(NamedTuple):
    """The outputs of one program of the convolution; rows and columns count outputs of one phase."""

    unrolled: bool
    phases: tuple[int, int]
    rows: int
    columns: int
    features: int
    blocks: tuple[int, int, int, int]

    @classmethod
    def of(cls, volume: _Volume, itemsize: int) -> _ConvTile:
        depth, rows, columns = volume.axes
        products = rows.taps * columns.taps
        unrolled = products <= MOST_UNROLLED
        phases = (rows.period, columns.period) if unrolled else (1, 1)
        height, width = pl.cdiv(rows.outputs, phases[0]), pl.cdiv(columns.outputs, phases[1])
        features, wide = _vector(volume.features, width, THREADS * LOAD_BYTES // itemsize)
        each = LOAD_BYTES // itemsize
        most = min(MOST_ROWS, MOST_SUMS // (each * math.prod(phases)), MOST_FMAS // (each * products))
        high = pl.cdiv(height, pl.cdiv(height, max(1, most)))
        blocks = (depth.outputs, pl.cdiv(height, high), pl.cdiv(width, wide), pl.cdiv(volume.features, features))
        return cls(unrolled, phases, high, wide, features, blocks)

    @property
    def programs(self) -> int:
        """Number per image."""
        return math.prod(self.blocks)

    @property
    def sums(self) -> list[tuple[int, int, int]]:
        """(row, row phase, column phase) of each vector that a program sums into."""
        first, second = map(range, self.phases)
        return list(itertools.product(range(self.rows), first, second))


class _GradientTile(NamedTuple):
    """The outputs over which one program of the kernel gradient adds, and its taps and features."""

    images: int
    lines: int
    columns: int
    features: int
    taps: int
    groups: int
    chunks: int
    parts: int
    blocks: int

    @classmethod
    def of(cls, volume: _Volume, itemsize: int) -> _GradientTile:
        lines, width = math.prod(volume.outputs[:-1]), volume.outputs[-1]
        features, columns = _vector(volume.features, width, THREADS * LOAD_BYTES // itemsize)
        count = math.prod(volume.kernel_size)
        groups = pl.cdiv(count, MOST_TAPS)
        blocks = pl.cdiv(volume.features, features)
        parts = max(1, ENOUGH_PROGRAMS // (groups * blocks))
        # whole images where they are enough; a divisor of their number, so that none is read twice
        images = next(n for n in range(max(1, volume.images // parts), 0, -1) if volume.images % n == 0)
        chunks = min(lines, max(1, parts // (volume.images // images)))
        each = pl.cdiv(lines, chunks)
        chunks = pl.cdiv(lines, each)
        parts = volume.images // images * chunks
        return cls(images, each, columns, features, pl.cdiv(count, groups), groups, chunks, parts, blocks)

    @property
    def programs(self) -> int:
        """Number per part."""
        return self.groups * self.blocks


def _vector(features: int, columns: int, elements: int) -> tuple[int, int]:
    """Return powers of two, with product `elements` or less, that cover both numbers with the fewest idle elements.

    There are at least eight features, the bytes that memory moves at once. Of equal choices, the nearest to 64 features
    is taken.
    """

    def cost(tile: tuple[int, int]) -> tuple[int, int, float]:
        covered = pl.cdiv(features, tile[0]) * tile[0] * pl.cdiv(columns, tile[1]) * tile[1]
        return -math.prod(tile), covered, abs(math.log2(tile[0] / 64))

    most = (pl.next_power_of_2(features), pl.next_power_of_2(columns))
    wide = [2**n for n in range(elements.bit_length()) if min(8, most[0]) <= 2**n <= most[0]]
    tiles = [(f, 2**n) for f in wide for n in range(elements.bit_length()) if 2**n <= most[1] and f * 2**n <= elements]
    return min(tiles, key=cost)


def _call(
    program: Callable[..., None],
    operands: Sequence[jax.Array],
    output: tuple[int, int],
    dtype: np.dtype,
    *,
    programs: int,
    together: int | None,
    part: Callable[[Any], Any],
    interpret: bool,
) -> jax.Array:
    """Return the output of `programs` programs.

    Each has its part of the output, and of operands with two axes its images: `together` of them, or one without an
    axis.
    """

    def spec(operand: jax.Array) -> pl.BlockSpec:
        if operand.ndim == 1:
            return pl.BlockSpec(operand.shape, lambda index: (0,))
        if together is None:
            return pl.BlockSpec((None, operand.shape[1]), lambda index: (part(index), 0))
        chunks = output[0] * together // operand.shape[0]
        return pl.BlockSpec((together, operand.shape[1]), lambda index: (part(index) // chunks, 0))

    return pl.pallas_call(
        program,
        out_shape=struct_like(operands[0], output, dtype),
        grid=(programs,),
        in_specs=[spec(operand) for operand in operands],
        out_specs=pl.BlockSpec((None, output[1]), lambda index: (part(index), 0)),
        compiler_params=triton.CompilerParams(num_warps=THREADS // 32),
        interpret=interpret,
    )(*operands)


def _conv_program(
    x: Any, kernel: Any, *bias_and_y: Any, volume: _Volume, tile: _ConvTile, compute: np.dtype, arithmetic: _Arithmetic
) -> None:
    *bias, y = bias_and_y
    plane, top, left, block = _unravel(pl.program_id(0) % tile.programs, tile.blocks)
    top, columns = top * tile.rows, left * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
    feature = block * tile.features + jnp.arange(tile.features, dtype=jnp.int32)
    start = arithmetic.zeros((1, tile.features), compute)
    if bias:
        start = _load(bias[0], feature, feature < volume.features, compute)[None, :]
    sums = tuple(jnp.broadcast_to(start, (tile.columns, tile.features)) for _ in tile.sums)

    def weight(tap: tuple[Any, Any, Any]) -> jax.Array:
        offset = _ravel(tap, volume.kernel_size) * volume.features + feature
        return _load(kernel, offset, feature < volume.features, compute)[None, :]

    summed = _unrolled if tile.unrolled else _looped
    sums = summed(x, weight, sums, (plane, top, columns), feature, volume, tile, compute, arithmetic.fma)

    for (row, row_phase, column_phase), total in zip(tile.sums, sums):
        at = (plane, (top + row) * tile.phases[0] + row_phase, columns * tile.phases[1] + column_phase)
        inside = (at[1] < volume.outputs[1]) & (at[2] < volume.outputs[2])
        offset, mask = _elements(at, inside, volume.outputs, feature, volume.features, feature < volume.features)
        triton.store(y.at[offset], total.astype(y.dtype), mask=mask)


def _unrolled(x, weight, sums, position, feature, volume, tile, compute, fma):
    """Load each row and column of x that the tile needs once, and add it to all of its sums."""
    (plane, top, columns), (depth, rows, cols) = position, volume.axes
    users = defaultdict(list)
    for index, (row, row_phase, column_phase) in enumerate(tile.sums):
        for i, j in np.ndindex(rows.taps, cols.taps):
            first, second = rows.base(row_phase, i), cols.base(column_phase, j)
            if first is not None and second is not None:
                users[row * rows.step + first, second].append((index, i, j))

    def add(k: Any, sums: _Sums) -> _Sums:
        found = list(sums)
        source, exists = depth.source(plane, k)
        for (first, second), uses in sorted(users.items()):  # taps in raster order, for each sum
            at = (source, top * rows.step + first, columns * cols.step + second)
            inside = exists & (at[1] >= 0) & (at[1] < rows.size) & (at[2] >= 0) & (at[2] < cols.size)
            value = _read(x, at, inside, feature, volume, compute)
            for index, i, j in uses:
                found[index] = fma(value, weight((k, i, j)), found[index])
        return tuple(found)

    return add(0, sums) if depth.taps == 1 else _loop(depth.taps, add, sums)


def _looped(x, weight, sums, position, feature, volume, tile, compute, fma):
    """Add one tap after the other, for kernels with many taps."""
    (plane, top, columns), (depth, rows, cols) = position, volume.axes

    def add(tap: Any, sums: _Sums) -> _Sums:
        k, i, j = _unravel(tap, volume.kernel_size)
        (source, in_depth), (column, in_row) = depth.source(plane, k), cols.source(columns, j)
        found = []
        for (row, _, _), total in zip(tile.sums, sums):
            line, in_column = rows.source(top + row, i)
            inside = in_depth & in_row & in_column
            value = _read(x, (source, line, column), inside, feature, volume, compute)
            found.append(fma(value, weight((k, i, j)), total))
        return tuple(found)

    return _loop(math.prod(volume.kernel_size), add, sums)


def _gradient_program(
    x: Any, dy: Any, found: Any, *, volume: _Volume, tile: _GradientTile, compute: np.dtype, arithmetic: _Arithmetic
) -> None:
    depth, rows, cols = volume.axes
    part, group, block = _unravel(pl.program_id(0), (tile.parts, tile.groups, tile.blocks))
    first_line = part % tile.chunks * tile.lines
    feature = block * tile.features + jnp.arange(tile.features, dtype=jnp.int32)
    taps = [group * tile.taps + index for index in range(tile.taps)]
    steps = (tile.images, tile.lines, pl.cdiv(cols.outputs, tile.columns))

    def add(step: Any, sums: _Sums) -> _Sums:
        image, line, left = _unravel(step, steps)
        plane, row = _unravel(first_line + line, (depth.outputs, rows.outputs))
        columns = left * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
        inside = (plane < depth.outputs) & (columns < cols.outputs)
        offset, mask = _elements(
            (plane, row, columns), inside, volume.outputs, feature, volume.features, feature < volume.features
        )
        gradient = _load(dy, (image, offset), mask, compute)
        after = []
        for tap, total in zip(taps, sums):
            k, i, j = _unravel(tap, volume.kernel_size)
            sources = [axis.source(o, t) for axis, o, t in zip(volume.axes, (plane, row, columns), (k, i, j))]
            at, exist = zip(*sources)
            reads = inside & exist[0] & exist[1] & exist[2]
            after.append(arithmetic.fma(_read(x, at, reads, feature, volume, compute, image), gradient, total))
        return tuple(after)

    nothing = tuple(arithmetic.zeros((tile.columns, tile.features), compute) for _ in taps)
    for tap, total in zip(taps, _loop(math.prod(steps), add, nothing)):
        offset = tap * volume.features + feature
        triton.store(found.at[offset], total.sum(axis=0), mask=feature < volume.features)


def _read(
    x: Any,
    at: Sequence[Any],
    inside: jax.Array,
    feature: jax.Array,
    volume: _Volume,
    compute: np.dtype,
    image: Any = None,
) -> jax.Array:
    """Return x at a plane, a row, and columns: `(columns, features)`, 0 at columns that are not `inside`."""
    sizes, channel = [axis.size for axis in volume.axes], volume.channel(feature)
    offset, mask = _elements(at, inside, sizes, channel, volume.channels, feature < volume.features)
    return _load(x, offset if image is None else (image, offset), mask, compute)


def _elements(
    at: Sequence[Any], inside: jax.Array, sizes: Sequence[int], channel: jax.Array, channels: int, exists: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return offsets within an image `(*sizes, channels)`, and a mask of those that exist: `(columns, features)`."""
    return (_ravel(at, sizes) * channels)[:, None] + channel[None, :], inside[:, None] & exists[None, :]


def _load(ref: Any, at: Any, mask: jax.Array, dtype: np.dtype) -> jax.Array:
    return triton.load(ref.at[at], mask=mask, other=0).astype(dtype)


def _fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return a * b + c, rounded once; b may have one column. Triton, as XLA calls it, never fuses the two itself."""
    letter, suffix = ("d", "f64") if c.dtype.itemsize == 8 else ("f", "f32")
    (total,) = triton.elementwise_inline_asm(
        f"fma.rn.{suffix} $0, $1, $2, $3;",
        args=[a, jnp.broadcast_to(b, c.shape), c],
        constraints=f"={letter},{letter},{letter},{letter}",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, c.dtype)],
    )
    return total


def _multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return the same if the compiler of JAX's operations fuses the two, as XLA:CPU mostly does."""
    return c + a * b


def _opaque_zeros(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Return zeros that XLA does not see: it would remove the first addition, and round the first product."""
    return lax.optimization_barrier(jnp.zeros(shape, dtype))


_COMPILED, _INTERPRETED = _Arithmetic(jnp.zeros, _fma), _Arithmetic(_opaque_zeros, _multiply_add)


def _loop(times: int, step: Callable[[Any, _Sums], _Sums], sums: _Sums) -> _Sums:
    return lax.fori_loop(jnp.int32(0), jnp.int32(times), step, sums)


def _ravel(index: Sequence[Any], sizes: Sequence[int]) -> Any:
    return functools.reduce(lambda outer, pair: outer * pair[1] + pair[0], zip(index[1:], sizes[1:]), index[0])


def _unravel(index: Any, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Return the index along each axis, the last axis fastest."""
    found = []
    for size in reversed(sizes[1:]):
        found.append(lax.rem(index, jnp.int32(size)))
        index = lax.div(index, jnp.int32(size))
    return (index, *reversed(found))
