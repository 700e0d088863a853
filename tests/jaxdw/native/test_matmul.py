"""Matrix products of the compiled kernels: the order that is given, on every instruction set, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from bridge.accumulation import Tree, reveal_dot
from bridge.accumulation.arithmetic import Accumulator
from bridge.numerics import FLOAT32, FLOAT64, cast, same_bits
from jaxdw import native
from jaxdw.native import calls
from tests.jaxdw.native import arrays

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())


def in_order(x, w, bias, ends, bias_first=False):
    """The oracle: one fused multiply-add after another, in NumPy."""
    add_up = Accumulator(FLOAT64 if x.dtype == np.float64 else FLOAT32)
    shape, total = (x.shape[0], w.shape[1]), None
    for first, end in zip((0, *ends), ends):
        start = bias if total is None and bias is not None and bias_first else np.zeros((), x.dtype)
        chain = np.broadcast_to(start.astype(add_up.dtype), shape)
        for term in range(first, end):
            chain = add_up.fma(x[:, term, None], w[term], chain)
        total = chain if total is None else add_up.add(total, chain)
    if bias is not None and not bias_first:
        total = add_up.add(total, bias.astype(add_up.dtype))
    return total if total.dtype == x.dtype else cast(total.astype(np.float64), x.dtype)


def problem(rng, dtype, most=60):
    rows, terms, columns = (int(rng.integers(1, most)) for _ in range(3))
    x, w, bias = (rng.standard_normal(size).astype(dtype) for size in ((rows, terms), (terms, columns), columns))
    ends = sorted({*rng.integers(1, terms + 1, int(rng.integers(0, 4))).tolist(), terms})
    return x, w, bias if rng.integers(2) else None, ends, bool(rng.integers(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_every_instruction_set_adds_in_the_order_that_is_given(dtype, seed, full):
    rng = np.random.default_rng(seed)
    for number in range(100 if full else 8):
        x, w, bias, ends, bias_first = problem(rng, dtype)
        expected = in_order(x, w, bias, ends, bias_first)
        for isa in arrays.isas():
            for of_x, of_w in ((x, w), (np.asfortranarray(x), w), (x, np.asfortranarray(w))):
                y = np.empty(expected.shape, dtype)
                calls.matmul(of_x, of_w, bias, y, ends, bias_first=bias_first, threads=1 + number % 3, isa=isa)
                assert same_bits(y, expected).all(), (isa, ends)


def test_long_sums_and_large_results_have_the_same_bits_in_every_division(seed):
    """Terms are added in parts that fit the caches, and rows and columns shared out: none changes a bit."""
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in ((700, 1100), (1100, 70)))
    for ends in ([1100], [600, 1100], [512, 1024, 1100]):
        expected = in_order(x[:5], w, None, ends)
        for threads in (1, 2, 3, 8):
            y = np.empty((700, 70), np.float32)
            calls.matmul(x, w, None, y, ends, threads=threads)
            assert same_bits(y[:5], expected).all()


def test_the_order_is_revealed_as_it_was_given():
    def element(x, w):
        return np.asarray(jaxdw.chain_matmul(jnp.stack([x] * 3), jnp.stack([w] * 5, 1), block_ends=(7, 20)))[1, 2]

    tree = Tree.add(Tree.chain(range(7), fused=True), Tree.chain(range(7, 20), fused=True))
    assert reveal_dot(element, 20).trees == (tree,)


def test_derivatives_of_both_modes_are_exact_on_integers(seed):
    rng = np.random.default_rng(seed)
    x, w, bias, dx, dw = (
        jnp.asarray(rng.integers(-4, 5, size), jnp.float32) for size in ((2, 9, 6), (6, 5), 5, (2, 9, 6), (6, 5))
    )

    def values(function):
        def loss(*arguments):
            return (function(*arguments) ** 2).sum()

        first = jax.jvp(function, (x, w, bias), (dx, dw, bias))
        second = jax.jvp(jax.grad(loss, (0, 1, 2)), (x, w, bias), (dx, dw, bias))
        mapped = (
            jax.vmap(function, (0, None, None))(x, w, bias),
            jax.vmap(function, (0, 0, None))(x, jnp.stack([w, dw]), bias),
        )
        return jax.tree.leaves((first, second, mapped))

    ours = values(lambda x, w, bias: jaxdw.chain_matmul(x, w, bias, block_ends=(2, 6)))
    plain = values(lambda x, w, bias: x @ w + jnp.broadcast_to(bias, (*x.shape[:-1], 5)))
    for one, other in zip(ours, plain, strict=True):
        assert np.array_equal(one, other)


def test_nothing_to_add_is_zero_or_the_bias():
    assert (
        jaxdw.chain_matmul(jnp.ones((2, 0)), jnp.ones((0, 3)), jnp.arange(3.0), block_ends=None).tolist()
        == [[0, 1, 2]] * 2
    )
    assert jaxdw.chain_matmul(jnp.ones((0, 4)), jnp.ones((4, 3))).shape == (0, 3)


def test_a_sum_of_nothing_starts_from_zero():
    x, w, bias = jnp.ones((1, 0)), jnp.ones((0, 1)), -jnp.zeros(1)
    assert not np.signbit(jaxdw.chain_matmul(x, w, bias, block_ends=(0,)))
    assert np.signbit(jaxdw.chain_matmul(x, w, bias, bias_first=True))


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)])
def test_vmap_over_nothing_gives_nothing(axes):
    arrays = (jnp.ones((6, 4)), jnp.ones((4, 3)), jnp.ones(3))
    mapped = [array if axis is None else jnp.ones((0, *array.shape)) for array, axis in zip(arrays, axes)]
    assert jax.vmap(jaxdw.chain_matmul, axes)(*mapped).shape == (0, 6, 3)


def test_the_transpose_of_product_and_bias_together():
    x, w, bias, dy = jnp.ones((6, 4)), jnp.arange(12.0).reshape(4, 3), jnp.ones(3), jnp.ones((6, 3))
    dx, dbias = jax.linear_transpose(lambda x, bias: jaxdw.chain_matmul(x, w, bias), x, bias)(dy)
    assert (dx == dy @ w.T).all() and (dbias == 6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": jnp.ones(4)}, r"`w` has shape \(4,\), expected \(terms, columns\)"),
        ({"x": jnp.ones((2, 5))}, r"`x` has shape \(2, 5\), expected \(\*batch, 4\)"),
        ({"bias": jnp.ones(4)}, r"`bias` has shape \(4,\), expected \(3,\)"),
        ({"block_ends": (2, 3)}, r"`block_ends` is \(2, 3\), expected ascending numbers from 1, and 4 last"),
        ({"block_ends": (3, 2, 4)}, "`block_ends` is"),
        ({"block_ends": ()}, "`block_ends` is"),
        ({"block_ends": (-1, 4)}, "`block_ends` is"),
        ({"block_ends": (True, 4)}, "`block_ends` is"),
        ({"block_ends": 4}, "`block_ends` is 4"),
        ({"bias_first": "yes"}, "`bias_first` is 'yes', expected True or False"),
        ({"block_ends": (0, 4)}, "`block_ends` is"),
        ({"block_ends": (2.0, 4)}, "`block_ends` is"),
        ({"x": jnp.ones((2, 4), jnp.int32)}, "`x` has dtype int32, expected one of"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jaxdw.chain_matmul(**{"x": jnp.ones((2, 4)), "w": jnp.ones((4, 3))} | arguments)


@pytest.mark.parametrize(
    ("x", "w", "y", "ends", "message"),
    [
        ((2, 4), (5, 3), (2, 3), [4], "`w` has shape .*, expected 4 terms"),
        ((2, 4), (4, 3), (3, 2), [4], "`y` has shape .*, expected"),
        ((2, 4), (4, 3), (2, 3), [3], "`ends` is .*, expected 4 last"),
        ((2, 4), (4, 3), (2, 3), [5, 4], "`ends` is .*, expected ascending"),
        ((2, 4), (4, 3), (2, 3), [], "`ends` is .*, expected 4 last"),
        ((2, 4, 1), (4, 3), (2, 3), [4], "`x` has shape .*, expected 2 axes"),
        ((2, 0), (0, 3), (2, 3), [0], "`x` has shape .*, expected sizes from 1"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error_that_names_the_argument(x, w, y, ends, message):
    run = jax.ffi.ffi_call(native.MATMUL, jax.ShapeDtypeStruct(y, np.float32))
    options = {"x_transposed": False, "w_transposed": False, "bias_last": True}
    with pytest.raises(Exception, match=message):
        run(jnp.ones(x), jnp.ones(w), ends=np.array(ends, np.int64), **options).block_until_ready()
