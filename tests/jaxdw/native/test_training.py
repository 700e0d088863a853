"""The kernels of a training step: the bits of docs/arithmetic.md, on every instruction set, and their derivatives."""

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bridge.accumulation.arithmetic import Accumulator
from bridge.numerics import FLOAT32, FLOAT64, cast, same_bits
from jaxdw import native
from jaxdw.native import calls
from jaxdw.norm import batch_norm
from jaxdw.sum_order import SumOrder
from jaxdw.training import add, axpby, cross_entropy, divide, fork, sgd
from tests.jaxdw.native import arrays

needs_kernels = pytest.mark.skipif(not native.is_available(), reason=native.status())
fma64 = Accumulator(FLOAT64).fma

#: SHA-256 of the results of 60 random problems. They change only where docs/arithmetic.md does.
DIGEST = "1fb430a4c40b2e86b3ede2534e164ff4c2cb693f2c745932cc564fd6b16fe13f"


def wide(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def run_norm(x, scale, bias, **options):
    y, mean, var = np.empty_like(x), np.empty_like(scale), np.empty_like(scale)
    calls.batch_norm([a.ctypes.data for a in (x, scale, bias, y, mean, var)], x.shape, x.dtype.name, **options)
    return y, mean, var


def run_gradient(x, scale, bias, mean, var, dy, **options):
    results = np.empty_like(x), np.empty_like(scale), np.empty_like(scale)
    given = (x, scale, bias, mean, var, dy, *results)
    calls.batch_norm_gradient([a.ctypes.data for a in given], x.shape, x.dtype.name, **options)
    return results


def run_loss(logits, labels, ct, **options):
    result = np.empty((), logits.dtype) if ct is None else np.empty_like(logits)
    address = None if ct is None else ct.ctypes.data
    pointers = (logits.ctypes.data, labels.ctypes.data, address, result.ctypes.data)
    calls.cross_entropy(*pointers, logits.shape, logits.dtype.name, **options)
    return result


def run_axpby(factors, x, y, **options):
    result = np.empty_like(x)
    calls.axpby([a.ctypes.data for a in (factors, x, y, result)], x.size, x.dtype.name, **options)
    return result


def rounded(values, dtype):
    return values if values.dtype == dtype else cast(values.astype(np.float64), dtype)


def in_chain(terms, start=0.0):
    return functools.reduce(np.add, terms, np.full(terms.shape[1:], start))


def defined_norm(x, scale, bias, epsilon, activation):
    """The oracle: docs/arithmetic.md in NumPy."""
    count, values = len(x), x.astype(np.float64)
    blocks = [values[first : first + 128] for first in range(0, count, 128)]
    sums, squares = [in_chain(block) for block in blocks], []
    for block, total in zip(blocks, sums):
        square = np.zeros_like(total)
        for distance in block - total / len(block):
            square = fma64(distance, distance, square)
        squares.append(square)
    center = in_chain(np.stack(sums)) / count
    spread = np.zeros_like(center)
    for block, total, square in zip(blocks, sums, squares):
        distance = total / len(block) - center
        spread = fma64(distance * len(block), distance, spread + square)
    mean, var = center.astype(scale.dtype), (spread / count).astype(scale.dtype)
    distance, factor, _ = numbers(x, scale, mean, var, epsilon)
    y = fma(scale.dtype)(distance, factor, bias)
    return rounded(activated(y, activation), x.dtype), mean, var


def fma(dtype):
    return Accumulator(FLOAT64 if dtype == np.float64 else FLOAT32).fma


def numbers(x, scale, mean, var, epsilon):
    deviation = (1 / np.sqrt(var.astype(np.float64) + epsilon)).astype(scale.dtype)
    return x.astype(scale.dtype) - mean, deviation * scale, deviation


def activated(y, activation):
    y = y if activation is None else np.where(y < 0, 0, y).astype(y.dtype)
    return np.where(y > 6, 6, y).astype(y.dtype) if activation == "relu6" else y


def defined_gradient(x, scale, bias, mean, var, dy, epsilon, activation):
    count, type_ = len(x), scale.dtype
    distance, factor, deviation = numbers(x, scale, mean, var, epsilon)
    before, slope = fma(type_)(distance, factor, bias), dy.astype(type_)
    if activation is not None:
        slope = np.where(before <= 0, 0, slope).astype(type_)
    if activation == "relu6":
        slope = np.where(before >= 6, 0, slope).astype(type_)
    first, second = (np.zeros(x.shape[1]) for _ in range(2))
    for start in range(0, count, 128):
        product = np.zeros(x.shape[1])
        for g, d in zip(slope[start : start + 128].astype(np.float64), distance[start : start + 128]):
            product = fma64(g, d.astype(np.float64), product)
        first, second = first + in_chain(slope[start : start + 128].astype(np.float64)), second + product
    f, r = factor.astype(np.float64), deviation.astype(np.float64)
    by_distance, shift = -(f * r * r * second / count), -(f * first / count)
    inner = fma(type_)(distance, by_distance.astype(type_), np.broadcast_to(shift.astype(type_), x.shape))
    dx = fma(type_)(slope, np.broadcast_to(factor, x.shape), inner)
    return rounded(dx, x.dtype), (second * r).astype(type_), first.astype(type_)


def norm_problem(rng, dtype):
    rows, channels = int(rng.integers(2, 400)), int(rng.integers(1, 70))
    draw = lambda *shape: rng.integers(-(2**20), 2**20, shape) * 2.0**-18  # noqa: E731 (bits that NumPy cannot change)
    x, dy = (draw(rows, channels).astype(dtype) for _ in range(2))
    scale, bias = (draw(channels).astype(wide(dtype)) for _ in range(2))
    return x, scale, bias, dy, [None, "relu", "relu6"][rng.integers(3)]


@needs_kernels
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_batch_normalization_and_its_gradient_are_the_documented_sums(dtype, seed):
    rng = np.random.default_rng(seed)
    for number in range(3):
        x, scale, bias, dy, activation = norm_problem(rng, dtype)
        expected = defined_norm(x, scale, bias, 1e-5, activation)
        gradients = defined_gradient(x, scale, bias, *expected[1:], dy, 1e-5, activation)
        for isa in arrays.isas():
            options = {"epsilon": 1e-5, "activation": activation, "isa": isa, "threads": 1 + number}
            for one, other in zip(run_norm(x, scale, bias, **options), expected):
                assert same_bits(one, other).all(), isa
            for one, other in zip(run_gradient(x, scale, bias, *expected[1:], dy, **options), gradients):
                assert same_bits(one, other).all(), isa


@needs_kernels
def test_every_instruction_set_and_number_of_threads_has_the_bits_that_the_repository_keeps():
    digests = {isa: digest(isa, threads) for isa, threads in zip(arrays.isas() * 2, (1, 2, 3, 8, 1, 2, 3, 8))}
    assert digests == dict.fromkeys(digests, DIGEST)


def digest(isa, threads):
    found, options = hashlib.sha256(), {"isa": isa, "threads": threads}
    for x, scale, bias, dy, activation, labels, ct in digest_problems():
        norm = {"epsilon": 1e-5, "activation": activation, **options}
        y, mean, var = run_norm(x, scale, bias, **norm)
        results = [y, mean, var, *run_gradient(x, scale, bias, mean, var, dy, **norm)]
        results += [run_loss(x, labels, None, **options), run_loss(x, labels, ct, **options)]
        results.append(run_axpby(scale[:1].repeat(2), x, dy, **options))
        for result in results:
            found.update(result.tobytes())
    return found.hexdigest()


def digest_problems():
    rng = np.random.default_rng(20261128)
    for number in range(60):
        dtype = arrays.DTYPES[number % 4]
        x, scale, bias, dy, activation = norm_problem(rng, dtype)
        labels, ct = rng.integers(0, x.shape[1], len(x), np.int32), np.array(0.75, dtype)
        yield x, scale, bias, dy, activation, labels, ct


def problems_as_bytes():
    """The problems as `driver.cc` reads them."""
    given = b""
    for x, scale, bias, dy, activation, labels, ct in digest_problems():
        numbers = np.array([calls.TYPES[x.dtype.name], *x.shape, calls.ACTIVATIONS[activation]], np.int64)
        given += b"".join(array.tobytes() for array in (numbers, x, scale, bias, dy, labels, ct))
    return given


@needs_kernels
def test_threads_change_no_bit_of_large_arrays(seed):
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((5000, 33), np.float32) for _ in range(2))
    scale, bias = (rng.standard_normal(33).astype(np.float32) for _ in range(2))
    one = run_norm(x, scale, bias, epsilon=1e-5, threads=1)
    gradients = run_gradient(x, scale, bias, *one[1:], dy, epsilon=1e-5, threads=1)
    for threads in (2, 3, 8):
        more = run_norm(x, scale, bias, epsilon=1e-5, threads=threads)
        assert all(same_bits(a, b).all() for a, b in zip(one, more))
        more = run_gradient(x, scale, bias, *one[1:], dy, epsilon=1e-5, threads=threads)
        assert all(same_bits(a, b).all() for a, b in zip(gradients, more))


