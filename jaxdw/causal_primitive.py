"""Steps of a stream and packed sequences as a primitive, which is linear in the inputs and in the kernel.

On a CPU a compiled kernel computes it, and its derivatives by x and state. Elsewhere it is a convolution of the inputs,
or of the windows of packed sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jaxdw import _arrays, native, primitive
from jaxdw._compat import varying_together
from jaxdw.conv import depthwise_conv
from jaxdw.epilogue import Epilogue, differentiate_as_defined
from jaxdw.geometry import Geometry
from jaxdw.native import calls
from jaxdw.primitive import kernel_lowering, replicated

#: Bytes of windows that packed sequences have in memory at once.
WINDOW_BYTES = 1 << 26


class Settings(NamedTuple):
    """The parameters of `_causal_p`: of x, state, kernel, and what there is of bias and ids.

    x is `(*batch, T, C)`, the state `(*batch, K-1, C)`, the ids `(*batch, K-1 + T)`. The results are y and the last K-1
    inputs.
    """

    biased: bool
    packed: bool
    activation: str | None
    method: str


_causal_p = Primitive("causal_conv1d")
_causal_p.multiple_results = True


def results(operands: Sequence[jax.Array], settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Return y `(*batch, T, C*M)` and the last K-1 inputs."""
    if _suits_kernel(operands, settings):
        y, state = _causal_p.bind(*varying_together(*operands), settings=settings)
        return y, state
    return _defined(*operands, settings=settings)


def _suits_kernel(operands: Sequence[jax.Array], settings: Settings) -> bool:
    """Return True if the compiled kernel is meant for it, where it can be called: steps, and packed sequences.

    Chunks of a stream are faster as convolutions.
    """
    x, _, kernel, *rest = operands
    if settings.packed and rest[-1].dtype != np.int32:
        return False
    is_one = kernel.shape[-1] == x.shape[-1] and kernel.shape[0] > 1 and not any(map(_arrays.is_sharded, operands))
    return is_one and settings.method in ("auto", "taps") and (settings.packed or x.shape[-2] == 1)


def _defined(x: jax.Array, state: jax.Array, kernel: jax.Array, *rest: jax.Array, settings: Settings) -> Any:
    bias = without_sign_of_zero(rest[0]) if settings.biased else None
    epilogue = None if settings.activation is None else Epilogue(activation=settings.activation)
    inputs = lax.concatenate([state, x], x.ndim - 2)
    if settings.packed:
        y = _packed(inputs, kernel, bias, rest[-1], settings.method, epilogue)
    else:
        y = depthwise_conv(inputs, kernel, bias, padding="VALID", method=settings.method, epilogue=epilogue)
    return y, next_state(state, x)


def without_sign_of_zero(bias: jax.Array | None) -> jax.Array | None:
    """Return a bias whose -0 are +0. A sum keeps -0 where it skips the zeros before x, and not where it adds them."""
    if bias is None:
        return None
    return bias + lax.stop_gradient(jnp.where(bias == 0, jnp.abs(bias), jnp.zeros_like(bias)))


def next_state(state: jax.Array, x: jax.Array) -> jax.Array:
    """Return the last K-1 inputs."""
    length = x.shape[-2]
    inputs = lax.concatenate([state, x], x.ndim - 2)
    return lax.slice_in_dim(inputs, length, length + state.shape[-2], axis=-2)


