"""The sum over the taps on XLA:CPU: one fused loop over the output, no copy of the input, padded or otherwise.

The output is cut into boxes. In the middle one every tap reads a strided slice of x. Around it some taps read padding:
there a tap's inputs are gathered by a table of positions, and are zero where there is none. The boxes
are concatenated, and XLA:CPU fuses all of it, with what follows it, into one loop per box, vectorised over channels.

Two things break that, both seen with jaxlib 0.10.2. A value that several boxes or taps read at different positions
becomes a function of its own, whose loads LLVM can no longer prove apart from the stores, and the loop is not
vectorised: so every tap gathers from x itself, and each box starts from a zero of its own. And a value computed from x
that fewer than 16 places read is computed anew in each.

What would break the chain of FMAs, which LLVM makes only of a product and a sum that stand side by side, the product
for this sum alone, is kept out. What computes an operand is not fused with the sum: `materialized`. A constant kernel
lets XLA see through the zero that a sum starts from, and of a constant x XLA computes masked gathers itself, wrongly at
that (positions and images change places): so operands are behind a barrier when XLA simplifies. Two outputs that read
the same input under the same tap, as in a small reflected image, share its product: so periodic or reflected input is
copied. Where one loop holds several boxes, as when what follows moves axes, boxes that read the same share products,
and LLVM takes the last sums of two boxes to where they meet, away from the products; where channels are reordered it
moves shuffles past products: so every box has values of its own, and ends in an instruction that its neighbours do not.
With few channels nothing is fused with the sum at all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxdw.geometry import Geometry
from jaxdw.sums.narrow import stored, widened
from jaxdw.sums.order import Order, Term, accumulate, joined, whole_numbers, zero_of_its_own
from jaxdw.sums.padded import of_padded, pad_undilated, sum_of_padded
from jaxdw.windows import pad

#: With fewer channels LLVM may vectorise over positions instead, and then shuffles between a product and its sum keep
#: the two from becoming one FMA.
LEAST_CHANNELS = 9

#: With more taps the registers do not hold the positions of the gathers, and compiling five boxes takes seconds.
MOST_TAPS = 49

#: For one axis, the input position under (output position, tap), -1 where there is none.
Table = np.ndarray


def sum_in_boxes(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, geometry: Geometry, order: Order, compute: np.dtype
) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` in dtype `compute`, which x, kernel and bias are converted to tap by tap."""
    x, kernel, *biases = materialized(stored(x), kernel, *(() if bias is None else (bias,)))
    bias = biases[0] if biases else None
    if geometry.padding_mode != "zeros":
        x, geometry = lax.optimization_barrier(pad(x, geometry)), of_padded(geometry)
    if geometry.channels < LEAST_CHANNELS or math.prod(geometry.spatial) >= 2**31:  # positions are 32-bit numbers
        return _alone(
            functools.partial(sum_of_padded, geometry=geometry, order=order, compute=compute), x, kernel, bias
        )
    if geometry.taps > MOST_TAPS or x.dtype == np.uint16:  # the bits of bfloat16 are a copy anyway, so copy once
        x, geometry = pad_undilated(x, geometry)
    flat = x.reshape(math.prod(geometry.batch), *geometry.spatial, geometry.channels)
    weights = kernel.astype(compute).reshape(geometry.taps, geometry.channels, geometry.multiplier)
    starts = None if bias is None else bias.astype(compute).reshape(geometry.channels, geometry.multiplier)
    return interleaved(
        [Boxes(flat, weights, starts, m, geometry, order).assemble(()) for m in range(geometry.multiplier)], geometry
    )


