"""PyTorch's operators in JAX with PyTorch's bits: sums in revealed orders, batch norm, activations, and moves.

Sums are those of `jaxdw`, whose kernels add in an order that is given: nothing else in a program changes a bit. What
follows no order, as an activation, has PyTorch's roundings as they are known. Results tell whether that is so here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxdw
from bridge.model import aten
from bridge.model.alignment import Alignment
from bridge.model.known_orders import KnownOrders
from bridge.model.operation_names import kind_of_call
from bridge.model.operations import Operation
from bridge.model.orders import Order, Revealed, Run, is_a_sum
from bridge.model.recorded_operations import operation_of
from bridge.model.running_error import Bounded
from bridge.model.torch_evaluation import evaluate
from bridge.model.torch_graph import Call, Ref
from bridge.numerics import same_bits
from jaxdw import epilogue
from jaxdw.matmul import ordered_matmul, ordered_mean

#: The results of an operator of PyTorch, by number, for its operands by number; all of them `channels_last`.
Operator = Callable[[Mapping[int, jax.Array]], Mapping[int, jax.Array]]

#: The orders of a sum by channel: each up to a channel, ascending, the last up to their number.
ByChannel = Sequence[tuple[int, Order]]


def channels_last(x: jax.Array) -> jax.Array:
    """Return a tensor with its second axis last, where it has more than two."""
    return jnp.moveaxis(x, 1, -1) if x.ndim > 2 else x


def channels_first(x: jax.Array) -> jax.Array:
    """Return a tensor in PyTorch's layout that is `channels_last`."""
    return jnp.moveaxis(x, -1, 1) if x.ndim > 2 else x


class Undefined(ValueError):
    """An operator whose bits no function of `jaxdw` has; the message says why."""


class Defined(NamedTuple):
    """An operator as a function.

    Attributes:
      run: the operator.
      revealed: the orders of a sum that were revealed; None for anything else.
    """

    run: Operator
    revealed: Revealed | None = None


def defined(alignment: Alignment, call: Call, known: KnownOrders) -> Defined:
    """Return an operator with PyTorch's bits.

    Raises:
      Undefined: no function has these bits.
    """
    if call.name in aten.MOVES:
        return Defined(functools.partial(_moved, call))
    revealed = _orders(alignment, call, known)
    if revealed is not None:
        if not revealed.channels:
            raise Undefined(f"PyTorch adds in orders that no ranges of channels have: {revealed}")
        sums = {"convolution": _convolution, "addmm": _linear, "mm": _linear, "mean": _mean}[call.name]
        return Defined(functools.partial(_result_of, call, functools.partial(sums, call, revealed.channels)), revealed)
    function = _function(alignment, call)
    if function is None:
        raise Undefined(f"neither an order nor the roundings of PyTorch's {kind_of_call(call)} are defined")
    return Defined(functools.partial(_result_of, call, function))


def _result_of(
    call: Call, function: Callable[[Callable[[str], Any]], jax.Array], values: Mapping[int, jax.Array]
) -> Mapping[int, jax.Array]:
    """Return the first result of a call, by a function of its tensors by argument."""

    def argument(name: str) -> Any:
        given = call.get(name)
        return values[given.number] if isinstance(given, Ref) else given

    return {call.outputs[0]: function(argument)}


# --- sums


def _orders(alignment: Alignment, call: Call, known: KnownOrders) -> Revealed | None:
    """Return the orders of a sum; None for anything else. Groups of a convolution are revealed one by one."""
    groups = call.get("groups", 1)
    operation = operation_of(alignment, dataclasses.replace(call, arguments={**call.arguments, "groups": 1}))
    if operation is None or not is_a_sum(operation) or operation.run is None:
        return None
    if groups == 1:
        return known.revealed(operation, "PyTorch", operation.run, operation.output)
    found = [
        known.revealed(each, "PyTorch", run, each.output)
        for each, run in (
            _group(operation, i, groups) for i in range(groups) if operation.parameters["weight"].shape[1] > 1
        )
    ]
    if not found:  # a depthwise one
        return None
    width = operation.output.shape[-1] // groups
    channels = [(i * width + end, order) for i, each in enumerate(found) for end, order in each.channels]
    labels = np.concatenate([each.labels for each in found], -1)
    reason = next((each.reason for each in found if each.reason), "")
    orders = list(dict.fromkeys(order for each in found for order in each.orders))
    return Revealed(orders, labels, reason, _joined(channels) if all(each.channels for each in found) else ())


def _joined(channels: ByChannel) -> ByChannel:
    """Return ranges of channels in which neighbours of one order are one range."""
    after = [order for _, order in channels[1:]] + [None]
    return [(end, order) for (end, order), following in zip(channels, after) if order != following]


