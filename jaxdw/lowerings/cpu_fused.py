"""The sum over the taps on XLA:CPU: one fused loop over the output, and of small kernels no copy of the input.

The output is cut into regions. In the inner region every tap reads a strided slice of x. In the border regions some
taps read padding: there a tap's inputs are gathered by a table of positions, and are zero where the table has none. The
regions are concatenated. XLA:CPU fuses all of it, and what follows it, into one loop per region, vectorised over
channels.

Two things break the fusion, both seen with jaxlib 0.10.2:

1. XLA makes a function of its own of a value that several regions or taps read at different positions. LLVM cannot
   prove that the loads there do not alias the stores, and does not vectorise the loop. Therefore every tap gathers
   from x itself, and each region starts from a zero of its own.
2. A value computed from x that fewer than 16 places read is computed anew in each of them.

LLVM fuses a product and an add only if they are adjacent and the product has one use. Therefore:

3. What computes an operand is not fused with the sum: `materialized`.
4. Operands are behind a barrier while XLA simplifies. Through a constant kernel XLA sees the zero that a sum starts
   from. Of a constant x it computes masked gathers itself, and wrongly: positions and images change places.
5. Periodic or reflected input is copied. Otherwise two outputs that read the same input under the same tap, as in a
   small reflected image, have one product in common.
6. Every region has values of its own, and ends in an instruction that its neighbours do not have. One loop can hold
   several regions, as when the next operation moves axes: then regions with the same reads have products in common,
   and LLVM moves the last adds of two regions to where they meet, away from the products. Where channels are reordered,
   it moves shuffles past products.
7. With few channels nothing is fused with the sum at all.

Each region is compiled with all of its taps. So that compiling does not take seconds, larger kernels read a padded
copy, in fewer regions, and in the regions of the largest a loop goes over the taps (`jaxdw.lowerings.cpu_loops`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxdw.geometry import Geometry
from jaxdw.lowerings import generic
from jaxdw.lowerings.bfloat16_bits import stored, widened
from jaxdw.lowerings.cpu_loops import AffineIndex, chain_in_loop
from jaxdw.lowerings.ordered_sum import Order, Term, accumulate, integers_like, joined, zero_of_its_own
from jaxdw.padding import pad, pad_undilated, padded_geometry, undilated_geometry

#: With fewer channels LLVM may vectorise over positions instead, and then shuffles between a product and its sum keep
#: the two from becoming one FMA.
LEAST_CHANNELS = 9

#: With more taps the registers do not hold the positions of the gathers, and compiling nine regions takes seconds.
MOST_TAPS = 25

#: With more taps a copy that is padded along all axes but the first costs less than compiling the regions at its ends.
MOST_GATHERED_TAPS = 15

#: With more taps the regions are loops over them.
MOST_UNROLLED_TAPS = 64

#: Fraction of the products that three regions in place of one must save.
LEAST_SAVED = 1 / 16

#: For one axis, the input position under (output position, tap), -1 where there is none.
Table = np.ndarray


def conv(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` in dtype `compute`, to which operands are converted tap by tap."""
    x, kernel, *biases = materialized(stored(x), kernel, *(() if bias is None else (bias,)))
    bias = biases[0] if biases else None
    if geometry.padding_mode != "zeros":
        x, geometry = lax.optimization_barrier(pad(x, geometry)), padded_geometry(geometry)
    if geometry.taps > MOST_UNROLLED_TAPS and not geometry.has_symbolic_axes:
        return _in_loops(x, kernel, bias, geometry, order, compute)
    # positions are known, and are 32-bit numbers
    if geometry.channels < LEAST_CHANNELS or geometry.has_symbolic_axes or math.prod(geometry.spatial) >= 2**31:
        return _not_inlined(
            functools.partial(generic.conv, geometry=geometry, order=order, compute=compute), x, kernel, bias
        )
    bands = None
    if geometry.taps > MOST_TAPS or x.dtype == np.uint16:  # the bits of bfloat16 are a copy, so copy once
        bands = _bands(geometry)
        x, geometry = pad_undilated(x, geometry)
    elif geometry.taps > MOST_GATHERED_TAPS and geometry.rank > 1:  # regions that differ along the first axis alone
        x, geometry = pad_undilated(x, geometry, from_axis=1)
    flat = x.reshape(math.prod(geometry.batch), *geometry.spatial, geometry.channels)
    weights = kernel.astype(compute).reshape(geometry.taps, geometry.channels, geometry.multiplier)
    starts = None if bias is None else bias.astype(compute).reshape(geometry.channels, geometry.multiplier)
    return interleaved(
        [Regions(flat, weights, starts, m, geometry, order).assemble((), bands) for m in range(geometry.multiplier)],
        geometry,
    )


