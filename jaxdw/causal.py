"""The causal depthwise convolution along time: with the state of a stream, packed sequences, and a step of decoding.

An output adds K products in the order of time, from the bias. The inputs before the start are zeros, or the state. So
the bits do not depend on how a sequence is cut into chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdw import _arrays
from jaxdw.causal_primitive import Settings, next_state, results, without_sign_of_zero
from jaxdw.conv import depthwise_conv
from jaxdw.epilogue import Epilogue
from jaxdw.methods import NAMES, check_method

#: What the argument `activation` accepts.
ACTIVATIONS = ("silu",)


def causal_conv1d(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    activation: str | None = None,
    return_state: bool = False,
    method: str = "auto",
) -> Any:
    """Causal depthwise convolution: output t reads the inputs t-K+1 to t. `kernel[K-1]` weighs input t.

    Args:
      x: `(*batch, T, C)`, float16, bfloat16, float32 or float64; T may be 0.
      kernel: `(K, 1, C*M)`. Output channel `c*M + m` reads input channel c. PyTorch's weight is `(C*M, 1, K)`.
      bias: `(C*M,)` or None.
      state: `(*batch, K-1, C)`: the inputs before x, the last one next to x. None is zeros.
      segment_ids: `(*batch, T)` integers, or None. Sequences that are packed into one row have different ids; no output
        reads an input of another sequence. A negative id marks padding at the end of a row: its output is 0. The state
        belongs to the first sequence of the row. With `(*batch, K-1 + T)` the first K-1 ids are those of the state.
      activation: "silu" or None. It follows the sum before the one rounding to the dtype of the result.
      return_state: return the state after x, too.
      method: as for `jaxdw.depthwise_conv`. "fft" is for filters about as long as the sequence. It takes no
        `segment_ids`, and its bits depend on the division into calls.

    The same bits come out of one call and of consecutive calls on chunks of any lengths, each with the state that the
    call before returned, if the weights are finite. `causal_conv1d_step` has them too.

    Returns:
      y `(*batch, T, C*M)`; or `(y, state)`. That state has the last K-1 inputs, with zeros for those of other sequences
      than the last one and without the padding at the end of the row.

    Raises:
      ValueError, TypeError: an argument that does not fit; the message names it, its value and what was expected.

    >>> x, kernel = jnp.arange(1.0, 5.0).reshape(1, 4, 1), jnp.array([10.0, 1.0]).reshape(2, 1, 1)
    >>> causal_conv1d(x, kernel)[0, :, 0]
    Array([ 1., 12., 23., 34.], dtype=float32)

    In two chunks:

    >>> y, state = causal_conv1d(x[:, :3], kernel, return_state=True)
    >>> causal_conv1d(x[:, 3:], kernel, state=state)[0, :, 0]
    Array([34.], dtype=float32)

    Two sequences in one row:

    >>> causal_conv1d(x, kernel, segment_ids=jnp.array([[0, 0, 1, 1]]))[0, :, 0]
    Array([ 1., 12.,  3., 34.], dtype=float32)
    """
    check_method(method)
    if method == "fft" and segment_ids is not None:
        others = ", ".join(name for name in NAMES if name != "fft")
        raise ValueError(
            f"`method` is 'fft' with `segment_ids`, expected one of {others}: a transform mixes all sequences of a row"
        )
    x, kernel, bias, state = _checked(x, kernel, bias, state, activation)
    ids = None if segment_ids is None else _checked_ids(segment_ids, x.shape, kernel.shape[0], state is not None)
    return _run(x, kernel, bias, state, ids, activation=activation, return_state=return_state, method=method)


@functools.partial(jax.jit, static_argnames=("activation", "return_state", "method"))
def _run(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    ids: jax.Array | None,
    *,
    activation: str | None,
    return_state: bool,
    method: str,
) -> Any:
    batch, length, taps = x.shape[:-2], x.shape[-2], kernel.shape[0]
    before = state
    if state is None and (ids is not None or return_state):
        no_input = lax.slice_in_dim(x, 0, 0, axis=-2)  # sharded as x is
        before = lax.pad(no_input, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * len(batch), (taps - 1, 0, 0), (0, 0, 0)])
    if ids is not None:
        ids = _with_ids_of_state(ids, length, taps)
        ids = ids.astype(np.int32) if np.can_cast(ids.dtype, np.int32) else ids
    operands = [x, before, kernel, *(array for array in (bias, ids) if array is not None)]
    settings = Settings(bias is not None, ids is not None, activation, method)
    if ids is None and state is None:
        epilogue = None if activation is None else Epilogue(activation=activation)
        y = depthwise_conv(x, kernel, without_sign_of_zero(bias), padding="CAUSAL", method=method, epilogue=epilogue)
        return (y, next_state(before, x)) if return_state else y
    y, state = results(operands, settings)
    if not return_state:
        return y
    return y, state if ids is None else _last_inputs(before, x, ids)


def causal_conv1d_step(
    x: jax.Array,
    state: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    method: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Return the output for the next input of a stream, and the next state: one step of decoding.

    Args:
      x: `(*batch, C)`.
      state: `(*batch, K-1, C)`, from `causal_conv1d(..., return_state=True)` or from the step before; zeros at first.
      kernel, bias, activation, method: as for `causal_conv1d`.

    Returns:
      y `(*batch, C*M)` and the state `(*batch, K-1, C)`.

    >>> kernel = jnp.array([10.0, 1.0]).reshape(2, 1, 1)
    >>> y, state = causal_conv1d_step(jnp.array([[2.0]]), jnp.ones((1, 1, 1)), kernel)
    >>> y.item(), state.item()
    (12.0, 2.0)
    """
    x = _arrays.as_array("x", x)
    if x.ndim < 1:
        raise ValueError(f"`x` has shape {x.shape}, expected (*batch, channels)")
    if state is None:
        raise TypeError("`state` is None, expected an array (*batch, K-1, channels): zeros at the start of a stream")
    x = lax.expand_dims(x, (x.ndim - 1,))
    y, state = causal_conv1d(x, kernel, bias, state=state, activation=activation, return_state=True, method=method)
    return lax.squeeze(y, (y.ndim - 2,)), state


