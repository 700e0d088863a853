"""The convolution and its kernel's gradient as two hand-written TPU kernels (Pallas, compiled by Mosaic).

The kernels read x without a copy, in blocks of whole tiles. Channels are in the lanes, and columns or images in the
sublanes. With few channels, columns are in the lanes and channels in the sublanes, if that leaves fewer of them idle:
XLA chooses the same layouts. Inputs of two blocks are read twice.

A program first writes its block into a scratch of float32, channels in the lanes. It writes the zeros of padding and of
input dilation there, never to HBM. From the scratch a tap is one load of 8 sublanes, from any sublane, strided as the
convolution is: VMEM holds an 8 x 128 tile of 32 bits row by row. A loaded value is added to every row of outputs that
reads it. Products are added in raster order, from the bias or 0, in float32. A product is rounded and then added.

With fewer than 128 channels, lanes are idle. Mosaic has no float64; float16 is converted outside of the kernel. With a
channel multiplier, x is read once, and one array of outputs per multiple is written, which XLA interleaves.

Nobody has run this on a TPU: the sizes of the blocks are derived, not measured.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxdw._compat import struct_like
from jaxdw.geometry import Geometry
from jaxdw.lowerings.ordered_sum import Order
from jaxdw.lowerings.tpu_tiles import LANES, SUBLANES
from jaxdw.padding import pad_repeated

#: Most bytes of a block of x or of y in VMEM, and of the scratch. With two buffers per block they are half of the 16
#: MiB that a kernel has by default.
BLOCK_BYTES, SCRATCH_BYTES = 1 << 20, 3 << 20

#: Blocks that are parts of the columns start at multiples of this: whole tiles, of 16 bits too.
ALIGNED = 16

#: Most tiles of sums in a program, which has 64 registers, and most of them in one row.
MOST_SUMS, MOST_WIDE = 24, 8

#: Most unrolled products over the rows and columns of a kernel; with more, a program loops over the taps.
MOST_UNROLLED = 256

#: Taps that a program of the kernel gradient adds at once.
MOST_TAPS = 16


def _with_32_bit_indices(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Disable 64-bit types: a TPU has no such indices."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> jax.Array:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return run


@_with_32_bit_indices
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

    Raises:
      ValueError: `compute` is not float32.
    """
    _check(compute)
    x, geometry = pad_repeated(x, geometry)
    volume = _Volume.of(geometry)
    x, stored = volume.arranged(_readable(x), 1), _storable(dtype)
    operands = [x, volume.by_multiple(kernel.astype(compute))]
    specs = [volume.read_spec(1), volume.kernel_spec(volume.taps)]
    if bias is not None:
        operands.append(volume.by_multiple(bias.astype(compute)))
        specs.append(volume.kernel_spec(1))
    y = pl.pallas_call(
        functools.partial(_conv_program, volume=volume, compute=compute),
        out_shape=struct_like(x, (volume.multiplier, *volume.y_shape), stored),
        grid=volume.grid,
        in_specs=specs,
        out_specs=volume.written_spec,
        scratch_shapes=[tpu.VMEM(volume.held, compute)] + [tpu.VMEM(volume.summed, compute)] * volume.y_turned,
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 5 + ("arbitrary",)),
        cost_estimate=volume.cost(x.dtype, stored),
        interpret=interpret,
    )(*operands)
    y = jnp.swapaxes(y, 4, 5) if volume.y_turned else y
    y = jnp.moveaxis(jnp.moveaxis(y, 4, 1) if volume.images_last else y, 0, -1)
    return y.reshape(geometry.output_shape).astype(dtype)


