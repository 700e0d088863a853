"""The convolution and its kernel's gradient as two hand-written TPU kernels (Pallas, compiled by Mosaic).

x is read where it lies, channels in the lanes and columns in the sublanes, a block of whole tiles at a time; the rows
that two blocks share are read twice. A program first spreads its block out in a scratch of float32: the zeros of
padding and of input dilation are written there, never to HBM. There a tap is one load of 8 sublanes from any sublane,
strided where the convolution is: an 8 x 128 tile of 32 bits lies in VMEM row by row. What is loaded once is added to
every row of outputs that reads it. Products enter the sum in raster order, from the bias or 0, in float32: a product is
rounded and then added, as the program is written.

Where there are fewer than 128 channels, lanes are idle. Mosaic has no float64; float16 is converted outside of the
kernel. A channel multiplier reads x once and writes one array of outputs for each multiple, which XLA interleaves.

None of this has run on a TPU: the sizes of the blocks are reasoned, not measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jaxdw.geometry import Geometry
from jaxdw.sums.padded import kernel_gradient_of_padded, of_padded, sum_of_padded
from jaxdw.sums.tiles import LANES, SUBLANES
from jaxdw.windows import pad

#: Bytes that a block of x or of y may take in VMEM, and what a program spreads out there: with two buffers a block,
#: half of the 16 MiB that a kernel has by default.
BLOCK_BYTES, SCRATCH_BYTES = 1 << 20, 3 << 20

#: First sublanes of blocks that are not whole along the columns: whole tiles, of 16 bits too.
ALIGNED = 16

#: Tiles that a program sums into, of 64 registers, and those that lie side by side in a row.
MOST_SUMS, MOST_WIDE = 24, 8

#: Products over the rows and columns of a kernel that a program spells out at most; beyond, it loops over the taps.
MOST_UNROLLED = 256

#: Taps that a program of the kernel gradient sums at once.
MOST_TAPS = 16


def sum_in_kernel(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    geometry: Geometry,
    compute: np.dtype,
    dtype: np.dtype,
    *,
    interpret: bool = False,
) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` of dtype `dtype`, summed in `compute` from the bias or 0, in raster order.

    `interpret` runs the kernel as JAX operations, on any backend.

    Raises:
      ValueError: `compute` is not float32.
    """
    _check(compute)
    if 0 in geometry.x_shape or 0 in geometry.output_shape:
        return sum_of_padded(x, kernel, bias, geometry, "raster", compute).astype(dtype)
    if geometry.padding_mode != "zeros":
        x, geometry = pad(x, geometry), of_padded(geometry)
    volume = _Volume.of(geometry)
    x, stored = _readable(x).reshape(volume.x_shape), _storable(dtype)
    operands = [x, volume.by_multiple(kernel.astype(compute))]
    specs = [volume.x_spec, volume.kernel_spec(volume.taps)]
    if bias is not None:
        operands.append(volume.by_multiple(bias.astype(compute)))
        specs.append(volume.kernel_spec(1))
    y = pl.pallas_call(
        functools.partial(_conv_program, volume=volume, compute=compute),
        out_shape=_like(x, (volume.multiplier, *volume.y_shape), stored),
        grid=volume.grid,
        in_specs=specs,
        out_specs=volume.y_spec,
        scratch_shapes=[tpu.VMEM(volume.held, compute)],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 5 + ("arbitrary",)),
        cost_estimate=volume.cost(x.dtype, stored),
        interpret=interpret,
    )(*operands)
    y = y.reshape(volume.multiplier, *geometry.output_shape[:-1], geometry.channels)
    return jnp.moveaxis(y, 0, -1).reshape(geometry.output_shape).astype(dtype)