def _checked(
    x: Any, kernel: Any, bias: Any, state: Any, activation: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Return the arrays in their common dtype; shapes that `depthwise_conv` checks are left to it."""
    x, kernel = _arrays.as_array("x", x), _arrays.as_array("kernel", kernel)
    if activation is not None:
        _arrays.check_choice("activation", activation, ACTIVATIONS)
    if kernel.ndim != 3 or 0 in kernel.shape:
        raise ValueError(f"`kernel` has shape {kernel.shape}, expected (K, 1, features), no size of them 0")
    if x.ndim < 2:
        raise ValueError(f"`x` has shape {x.shape}, expected (*batch, time, channels)")
    arrays: dict[str, jax.Array | None] = {"x": x, "kernel": kernel}
    for name, value in (("bias", bias), ("state", state)):
        arrays[name] = None if value is None else _arrays.as_array(name, value)
    common, _ = _arrays.common_and_result_dtype(arrays, None)
    expected = (*x.shape[:-2], kernel.shape[0] - 1, x.shape[-1])
    if (given := arrays["state"]) is not None and given.shape != expected:
        raise ValueError(
            f"`state` has shape {given.shape}, expected {expected}: the K-1 inputs before `x`, for K={kernel.shape[0]}"
        )
    x, kernel, bias, state = (a if a is None or a.dtype == common else a.astype(common) for a in arrays.values())
    return x, kernel, bias, state


def _checked_ids(ids: Any, x_shape: tuple[int, ...], taps: int, has_state: bool) -> jax.Array:
    """Return the segment ids, `(*batch, T)` or `(*batch, K-1 + T)`."""
    (*batch, length, _) = x_shape
    ids = _arrays.as_array("segment_ids", ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`segment_ids` has dtype {ids.dtype}, expected integers")
    if has_state and ids.shape == (*batch, taps - 1 + length) and taps > 1:
        return ids
    if ids.shape != tuple(x_shape[:-1]):
        also = f", or {(*batch, taps - 1 + length)} with those of the state" if has_state else ""
        raise ValueError(f"`segment_ids` has shape {ids.shape}, expected {(*batch, length)}, one per position{also}")
    return ids


def _with_ids_of_state(ids: jax.Array, length: int, taps: int) -> jax.Array:
    """Return the segment ids `(*batch, K-1 + T)`; the state belongs to the first sequence."""
    if ids.shape[-1] != length or taps == 1:
        return ids
    before = (*ids.shape[:-1], taps - 1)
    first = jnp.broadcast_to(ids[..., :1], before) if length else jnp.zeros(before, ids.dtype)
    return lax.concatenate([first, ids], ids.ndim - 1)


def _last_inputs(state: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the K-1 inputs `(*batch, K-1, C)` before the padding of each row, with zeros for other sequences."""
    taps, length = state.shape[-2] + 1, x.shape[-2]
    inputs = lax.concatenate([state, x], x.ndim - 2)
    ends = jnp.arange(1, length + 1, dtype=np.int32)
    is_real = lax.slice_in_dim(ids, taps - 1, None, axis=-1) >= 0
    count = jnp.where(is_real, jnp.broadcast_to(ends, is_real.shape), 0).max(axis=-1, initial=0)
    positions = jnp.broadcast_to(jnp.arange(taps - 1, dtype=np.int32), (*count.shape, taps - 1)) + count[..., None]
    names = jnp.take_along_axis(ids, positions, axis=-1)
    values = jnp.take_along_axis(inputs, positions[..., None], axis=-2)
    return jnp.where((names == names[..., -1:])[..., None], values, jnp.zeros((), values.dtype))