def materialized(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands as arrays in memory that XLA:CPU computes once, at no cost where it has them in memory anyway.

    XLA fuses what computes an operand with each loop that reads it, and LLVM may contract it there otherwise than where
    the program uses it next. It fuses nothing across a call that it does not inline. The call is an identity that
    copies nothing: its results are the buffers of its operands. The barrier in it keeps JAX from dropping it.
    """
    return _alone(lambda *values: lax.optimization_barrier(values), *lax.optimization_barrier(operands))


def interleaved(outputs: list[jax.Array], geometry: Geometry) -> jax.Array:
    """y `(*batch, *output_spatial, C*M)` of M arrays `(images, *output_spatial, C)`."""
    if geometry.multiplier == 1:
        return outputs[0].reshape(geometry.output_shape)
    # a barrier: XLA would put the stacking inside of each box, and LLVM would vectorise none
    return jnp.stack(lax.optimization_barrier(outputs), axis=-1).reshape(geometry.output_shape)


def _alone(compute: Callable[..., Any], *operands: jax.Array | None) -> Any:
    """compute(*operands) as a call that XLA does not inline, so that nothing before or after it joins its loops."""
    with set_xla_metadata(inlineable="false"):
        return jax.jit(compute)(*operands)


class Boxes:
    """Output m of each channel, of x `(images, *spatial, C)`, weights `(taps, C, M)` and biases `(C, M)`."""

    def __init__(
        self, x: jax.Array, weights: jax.Array, biases: jax.Array | None, m: int, geometry: Geometry, order: Order
    ):
        self.x, self.weights, self.geometry, self.order = x, weights[..., m], geometry, order
        self.bias = None if biases is None else biases[:, m]
        self.positions = x.reshape(x.shape[0], math.prod(geometry.spatial), geometry.channels)
        self.number = m

    def assemble(self, chosen: tuple[Table, ...]) -> jax.Array:
        """The output over the given positions of the first axes and all positions of the others."""
        axis = len(chosen)
        geometry = self.geometry
        if axis == geometry.rank:
            return self.box(chosen)
        table, rest = geometry.sources[axis], geometry.sources[axis + 1 :]
        spread, stride = geometry.input_dilation[axis], geometry.strides[axis]
        phases = spread // math.gcd(spread, stride)  # outputs this far apart have the same taps on zeros of dilation
        longest = -(-len(table) // phases)
        parts = []
        for phase in range(min(phases, len(table))):
            positions = np.arange(phase, len(table), phases)
            own = table[positions]
            first, end = _regular(own, geometry, axis, positions)
            pieces = [
                *(self.box((*chosen, part, *rest)) for part in self.alike(own[:first], axis)),
                *([self.assemble((*chosen, own[first:end]))] if end > first else []),
                *(self.box((*chosen, part, *rest)) for part in self.alike(own[end:], axis)),
            ]
            if len(own) < longest:
                pieces.append(self.box((*chosen, np.full((1, own.shape[1]), -1), *rest)))
            parts.append(pieces[0] if len(pieces) == 1 else lax.concatenate(pieces, axis + 1))
        if len(parts) == 1:
            return parts[0]
        woven = jnp.stack(parts, axis + 2)
        woven = woven.reshape(*woven.shape[: axis + 1], -1, *woven.shape[axis + 3 :])
        return lax.slice_in_dim(woven, 0, len(table), axis=axis + 1)

    def alike(self, table: Table, axis: int) -> list[Table]:
        """A strip, cut where other taps read something: a tap that reads nothing in all of a box costs nothing. Not
        along the last axis, where there would be many small boxes."""
        if axis == self.geometry.rank - 1 or len(table) == 0:
            return [table] if len(table) else []
        reads = table >= 0
        cuts = np.flatnonzero((reads[1:] != reads[:-1]).any(axis=1)) + 1
        return np.split(table, cuts)

    def box(self, tables: tuple[Table, ...]) -> jax.Array:
        self.number += 1  # unlike those of the boxes next to this one, of this output and the next
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
            steps = [step(column) for column in columns]
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


def _masked(value: jax.Array, exists: np.ndarray) -> jax.Array:
    """value, or +0 where it does not exist, by its bits: LLVM splits loops on a select, and where a product and the sum
    it belongs to come to lie in different blocks, they are no longer contracted to one FMA."""
    bits = whole_numbers(value.dtype)
    mask = jnp.asarray(np.where(exists, -1, 0).astype(bits))
    kept = lax.bitcast_convert_type(value, bits) & jnp.broadcast_to(mask, value.shape)
    return lax.bitcast_convert_type(kept, value.dtype)


def _regular(table: Table, geometry: Geometry, axis: int, positions: np.ndarray) -> tuple[int, int]:
    """The longest run of output positions at which every tap that reads anything reads where no padding interferes."""
    live = (table >= 0).any(axis=0)
    taps = np.arange(geometry.kernel_size[axis]) * geometry.kernel_dilation[axis]
    expected = positions[:, None] * geometry.strides[axis] + taps - geometry.padding[axis][0]
    same = (table * geometry.input_dilation[axis] == expected) & (table >= 0)
    regular = live.any() & same[:, live].all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], regular, [False]]).astype(np.int8))).tolist()
    runs = list(zip(edges[::2], edges[1::2]))
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def step(column: np.ndarray) -> int:
    """The distance between neighbours where it is one positive number and all exist, else 0."""
    if column.min() < 0:
        return 0
    distances = np.diff(column)
    if len(distances) == 0:
        return 1
    return int(distances[0]) if distances[0] > 0 and (distances == distances[0]).all() else 0