def kernel_gradient_in_kernel(
    x: jax.Array, dy: jax.Array, geometry: Geometry, compute: np.dtype, dtype: np.dtype, *, interpret: bool = False
) -> jax.Array:
    """`(*kernel_size, 1, C*M)` of dtype `dtype`: for each tap, the sum in `compute` of what it read times dy.

    A program sums over a block of outputs, in 8 sums which lie in the 8 sublanes; blocks are then added one after the
    other, and the 8 sums last.

    Raises:
      ValueError: `compute` is not float32.
    """
    _check(compute)
    if 0 in geometry.x_shape or 0 in geometry.output_shape:
        return kernel_gradient_of_padded(x, dy, geometry, compute).astype(dtype)
    if geometry.padding_mode != "zeros":
        x, geometry = pad(x, geometry), of_padded(geometry)
    volume = _Volume.of(geometry)
    x = _readable(x).reshape(volume.x_shape)
    dy = jnp.moveaxis(_readable(dy).reshape(*volume.y_shape, geometry.multiplier), -1, 0)
    groups = pl.cdiv(volume.taps, MOST_TAPS)
    together = pl.cdiv(volume.taps, groups)
    gradient = pl.pallas_call(
        functools.partial(_gradient_program, volume=volume, together=together, compute=compute),
        out_shape=_like(x, (volume.multiplier, groups * together, geometry.channels), compute),
        grid=volume.grid,
        in_specs=[volume.x_spec, volume.y_spec],
        out_specs=volume.kernel_spec(groups * together),
        scratch_shapes=[
            tpu.VMEM(volume.held, compute),
            tpu.VMEM(volume.held_dy, compute),
            tpu.VMEM((volume.multiplier, groups * together, SUBLANES, volume.lanes), compute),
        ],
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) + ("arbitrary",) * 5),
        cost_estimate=volume.cost(x.dtype, dy.dtype),
        interpret=interpret,
    )(x, dy)
    return jnp.moveaxis(gradient[:, : volume.taps], 0, -1).reshape(geometry.kernel_shape).astype(dtype)


def _check(compute: np.dtype) -> None:
    if compute != np.float32:
        raise ValueError(f"`method` is 'pallas' with sums in {compute}, expected another: kernels for TPUs add float32")


def _readable(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32) if array.dtype == jnp.float16 else array


