"""Every mode and order of differentiation, `vmap` over any operands, and every control structure, of jaxdw's methods
against XLA's own convolution.

The data are small whole numbers, so that every product and every sum is exact and every comparison is for equality.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax

import jaxdw
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from tests.programs import release_programs
from tests.strategies import problems

METHODS = ["taps", "rows"]


def whole_numbers(seed, *shapes, dtype=np.float64):
    """Arrays of whole numbers from -3 to 3; None for a shape that is None."""
    rng = np.random.default_rng(seed)
    return [None if shape is None else rng.integers(-3, 4, shape).astype(dtype) for shape in shapes]


def assert_equal(actual, expected):
    """Equal trees, dtypes and shapes included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert (a == b).all(), f"{jax.tree_util.keystr(path)}: {(a != b).sum()} of {a.size} differ"


def convolution(method, **options):
    def conv(x, kernel, bias=None):
        return jaxdw.depthwise_conv(x, kernel, bias, method=method, **options)

    return conv


def derivatives(conv):
    """A function that makes every first and second derivative of a convolution, in both modes and both orders."""

    def gradients(x, kernel, dy):
        return jax.vjp(conv, x, kernel)[1](dy)

    def run(primals, tangents, dy, ddy):
        x, kernel, _ = primals
        dx, dkernel, _ = tangents
        y, pullback = jax.vjp(conv, *primals)
        _, pullback_of_gradients = jax.vjp(gradients, x, kernel, dy)
        return {
            "value": y,
            "vjp": pullback(dy),
            "jvp": jax.jvp(conv, primals, tangents)[1],
            "forward over reverse": jax.jvp(gradients, (x, kernel, dy), (dx, dkernel, ddy))[1],
            "reverse over reverse": pullback_of_gradients((dx, dkernel)),
            "transpose by x": jax.linear_transpose(lambda x: conv(x, kernel), x)(dy),
            "transpose by the kernel": jax.linear_transpose(lambda kernel: conv(x, kernel), kernel)(dy),
        }

    return run


#: Few channels and enough of them, since the two are summed by different programs.
any_problem = st.one_of(problems(max_size=7, max_channels=3), problems(max_size=7, min_channels=9, max_channels=11))


def test_every_derivative_equals_that_of_the_grouped_convolution(x64, full):
    @hypothesis.settings(max_examples=300 if full else 4)
    @given(any_problem, st.sampled_from(METHODS), st.sampled_from([np.float64, np.float32]))
    def check(problem, method, dtype):
        release_programs()
        shapes = problem.x_shape, problem.kernel_shape, problem.kernel_shape[-1:] if problem.bias else None
        y_shape = Geometry.of(*shapes, **problem.options).output_shape
        primals = whole_numbers(problem.seed, *shapes, dtype=dtype)
        tangents = whole_numbers(problem.seed + 1, *shapes, dtype=dtype)
        dy, ddy = whole_numbers(problem.seed + 2, y_shape, y_shape, dtype=dtype)
        actual, expected = (
            jax.jit(derivatives(convolution(m, **problem.options)))(tuple(primals), tuple(tangents), dy, ddy)
            for m in (method, "grouped")
        )
        assert_equal(actual, expected)

    check()


def test_vmap_over_any_operands_equals_a_loop(x64, full):
    count = 3

    @hypothesis.settings(max_examples=200 if full else 4)
    @given(any_problem, st.sampled_from(METHODS), st.lists(st.none() | st.integers(0, 9), min_size=4, max_size=4))
    def check(problem, method, axes):
        release_programs()
        shapes = [problem.x_shape, problem.kernel_shape, problem.kernel_shape[-1:] if problem.bias else None]
        shapes.append(Geometry.of(*shapes, **problem.options).output_shape)
        axes = [None if s is None or a is None else a % (len(s) + 1) for s, a in zip(shapes, axes)]
        hypothesis.assume(any(axis is not None for axis in axes))
        shapes = [s if a is None else (*s[:a], count, *s[a:]) for s, a in zip(shapes, axes)]
        operands = whole_numbers(problem.seed, *shapes)

        def of(method, x, kernel, bias, dy):
            y, pullback = jax.vjp(convolution(method, **problem.options), x, kernel, bias)
            return y, pullback(dy)

        def loop(*operands):
            each = [
                of("grouped", *(v if a is None else jnp.take(v, i, axis=a) for v, a in zip(operands, axes)))
                for i in range(count)
            ]
            return jax.tree.map(lambda *values: jnp.stack(values), *each)

        assert_equal(jax.jit(jax.vmap(functools.partial(of, method), axes))(*operands), jax.jit(loop)(*operands))

    check()


