"""A depthwise convolution with a function of the windows before the product with the kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxdw import _arrays
from jaxdw._compat import varying_axes
from jaxdw.call import Call
from jaxdw.geometry import Geometry, Padding
from jaxdw.lowerings.cpu_fused import LEAST_CHANNELS, Regions, constant_step, interleaved
from jaxdw.lowerings.ordered_sum import Term, accumulate, zero_like, zero_of_its_own
from jaxdw.padding import pad, tap_slices
from jaxdw.windows import window_tracing
from jaxdw.windows.contraction import weighted_sum
from jaxdw.windows.extraction import windows_of
from jaxdw.windows.window_tracing import Traced

#: Most operations, on all taps together, of a function that is computed tap by tap; the program has them all.
MOST_OPERATIONS = 1200

#: Most operations and taps of a function that is computed in regions of the output on CPU. A larger one reads a padded
#: copy of x: compiling all regions would take seconds.
MOST_OPERATIONS_IN_REGIONS, MOST_TAPS_IN_REGIONS = 100, 25


def windowed_conv(
    fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = 1,
    input_dilation: int | Sequence[int] | None = 1,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Compute `contract(fn(unfold(x, ...)), kernel, bias)`, under `jax.jit` without windows in memory if fn allows.

    fn allows it if it treats every output position and channel in the same way and on its own: elementwise functions,
    sums, means, products and extremes over the taps, and slicing, reordering or broadcasting taps, with arrays of its
    own that do not vary over the output. It is then computed tap by tap, in one loop with the convolution. With a
    simple fn that takes as long as the convolution.

    fn gets all windows at once in these cases: (a) it is another function, such as a sort or a sum over channels;
    (b) outside of `jax.jit`; (c) in a derivative; (d) arrays are sharded over devices.

    The sum is in the order of `contract`. On CPU every bit is that of `contract(fn(unfold(x, ...)), kernel, bias)` if
    fn rounds nothing: it compares, selects, negates and moves numbers, or all its results are exact. If fn rounds, a
    result may differ by roundings: sums over the taps are in raster order, XLA may round a product and a sum together,
    and it may omit intermediate roundings of float16 and bfloat16. Other backends are not tested for this.

    Args:
      fn: takes windows `(*batch, *output_spatial, *kernel_size, C)` and returns an array of that shape and dtype. As
        for `jax.jit` it must be pure: it is traced, and may be called twice. A method of a Flax Linen module with state
        is not pure; use `jaxdw.linen.DepthwiseConv(window_fn=...)`, which calls it once, on all windows.
      x, kernel, bias, strides, padding, kernel_dilation, input_dilation, preferred_element_type: as for
        `depthwise_conv`.

    Returns:
      `(*batch, *output_spatial, C*M)`.

    Raises:
      ValueError, TypeError: an argument, or a result of `fn`, that does not fit; the message names it.

    >>> x = jnp.array([3.0, -1.0, 2.0, 5.0])[:, None]
    >>> windowed_conv(lambda w: w - w.min(axis=-2, keepdims=True), x, jnp.ones((3, 1, 1)), padding="VALID")[:, 0]
    Array([7., 9.], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"`fn` is {fn!r}, expected a function of windows")
    call = Call.of(
        x,
        kernel,
        bias,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
        preferred_element_type=preferred_element_type,
    )
    return run(call, fn, "fn")


def run(call: Call, fn: Callable[[jax.Array], jax.Array], name: str) -> jax.Array:
    """Compute `windowed_conv` of a call whose x has the dtype that fn works in; errors call fn by `name`."""
    (x, kernel, bias), geometry, result = call.arrays, call.geometry, call.result
    traced = window_tracing.trace(fn, geometry, x.dtype) if _worth_tracing(geometry) else None
    if traced is None or traced.operations > MOST_OPERATIONS or _any_sharded(x, kernel, bias, *traced.closed_over):
        return weighted_sum(applied(name, fn, windows_of(x, geometry)), kernel, bias, result)

    @jax.custom_jvp
    def tap_by_tap(closed_over: tuple[Any, ...], x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        dtype = _arrays.accumulator(result)
        constants = traced.constants(closed_over)
        y = lax.platform_dependent(
            constants,
            x,
            kernel,
            cpu=functools.partial(_in_regions, traced, geometry, dtype),
            default=functools.partial(_from_padded, traced, geometry, dtype),
        )
        return (y if bias is None else y + jnp.broadcast_to(bias.astype(dtype), y.shape)).astype(result)

    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        """Differentiate through the windows: fn has its own derivative, which needs them."""
        values, structure = jax.tree.flatten(primals)
        directions = jax.tree.leaves(tangents)
        moving = [i for i, direction in enumerate(directions) if not isinstance(direction, SymbolicZero)]

        def along(*moved: jax.Array) -> jax.Array:
            full = list(values)
            for i, value in zip(moving, moved):
                full[i] = value
            closed_over, x, kernel, bias = jax.tree.unflatten(structure, full)
            return weighted_sum(traced.of_windows(closed_over, windows_of(x, geometry)), kernel, bias, result)

        return jax.jvp(along, [values[i] for i in moving], [directions[i] for i in moving])

    tap_by_tap.defjvp(derivative, symbolic_zeros=True)
    return tap_by_tap(traced.closed_over, x, kernel, bias)


def applied(name: str, fn: Callable[[jax.Array], jax.Array], windows: jax.Array) -> jax.Array:
    """Return fn(windows), checked to be windows again."""
    result = fn(windows)
    if not isinstance(result, jax.Array):
        raise TypeError(f"`{name}` returned a {type(result).__name__}, expected a JAX array")
    if (result.shape, result.dtype) != (windows.shape, windows.dtype):
        raise ValueError(
            f"`{name}` returned {result.dtype} of shape {result.shape}, "
            f"expected {windows.dtype} of shape {windows.shape}, as the windows it was given"
        )
    return result


def _worth_tracing(geometry: Geometry) -> bool:
    """Return True under `jax.jit`: operation by operation, taps would be slower than windows."""
    compiled = isinstance(jnp.add(1, 1), jax.core.Tracer) and not geometry.is_symbolic
    return compiled and not geometry.is_empty


def _any_sharded(*arrays: jax.Array | None) -> bool:
    """Return True if the type of one of them says that it is sharded."""
    present = [array for array in arrays if array is not None]
    return any(_arrays.is_sharded(array) or varying_axes(array) for array in present)


def _from_padded(
    traced: Traced, geometry: Geometry, dtype: np.dtype, constants: Sequence[Any], x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Return y `(*batch, *output_spatial, C*M)`; every tap is a slice of a padded copy of x."""
    weights = kernel.astype(dtype).reshape(geometry.taps, geometry.channels, geometry.multiplier)
    values = list(tap_slices(pad(x, geometry), geometry, geometry.output_spatial))
    shape = values[0].shape
    results = traced.of_taps(constants, window_tracing.grid(values, geometry.kernel_size))
    values = [jnp.broadcast_to(value.astype(dtype), shape) for value in results.flat]

    def output(weights: jax.Array) -> jax.Array:
        terms = (Term(value, weights[index], 0) for index, value in enumerate(values))
        return accumulate(terms, zero_like(weights[0]), None, shape, "raster", zero_of_its_own(0, dtype))

    outputs = [output(weights[..., m]) for m in range(geometry.multiplier)]
    return jnp.stack(outputs, axis=-1).reshape(geometry.output_shape)