def _group(operation: Operation, number: int, groups: int) -> tuple[Operation, Run]:
    """Return one group of a convolution as a convolution, and its run with zeros in all others."""
    run, x, parameters = operation.run, operation.operands[0], operation.parameters
    assert run is not None
    given, width = (
        slice(number * n // groups, (number + 1) * n // groups) for n in (x.shape[-1], len(parameters["weight"]))
    )

    def own(x_: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        every, weights = np.zeros(x.shape, np.float32), np.zeros(parameters["weight"].shape, np.float32)
        every[..., given], weights[width] = x_, weight
        biases = None if bias is None else np.zeros(len(weights), np.float32)
        if biases is not None:
            biases[width] = bias
        return np.ascontiguousarray(run(every, weights, biases)[..., width])

    some = {name: np.ascontiguousarray(array[width]) for name, array in parameters.items()}
    x_, y = (np.ascontiguousarray(a[..., part]) for a, part in ((x, given), (operation.output, width)))
    return dataclasses.replace(operation, operands=(x_,), output=y, parameters=some), own


def _convolution(call: Call, orders: ByChannel, given: Callable[[str], Any]) -> jax.Array:
    x, kernel, bias = given("input"), jnp.moveaxis(given("weight"), 0, -1), given("bias")
    rank, groups = kernel.ndim - 2, call.get("groups")
    settings = _settings(call, rank)
    is_pointwise = {*kernel.shape[:rank]} == {1} and not any(map(any, settings["padding"]))
    if is_pointwise:
        x = x[(slice(None), *(slice(None, None, stride) for stride in settings["strides"]))]
        kernel = kernel.reshape(kernel.shape[rank:])

    channels, width = kernel.shape[-2], kernel.shape[-1] // groups

    def of(start: int, end: int, order: Order) -> jax.Array:
        own = None if bias is None else bias[start:end]
        of_group = x[..., start // width * channels :][..., :channels]
        if is_pointwise:
            return ordered_matmul(of_group, kernel[..., start:end], own, order=order.sum_order)
        return jaxdw.ordered_conv(of_group, kernel[..., start:end], own, order=order.sum_order, **settings)

    ends = sorted({*(end for end, _ in orders), *range(width, kernel.shape[-1] + 1, width)})
    return _by_channel(of, [(end, next(order for last, order in orders if end <= last)) for end in ends])


def _settings(call: Call, rank: int) -> dict[str, Any]:
    names = {"strides": "stride", "padding": "padding", "kernel_dilation": "dilation"}
    each = {name: [*call.get(own)] * (rank if len(call.get(own)) == 1 else 1) for name, own in names.items()}
    return each | {"padding": [(n, n) for n in each["padding"]]}


def _linear(call: Call, orders: ByChannel, given: Callable[[str], Any]) -> jax.Array:
    x, w = (given("mat1"), given("mat2")) if call.name == "addmm" else (given("self"), given("mat2"))
    bias = given("self") if call.name == "addmm" else None

    def of(start: int, end: int, order: Order) -> jax.Array:
        own = None if bias is None else bias[start:end]
        return ordered_matmul(x, w[:, start:end], own, order=order.sum_order)

    return _by_channel(of, orders)


def _mean(call: Call, orders: ByChannel, given: Callable[[str], Any]) -> jax.Array:
    x = given("self")
    terms = math.prod(x.shape[1:-1])
    rows = x.reshape(x.shape[0], terms, x.shape[-1])

    def of(start: int, end: int, order: Order) -> jax.Array:
        some = rows[..., start:end]
        if order.finish == "division":
            return ordered_mean(some, order.sum_order)
        sums = ordered_matmul(some.swapaxes(-1, -2), jnp.ones((terms, 1), x.dtype), order=order.sum_order)
        return sums[..., 0] * (np.float32(1) / np.float32(terms))

    y = _by_channel(of, orders)
    return y.reshape(len(y), *(1,) * (x.ndim - 2), -1) if call.get("keepdim") else y


def _by_channel(of: Callable[[int, int, Order], jax.Array], orders: ByChannel) -> jax.Array:
    starts = (0, *(end for end, _ in orders))
    parts = [of(start, end, order) for start, (end, order) in zip(starts, orders)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


# --- what needs no order


def _function(alignment: Alignment, call: Call) -> Callable[[Callable[[str], Any]], jax.Array] | None:
    """Return a depthwise convolution, a batch norm by given statistics, or an activation; None for anything else."""
    if call.name == "convolution":
        x, weight = (alignment.graph.values[call.get(name).number] for name in ("input", "weight"))
        is_depthwise = call.get("groups") == x.shape[1] and not call.get("transposed") and x.ndim == weight.ndim
        if not is_depthwise or call.get("bias") is None:
            return functools.partial(_depthwise, call, False) if is_depthwise else None
        values = {n: channels_last(jnp.asarray(alignment.graph.values[n])) for n in call.operands}
        wanted = channels_last(jnp.asarray(alignment.graph.values[call.outputs[0]]))
        for bias_last in (False, True):
            found = functools.partial(_depthwise, call, bias_last)
            if same_bits(np.asarray(_result_of(call, found, values)[call.outputs[0]]), np.asarray(wanted)).all():
                return found
        return None
    operation = operation_of(alignment, call)
    if operation is not None and operation.kind == "batch norm" and operation.operands[0].ndim > 2:
        return functools.partial(_batch_norm, call)
    if call.name in _EXPONENTIAL:
        return _in_vectors(alignment, call)
    function = _ACTIVATIONS.get(call.name)
    if call.name in ("hardtanh", "clamp", "clamp_min"):
        lower, upper = (("min_val", -1), ("max_val", 1)) if call.name == "hardtanh" else (("min", None), ("max", None))
        function = _CLAMPS.get((call.get(*lower), call.get(*upper)))
    return None if function is None else lambda given: function(given("self"))


def _depthwise(call: Call, bias_last: bool, given: Callable[[str], Any]) -> jax.Array:
    kernel, bias = jnp.moveaxis(given("weight"), 0, -1), given("bias")
    settings = _settings(call, kernel.ndim - 2)
    first = None if bias_last else bias
    y = jaxdw.depthwise_conv(given("input"), kernel, first, method="taps", **settings)
    return y + jnp.broadcast_to(bias, y.shape) if bias_last else y


def _batch_norm(call: Call, given: Callable[[str], Any]) -> jax.Array:
    statistics = (given(name) for name in ("running_mean", "running_var", "weight", "bias"))
    x = given("input")
    norm = jaxdw.Epilogue.batch_norm(*statistics, epsilon=call.get("eps"))
    return norm.apply(x, x.ndim - 2, x.dtype)


def _fma(x: jax.Array, factor: Any, term: Any) -> jax.Array:
    """Return fma(x, factor, term) element by element."""
    factor, term = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape).reshape(-1) for a in (factor, term))
    return epilogue.multiply_add(x.reshape(1, 1, -1), factor, term, 1).reshape(x.shape)


#: log2(e); log(2) in two parts; the polynomial of (exp(s) - 1 - s) / s^2.
_LOG2_E, _LOG_2 = np.float32(1.442695040888963), (np.float32(0.693145751953125), np.float32(1.428606765330187e-06))
_POLYNOMIAL = (
    0.000198527617612853646278381,
    0.00139304355252534151077271,
    0.00833336077630519866943359,
    0.0416664853692054748535156,
    0.166666671633720397949219,
    0.5,
)


def _exp(x: jax.Array) -> jax.Array:
    """Return exp(x) as Sleef's `expf` of 1 ULP computes it, which PyTorch's vectors call (Shibata, Petrogalli 2020).

    x = q log(2) + s, exp(x) = 2^q exp(s), and a polynomial of exp(s), with fused multiply-adds.
    """
    q = lax.round(x * _LOG2_E, lax.RoundingMethod.TO_NEAREST_EVEN)
    s = _fma(q, -_LOG_2[1], _fma(q, -_LOG_2[0], x))
    u = jnp.full_like(s, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        u = _fma(u, s, np.float32(coefficient))
    y = _fma(s * s, u, s) + 1
    exponent = q.astype(jnp.int32)
    half = exponent >> 1  # 2^q may be no normal number
    for power in (half, exponent - half):
        y = y * lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
    return jnp.where(x < -104, 0, jnp.where(x > 100, jnp.inf, y))


#: 2^(i / 32), and the polynomial of 2^(r / 32).
_ROOTS = 2.0 ** (np.arange(32) / 32)
_CUBIC = tuple(
    float.fromhex(each) / 32**power
    for each, power in (("0x1.c6af84b912394p-5", 3), ("0x1.ebfce50fac4f3p-3", 2), ("0x1.62e42ff0c52d6p-1", 1))
)


def _exp_alone(x: jax.Array) -> jax.Array:
    """Return exp(x) as glibc's `expf` computes it, which PyTorch calls for elements that fill no vector.

    exp(x) = 2^(k / 32) 2^(r / 32) in float64, by a table and a polynomial, rounded once.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        z = x.astype(jnp.float64) * (math.log2(math.e) * 32)
        k = jnp.round(z)
        r, number = z - k, k.astype(jnp.int64)
        power = lax.bitcast_convert_type(((number // 32) + 1023) << 52, jnp.float64)
        third, second, first = _CUBIC
        y = ((third * r + second) * (r * r) + (first * r + 1)) * (jnp.asarray(_ROOTS)[number % 32] * power)
        return jnp.where(x < -104, 0, jnp.where(x > 89, jnp.inf, y)).astype(jnp.float32)


def _sigmoid(exp: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return 1 / (exp(-x) + 1)


def _silu(exp: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return x / (exp(-x) + 1)


#: Functions of an exponential.
_EXPONENTIAL = {"sigmoid": _sigmoid, "silu": _silu}


@functools.cache
def _telling(name: str) -> tuple[np.float32, np.ndarray]:
    """Return a number at which a function in vectors has other bits than alone, and both results."""
    x = np.linspace(-4, 4, 4097, dtype=np.float32)
    made = [np.asarray(jax.jit(functools.partial(_EXPONENTIAL[name], exp))(x)) for exp in (_exp, _exp_alone)]
    at = int(np.argmin(same_bits(*made)))
    return x[at], np.array([y[at] for y in made])


def _in_vectors(alignment: Alignment, call: Call) -> Callable[[Callable[[str], Any]], jax.Array] | None:
    """Return a function of an exponential. The operator on one telling number shows which elements fill no vector."""
    function = _EXPONENTIAL[call.name]
    x, again = alignment.graph.values[call.get("self").number], alignment.graph.runs.get(call.outputs[0])
    if again is None or x.dtype != np.float32:
        return None
    number, (wide, alone) = _telling(call.name)
    shown = again.run(np.full(channels_last(x).shape, number))
    is_alone = same_bits(shown, np.broadcast_to(alone, shown.shape))
    if not (is_alone | same_bits(shown, np.broadcast_to(wide, shown.shape))).all():
        return None
    places = np.flatnonzero(is_alone)

    def of(given: Callable[[str], Any]) -> jax.Array:
        flat = given("self").reshape(-1)
        y = function(_exp, flat)
        return y.at[places].set(function(_exp_alone, flat[places])).reshape(shown.shape)

    return of


_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "relu": epilogue.relu,
    "hardswish": epilogue.hard_swish,
    "hardsigmoid": epilogue.hard_sigmoid,
}

_CLAMPS: Mapping[Any, Callable[[jax.Array], jax.Array]] = {(0, 6): epilogue.relu6, (0, None): epilogue.relu}


# --- moves


def _moved(call: Call, values: Mapping[int, jax.Array]) -> Mapping[int, jax.Array]:
    """Return the results of an operator that only moves elements, or adds zeros.

    Raises:
      Undefined: it does something else.
    """
    operands = {n: channels_first(values[n]) for n in call.operands}
    places, count = {}, 1  # 0 is the place of what is added
    for n, x in operands.items():
        places[n] = Bounded.exact(np.arange(count, count + x.size, dtype=np.float64).reshape(x.shape))
        count += x.size
    try:
        found = evaluate(call, places)
    except aten.UnknownOperator as error:
        raise Undefined(f"it is not known what PyTorch's {error} moves") from None
    given = list(operands.values())
    return {n: channels_last(_taken(given, each.value)) for n, each in zip(call.outputs, found)}


def _taken(given: Sequence[jax.Array], places: np.ndarray) -> jax.Array:
    """Return the elements of arrays that stand at places, counted from 1 through all of them; 0 where there is a 0."""
    index = places.astype(np.int32)
    if not (index == places).all() or index.max(initial=0) > sum(x.size for x in given) or index.min(initial=0) < 0:
        raise Undefined("it computes other elements than those that it takes")
    if len(given) == 1 and index.size == given[0].size > 0:
        first = (0,) * index.ndim
        steps = [
            0 if size == 1 else int(index[(*first[:k], 1, *first[k + 1 :])] - index[first])
            for k, size in enumerate(index.shape)
        ]
        order = sorted(range(index.ndim), key=lambda k: -steps[k])
        back = [order.index(k) for k in range(index.ndim)]
        shape = tuple(index.shape[k] for k in order)
        if np.array_equal(np.arange(1, index.size + 1).reshape(shape).transpose(back), index):
            return given[0].reshape(shape).transpose(back)  # a permutation of axes
    flat = jnp.concatenate([jnp.zeros(1, given[0].dtype), *(x.reshape(-1) for x in given)])
    return jnp.take(flat, index)