GEOMETRIES = {  # in "taps" each runs in a program of its own kind, in one order of the bias or the other
    "bias first": ((2, 6, 5, 10), (3, 3), 1, {"padding": 1}),
    "bias last": ((2, 5, 4, 10), (3, 3), 1, {"padding": 3, "strides": 2}),
    "multiplier": ((6, 5, 9), (3, 2), 2, {"padding": ((1, 2), (0, -1)), "kernel_dilation": (2, 1)}),
    "few channels": ((2, 6, 5, 3), (3, 3), 1, {"strides": (2, 3)}),
    "one axis": ((2, 9, 12), (4,), 1, {"padding": "CAUSAL"}),
    "three axes": ((2, 4, 3, 5, 9), (2, 3, 2), 1, {"padding": "SAME", "strides": (1, 2, 1)}),
    "transposed": ((2, 4, 3, 9), (3, 3), 1, {"padding": 2, "input_dilation": (2, 3), "strides": (3, 2)}),
    "periodic": ((2, 3, 4, 9), (3, 5), 1, {"padding": "CIRCULAR"}),
    "reflected": ((3, 2, 4, 4, 9), (3, 3), 1, {"padding": "REFLECT", "strides": 2}),
}


def example(name, dtype=np.float64):
    """(options, (x, kernel, bias), dy), whole numbers."""
    x_shape, kernel_size, multiplier, options = GEOMETRIES[name]
    kernel_shape = (*kernel_size, 1, x_shape[-1] * multiplier)
    y_shape = Geometry.of(x_shape, kernel_shape, **options).output_shape
    *operands, dy = whole_numbers(0, x_shape, kernel_shape, kernel_shape[-1:], y_shape, dtype=dtype)
    return options, tuple(operands), dy


def test_the_examples_have_the_bias_where_they_say():
    for name, first in {"bias first": True, "bias last": False}.items():
        x_shape, kernel_size, _, options = GEOMETRIES[name]
        assert bias_comes_first(Geometry.of(x_shape, (*kernel_size, 1, x_shape[-1]), **options)) is first


def scanned(conv):
    return lambda *operands: lax.scan(lambda carry, _: (carry, conv(*operands)), 0, None, length=3)[1][-1]


def scanned_over(conv):
    def run(x, kernel, bias):
        start = conv(x, kernel, bias)
        return lax.scan(lambda total, xs: (total + conv(*xs, bias), None), start, (x[None], kernel[None]))[0] / 2

    return run


def chosen(conv):
    return lambda x, *rest: lax.cond(x.sum() < x.size * 4, lambda x: conv(x, *rest), lambda x: conv(-x, *rest), x)


def repeated(conv):
    return lambda *operands: lax.fori_loop(0, 2, lambda _, y: y + conv(*operands), 0 * conv(*operands)) / 2


def linearized(conv):
    """By Euler's identity: the derivative of a bilinear map towards its own arguments is twice its value."""

    def run(x, kernel, bias):
        _, tangent = jax.linearize(conv, x, kernel, bias)
        return tangent(x, kernel, 2 * bias) / 2

    return run


def mapped(conv):
    return lambda x, *rest: jax.vmap(jax.vmap(conv, (0, None, None)), (0, None, None))(x[None, None], *rest)[0, 0]