@_with_32_bit_indices
def kernel_gradient(
    x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype, dtype: np.dtype, *, interpret: bool = False
) -> jax.Array:
    """Return `(*kernel_size, 1, C*M)` of dtype `dtype`: for each tap, the sum in `compute` of what it read times dy.

    A program adds over a block of outputs into 8 sums, in the 8 sublanes, and then adds these. The results of the
    programs are added in order.

    Raises:
      ValueError: `compute` is not float32.
    """
    _check(compute)
    x, geometry = pad_repeated(x, geometry)
    volume = _Volume.of(geometry)
    x, dy = volume.arranged(_readable(x), 1), volume.of_dy.arranged(_readable(dy), volume.multiplier)
    groups = pl.cdiv(volume.taps, MOST_TAPS)
    together = pl.cdiv(volume.taps, groups)
    gradient = pl.pallas_call(
        functools.partial(_gradient_program, volume=volume, together=together, compute=compute),
        out_shape=struct_like(x, (volume.multiplier, groups * together, geometry.channels), compute),
        grid=volume.grid,
        in_specs=[volume.read_spec(1), volume.of_dy.read_spec(volume.multiplier)],
        out_specs=volume.kernel_spec(groups * together),
        scratch_shapes=[
            tpu.VMEM(volume.held, compute),
            tpu.VMEM(volume.of_dy.held, compute),
            tpu.VMEM((volume.multiplier, groups * together, volume.lanes), compute),
        ],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) + ("arbitrary",) * 5),
        cost_estimate=volume.cost(x.dtype, dy.dtype),
        interpret=interpret,
    )(x, dy)
    return jnp.moveaxis(gradient[:, : volume.taps], 0, -1).reshape(geometry.kernel_shape).astype(dtype)


def _check(compute: np.dtype) -> None:
    if compute != np.float32:
        raise ValueError(f"`method='pallas'` adds in float32 on TPUs, not in {compute}; use 'taps' or 'auto'")


def _readable(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32) if array.dtype == jnp.float16 else array