@needs_kernels
def test_the_loss_and_its_gradient_are_right_to_some_units_of_float64(seed):
    """In float64, against numbers of 64 bits or more; exponential and logarithm are within a unit in the last place.

    With u = 2^-53, the sum of K powers is right to (K + 2) u, its logarithm to as much and one rounding, and what is
    subtracted is exact but for one rounding. A share is a quotient of two such numbers.
    """
    rng = np.random.default_rng(seed)
    rows, classes = 50, 9
    logits = rng.standard_normal((rows, classes)) * 2.0 ** rng.integers(-3, 9, (rows, 1))
    labels = rng.integers(0, classes, rows, np.int32)
    precise = logits.astype(np.longdouble)
    shifted = precise - precise.max(1, keepdims=True)
    total = np.exp(shifted).sum(1, keepdims=True)
    losses = np.log(total)[:, 0] - shifted[np.arange(rows), labels]
    u = 2.0**-53
    room_of_loss = (classes + 4) * u + 2 * u * (abs(shifted).max(1) + np.log(total)[:, 0]) + rows * u * abs(losses)
    for isa in arrays.isas():
        loss = run_loss(logits, labels, None, isa=isa)
        assert abs(loss - losses.mean()) <= room_of_loss.mean() + 2 * u * losses.mean()
        gradient = run_loss(logits, labels, np.ones(()), isa=isa)
        shares = np.exp(shifted) / total
        wanted = (shares - (np.arange(classes) == labels[:, None])) / rows
        room = (classes + 2 * abs(shifted) + 8) * u * shares
        subnormal = 2.0**-1022  # powers below have fewer digits
        assert (abs(gradient - wanted) <= room + 3 * u * abs(wanted) + subnormal).all()