def _in_regions(
    traced: Traced, geometry: Geometry, dtype: np.dtype, constants: Sequence[Any], x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Return the same on XLA:CPU, read from x itself; see `jaxdw.lowerings.cpu_fused`."""
    many = traced.operations > MOST_OPERATIONS_IN_REGIONS or geometry.taps > MOST_TAPS_IN_REGIONS
    if many or geometry.channels < LEAST_CHANNELS or math.prod(geometry.spatial) >= 2**31:
        return _from_padded(traced, geometry, dtype, constants, x, kernel)
    x, kernel = lax.optimization_barrier((x, kernel))
    flat = x.reshape(-1, *geometry.spatial, geometry.channels)
    weights = kernel.astype(dtype).reshape(geometry.taps, geometry.channels, geometry.multiplier)
    outputs = [
        _WindowedRegions(traced, constants, flat, weights, m, geometry).assemble(()) for m in range(geometry.multiplier)
    ]
    return interleaved(outputs, geometry)


class _WindowedRegions(Regions):
    def __init__(
        self, traced: Traced, constants: Sequence[Any], x: jax.Array, weights: jax.Array, m: int, geometry: Geometry
    ):
        super().__init__(x, weights, None, m, geometry, "raster")
        self.traced, self.constants = traced, constants

    def terms(self, tables: tuple[np.ndarray, ...]) -> Iterator[Term]:
        """Yield the terms of all taps, padding too: the function may map 0 to another number."""
        shape = (self.x.shape[0], *map(len, tables), self.geometry.channels)
        kernel_size = self.geometry.kernel_size
        taps = window_tracing.grid((self.read(tables, tap, shape) for tap in np.ndindex(*kernel_size)), kernel_size)
        for index, value in enumerate(self.traced.of_taps(self.constants, taps).flat):
            weight = lax.index_in_dim(self.weights, index, keepdims=False)
            yield Term(jnp.broadcast_to(value.astype(weight.dtype), shape), weight, 0)

    def read(self, tables: tuple[np.ndarray, ...], tap: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
        columns = [table[:, t] for table, t in zip(tables, tap)]
        if any((column < 0).all() for column in columns):
            return jnp.zeros(shape, self.x.dtype)
        steps = [constant_step(column) for column in columns]
        return self.sliced(columns, steps) if all(steps) else self.gathered(columns)