def _storable(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype == np.float16 else dtype


class _Axis(NamedTuple):
    """One axis: output o reads at tap t the input (o * stride + t * dilation - low) / input_dilation, if whole.

    One program computes `tile` outputs. If `in_sublanes`, blocks start at whole tiles.
    """

    size: int
    outputs: int
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    input_dilation: int = 1
    low: int = 0
    in_sublanes: bool = False
    tile: int = 1

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.outputs, self.tile)

    @property
    def positions(self) -> int:
        """Number of positions that a tile reads, with the zeros of padding and dilation."""
        return (self.tile - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    @property
    def block(self) -> int:
        """Number of consecutive inputs that contain all reads of a tile."""
        reads = (self.positions - 1) // self.input_dilation + 1
        if self.in_sublanes and self.tiles == 1:
            return self.size
        if self.in_sublanes:
            aligned = self.input_dilation == 1 and self.tile * self.stride % ALIGNED == 0 == self.low % ALIGNED
            reads = _whole(reads if aligned else reads + ALIGNED - 1, ALIGNED)
        return min(self.size, reads)

    def first(self, index: Any) -> Any:
        """Return the first position that a tile reads; input i is at position i * input_dilation."""
        return -self.low if self.tiles == 1 else index * (self.tile * self.stride) - self.low

    def start(self, index: Any) -> Any:
        """Return the first input of a tile's block."""
        if self.block == self.size:
            return 0
        aligned = ALIGNED if self.in_sublanes else 1
        last = (_whole(self.size, aligned) - self.block) // aligned
        found = self.source(self.first(index) + self.input_dilation - 1)
        found = _quotient(found, aligned, -self.low)
        return _clip(found, last) * aligned

    @property
    def beyond(self) -> int:
        """Number of positions of the last block after the end of the inputs."""
        return max(0, self.start(self.tiles - 1) + self.block - self.size)

    def reads(self, output: Any, tap: Any) -> Any:
        """Return the position that a tap reads, counted from the first of the tile."""
        return output * self.stride + tap * self.dilation

    def source(self, position: Any) -> Any:
        """Return the last input that is not after a position."""
        return _quotient(position, self.input_dilation, -self.low)

    def offset(self, index: Any) -> Any:
        """Return the start of a tile's block, counted from the first position."""
        return self.start(index) * self.input_dilation - self.first(index)

    @property
    def offsets(self) -> list[int]:
        """`offset` of each tile."""
        return [self.offset(index) for index in range(self.tiles)]

    @property
    def front(self) -> int:
        """Size of the scratch before the first position, so that it contains the start of every block."""
        return max(0, -min(self.offsets))

    @property
    def extent(self) -> int:
        """Size of the scratch, so that it contains the end of every block too."""
        return self.front + max(self.positions, max(self.offsets) + (self.block - 1) * self.input_dilation + 1)

    def borders(self, size: int) -> list[tuple[int, int]]:
        """Return the ranges (first, end) of a scratch of this size that some block does not fill."""
        if self.input_dilation > 1:
            return [(0, size)]
        parts = [(0, self.front + max(self.offsets)), (self.front + min(self.offsets) + self.block, size)]
        return [(low, high) for low, high in parts if low < high]


class _Volume(NamedTuple):
    """A geometry with four axes before the channels, the last in the sublanes.

    The axes are images, planes, rows and columns; or planes, rows, columns and images. If `x_turned` or `y_turned`,
    that array has columns in the lanes and channels in the sublanes, and a program transposes them.
    """

    channels: int
    multiplier: int
    rank: int
    images_last: bool
    x_turned: bool
    y_turned: bool
    axes: tuple[_Axis, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> _Volume:
        images = math.prod(geometry.batch)
        axes = [_Axis(images, images)] + [_Axis(1, 1)] * (3 - geometry.rank)
        axes += [_Axis(*axis[:-1]) for axis in geometry.axes]
        images_last, x_turned, y_turned = _arrangement(images, geometry)
        if images_last:
            axes.append(axes.pop(0))
        axes[-1] = axes[-1]._replace(in_sublanes=True)
        axes = [axis._replace(tile=axis.outputs) for axis in axes]
        whole = cls(geometry.channels, geometry.multiplier, geometry.rank, images_last, x_turned, y_turned, tuple(axes))
        tiled = whole._tiled()
        if tiled.axes[-1].tiles > 1:  # whole columns alone are turned
            tiled = whole._replace(x_turned=False, y_turned=False)._tiled()
        return tiled

    def _tiled(self) -> _Volume:
        """Return the volume with tiles that fit: made smaller along one axis at a time, by the fewest reads of x.

        Images in the sublanes have no reads in common, so a program has as few of them as possible.
        """
        volume = self
        if self.images_last and self.axes[-1].outputs > ALIGNED:
            volume = volume._with_tile(3, ALIGNED)
        while not volume.fits:
            smaller = []
            for number, axis in enumerate(volume.axes):
                unit = SUBLANES * MOST_WIDE if axis.in_sublanes else 1
                if axis.tile > unit and not (axis.in_sublanes and volume.images_last):
                    smaller.append(volume._with_tile(number, _whole(pl.cdiv(axis.outputs, 2 * axis.tiles), unit)))
            if not smaller:
                break
            volume = min(smaller, key=lambda volume: volume.x_bytes(4))
        return volume

    def _with_tile(self, number: int, tile: int) -> _Volume:
        axes = list(self.axes)
        axes[number] = axes[number]._replace(tile=tile)
        return self._replace(axes=tuple(axes))

    @property
    def fits(self) -> bool:
        x = self.block_bytes([axis.block for axis in self.axes], 4, self.x_turned)
        y = self.block_bytes([axis.tile for axis in self.axes], 4, self.y_turned)
        return max(x, y, _bytes(self.summed)) <= BLOCK_BYTES and _bytes(self.held) <= SCRATCH_BYTES

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Taps along each axis; they are in raster order, since images have only one."""
        return tuple(axis.taps for axis in self.axes)

    def arranged(self, array: jax.Array, multiplier: int) -> jax.Array:
        """Return `(multiplier, *axes, C)` of x or dy `(*batch, *spatial, C * multiplier)`, turned if x is."""
        rest = array.shape[array.ndim - 1 - self.rank : -1]
        array = array.reshape(-1, *(1,) * (3 - self.rank), *rest, self.channels, multiplier)
        array = jnp.moveaxis(array, -1, 0)
        array = jnp.moveaxis(array, 1, 4) if self.images_last else array
        return jnp.swapaxes(array, 4, 5) if self.x_turned else array

    @property
    def lanes(self) -> int:
        return min(self.channels, LANES)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of programs: channels first, so that a kernel is read once; multiples last, so that x is."""
        return (pl.cdiv(self.channels, self.lanes), *(axis.tiles for axis in self.axes), self.multiplier)

    @property
    def of_dy(self) -> _Volume:
        """The volume of dy, as the input of a kernel of one tap."""
        axes = [_Axis(a.outputs, a.outputs, in_sublanes=a.in_sublanes, tile=a.tile) for a in self.axes]
        return self._replace(axes=tuple(axes), x_turned=self.y_turned)

    @property
    def unrolled(self) -> bool:
        return self.products <= MOST_UNROLLED

    @property
    def products(self) -> int:
        *_, rows, columns = self.axes
        return rows.taps * columns.taps

    @property
    def wide(self) -> int:
        """Number of columns that a program adds together: whole sublanes, all of them or a few equal parts."""
        strips = pl.cdiv(self.axes[-1].tile, SUBLANES)
        return SUBLANES * pl.cdiv(strips, pl.cdiv(strips, MOST_WIDE))

    @property
    def high(self) -> int:
        """Number of rows of outputs that a program adds at once, limited by the registers and by MOST_UNROLLED."""
        *_, rows, columns = self.axes
        most = MOST_SUMS * SUBLANES // self.wide
        if self.unrolled:
            most = min(most, MOST_UNROLLED // (self.products * pl.cdiv(columns.tile, self.wide)))
        return pl.cdiv(rows.tile, pl.cdiv(rows.tile, max(1, most)))

    @property
    def common_rows(self) -> int:
        """Number of rows of dy that a program multiplies at once: a divisor of the rows of every tile."""
        rows = self.axes[2]
        whole = math.gcd(rows.tile, rows.outputs - (rows.tiles - 1) * rows.tile)
        most = max(1, MOST_WIDE * SUBLANES // self.wide)
        return next(n for n in range(most, 0, -1) if whole % n == 0)

    @property
    def held(self) -> tuple[int, ...]:
        """Shape of the scratch that a program copies x to."""
        first, second, rows, columns = self.axes
        overhang = (_whole(columns.tile, self.wide) - columns.tile) * columns.stride
        return first.positions, second.positions, rows.extent, _whole(columns.extent + overhang, SUBLANES), self.lanes

    def read_spec(self, multiplier: int) -> pl.BlockSpec:
        """Return the blocks of an array in this arrangement; they may overlap."""

        def index(c: Any, *rest: Any) -> tuple[Any, ...]:
            starts = [axis.start(i) for axis, i in zip(self.axes, rest)] + [c * self.lanes if self.grid[0] > 1 else 0]
            return (rest[-1] if multiplier > 1 else 0, *_turned(starts, self.x_turned))

        channels = self.grid[0] * self.lanes - self.channels
        sizes = [pl.Element(axis.block, (0, axis.beyond)) for axis in self.axes] + [
            pl.Element(self.lanes, (0, channels))
        ]
        return pl.BlockSpec((None, *_turned(sizes, self.x_turned)), index)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return _turned([*(axis.outputs for axis in self.axes), self.channels], self.y_turned)

    @property
    def summed(self) -> tuple[int, ...]:
        """Shape of the sums of a program before it transposes them."""
        return (*(axis.tile for axis in self.axes), self.lanes)

    @property
    def written_spec(self) -> pl.BlockSpec:
        block = _turned([*(axis.tile for axis in self.axes), self.lanes], self.y_turned)
        return pl.BlockSpec((None, *block), lambda c, *rest: (rest[-1], *_turned([*rest[:-1], c], self.y_turned)))

    def kernel_spec(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, self.lanes), lambda c, *rest: (rest[-1], 0, c))

    def by_multiple(self, kernel: jax.Array) -> jax.Array:
        """Return `(M, taps, C)` for a kernel, `(M, 1, C)` for a bias."""
        return jnp.moveaxis(kernel.reshape(-1, self.channels, self.multiplier), -1, 0)

    def x_bytes(self, itemsize: int) -> int:
        """Return the bytes of x that the grid reads."""
        return self.block_bytes([axis.block for axis in self.axes], itemsize, self.x_turned) * math.prod(self.grid[:-1])

    def block_bytes(self, shape: Sequence[int], itemsize: int, turned: bool) -> int:
        """Return the bytes, in whole tiles, of a block of this shape before the channels."""
        return _bytes(_turned([*shape, self.lanes], turned), itemsize)

    def cost(self, x: np.dtype, y: np.dtype) -> pl.CostEstimate:
        """Return the cost of the grid in whole tiles; a block that follows itself is read once."""
        programs, lanes = math.prod(self.grid), _whole(self.lanes, LANES)
        outputs = math.prod(axis.tile for axis in self.axes)
        y_bytes = self.block_bytes([axis.tile for axis in self.axes], y.itemsize, self.y_turned) * programs
        kernel_bytes = _bytes([self.taps, self.lanes]) * self.grid[0] * self.multiplier
        return pl.CostEstimate(
            flops=2 * programs * outputs * lanes * self.taps,
            transcendentals=0,
            bytes_accessed=self.x_bytes(x.itemsize) + y_bytes + kernel_bytes,
        )


def _arrangement(images: int, geometry: Geometry) -> tuple[bool, bool, bool]:
    """Return `images_last`, `x_turned` and `y_turned`, by XLA's layouts of x and y, so that few bytes are copied.

    XLA keeps an array in the fewest tiles. For another layout it is read and written once more.
    """

    def moved(spatial: Sequence[int]) -> list[int]:
        """Return the cost with columns in the sublanes, with images there, and with columns in the lanes."""
        *outer, columns = spatial
        channels = geometry.channels
        stored = [
            images * _whole(columns, SUBLANES) * _whole(channels, LANES),
            columns * _whole(images, SUBLANES) * _whole(channels, LANES),
            images * _whole(channels, SUBLANES) * _whole(columns, LANES),
        ]
        least = min(stored)
        natural = stored.index(least)
        return [math.prod(outer) * (n if i == natural else 2 * n + least) for i, n in enumerate(stored)]

    x, y = moved(geometry.spatial), moved(geometry.output_spatial)
    images_last = x[1] + y[1] < min(x[0], x[2]) + min(y[0], y[2])
    return images_last, not images_last and x[2] < x[0], not images_last and y[2] < y[0]


def _turned(items: Sequence[Any], turned: bool) -> tuple[Any, ...]:
    """Return the items, the last two exchanged if turned."""
    *outer, columns, channels = items
    return (*outer, channels, columns) if turned else tuple(items)


def _bytes(shape: Sequence[int], itemsize: int = 4) -> int:
    """Return the bytes of a block of this shape, in whole tiles."""
    *outer, sublanes, lanes = shape
    return math.prod(outer) * _whole(sublanes, SUBLANES * 4 // itemsize) * _whole(lanes, LANES) * itemsize


def _whole(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def _conv_program(x: Any, kernel: Any, *others: Any, volume: _Volume, compute: np.dtype) -> None:
    others, turned = (others[:-1], others[-1:]) if volume.y_turned else (others, ())
    *bias, y, held = others
    (into,) = turned or (y,)
    at = [pl.program_id(number) for number in range(1, 5)]
    pl.when(pl.program_id(5) == 0)(lambda: _write_padded(x, held, at, volume))

    first, second, rows, columns = volume.axes
    start = bias[0][...] if bias else jnp.zeros((1, volume.lanes), compute)
    summed = _unrolled if volume.unrolled else _looped
    wide, high = volume.wide, volume.high

    def sum_rows(index: tuple[Any, ...], _: None) -> None:
        *line, group = index
        top = _clip(group * high, rows.tile - high)  # the last rows may be computed twice
        for left in range(0, columns.tile, wide):
            sums = tuple(jnp.broadcast_to(start, (wide, volume.lanes)) for _ in range(high))
            sums = summed(held, kernel, sums, (*line, top, left), volume)
            width = min(wide, columns.tile - left)
            for row, total in enumerate(sums):
                into[(*line, top + row, pl.ds(left, width))] = total[:width].astype(into.dtype)

    def turn(line: tuple[Any, ...], _: None) -> None:
        y[line] = jnp.swapaxes(into[line], 1, 2).astype(y.dtype)

    _loop((first.tile, second.tile, pl.cdiv(rows.tile, high)), sum_rows, None)
    if volume.y_turned:
        _loop((first.tile, second.tile), turn, None)


_Sums = tuple[jax.Array, ...]


def _unrolled(held: Any, kernel: Any, sums: _Sums, output: tuple[Any, ...], volume: _Volume) -> _Sums:
    """Load each row and column of x that the sums need once, and add it to all of its sums."""
    first, second, rows, columns = volume.axes

    def add(line: tuple[Any, ...], sums: _Sums) -> _Sums:
        found = list(sums)
        for position in range((len(sums) - 1) * rows.stride + (rows.taps - 1) * rows.dilation + 1):
            uses = [(o, t) for o, t in np.ndindex(len(sums), rows.taps) if rows.reads(o, t) == position]
            for j in range(columns.taps) if uses else ():  # taps in raster order, for each sum
                o, t = uses[0]
                value = _read(held, output, o, (*line, t, j), volume.wide, volume)
                for o, t in uses:
                    found[o] = found[o] + value * kernel[pl.ds(_ravel((*line, t, j), volume.kernel_size), 1)]
        return tuple(found)

    lines = (first.taps, second.taps)
    if math.prod(lines) * len(sums) * volume.products <= MOST_UNROLLED:
        return functools.reduce(lambda sums, line: add(line, sums), np.ndindex(lines), sums)
    return _loop(lines, add, sums)


def _looped(held: Any, kernel: Any, sums: _Sums, output: tuple[Any, ...], volume: _Volume) -> _Sums:
    """Add one tap after the other, for kernels with many taps."""

    def add(tap: tuple[Any, ...], sums: _Sums) -> _Sums:
        weight = kernel[pl.ds(_ravel(tap, volume.kernel_size), 1)]
        values = [_read(held, output, row, tap, volume.wide, volume) for row in range(len(sums))]
        return tuple(total + value * weight for total, value in zip(sums, values))

    return _loop(volume.kernel_size, add, sums)


def _gradient_program(
    x: Any,
    dy: Any,
    gradient: Any,
    held: Any,
    held_dy: Any,
    total: Any,
    *,
    volume: _Volume,
    together: int,
    compute: np.dtype,
) -> None:
    at, multiple = [pl.program_id(number) for number in range(1, 5)], pl.program_id(5)
    pl.when(multiple == 0)(lambda: _write_padded(x, held, at, volume))
    _write_padded(dy, held_dy, at, volume.of_dy)
    columns, wide = volume.axes[-1], volume.wide
    parts = pl.cdiv(columns.tile, wide)
    first = functools.reduce(jnp.logical_and, [i == 0 for i in at])
    last = functools.reduce(jnp.logical_and, [i == axis.tiles - 1 for i, axis in zip(at, volume.axes)])
    *lines, height, width = (
        axis.tile if axis.tiles == 1 else jnp.minimum(axis.tile, axis.outputs - axis.tile * i)
        for axis, i in zip(volume.axes, at)
    )
    least = columns.outputs - (columns.tiles - 1) * columns.tile
    high = volume.common_rows
    steps = _quotient(height, high, 0)
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, volume.lanes), 0)

    def sum_taps(index: tuple[Any], _: None) -> None:
        (group,) = index
        taps = [_unravel(_clip(group * together + n, volume.taps - 1), volume.kernel_size) for n in range(together)]

        def add(index: tuple[Any, ...], sums: _Sums) -> _Sums:
            *line, step, part = index
            found = list(sums)
            for row, beyond in itertools.product(range(high), range(0, wide, SUBLANES)):
                left = pl.multiple_of(part * wide + beyond, SUBLANES)
                output = (*line, step * high, left)
                given = _read(held_dy, output, row, (0, 0, 0, 0), SUBLANES, volume.of_dy)
                values = [_read(held, output, row, tap, SUBLANES, volume) for tap in taps]
                if (parts - 1) * wide + beyond + SUBLANES > least:  # 0 times a value after the outputs may be NaN
                    values = [jnp.where(sublane + left < width, value, 0) for value in values]
                found = [total + value * given for total, value in zip(found, values)]
            return tuple(found)

        nothing = jnp.zeros((SUBLANES, volume.lanes), compute)
        sums = _loop((*lines, steps, parts), add, (nothing,) * together)
        for number, found in enumerate(sums):
            place = (multiple, pl.ds(group * together + number, 1))
            summed = found.sum(axis=0, keepdims=True)
            total[place] = jnp.where(first, summed, total[place] + summed)

    groups = total.shape[1] // together
    if volume.taps * high * wide // SUBLANES <= 2 * MOST_UNROLLED:
        for group in range(groups):
            sum_taps((group,), None)
    else:
        _loop((groups,), sum_taps, None)

    @pl.when(last)
    def _() -> None:
        gradient[...] = total[multiple]


def _write_padded(block: Any, held: Any, at: Sequence[Any], volume: _Volume) -> None:
    """Write a block into the scratch: each input at the position where the taps read it, and 0 elsewhere."""
    *outer, rows, columns = volume.axes
    top, left = (axis.front + axis.offset(i) for axis, i in zip((rows, columns), at[2:]))

    def write(places: tuple[Any, ...], _: None) -> None:
        sources, inside = [], jnp.bool_(True)
        for place, axis, i in zip(places, outer, at):
            position = axis.first(i) + place
            source = axis.source(position)
            inside &= (source >= 0) & (source < axis.size) & (source * axis.input_dilation == position)
            sources.append(_clip(source - axis.start(i), axis.block - 1))
        value = block[tuple(sources)].astype(held.dtype)
        value = jnp.swapaxes(value, 1, 2) if volume.x_turned else value
        if columns.tiles > 1:
            inside &= columns.start(at[3]) + lax.broadcasted_iota(jnp.int32, value.shape, 1) < columns.size
        for low, high in rows.borders(held.shape[2]):
            held[(*places, pl.ds(low, high - low))] = jnp.zeros((high - low, *held.shape[3:]), held.dtype)
        for low, high in columns.borders(held.shape[3]):
            nothing = jnp.zeros((held.shape[2], high - low, held.shape[4]), held.dtype)
            held[(*places, slice(None), pl.ds(low, high - low))] = nothing
        in_rows = pl.ds(top, rows.block, stride=rows.input_dilation)
        in_columns = pl.ds(left, columns.block, stride=columns.input_dilation)
        held[(*places, in_rows, in_columns)] = jnp.where(inside, value, 0)

    _loop(held.shape[:2], write, None)


def _read(held: Any, output: Sequence[Any], row: int, tap: Sequence[Any], count: int, volume: _Volume) -> jax.Array:
    """Return the reads of a tap for `count` neighbouring outputs, the first of them `row` rows after `output`."""
    beyond = (0, 0, row, 0)
    *line, above, left = (
        axis.reads(o, 0) + axis.reads(b, t) for axis, o, b, t in zip(volume.axes, output, beyond, tap)
    )
    *_, rows, columns = volume.axes
    return held[(*line, rows.front + above, pl.ds(columns.front + left, count, stride=columns.stride))]


def _ravel(index: Sequence[Any], sizes: Sequence[int]) -> Any:
    return functools.reduce(lambda outer, pair: outer * pair[1] + pair[0], zip(index[1:], sizes[1:]), index[0])


def _loop(sizes: Sequence[Any], step: Callable[[tuple[Any, ...], Any], Any], carry: Any) -> Any:
    """Run a step for each index, the last axis fastest, in nested loops: a division takes many instructions."""
    if not sizes:
        return step((), carry)
    size, *rest = sizes

    def run(i: Any, carry: Any) -> Any:
        return _loop(rest, lambda index, carry: step((i, *index), carry), carry)

    return run(jnp.int32(0), carry) if isinstance(size, int) and size == 1 else lax.fori_loop(0, size, run, carry)


def _clip(number: Any, most: int) -> Any:
    return max(0, min(number, most)) if isinstance(number, int) else jnp.clip(number, 0, most)


def _unravel(index: Any, sizes: Sequence[int]) -> tuple[Any, ...]:
    """Return the index along each axis, the last axis fastest."""
    found = []
    for size in reversed(sizes[1:]):
        outer = _quotient(index, size, 0)
        found.append(index - outer * size)
        index = outer
    return (index, *reversed(found))


def _quotient(number: Any, divisor: int, least: int) -> Any:
    """Return the quotient, rounded down, of a number not below `least`: the hardware's division rounds to 0."""
    if divisor == 1:
        return number
    if isinstance(number, int):
        return number // divisor
    shift = max(0, -(least // divisor))
    return lax.div(number + shift * divisor, jnp.int32(divisor)) - shift