@needs_kernels
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_a_x_plus_b_y_is_a_product_and_a_fused_multiply_add(dtype, seed):
    rng = np.random.default_rng(seed)
    x, y = (rng.standard_normal(1001).astype(dtype) for _ in range(2))
    x[:2], y[:2] = [2.0**-140, -0.0], [2.0**-142, -0.0]
    a, b = factors = rng.standard_normal(2).astype(wide(dtype))
    expected = rounded(fma(wide(dtype))(a, x.astype(wide(dtype)), b * y.astype(wide(dtype))), dtype)
    for isa in arrays.isas():
        assert same_bits(run_axpby(factors, x, y, isa=isa), expected).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_derivatives_of_batch_normalization_are_right_in_every_mode_and_order(activation, x64, seed):
    rng = np.random.default_rng(seed)
    options = {"epsilon": 0.1, "activation": activation}
    kink = 0.0
    while kink < 1e-3:  # a difference over a kink of the activation is no slope
        x, scale, bias = (jnp.asarray(rng.standard_normal(s)) for s in ((5, 2, 3), 3, 3))
        y = batch_norm(x, scale, bias, epsilon=0.1)[0]
        kink = min(abs(y).min(), abs(y - 6).min())

    def everything(*operands):
        return batch_norm(*operands, **options)

    check_grads(everything, (x, scale, bias), order=1, modes=("fwd", "rev"), eps=1e-6)
    if activation is None:
        check_grads(everything, (x, scale, bias), order=2, modes=("fwd", "rev"), eps=1e-5)