def _packed(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    ids: jax.Array,
    method: str,
    epilogue: Epilogue | None,
) -> jax.Array:
    """Return the convolution of packed sequences `(*batch, K-1 + T, C)`.

    The windows of some positions are in memory at once, with zeros for what belongs to other sequences, and each of
    them is a sequence of K inputs with one output.
    """
    taps, channels = kernel.shape[0], inputs.shape[-1]
    length = inputs.shape[-2] - taps + 1

    def outputs(start: jax.Array | int, count: int) -> jax.Array:
        piece = lax.dynamic_slice_in_dim(inputs, start, count + taps - 1, inputs.ndim - 2)
        names = lax.dynamic_slice_in_dim(ids, start, count + taps - 1, ids.ndim - 1)
        mine = lax.slice_in_dim(names, taps - 1, None, axis=-1)
        windows = []
        for tap in range(taps):
            values = lax.slice_in_dim(piece, tap, tap + count, axis=-2)
            same = lax.slice_in_dim(names, tap, tap + count, axis=-1) == mine
            windows.append(jnp.where(same[..., None], values, jnp.zeros((), values.dtype)))
        window = jnp.stack(windows, axis=-2)  # (*batch, count, K, C)
        y = depthwise_conv(window, kernel, bias, padding="VALID", method=method, epilogue=epilogue)
        return jnp.where((mine >= 0)[..., None], lax.squeeze(y, (y.ndim - 2,)), jnp.zeros((), y.dtype))

    bytes_of_one = taps * channels * inputs.dtype.itemsize * math.prod(inputs.shape[:-2])
    in_all = bytes_of_one * length
    if export.is_symbolic_dim(in_all) or in_all <= WINDOW_BYTES:
        return outputs(0, length)
    count = max(1, WINDOW_BYTES // bytes_of_one)
    pieces = -(-length // count)
    missing = pieces * count - length
    inputs = lax.pad(inputs, jnp.zeros((), inputs.dtype), _at_end(inputs.ndim, inputs.ndim - 2, missing))
    ids = lax.pad(ids, jnp.full((), -1, ids.dtype), _at_end(ids.ndim, ids.ndim - 1, missing))
    # the derivative makes the windows of a piece again, and does not keep those of all
    piece_of = jax.checkpoint(lambda start: outputs(start, count))
    ys = jnp.moveaxis(lax.map(piece_of, jnp.arange(pieces) * count), 0, -3)
    y = ys.reshape(*ys.shape[:-3], pieces * count, ys.shape[-1])
    return lax.slice_in_dim(y, 0, length, axis=-2)


def _at_end(ndim: int, axis: int, count: int) -> list[tuple[int, int, int]]:
    config = [(0, 0, 0)] * ndim
    config[axis] = (0, count, 0)
    return config


def _by_kernel(x: jax.Array, state: jax.Array, kernel: jax.Array, *rest: jax.Array, settings: Settings) -> Any:
    def rows(array: jax.Array, axes: int) -> jax.Array:
        return array.reshape(math.prod(x.shape[:-2]), *array.shape[array.ndim - axes :])

    more = list(rest)
    if settings.packed:
        more[-1] = rows(more[-1], 1)
    shapes = [jax.ShapeDtypeStruct(rows(array, 2).shape, x.dtype) for array in (x, state)]
    results = jax.ffi.ffi_call(native.CAUSAL, shapes)(
        rows(x, 2),
        rows(state, 2),
        kernel,
        *more,
        biased=settings.biased,
        activation=calls.ACTIVATIONS[settings.activation],
    )
    return [result.reshape(array.shape) for result, array in zip(results, (x, state))]


@_causal_p.def_abstract_eval
def _causal_abstract(x, state, kernel, *rest, settings: Settings):
    return [replicated(array.shape, x.dtype, x) for array in (x, state)]


def _causal_batch(operands, axes, *, settings: Settings):
    """Make the mapped axis a batch axis of x, state and ids; where weights have it, map the definition."""
    rowed = (0, 1, len(operands) - 1) if settings.packed else (0, 1)
    if any(axis is not None and number not in rowed for number, axis in enumerate(axes)):
        return jax.vmap(functools.partial(_defined, settings=settings), in_axes=axes)(*operands), (0, 0)
    count = next(operand.shape[axis] for operand, axis in zip(operands, axes) if axis is not None)
    wide = list(operands)
    for number in rowed:
        array, axis = operands[number], axes[number]
        wide[number] = jnp.broadcast_to(array, (count, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
    return _causal_p.bind(*wide, settings=settings), (0, 0)


def _causal_jvp(primals, tangents, *, settings: Settings):
    """Compute tangents by the same primitive, which is linear in x and state and in the kernel."""
    x, state, kernel, *rest = primals
    dx, dstate, dkernel, *drest = tangents
    wide = _arrays.accumulator(x.dtype)
    ids = rest[-1:] if settings.packed else []

    def sums(*arrays: jax.Array) -> jax.Array:
        operands = [*(array.astype(wide) for array in arrays), *ids]
        plain = settings._replace(biased=False, activation=None)
        return _causal_p.bind(*varying_together(*operands), settings=plain)[0]

    dx, dstate = ad.instantiate_zeros(dx), ad.instantiate_zeros(dstate)
    dsums = sums(dx, dstate, kernel)
    if type(dkernel) is not ad.Zero:
        dsums += sums(x, state, dkernel)
    if settings.biased and type(drest[0]) is not ad.Zero:
        dsums += _at_outputs(drest[0].astype(wide), dsums, ids)
    if settings.activation is not None:
        s = sums(x, state, kernel)
        if settings.biased:
            s += _at_outputs(rest[0].astype(wide), s, ids)
        _, dsums = jax.jvp(jax.nn.silu, (s,), (dsums,))
    results = _causal_p.bind(*primals, settings=settings)
    return results, [dsums.astype(x.dtype), next_state(dstate, dx)]


def _at_outputs(bias: jax.Array, like: jax.Array, ids: Sequence[jax.Array]) -> jax.Array:
    """Return the bias at each output, and 0 at padding."""
    wide = jnp.broadcast_to(bias, like.shape)
    if not ids:
        return wide
    own = lax.slice_in_dim(ids[0], ids[0].shape[-1] - like.shape[-2], None, axis=-1)
    return jnp.where((own >= 0)[..., None], wide, jnp.zeros((), like.dtype))


def _causal_transpose(cts, x, state, kernel, *rest, settings: Settings):
    """Compute the gradient by x and state as a sum over the outputs that read them, which runs backwards in time."""
    by_inputs = ad.is_undefined_primal(x) or ad.is_undefined_primal(state)
    if settings.biased or settings.activation is not None or by_inputs == ad.is_undefined_primal(kernel):
        return _transpose_as_defined(cts, x, state, kernel, *rest, settings=settings)
    dy, dnext = map(ad.instantiate_zeros, cts)
    ids = rest[-1] if settings.packed else None
    none = [None] * len(rest)
    if not by_inputs:
        return [None, None, _kernel_gradient(lax.concatenate([state, x], x.ndim - 2), dy, ids), *none]
    length, time = dy.shape[-2], dy.ndim - 2
    zeros = jnp.zeros_like(dnext)
    operands = [lax.concatenate([lax.rev(dy, (time,)), zeros], time), zeros, kernel]
    if ids is not None:
        unread = jnp.zeros((*ids.shape[:-1], kernel.shape[0] - 1), ids.dtype)
        operands.append(lax.concatenate([unread, lax.rev(ids, (time,))], time))
    inputs = lax.rev(_causal_p.bind(*varying_together(*operands), settings=settings)[0], (time,))
    last = lax.slice_in_dim(inputs, length, None, axis=time) + dnext
    inputs = lax.concatenate([lax.slice_in_dim(inputs, 0, length, axis=time), last], time)
    before = dnext.shape[time]
    dstate, dx = lax.slice_in_dim(inputs, 0, before, axis=time), lax.slice_in_dim(inputs, before, None, axis=time)
    return [
        dx if ad.is_undefined_primal(x) else None,
        dstate if ad.is_undefined_primal(state) else None,
        None,
        *none,
    ]


def _kernel_gradient(inputs: jax.Array, dy: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Return `(K, 1, C)`: for each tap the sum over the outputs of its own sequence of what it read times dy."""
    if ids is None:
        taps = inputs.shape[-2] - dy.shape[-2] + 1
        geometry = Geometry.of(inputs.shape, (taps, 1, dy.shape[-1]), padding="VALID")
        return primitive.kernel_gradient(inputs, dy, geometry, "taps", inputs.dtype)
    if dy.shape[-2] == 0:  # no window fits
        return jnp.zeros((inputs.shape[-2] + 1, 1, inputs.shape[-1]), inputs.dtype)
    rows = [array.reshape(-1, *array.shape[-axes:]) for array, axes in ((inputs, 2), (dy, 2), (ids, 1))]
    sums = lax.platform_dependent(*rows, cpu=_sums_by_outputs, default=_sums_by_taps)
    return sums[:, None].astype(inputs.dtype)


def _sums_by_outputs(inputs: jax.Array, dy: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the sums `(K, C)`, to which each output of each row is added: a CPU reads every number once."""
    wide, taps = _arrays.accumulator(dy.dtype), inputs.shape[-2] - dy.shape[-2] + 1

    def of_row(sums: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        inputs, dy, ids = row

        def of_output(sums: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
            names = lax.dynamic_slice_in_dim(ids, time, taps)
            reads = ((names == names[-1]) & (names >= 0))[:, None]
            values = lax.dynamic_slice_in_dim(inputs, time, taps).astype(wide)
            return sums + jnp.where(reads, values, jnp.zeros((), wide)) * dy[time][None].astype(wide), None

        return lax.scan(of_output, sums, jnp.arange(dy.shape[0]))[0], None

    return lax.scan(of_row, jnp.zeros((taps, inputs.shape[-1]), wide), (inputs, dy, ids))[0]


def _sums_by_taps(inputs: jax.Array, dy: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the sums `(K, C)`, one tap after the other."""
    wide, length = _arrays.accumulator(dy.dtype), dy.shape[-2]
    taps = inputs.shape[-2] - length + 1
    own = lax.slice_in_dim(ids, taps - 1, None, axis=1)

    def of_tap(tap: jax.Array) -> jax.Array:
        read = lax.dynamic_slice_in_dim(inputs, tap, length, 1).astype(wide)
        reads = (lax.dynamic_slice_in_dim(ids, tap, length, 1) == own) & (own >= 0)
        return (jnp.where(reads[..., None], read, jnp.zeros((), wide)) * dy.astype(wide)).sum((0, 1))

    return lax.map(of_tap, jnp.arange(taps))


differentiate_as_defined(_causal_p, _defined)
_transpose_as_defined = ad.primitive_transposes[_causal_p]
ad.primitive_jvps[_causal_p] = _causal_jvp
ad.primitive_transposes[_causal_p] = _causal_transpose
batching.primitive_batchers[_causal_p] = _causal_batch
_causal_p.def_impl(functools.partial(xla.apply_primitive, _causal_p))
mlir.register_lowering(_causal_p, mlir.lower_fun(_defined, multiple_results=True))
mlir.register_lowering(_causal_p, kernel_lowering(_defined, _by_kernel, multiple_results=True), platform="cpu")