WITHIN = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": scanned,
    "scan over x and kernel": scanned_over,
    "cond": chosen,
    "fori_loop": repeated,
    "linearize": linearized,
    "vmap of vmap": mapped,
    "checkpoint with a policy": lambda conv: jax.checkpoint(
        jax.jit(conv), policy=jax.checkpoint_policies.dots_saveable
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name, within", list(zip(itertools.cycle(GEOMETRIES), WITHIN)))
def test_value_and_gradients_inside_every_control_structure(name, within, x64):
    options, operands, dy = example(name)

    def run(conv):
        return lambda *operands: (y := conv(*operands), (y * dy).sum())[::-1]

    derivative = jax.value_and_grad(run(WITHIN[within](convolution("taps", **options))), (0, 1, 2), has_aux=True)
    expected = jax.value_and_grad(run(convolution("grouped", **options)), (0, 1, 2), has_aux=True)
    assert_equal(jax.jit(derivative)(*operands), jax.jit(expected)(*operands))


def test_every_derivative_by_pallas(full):
    """Of few geometries, and in float32: the kernels are interpreted here."""
    for name in GEOMETRIES if full else ["one axis"]:
        options, primals, dy = example(name, np.float32)
        actual, expected = (
            jax.jit(derivatives(convolution(method, **options)))(primals, primals, dy, 2 * dy)
            for method in ("pallas", "grouped")
        )
        assert_equal(actual, expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("method, name", [("taps", "few channels"), ("rows", "one axis")])
def test_jacobians_and_hessians_in_both_modes(method, name, x64):
    """Of a few entries of x and of the kernel: more of them would make programs that take long to compile."""
    options, (x, kernel, bias), dy = example(name)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    few, modes = (x[0, ..., 1, 0], kernel[..., 0, 0]), (jax.jacfwd, jax.jacrev)

    def of(method, few_x, few_kernel):
        whole = x.at[0, ..., 1, 0].set(few_x), kernel.at[..., 0, 0].set(few_kernel)
        return convolution(method, **options)(*whole, bias)

    def loss(*few):
        return (of(method, *few) * dy).sum()

    expected = jax.jacfwd(functools.partial(of, "grouped"), (0, 1))(*few)
    assert_equal([jax.jit(mode(functools.partial(of, method), (0, 1)))(*few) for mode in modes], [expected] * 2)
    hessians = jax.jit(lambda *few: [outer(inner(loss, (0, 1)), (0, 1))(*few) for outer in modes for inner in modes])
    first, *others = hessians(*few)
    assert_equal(others, [first] * 3)
    (by_x_twice, mixed), _ = first
    assert mixed.any() and not by_x_twice.any()


NARROW = list(itertools.product(["bfloat16", "float16", "float32"], [False, True]))
SUMMED = itertools.cycle(
    [("taps", "bias first"), ("rows", "multiplier"), ("taps", "few channels"), ("rows", "bias last")]
)


@pytest.mark.parametrize("dtype, wide, method, name", [(*narrow, *summed) for narrow, summed in zip(NARROW, SUMMED)])
def test_narrow_dtypes_are_summed_wide_and_rounded_once(dtype, wide, method, name, x64):
    """And with a wider `preferred_element_type`."""
    options, operands, dy = example(name, jnp.dtype(dtype))
    if wide:
        options = {**options, "preferred_element_type": {"float32": jnp.float64}.get(dtype, jnp.float32)}
        dy = dy.astype(options["preferred_element_type"])

    def run(method):
        y, pullback = jax.vjp(convolution(method, **options), *operands)
        return y, pullback(dy)

    y, gradients = jax.jit(run, static_argnums=0)(method)
    expected_y, expected = jax.jit(run, static_argnums=0)("grouped")
    assert y.dtype == dy.dtype and all(g.dtype == jnp.dtype(dtype) for g in gradients)
    assert_equal((y, gradients[:2]), (expected_y, expected[:2]))