def test_mapped_axes_change_no_bit(seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((4, 3, 5, 6)), jnp.float32)
    scale, bias = (jnp.asarray(rng.standard_normal((3, 6)), jnp.float32) for _ in range(2))

    def gradient(x, scale, bias):
        y, pull = jax.vjp(lambda *a: batch_norm(*a)[0], x, scale, bias)
        return y, *pull(y)

    mapped = jax.vmap(gradient, (1, 0, None))(x, scale, bias[0])
    for number in range(3):
        for one, all_ in zip(gradient(x[:, number], scale[number], bias[0]), mapped):
            assert same_bits(np.asarray(one), np.asarray(all_[number])).all()
    assert jax.vmap(batch_norm, (0, None, None))(jnp.ones((0, 2, 6)), scale[0], bias[0])[0].shape == (0, 2, 6)


def test_branches_join_and_fork(seed):
    rng = np.random.default_rng(seed)
    x, y = (jnp.asarray(rng.integers(-9, 9, (2, 3)), jnp.float32) for _ in range(2))

    def joined(x, y):
        left, right = fork(x)
        return add(divide(left, 2), add(right, y))

    primal, tangent = jax.jvp(joined, (x, y), (y, x))
    assert (primal == 1.5 * x + y).all() and (tangent == 1.5 * y + x).all()
    dx, dy = jax.vjp(joined, x, y)[1](jnp.ones((2, 3)))
    assert (dx == 1.5).all() and (dy == 1).all()
    assert (jax.vmap(joined, (0, None))(x, y[0]) == 1.5 * x + y[:1].repeat(2, 0)).all()


def test_sgd_takes_the_documented_step(seed):
    rng = np.random.default_rng(seed)
    p, m, g = (rng.standard_normal(7).astype(np.float32) for _ in range(3))
    rate, momentum, decay = np.float32(0.1), np.float32(0.9), np.float32(0.01)
    step = fma(np.float32)
    decayed = step(decay, p, g)
    new = step(np.float32(1), decayed, momentum * m)
    look = step(momentum, new, decayed)
    if native.is_available():
        for nesterov, direction in ((False, new), (True, look)):
            options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
            for rate_ in (0.1, jnp.float32(0.1)):
                moved = jax.jit(functools.partial(sgd, **options))({"p": p}, {"p": m}, {"p": g}, learning_rate=rate_)
                assert same_bits(np.asarray(moved[1]["p"]), new).all()
                assert same_bits(np.asarray(moved[0]["p"]), step(-rate, direction, p)).all()


def test_a_label_that_is_no_class_makes_the_loss_nan():
    logits = jnp.zeros((2, 3))
    assert math.isnan(cross_entropy(logits, jnp.array([0, 3])))
    gradient = jax.grad(cross_entropy)(logits, jnp.array([0, 3]))
    assert not jnp.isnan(gradient[0]).any() and jnp.isnan(gradient[1]).all()
    assert jax.vmap(cross_entropy)(jnp.zeros((0, 2, 3)), jnp.zeros((0, 2), jnp.int32)).shape == (0,)