def _bands(geometry: Geometry) -> list[Table] | None:
    """Return the table of the first axis on padded input in three parts, or None where few products would be saved.

    A part leaves out the taps that read only padding in all of it.
    """
    if geometry.rank == 1 or max(geometry.input_dilation) > 1:
        return None
    reads, padded = geometry.sources[0] >= 0, undilated_geometry(geometry).sources[0]
    height = len(reads)

    def saved(rows: np.ndarray) -> int:
        return len(rows) * int((~rows.any(axis=0)).sum())

    top = max(range(1, height // 2 + 1), key=lambda rows: saved(reads[:rows]), default=0)
    bottom = max(range(1, height // 2 + 1), key=lambda rows: saved(reads[height - rows :]), default=0)
    parts = [(a, b) for a, b in ((0, top), (top, height - bottom), (height - bottom, height)) if b > a]
    if sum(saved(reads[a:b]) for a, b in parts) < LEAST_SAVED * reads.size:
        return None
    return [np.where(reads[a:b].any(axis=0), padded[a:b], -1) for a, b in parts]


def _in_loops(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """Compute `conv` with a copy of x for each output of a channel."""
    x, geometry = pad_undilated(x, geometry)
    flat = x.reshape(math.prod(geometry.batch), *geometry.spatial, geometry.channels)
    flat = flat if geometry.multiplier == 1 else jnp.repeat(flat, geometry.multiplier, axis=-1)
    wide = dataclasses.replace(geometry, channels=geometry.features, multiplier=1)
    weights = kernel.astype(compute).reshape(geometry.taps, geometry.features, 1)
    biases = None if bias is None else bias.astype(compute).reshape(geometry.features, 1)
    regions = _LoopedRegions(flat, weights, biases, 0, wide, order)
    if max(geometry.input_dilation) > 1:
        return regions.assemble(()).reshape(geometry.output_shape)
    indices = [AffineIndex(-low, *steps) for (low, _), *steps in zip(wide.padding, wide.kernel_dilation, wide.strides)]
    taps = [slice(None)] * wide.rank
    return regions.looped(wide.output_spatial, indices, taps).reshape(geometry.output_shape)


def materialized(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Return the operands as arrays in memory that XLA:CPU computes once. Those already in memory cost nothing.

    XLA fuses what computes an operand with each loop that reads it, and LLVM may contract it there in another way than
    where the program uses it next. XLA fuses nothing across a call that it does not inline. This call is an identity
    that copies nothing: its results are the buffers of its operands. The barrier in it keeps JAX from dropping it.
    """
    return _not_inlined(lambda *values: lax.optimization_barrier(values), *lax.optimization_barrier(operands))


def in_memory(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """Return the operands `materialized` in a program for a CPU, and as they are in others."""
    return lax.platform_dependent(*operands, cpu=materialized, default=lambda *operands: operands)


def interleaved(outputs: list[jax.Array], geometry: Geometry) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)` of M arrays `(images, *output_spatial, C)`."""
    if geometry.multiplier == 1:
        return outputs[0].reshape(geometry.output_shape)
    # a barrier: XLA would put the stacking inside of each region, and LLVM would vectorise none
    return jnp.stack(lax.optimization_barrier(outputs), axis=-1).reshape(geometry.output_shape)


def _not_inlined(compute: Callable[..., Any], *operands: jax.Array | None) -> Any:
    """Compute in a call that XLA does not inline, so that nothing before or after it joins its loops."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(compute)(*operands)


class Regions:
    """Output m of each channel, in regions: of x `(images, *spatial, C)`, weights `(taps, C, M)`, biases `(C, M)`."""

    def __init__(
        self, x: jax.Array, weights: jax.Array, biases: jax.Array | None, m: int, geometry: Geometry, order: Order
    ):
        self.x, self.weights, self.geometry, self.order = x, weights[..., m], geometry, order
        self.bias = None if biases is None else biases[:, m]
        self.positions = x.reshape(x.shape[0], math.prod(geometry.spatial), geometry.channels)
        self.number = m

    def assemble(self, chosen: tuple[Table, ...], bands: list[Table] | None = None) -> jax.Array:
        """Return the output over the chosen positions of the first axes and all positions of the others.

        With `bands` there is one region for each of these parts of the first axis's table.
        """
        axis = len(chosen)
        geometry = self.geometry
        if bands:
            return lax.concatenate([self.region((band, *geometry.sources[1:])) for band in bands], 1)
        if axis == geometry.rank:
            return self.region(chosen)
        table, rest = geometry.sources[axis], geometry.sources[axis + 1 :]
        dilation, stride = geometry.input_dilation[axis], geometry.strides[axis]
        phases = dilation // math.gcd(dilation, stride)  # outputs at this distance have the same taps on its zeros
        longest = -(-len(table) // phases)
        parts = []
        for phase in range(min(phases, len(table))):
            positions = np.arange(phase, len(table), phases)
            own = table[positions]
            first, end = _regular(own, geometry, axis, positions)
            pieces = [
                *(self.region((*chosen, part, *rest)) for part in self.split_by_taps(own[:first], axis)),
                *([self.assemble((*chosen, own[first:end]))] if end > first else []),
                *(self.region((*chosen, part, *rest)) for part in self.split_by_taps(own[end:], axis)),
            ]
            if len(own) < longest:
                pieces.append(self.region((*chosen, np.full((1, own.shape[1]), -1), *rest)))
            parts.append(pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, axis + 1))
        if len(parts) == 1:
            return parts[0]
        woven = jnp.stack(parts, axis + 2)
        woven = woven.reshape(*woven.shape[: axis + 1], -1, *woven.shape[axis + 3 :])
        return lax.slice_in_dim(woven, 0, len(table), axis=axis + 1)

    def split_by_taps(self, table: Table, axis: int) -> list[Table]:
        """Return a border in parts in each of which the same taps read something: the others cost nothing there.

        The last axis is not cut: it would have many small regions.
        """
        if axis == self.geometry.rank - 1 or len(table) == 0:
            return [table] if len(table) else []
        reads = table >= 0
        cuts = np.flatnonzero((reads[1:] != reads[:-1]).any(axis=1)) + 1
        return np.split(table, cuts)

    def region(self, tables: tuple[Table, ...]) -> jax.Array:
        self.number += 1  # unlike those of the neighbouring regions, of this output and the next
        shape = (self.x.shape[0], *map(len, tables), self.geometry.channels)
        zero = zero_of_its_own(self.number, self.weights.dtype)
        total = accumulate(self.terms(tables), zero, self.bias, shape, self.order, zero)
        return joined(total, zero, by=self.number)

    def terms(self, tables: tuple[Table, ...]) -> Iterator[Term]:
        geometry = self.geometry
        for index, tap in enumerate(itertools.product(*map(range, geometry.kernel_size))):
            columns = [table[:, t] for table, t in zip(tables, tap)]
            if any((column < 0).all() for column in columns):
                continue
            steps = [constant_step(column) for column in columns]
            value = self.sliced(columns, steps) if all(steps) else self.gathered(columns)
            weight = lax.index_in_dim(self.weights, index, keepdims=False)
            yield Term(widened(value, weight.dtype), weight, index // geometry.kernel_size[-1])

    def sliced(self, columns: list[np.ndarray], steps: list[int]) -> jax.Array:
        starts = [int(column[0]) for column in columns]
        limits = [int(column[-1]) + 1 for column in columns]
        return lax.slice(self.x, (0, *starts, 0), (self.x.shape[0], *limits, self.x.shape[-1]), (1, *steps, 1))

    def gathered(self, columns: list[np.ndarray]) -> jax.Array:
        exists, index = np.ones((), bool), np.zeros((), np.int64)
        for column, size in zip(columns, self.geometry.spatial):
            exists = np.logical_and.outer(exists, column >= 0)
            index = np.add.outer(index * size, column)
        index = np.where(exists, index, 0).astype(np.int32)
        rank = index.ndim
        numbers = lax.GatherDimensionNumbers(offset_dims=(0, rank + 1), collapsed_slice_dims=(1,), start_index_map=(1,))
        value = lax.gather(
            self.positions,
            jnp.asarray(index)[..., None],
            numbers,
            (self.positions.shape[0], 1, self.positions.shape[2]),
            mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
        )
        return value if exists.all() else _masked(value, exists[None, ..., None])


class _LoopedRegions(Regions):
    """Regions in each of which a loop goes over the taps."""

    def region(self, tables: tuple[Table, ...]) -> jax.Array:
        reading = [np.flatnonzero((table >= 0).any(axis=0)) for table in tables]
        found = [_affine_index(table[:, taps]) for table, taps in zip(tables, reading)]
        indices = [index for index in found if index is not None]
        if len(indices) < len(tables):
            return super().region(tables)
        # where positions go by equal steps, taps do
        parts = [slice(taps[0], taps[-1] + 1, taps[1] - taps[0] if len(taps) > 1 else 1) for taps in reading]
        return self.looped([len(table) for table in tables], indices, parts)

    def looped(self, outputs: Sequence[int], indices: Sequence[AffineIndex], taps: Sequence[slice]) -> jax.Array:
        weights = self.weights.reshape(*self.geometry.kernel_size, -1)[*taps]
        start = zero_of_its_own(0, weights.dtype) if self.bias is None else self.bias
        shape = (self.x.shape[0], *outputs, self.geometry.channels)
        return chain_in_loop(self.x, weights, jnp.broadcast_to(start, shape), indices, self.order)


def _affine_index(table: Table) -> AffineIndex | None:
    """Return the index of an axis where all taps read, and where taps and outputs go by equal steps; else None."""
    if table.size == 0 or table.min() < 0:
        return None
    first = int(table[0, 0])
    index = AffineIndex(first, *(int(line[1]) - first if len(line) > 1 else 1 for line in (table[0], table[:, 0])))
    outputs, taps = np.indices(table.shape)
    regular = (table == first + taps * index.step + outputs * index.stride).all()
    return index if regular and min(index.step, index.stride) > 0 else None


def _masked(value: jax.Array, exists: np.ndarray) -> jax.Array:
    """Return value, or +0 where it does not exist, by its bits.

    LLVM splits loops on a select. A product and its sum in different blocks are no longer contracted to one FMA.
    """
    bits = integers_like(value.dtype)
    mask = jnp.asarray(np.where(exists, -1, 0).astype(bits))
    kept = lax.bitcast_convert_type(value, bits) & jnp.broadcast_to(mask, value.shape)
    return lax.bitcast_convert_type(kept, value.dtype)


def _regular(table: Table, geometry: Geometry, axis: int, positions: np.ndarray) -> tuple[int, int]:
    """Return the longest run of output positions, first and end, where no tap that reads anything reads padding."""
    live = (table >= 0).any(axis=0)
    taps = np.arange(geometry.kernel_size[axis]) * geometry.kernel_dilation[axis]
    expected = positions[:, None] * geometry.strides[axis] + taps - geometry.padding[axis][0]
    same = (table * geometry.input_dilation[axis] == expected) & (table >= 0)
    regular = live.any() & same[:, live].all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], regular, [False]]).astype(np.int8))).tolist()
    runs = list(zip(edges[::2], edges[1::2]))
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def constant_step(column: np.ndarray) -> int:
    """Return the distance between neighbours if it is one positive number and all exist, else 0."""
    if column.min() < 0:
        return 0
    distances = np.diff(column)
    if len(distances) == 0:
        return 1
    return int(distances[0]) if distances[0] > 0 and (distances == distances[0]).all() else 0