def _storable(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


class _Axis(NamedTuple):
    """One axis: output o reads at tap t the input (o * stride + t * dilation - low) / spread, if whole.

    `tile` outputs are computed by one program. `in_sublanes`: blocks start at whole tiles.
    """

    size: int
    outputs: int
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    spread: int = 1
    low: int = 0
    in_sublanes: bool = False
    tile: int = 1

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.outputs, self.tile)

    @property
    def positions(self) -> int:
        """From the first that a tile reads to the last, with the zeros of padding and dilation."""
        return (self.tile - 1) * self.stride + (self.taps - 1) * self.dilation + 1

    @property
    def block(self) -> int:
        """Consecutive inputs that hold all that a tile reads."""
        reads = (self.positions - 1) // self.spread + 1
        if self.in_sublanes:
            reads = self.size if self.tiles == 1 else _whole(reads + ALIGNED - 1, ALIGNED)
        return min(self.size, reads)

    def first(self, index: Any) -> Any:
        """The first position that a tile reads; input i is at position i * spread."""
        return index * (self.tile * self.stride) - self.low

    def start(self, index: Any, library: Any = jnp) -> Any:
        """The first input of its block."""
        if self.block == self.size:
            return 0 * index
        aligned = ALIGNED if self.in_sublanes else 1
        last = (_whole(self.size, aligned) - self.block) // aligned
        return library.clip(-(-self.first(index) // self.spread) // aligned, 0, last) * aligned

    def offset(self, index: Any, library: Any = jnp) -> Any:
        """Where its block begins, counted from the first position."""
        return self.start(index, library) * self.spread - self.first(index)


class _Volume(NamedTuple):
    """A geometry with four axes before the channels: images, planes, rows and columns."""

    channels: int
    multiplier: int
    axes: tuple[_Axis, _Axis, _Axis, _Axis]

    @classmethod
    def of(cls, geometry: Geometry) -> _Volume:
        images = math.prod(geometry.batch)
        axes = [_Axis(images, images)] + [_Axis(1, 1)] * (3 - geometry.rank)
        for size, outputs, taps, stride, dilation, spread, (low, _) in zip(
            geometry.spatial,
            geometry.output_spatial,
            geometry.kernel_size,
            geometry.strides,
            geometry.kernel_dilation,
            geometry.input_dilation,
            geometry.padding,
        ):
            axes.append(_Axis(size, outputs, taps, stride, dilation, spread, low))
        axes[-1] = axes[-1]._replace(in_sublanes=True)
        whole = cls(geometry.channels, geometry.multiplier, tuple(axes))
        return whole._tiled()

    def _tiled(self) -> _Volume:
        """With the largest tiles that fit, longest along the columns, then along the rows, planes and images."""
        volume = self
        for number in reversed(range(4)):
            axis = self.axes[number]
            count, unit = 1, SUBLANES * MOST_WIDE if axis.in_sublanes else 1
            while True:
                tile = pl.cdiv(axis.outputs, count)
                tile = axis.outputs if count == 1 else _whole(tile, unit)
                axes = tuple(a._replace(tile=tile) if n == number else a for n, a in enumerate(volume.axes))
                tried = volume._replace(axes=axes)
                if tile <= unit or tried.fits:
                    break
                count += 1
            volume = tried
        return volume

    @property
    def fits(self) -> bool:
        blocks = _bytes([axis.block for axis in self.axes]), _bytes([axis.tile for axis in self.axes])
        return max(blocks) <= BLOCK_BYTES and _bytes(self.held[:-1]) <= SCRATCH_BYTES

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(axis.taps for axis in self.axes[1:])

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*(axis.size for axis in self.axes), self.channels)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Of each multiple."""
        return (*(axis.outputs for axis in self.axes), self.channels)

    @property
    def lanes(self) -> int:
        return min(self.channels, LANES)

    @property
    def grid(self) -> tuple[int, ...]:
        """Channels first, whose kernel is then read once; multiples last, so that x is."""
        return (pl.cdiv(self.channels, self.lanes), *(axis.tiles for axis in self.axes), self.multiplier)

    @property
    def front(self) -> int:
        """Columns of the scratch before the first that is read, so that every block begins within it."""
        columns = self.axes[-1]
        return max(0, -int(min(columns.offset(np.arange(columns.tiles), np))))

    def x_lines(self, at: Sequence[Any]) -> list[_Lines]:
        return [
            _Lines(axis.size, axis.spread, axis.first(i), axis.start(i), axis.tiles == 1)
            for axis, i in zip(self.axes, at)
        ]

    def dy_lines(self, at: Sequence[Any]) -> list[_Lines]:
        return [
            _Lines(axis.outputs, 1, axis.tile * i, axis.tile * i, axis.tiles == 1) for axis, i in zip(self.axes, at)
        ]

    @property
    def unrolled(self) -> bool:
        return self._products <= MOST_UNROLLED

    @property
    def _products(self) -> int:
        *_, rows, columns = self.axes
        return rows.taps * columns.taps

    @property
    def wide(self) -> int:
        """Columns of a sum."""
        return min(_whole(self.axes[-1].tile, SUBLANES), SUBLANES * MOST_WIDE)

    @property
    def high(self) -> int:
        """Rows of outputs that a program sums at once: as many as the registers hold and as may be spelled out."""
        *_, rows, columns = self.axes
        most = MOST_SUMS * SUBLANES // self.wide
        if self.unrolled:
            most = min(most, MOST_UNROLLED // (self._products * pl.cdiv(columns.tile, self.wide)))
        return pl.cdiv(rows.tile, pl.cdiv(rows.tile, max(1, most)))

    @property
    def held(self) -> tuple[int, ...]:
        """The shape of what a program spreads x out in."""
        *outer, columns = self.axes
        last = int(max(columns.offset(np.arange(columns.tiles), np))) + (columns.block - 1) * columns.spread
        read = columns.positions + (_whole(columns.tile, SUBLANES) - columns.tile) * columns.stride
        width = self.front + max(read, last + 1)
        return (*(axis.positions for axis in outer), _whole(width, SUBLANES), self.lanes)

    @property
    def held_dy(self) -> tuple[int, ...]:
        *outer, columns = self.axes
        return (*(axis.tile for axis in outer), _whole(columns.tile, SUBLANES), self.lanes)

    @property
    def x_spec(self) -> pl.BlockSpec:
        def index(c: Any, *rest: Any) -> tuple[Any, ...]:
            return (*(axis.start(i) for axis, i in zip(self.axes, rest)), c * self.lanes)

        return pl.BlockSpec((*(pl.Element(axis.block) for axis in self.axes), pl.Element(self.lanes)), index)

    @property
    def y_spec(self) -> pl.BlockSpec:
        block = (None, *(axis.tile for axis in self.axes), self.lanes)
        return pl.BlockSpec(block, lambda c, *rest: (rest[-1], *rest[:-1], c))

    def kernel_spec(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, self.lanes), lambda c, *rest: (rest[-1], 0, c))

    def by_multiple(self, kernel: jax.Array) -> jax.Array:
        """`(M, taps, C)` of a kernel, `(M, 1, C)` of a bias."""
        return jnp.moveaxis(kernel.reshape(-1, self.channels, self.multiplier), -1, 0)

    def cost(self, x: np.dtype, y: np.dtype) -> pl.CostEstimate:
        """What the grid computes, reads and writes, in whole tiles: a block that follows itself is read once."""
        programs, lanes = math.prod(self.grid), _whole(self.lanes, LANES)
        outputs = math.prod(axis.tile for axis in self.axes)
        x_bytes = _bytes([axis.block for axis in self.axes], x.itemsize) * programs // self.multiplier
        y_bytes = _bytes([axis.tile for axis in self.axes], y.itemsize) * programs
        kernel_bytes = _bytes([self.taps]) * self.grid[0] * self.multiplier
        return pl.CostEstimate(
            flops=2 * programs * outputs * lanes * self.taps,
            transcendentals=0,
            bytes_accessed=x_bytes + y_bytes + kernel_bytes,
        )


def _bytes(shape: Sequence[int], itemsize: int = 4) -> int:
    """Of a block of that shape before the lanes, in whole tiles."""
    return math.prod(shape[:-1]) * _whole(shape[-1], SUBLANES * 4 // itemsize) * LANES * itemsize


def _whole(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def _conv_program(x: Any, kernel: Any, *others: Any, volume: _Volume, compute: np.dtype) -> None:
    *bias, y, held = others
    at = [pl.program_id(number) for number in range(1, 5)]
    pl.when(pl.program_id(5) == 0)(lambda: _spread_out(x, held, volume.x_lines(at), volume.front))

    images, planes, rows, columns = volume.axes
    start = bias[0][...] if bias else jnp.zeros((1, volume.lanes), compute)
    summed = _unrolled if volume.unrolled else _looped
    wide, high = volume.wide, volume.high
    groups = (images.tile, planes.tile, pl.cdiv(rows.tile, high))

    def sum_rows(index: Any, _: None) -> None:
        image, plane, group = _unravel(index, groups)
        top = jnp.minimum(group * high, rows.tile - high)  # the last rows may be computed twice
        for left in range(0, columns.tile, wide):
            sums = tuple(jnp.broadcast_to(start, (wide, volume.lanes)) for _ in range(high))
            sums = summed(held, kernel, sums, (image, plane, top, left), volume)
            width = min(wide, columns.tile - left)
            for row, total in enumerate(sums):
                y[image, plane, top + row, pl.ds(left, width)] = total[:width].astype(y.dtype)

    lax.fori_loop(0, math.prod(groups), sum_rows, None)


_Sums = tuple[jax.Array, ...]


def _unrolled(held: Any, kernel: Any, sums: _Sums, place: tuple[Any, ...], volume: _Volume) -> _Sums:
    """Each row and column of x that the sums need, loaded once and added to every sum it is in."""
    _, planes, rows, columns = volume.axes
    image, plane, top, left = place

    def add(k: Any, sums: _Sums) -> _Sums:
        found = list(sums)
        depth = plane * planes.stride + k * planes.dilation
        for row in range((len(sums) - 1) * rows.stride + (rows.taps - 1) * rows.dilation + 1):
            uses = [
                (o, i) for o in range(len(sums)) for i in range(rows.taps) if o * rows.stride + i * rows.dilation == row
            ]
            for j in range(columns.taps) if uses else ():  # taps in raster order, for each sum
                value = _read(held, (image, depth, top * rows.stride + row), left, j, volume.wide, volume)
                for o, i in uses:
                    found[o] = found[o] + value * kernel[pl.ds(_ravel((k, i, j), volume.kernel_size), 1)]
        return tuple(found)

    return add(0, sums) if planes.taps == 1 else lax.fori_loop(0, planes.taps, add, sums)


def _looped(held: Any, kernel: Any, sums: _Sums, place: tuple[Any, ...], volume: _Volume) -> _Sums:
    """One tap after the other, for kernels with many."""
    _, planes, rows, _ = volume.axes
    image, plane, top, left = place

    def add(tap: Any, sums: _Sums) -> _Sums:
        k, i, j = _unravel(tap, volume.kernel_size)
        weight, depth = kernel[pl.ds(tap, 1)], plane * planes.stride + k * planes.dilation
        found = []
        for row, total in enumerate(sums):
            line = (image, depth, (top + row) * rows.stride + i * rows.dilation)
            found.append(total + _read(held, line, left, j, volume.wide, volume) * weight)
        return tuple(found)

    return lax.fori_loop(0, volume.taps, add, sums)


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
    pl.when(multiple == 0)(lambda: _spread_out(x, held, volume.x_lines(at), volume.front))
    _spread_out(dy, held_dy, volume.dy_lines(at), 0)
    _, planes, rows, _ = volume.axes
    steps = (*held_dy.shape[:3], held_dy.shape[3] // SUBLANES)
    first = functools.reduce(jnp.logical_and, [i == 0 for i in at])

    def sum_taps(group: Any, _: None) -> None:
        numbers = [jnp.minimum(group * together + n, volume.taps - 1) for n in range(together)]
        taps = [_unravel(number, volume.kernel_size) for number in numbers]

        def add(step: Any, sums: _Sums) -> _Sums:
            image, plane, row, strip = _unravel(step, steps)
            left = pl.multiple_of(strip * SUBLANES, SUBLANES)
            given = held_dy[image, plane, row, pl.ds(left, SUBLANES)]
            found = []
            for (k, i, j), already in zip(taps, sums):
                depth, line = plane * planes.stride + k * planes.dilation, row * rows.stride + i * rows.dilation
                found.append(already + _read(held, (image, depth, line), left, j, SUBLANES, volume) * given)
            return tuple(found)

        nothing = jnp.zeros((SUBLANES, volume.lanes), compute)
        sums = lax.fori_loop(0, math.prod(steps), add, (nothing,) * together)
        for number, found in enumerate(sums):
            at_tap = (multiple, group * together + number)
            total[at_tap] = jnp.where(first, found, total[at_tap] + found)

    groups = total.shape[1] // together
    lax.fori_loop(0, groups, sum_taps, None)

    @pl.when(functools.reduce(jnp.logical_and, [i == axis.tiles - 1 for i, axis in zip(at, volume.axes)]))
    def _() -> None:
        gradient[...] = total[multiple].sum(axis=1)


class _Lines(NamedTuple):
    """Along one axis: `size` inputs, `spread` positions apart; the first position and the first input of a block."""

    size: int
    spread: int
    position: Any
    start: Any
    whole: bool


def _spread_out(block: Any, held: Any, axes: Sequence[_Lines], front: int) -> None:
    """Writes a block into the scratch, each input where the taps expect it, and 0 where there is none."""
    *outer, columns = axes
    offset = front + columns.start * columns.spread - columns.position

    def write(index: Any, _: None) -> None:
        line = _unravel(index, held.shape[:3])
        source, exists = [], jnp.bool_(True)
        for place, axis in zip(line, outer):
            position = axis.position + place
            read = position if axis.spread == 1 else position // axis.spread
            exists &= (read >= 0) & (read < axis.size) & (read * axis.spread == position)
            source.append(read - axis.start)
        held[line] = jnp.zeros(held.shape[3:], held.dtype)

        @pl.when(exists)
        def _() -> None:
            value = block[tuple(source)].astype(held.dtype)
            if not columns.whole:
                inside = columns.start + lax.broadcasted_iota(jnp.int32, value.shape, 0) < columns.size
                value = jnp.where(inside, value, 0)
            held[(*line, pl.ds(offset, value.shape[0], stride=columns.spread))] = value

    lax.fori_loop(0, math.prod(held.shape[:3]), write, None)


def _read(held: Any, line: tuple[Any, ...], left: Any, tap: Any, outputs: int, volume: _Volume) -> jax.Array:
    """What a tap of the columns reads in a line, for some outputs from `left` on."""
    columns = volume.axes[-1]
    first = volume.front + left * columns.stride + tap * columns.dilation
    return held[(*line, pl.ds(first, outputs, stride=columns.stride))]


def _ravel(index: Sequence[Any], sizes: Sequence[int]) -> Any:
    return functools.reduce(lambda outer, pair: outer * pair[1] + pair[0], zip(index[1:], sizes[1:]), index[0])


def _unravel(index: Any, sizes: Sequence[int]) -> tuple[Any, ...]:
    """The index along each axis, the last running fastest."""
    found = []
    for size in reversed(sizes[1:]):
        found.append(lax.rem(index, jnp.int32(size)))
        index = lax.div(index, jnp.int32(size))
    return (index, *reversed(found))