BAD = {
    "x": (lambda: batch_norm(jnp.ones((0, 3)), jnp.ones(3), jnp.ones(3)), r"`x` has shape \(0, 3\), expected"),
    "scale": (lambda: batch_norm(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(3)), r"`scale` has shape \(2,\), expected"),
    "dtype": (
        lambda: batch_norm(jnp.ones((2, 3), jnp.int32), jnp.ones(3), jnp.ones(3)),
        "`x` has dtype int32, expected one of",
    ),
    "epsilon": (
        lambda: batch_norm(jnp.ones((2, 3)), jnp.ones(3), jnp.ones(3), epsilon=-1),
        "`epsilon` is -1, expected a number from 0 on",
    ),
    "activation": (
        lambda: batch_norm(jnp.ones((2, 3)), jnp.ones(3), jnp.ones(3), activation="silu"),
        "`activation` is 'silu', expected None or one of relu, relu6",
    ),
    "labels": (lambda: cross_entropy(jnp.ones((2, 3)), jnp.ones(2)), "`labels` has dtype float32, expected integers"),
    "logits": (
        lambda: cross_entropy(jnp.ones((2, 3)), jnp.ones(3, jnp.int32)),
        r"`logits` and `labels` have shapes \(2, 3\) and \(3,\), expected",
    ),
    "y": (lambda: axpby(1, jnp.ones(2), 1, jnp.ones(3)), r"`y` is float32 of shape \(3,\), expected float32 of shape"),
    "a": (lambda: axpby(jnp.ones(2), jnp.ones(2), 1, jnp.ones(2)), "`a` is .*, expected a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    run, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        run()


CHANNELS, SCALAR = jax.ShapeDtypeStruct((3,), np.float32), jax.ShapeDtypeStruct((), np.float32)
ROWS = jax.ShapeDtypeStruct((2, 3), np.float32)
BAD_CALLS = {
    "scale": (native.BATCH_NORM, (ROWS, CHANNELS, CHANNELS), [(2, 3), (2,), (3,)], "`scale` has shape"),
    "no rows": (native.BATCH_NORM, (ROWS, CHANNELS, CHANNELS), [(0, 3), (3,), (3,)], "`x` has shape"),
    "y": (native.BATCH_NORM, (CHANNELS, CHANNELS, CHANNELS), [(2, 3), (3,), (3,)], "`y` has shape"),
    "dy": (
        native.BATCH_NORM_GRADIENT,
        (ROWS, CHANNELS, CHANNELS),
        [(2, 3), (3,), (3,), (3,), (3,), (3, 2)],
        "`dy` has shape",
    ),
    "labels": (native.CROSS_ENTROPY, SCALAR, [(2, 3), (2,)], "`labels` has an element type that is not s32"),
    "rows": (native.CROSS_ENTROPY, SCALAR, [(2, 3), (3,)], "`labels` has shape"),
    "factors": (native.AXPBY, ROWS, [(3,), (2, 3), (2, 3)], "`factors` has shape"),
    "x and y": (native.AXPBY, ROWS, [(2,), (2, 3), (3, 2)], "`y` has shape"),
}


@needs_kernels
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_does_not_fit_is_an_error_that_names_the_argument(name):
    target, results, shapes, message = BAD_CALLS[name]
    attributes = {"epsilon": np.float64(0), "activation": 0} if "batch_norm" in target else {}
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.ffi.ffi_call(target, results)(*map(jnp.ones, shapes), **attributes))


if __name__ == "__main__":  # for DIGEST, where docs/arithmetic.md changes
    print(digest("scalar", 1))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: add(x, x[:1]), ValueError, "`y` is float32 of shape"),
        (lambda x: add(x, x.astype(jnp.int32)), TypeError, "`y` has dtype int32"),
        (lambda x: axpby("a", x, 1, x), ValueError, "`a` is 'a', expected a number"),
        (lambda x: sgd(x, x, x, learning_rate=-1), ValueError, "`learning_rate` is -1, expected 0 or more"),
        (lambda x: sgd(x, x, x, learning_rate=1, nesterov=1), TypeError, "`nesterov` is 1"),
        (lambda x: SumOrder.chain(True), TypeError, "`terms` is True, expected an int"),
        (lambda x: SumOrder.chain(2.5), TypeError, "`terms` is 2.5, expected an int"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones(3, jnp.float32))
