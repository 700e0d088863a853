"""Matrix products of the compiled kernels: the order that is given, on every instruction set, and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from bridge.accumulation import Tree, reveal_dot
from bridge.accumulation.arithmetic import Accumulator
from bridge.numerics import FLOAT32, FLOAT64, cast, same_bits
from jaxdw import Epilogue, SumOrder, native
from jaxdw.epilogue import relu6
from jaxdw.matmul import ordered_mean
from jaxdw.native import calls
from jaxdw.sum_order import ADD, BIAS, ZERO
from tests.jaxdw.native import arrays
from tests.jaxdw.native.test_epilogue import Finish

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())


def summed(x, w, bias, order):
    """The oracle: the program of an order, step by step in NumPy, on numbers of the type of the sum."""
    accumulator = Accumulator(FLOAT64 if x.dtype == np.float64 else FLOAT32)
    shape, stack = (x.shape[0], w.shape[1]), []
    for step in order.steps:
        if step == ADD:
            stack[-2:] = [accumulator.add(*stack[-2:])]
        elif step in (BIAS, ZERO):
            number = bias if step == BIAS else np.zeros((), x.dtype)
            stack.append(np.broadcast_to(number.astype(accumulator.dtype), shape))
        elif step % 2:
            stack[-1] = accumulator.fma(x[:, step // 2, None], w[step // 2], stack[-1])
        else:
            stack.append(accumulator.product(x[:, step // 2, None], w[step // 2]))
    (total,) = stack
    return total


def in_order(x, w, bias, order):
    total = summed(x, w, bias, order)
    return total if total.dtype == x.dtype else cast(total.astype(np.float64), x.dtype)


def random_order(rng, terms, biased):
    """A random tree: chains of random lengths over some or all terms, added two by two in random places."""
    shuffled = rng.permutation(terms) if rng.integers(2) else np.arange(terms)
    left, stack, steps = [int(term) for term in shuffled], 0, []
    bias = [BIAS] if biased else []
    longest = int(rng.choice([1, 2, 8, max(terms, 1)]))
    while left or bias or stack != 1:
        kind = rng.integers(6)
        if kind == 0 and stack > 1:
            steps.append(ADD)
            stack -= 1
        elif kind == 1 and (rng.integers(8) == 0 or (bias and not left)):
            steps.append(bias.pop() if bias else ZERO)
            stack += 1
        elif kind == 2 and left:
            steps.append(2 * left.pop(0))
            stack += 1
        elif kind > 2 and stack:
            for term in [left.pop(0) for _ in range(min(len(left), int(rng.integers(1, longest + 1))))]:
                steps += [2 * term, ADD] if kind == 3 else [2 * term + 1]
    return SumOrder(tuple(steps))


def problem(rng, dtype, most=60):
    rows, terms, columns = (int(rng.integers(1, most)) for _ in range(3))
    x, w, bias = (rng.standard_normal(size).astype(dtype) for size in ((rows, terms), (terms, columns), columns))
    ends = sorted({*rng.integers(1, terms + 1, int(rng.integers(0, 4))).tolist(), terms})
    bias = bias if rng.integers(2) else None
    first = bias is not None and bool(rng.integers(2))
    orders = SumOrder.blocks(ends, bias="first" if first else None), random_order(rng, terms, first)
    order = orders[rng.integers(2)]
    return x, w, bias, order if bias is None else order.with_bias()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_every_instruction_set_adds_in_the_order_that_is_given(dtype, seed, full):
    rng = np.random.default_rng(seed)
    for number in range(100 if full else 6):
        x, w, bias, order = problem(rng, dtype)
        expected = in_order(x, w, bias, order)
        for isa in arrays.isas():
            for of_x, of_w in ((x, w), (np.asfortranarray(x), w), (x, np.asfortranarray(w))):
                y = np.empty(expected.shape, dtype)
                calls.matmul(of_x, of_w, bias, y, order, threads=1 + number % 3, isa=isa)
                assert same_bits(y, expected).all(), (isa, order)


def test_long_sums_and_large_results_have_the_same_bits_in_every_division(seed):
    """Terms are added in parts that fit the caches, and rows and columns shared out: none changes a bit."""
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in ((700, 1100), (1100, 70)))
    orders = [SumOrder.blocks(ends) for ends in ([1100], [600, 1100], [512, 1024, 1100])]
    for order in (*orders, random_order(rng, 1100, False)):
        expected = in_order(x[:5], w, None, order)
        for threads in (1, 2, 3, 8):
            y = np.empty((700, 70), np.float32)
            calls.matmul(x, w, None, y, order, threads=threads)
            assert same_bits(y[:5], expected).all(), order


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_every_instruction_set_finishes_sums_as_it_is_defined(dtype, seed, full):
    rng = np.random.default_rng(seed)
    for number in range(100 if full else 6):
        x, w, bias, order = problem(rng, dtype, most=40)
        products = int(rng.integers(1, 4))
        several = np.stack([rng.permutation(w, axis=1) for _ in range(products)])
        finish = Finish.drawn(rng, (products, len(x), w.shape[1]), np.dtype(dtype))
        divisor = int(rng.choice([1, 49]))
        total = np.stack([summed(x, each, bias, order) for each in several])
        expected = finish.expected(total / total.dtype.type(divisor), dtype)
        options = {"scale": finish.scale, "shift": finish.shift, "residual": finish.residual}
        for isa in arrays.isas():
            y = np.empty(expected.shape, dtype)
            calls.matmul(
                x,
                several,
                bias,
                y,
                order,
                **options,
                activation=finish.activation,
                divisor=divisor,
                threads=1 + number % 3,
                isa=isa,
            )
            assert same_bits(y, expected).all(), (isa, order, finish)


def test_the_order_is_revealed_as_it_was_given():
    order = SumOrder.blocks((7, 20))

    def element(x, w):
        return np.asarray(jaxdw.ordered_matmul(jnp.stack([x] * 3), jnp.stack([w] * 5, 1), order=order))[1, 2]

    tree = Tree.add(Tree.chain(range(7), fused=True), Tree.chain(range(7, 20), fused=True))
    assert reveal_dot(element, 20).trees == (tree,)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("activation", [None, "relu6"])
def test_derivatives_of_both_modes_are_exact_on_integers(activation, seed):
    rng = np.random.default_rng(seed)
    x, w, bias, scale, shift, residual, dx, dw = (
        jnp.asarray(rng.integers(-4, 5, size), jnp.float32)
        for size in ((2, 9, 6), (6, 5), 5, 5, 5, (2, 9, 5), (2, 9, 6), (6, 5))
    )
    operands = (x, w, bias, *(() if activation is None else (scale, shift, residual)))
    tangents = (dx, dw, *operands[2:])

    def values(function):
        def loss(*arguments):
            return (function(*arguments) ** 2).sum()

        first = jax.jvp(function, operands, tangents)
        second = jax.jvp(jax.grad(loss, range(len(operands))), operands, tangents)
        outer = (*operands[1:-1], operands[-1][0]) if activation else operands[1:]
        none = (None,) * (len(operands) - 2)
        mapped = (
            jax.vmap(lambda x: function(x, *outer))(x),
            jax.vmap(lambda x, w: function(x, w, *outer[1:]))(x, jnp.stack([w, dw])),
            jax.vmap(lambda bias: function(x[0], w, bias, *outer[2:]))(jnp.stack([bias, 2 * bias])),
            jax.vmap(jax.grad(lambda w: loss(x[0], w, *outer[1:])))(jnp.stack([w, dw])),
            jax.vmap(jax.vmap(lambda x, w: function(x, w, *outer[1:]), (0, None)), (None, 0))(x, jnp.stack([w, dw])),
        )
        return jax.tree.leaves((first, second, mapped, none))

    def ours(x, w, bias, scale=None, shift=None, residual=None):
        epilogue = Epilogue(scale, shift, residual, activation)
        return jaxdw.ordered_matmul(x, w, bias, order=SumOrder.blocks((2, 6), bias="first"), epilogue=epilogue)

    def plain(x, w, bias, scale=None, shift=None, residual=None):
        y = x @ w + jnp.broadcast_to(bias, (*x.shape[:-1], 5))
        if scale is None:
            return y
        y = y * jnp.broadcast_to(scale, y.shape) + jnp.broadcast_to(shift, y.shape) + residual
        return relu6(y)

    for one, other in zip(values(ours), values(plain), strict=True):
        assert np.array_equal(one, other)


def test_a_mean_is_its_sum_and_one_division(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, 49, 20)).astype(np.float32)
    ones = np.ones((1, 49), np.float32)
    for order in (SumOrder.chain(49), SumOrder.blocks((16, 32, 48, 49)), random_order(rng, 49, False)):
        sums = np.stack([in_order(ones, image, None, order)[0] for image in x.reshape(6, 49, 20)])
        actual = ordered_mean(jnp.asarray(x), order)
        assert same_bits(np.asarray(actual).reshape(6, 20), sums / np.float32(49)).all()
    gradient = jax.grad(lambda x: ordered_mean(x).sum())(jnp.asarray(x))
    assert (gradient == np.float32(1) / np.float32(49)).all()


def test_nothing_to_add_is_zero_or_the_bias():
    nothing = jaxdw.ordered_matmul(
        jnp.ones((2, 0)), jnp.ones((0, 3)), jnp.arange(3.0), epilogue=Epilogue(activation="relu")
    )
    assert nothing.tolist() == [[0, 1, 2]] * 2
    for epilogue in (None, Epilogue(activation="relu")):
        assert jaxdw.ordered_matmul(jnp.ones((0, 4)), jnp.ones((4, 3)), epilogue=epilogue).shape == (0, 3)
        assert jaxdw.ordered_matmul(jnp.ones((2, 4)), jnp.ones((4, 0)), epilogue=epilogue).shape == (2, 0)
    assert ordered_mean(jnp.ones((0, 4, 3))).shape == (0, 3)


def test_a_sum_of_nothing_starts_from_zero():
    x, w, bias = jnp.ones((1, 0)), jnp.ones((0, 1)), -jnp.zeros(1)
    assert not np.signbit(jaxdw.ordered_matmul(x, w, bias))
    assert np.signbit(jaxdw.ordered_matmul(x, w, bias, order=SumOrder.chain(0, bias_first=True)))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_over_nothing_gives_nothing(axes):
    arrays = (jnp.ones((6, 4)), jnp.ones((4, 3)), jnp.ones(3))
    mapped = [array if axis is None else jnp.ones((0, *array.shape)) for array, axis in zip(arrays, axes)]
    for epilogue in (None, Epilogue(activation="relu")):
        function = functools.partial(jaxdw.ordered_matmul, epilogue=epilogue)
        assert jax.vmap(function, axes)(*mapped).shape == (0, 6, 3)


def test_the_transpose_of_product_and_bias_together():
    x, w, bias, dy = jnp.ones((6, 4)), jnp.arange(12.0).reshape(4, 3), jnp.ones(3), jnp.ones((6, 3))
    dx, dbias = jax.linear_transpose(lambda x, bias: jaxdw.ordered_matmul(x, w, bias), x, bias)(dy)
    assert (dx == dy @ w.T).all() and (dbias == 6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": jnp.ones(4)}, r"`w` has shape \(4,\), expected \(terms, columns\)"),
        ({"x": jnp.ones((2, 5))}, r"`x` has shape \(2, 5\), expected \(\*batch, 4\)"),
        ({"bias": jnp.ones(4)}, r"`bias` has shape \(4,\), expected \(3,\)"),
        ({"order": SumOrder.chain(3)}, "`order` has 3 terms, expected 4"),
        ({"order": (1, 2)}, "`order` is a tuple, expected a `jaxdw.SumOrder` or None"),
        ({"order": SumOrder.chain(4, bias_first=True)}, "`order` has a bias, and `bias` is None"),
        ({"x": jnp.ones((2, 4), jnp.int32)}, "`x` has dtype int32, expected one of"),
        ({"epilogue": Epilogue(scale=jnp.ones(4))}, r"`epilogue.scale` has shape \(4,\), expected \(3,\)"),
        (
            {"epilogue": Epilogue(residual=jnp.ones((4, 3)))},
            r"`epilogue.residual` has shape \(4, 3\), expected \(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jaxdw.ordered_matmul(**{"x": jnp.ones((2, 4)), "w": jnp.ones((4, 3))} | arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SumOrder([1]), r"`steps` is \[1\], expected a tuple of ints"),
        (lambda: SumOrder((ZERO, True)), "expected a tuple of ints"),
        (lambda: SumOrder((1,)), "`steps` has 1 at place 0, expected 1 numbers on the stack before it"),
        (lambda: SumOrder((0, ADD)), "`steps` has -1 at place 1, expected 2 numbers"),
        (lambda: SumOrder((0, 2)), "`steps` leaves 2 numbers on the stack, expected one"),
        (lambda: SumOrder(()), "`steps` leaves 0 numbers"),
        (lambda: SumOrder((0, 1)), "`steps` has term 0 at place 1, expected each of 0 to 1 once"),
        (lambda: SumOrder((2,)), "`steps` has term 1 at place 0, expected each of 0 to 0 once"),
        (lambda: SumOrder((-4,)), "`steps` has -4 at place 0, expected -1"),
        (lambda: SumOrder((BIAS, BIAS, ADD)), "`steps` has the bias 2 times"),
        (lambda: SumOrder.chain(-1), "`terms` is -1, expected 0 or more"),
        (lambda: SumOrder.chain(2, bias_first=1), "`bias_first` is 1, expected True or False"),
        (lambda: SumOrder.blocks((3, 2, 4)), r"`ends` is \(3, 2, 4\), expected ascending numbers from 1"),
        (lambda: SumOrder.blocks(()), "`ends` is"),
        (lambda: SumOrder.blocks((0, 4)), "`ends` is"),
        (lambda: SumOrder.blocks((2.0, 4)), "`ends` is"),
        (lambda: SumOrder.blocks(4), "`ends` is 4"),
        (lambda: SumOrder.blocks((4,), bias="middle"), "`bias` is 'middle', expected None, 'first' or 'last'"),
    ],
)
def test_a_program_that_does_not_add_is_an_error(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("x", "w", "y", "steps", "message"),
    [
        ((2, 4), (5, 3), (2, 3), [-3, 1, 3, 5, 7], "`w` has shape .*, expected 4 terms"),
        ((2, 4), (4, 3), (3, 2), [-3, 1, 3, 5, 7], "`y` has shape .*, expected"),
        ((2, 2, 4), (3, 4, 3), (2, 2, 3), [-3, 1, 3, 5, 7], "`w` has shape .*, and as many products"),
        ((2, 4), (4, 3), (2, 3), [-3, 1, 3, 5], "each of 4 terms"),
        ((2, 4), (4, 3), (2, 3), [-3, 1, 3, 5, 5], "each term once"),
        ((2, 4), (4, 3), (2, 3), [-3, 1, 3, 5, 9], "each term once"),
        ((2, 4), (4, 3), (2, 3), [-3, -4], "each term once"),
        ((2, 4), (4, 3), (2, 3), [-3, -1], "two sums before"),
        ((2, 4), (4, 3), (2, 3), [1], "a sum before each fused"),
        ((2, 4), (4, 3), (2, 3), [], "one sum at the end"),
        ((2, 4), (4, 3), (2, 3), [-2, 1, 3, 5, 7], "no bias where none is given"),
        ((2, 4, 1, 1), (4, 3), (2, 3), [-3], "`x` has shape .*, expected 2 or 3 axes"),
        ((2, 0), (0, 3), (2, 3), [-3], "`x` has shape .*, expected sizes from 1"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error_that_names_the_argument(x, w, y, steps, message):
    run = jax.ffi.ffi_call(native.MATMUL, jax.ShapeDtypeStruct(y, np.float32))
    options = {"x_transposed": False, "w_transposed": False, "scaled": False, "residual": False}
    with pytest.raises(Exception, match=message):
        run(
            jnp.ones(x), jnp.ones(w), steps=np.array(steps, np.int64), **options, activation=0, divisor=1.0
        ).block_until_ready()
