"""The epilogue of a convolution: one definition for every method and transformation, and PyTorch's bits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from jax.test_util import check_grads

import jaxdw
from bridge.numerics import same_bits
from jaxdw import Epilogue
from jaxdw import epilogue as epilogues
from jaxdw.call import Call
from jaxdw.methods import METHODS
from jaxdw.native import is_available
from tests.programs import release_programs
from tests.strategies import problems

#: The activations whose bits are the same everywhere: SiLU has the exponential of XLA, or of the compiled kernels.
NAMES = [name for name in epilogues.NAMES if name != "silu"]

DTYPES = (np.float64, np.float32, ml_dtypes.bfloat16, np.float16)
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -6, 6, -3])
PARTS = list(itertools.product((False, True), (False, True), (None, *NAMES)))[1:]


def drawn(rng, shape, dtype, parts, special=True):
    """An epilogue for a result of this shape, with these of scale and shift, residual, activation."""
    scaled, added, activation = parts

    @np.errstate(over="ignore")
    def array(shape, dtype):
        values = rng.standard_normal(shape)
        return jnp.asarray(np.where(special and rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), values), dtype)

    wide = np.float64 if dtype == np.float64 else np.float32
    scale, shift = (array(shape[-1:], wide) if scaled else None for _ in range(2))
    return Epilogue(scale, shift, array(shape, dtype) if added else None, activation)


def defined(conv, epilogue, dtype, rank):
    """The definition: the convolution in float32 or wider, and then each step."""
    wide = np.float64 if dtype == np.float64 else np.float32
    y = conv(preferred_element_type=wide)
    return epilogue.apply(y, rank, np.dtype(dtype))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_have_the_bits_of_the_definition(dtype, x64, full):
    """With NaN, infinities and signed zeros; docs/arithmetic.md says how subnormal numbers differ."""

    @settings(max_examples=500 if full else 4)
    @given(problems())
    def check(problem):
        release_programs()
        x, kernel, bias = problem.arrays(dtype)
        conv = functools.partial(jaxdw.depthwise_conv, x, kernel, bias, method="taps", **problem.options)
        shape = jax.eval_shape(conv).shape
        rng = np.random.default_rng(problem.seed)
        epilogue = drawn(rng, shape, dtype, PARTS[rng.integers(len(PARTS))])
        expected = defined(conv, epilogue, dtype, kernel.ndim - 2)
        actual = conv(epilogue=epilogue)
        assert actual.dtype == dtype
        assert same_bits(np.asarray(actual), np.asarray(expected)).all()

    check()


@pytest.mark.skipif(not is_available(), reason="without the kernels XLA flushes subnormal numbers")
@pytest.mark.parametrize("activation", [None, *NAMES])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_normalization_residual_and_activation_have_the_bits_of_pytorch(activation, stride, seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 13, 14, 40), np.float32), rng.standard_normal((3, 3, 1, 40), np.float32)
    weight, bias, mean, var = (rng.standard_normal(40).astype(np.float32) for _ in range(4))
    var = abs(var)
    layer = functools.partial(jaxdw.depthwise_conv, x, kernel, strides=stride, padding=1)
    residual = rng.standard_normal(jax.eval_shape(layer).shape, np.float32)

    y = torch.conv2d(channels_first(x), torch.tensor(kernel).permute(3, 2, 0, 1), None, stride, 1, groups=40)
    y = torch.nn.functional.batch_norm(y, *map(torch.tensor, (mean, var, weight, bias)), eps=1e-3)
    y = y + channels_first(residual)
    if activation:
        y = getattr(torch.nn.functional, activation.replace("_", ""))(y)

    def unit(*statistics):
        residual_too = {"residual": jnp.asarray(residual), "activation": activation}
        return layer(epilogue=Epilogue.batch_norm(*statistics, epsilon=1e-3, **residual_too))

    for function in (unit, jax.jit(unit)):
        assert same_bits(np.asarray(function(mean, var, weight, bias)), y.movedim(1, -1).numpy()).all()


def channels_first(a):
    return torch.tensor(a).movedim(-1, 1)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", PARTS[-2:])
def test_every_method_has_the_definition(method, parts, seed):
    rng = np.random.default_rng(seed)
    x, kernel = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 7, 9, 5), (3, 3, 1, 10)))
    conv = functools.partial(jaxdw.depthwise_conv, x, kernel, method=method)
    epilogue = drawn(rng, (2, 7, 9, 10), np.float32, parts)
    assert same_bits(np.asarray(conv(epilogue=epilogue)), np.asarray(defined(conv, epilogue, np.float32, 2))).all()


@pytest.mark.parametrize("parts", PARTS[::2])
def test_a_residual_that_the_program_computes_changes_no_bit(parts, seed):
    rng = np.random.default_rng(seed)
    x, kernel, a = (rng.standard_normal(s, np.float32) for s in ((2, 7, 9, 5), (3, 3, 1, 5), (2, 7, 9, 5)))
    epilogue = drawn(rng, x.shape, np.float32, (parts[0], False, parts[2]), special=False)

    @functools.partial(jax.jit, static_argnums=3)
    def program(x, kernel, a, defining):
        residual = a * a * 1.1
        e = Epilogue(epilogue.scale, epilogue.shift, residual, epilogue.activation)
        conv = functools.partial(jaxdw.depthwise_conv, x, kernel, method="taps")
        return residual, defined(conv, e, np.float32, 2) if defining else conv(epilogue=e)

    residual, y = program(x, kernel, a, False)
    alone = Epilogue(epilogue.scale, epilogue.shift, residual, epilogue.activation)
    expected = np.asarray(jaxdw.depthwise_conv(x, kernel, method="taps", epilogue=alone))
    assert same_bits(np.asarray(y), expected).all()
    assert same_bits(np.asarray(program(x, kernel, a, True)[1]), expected).all()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("parts", PARTS)
def test_derivatives_are_those_of_the_definition(parts, x64, seed):
    rng = np.random.default_rng(seed)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(s)) for s in ((2, 5, 6, 4), (3, 3, 1, 4), (4,)))
    epilogue = drawn(rng, (2, 5, 6, 4), np.float64, parts, special=False)

    def conv(x, kernel, bias, epilogue):
        return jaxdw.depthwise_conv(x, kernel, bias, method="taps", epilogue=epilogue)

    def definition(x, kernel, bias, epilogue):
        return defined(functools.partial(jaxdw.depthwise_conv, x, kernel, bias, method="taps"), epilogue, np.float64, 2)

    def pulled(f, primals, cotangent):
        y, pull = jax.vjp(f, *primals)
        return y, pull(cotangent)

    primals, cotangent = (x, kernel, bias, epilogue), jnp.asarray(rng.standard_normal((2, 5, 6, 4)))
    of_both = (jax.jit(functools.partial(pulled, f))(primals, cotangent) for f in (conv, definition))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, of_both)))
    if parts[2] is None:  # the others have corners
        check_grads(conv, primals, order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("mapped", ["x", "x and residual", "kernel", "scale", "residual"])
def test_vmap_is_a_loop(mapped, seed):
    rng = np.random.default_rng(seed)
    x, kernel, bias = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 5, 6, 4), (3, 3, 1, 4), (4,)))
    epilogue = drawn(rng, x.shape, np.float32, (True, True, "relu6"), special=False)
    operands = [x, kernel, bias, epilogue.scale, epilogue.shift, epilogue.residual]
    axes = [None] * 6
    for number, name in enumerate(["x", "kernel", "bias", "scale", "shift", "residual"]):
        if name in mapped.split(" and "):
            axes[number] = 1
            operands[number] = jnp.stack([operands[number] * (i + 1) for i in range(3)], axis=1)

    def conv(x, kernel, bias, *arrays):
        return jaxdw.depthwise_conv(x, kernel, bias, method="taps", epilogue=Epilogue(*arrays, "relu6"))

    result = jax.jit(jax.vmap(conv, in_axes=axes))(*operands)
    for i in range(3):
        one = [a if axis is None else a[:, i] for a, axis in zip(operands, axes)]
        assert same_bits(np.asarray(result[i]), np.asarray(conv(*one))).all()


def test_a_linear_epilogue_can_be_transposed(seed):
    rng = np.random.default_rng(seed)
    x, kernel = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 5, 6, 4), (3, 3, 1, 4)))
    a = jnp.asarray(rng.standard_normal(x.shape, np.float32))
    f = lambda x, a: jaxdw.depthwise_conv(x, kernel, method="taps", epilogue=Epilogue(residual=a))  # noqa: E731
    assert all((i == j).all() for i, j in zip(jax.linear_transpose(f, x, a)(x), jax.vjp(f, x, a)[1](x)))


@pytest.mark.skipif(not is_available(), reason="XLA computes without the kernels")
def test_the_kernels_compute_it_in_the_same_pass():
    x, kernel = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 1, 4))
    epilogue = Epilogue(jnp.ones(4), jnp.ones(4), jnp.ones((1, 8, 9, 4)), "hard_swish")
    text = jax.jit(jaxdw.depthwise_conv).lower(x, kernel, epilogue=epilogue).as_text()
    assert text.count("@jaxdw_conv(") == 1 and "multiply" not in text and "maximum" not in text


def test_arrays_of_no_size_have_an_epilogue():
    epilogue = Epilogue(shift=jnp.full(4, -1.0), activation="relu")
    assert jaxdw.depthwise_conv(jnp.ones((0, 5, 6, 4)), jnp.ones((3, 3, 1, 4)), epilogue=epilogue).shape == (0, 5, 6, 4)
    bias = jnp.full(4, 3.0)
    y = jaxdw.depthwise_conv(jnp.ones((1, 0, 4)), jnp.ones((3, 1, 4)), bias, padding=2, epilogue=epilogue)
    assert (y == 2).all() and y.shape == (1, 2, 4)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "epilogue, error, message",
    [
        ("relu", TypeError, "`epilogue` is a str, expected a `jaxdw.Epilogue` or None"),
        (
            Epilogue(activation="gelu"),
            ValueError,
            "`epilogue.activation` is 'gelu', expected one of relu, relu6, hard_swish, hard_sigmoid, silu",
        ),
        (Epilogue(scale=ones(4)), ValueError, r"`epilogue.scale` has shape \(4,\), expected \(8,\)"),
        (Epilogue(shift=2.0), TypeError, "`epilogue.shift` is a float, expected a JAX or NumPy array"),
        (Epilogue(shift=ones(8, dtype=int)), TypeError, "`epilogue.shift` has dtype int"),
        (
            Epilogue(residual=ones(1, 6, 6, 8)),
            ValueError,
            r"`epilogue.residual` has shape \(1, 6, 6, 8\), expected \(1, 5",
        ),
        (
            Epilogue(residual=jnp.ones((1, 5, 6, 8))),
            TypeError,
            "`epilogue.residual` has dtype float32, expected bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(epilogue, error, message):
    x, kernel = jnp.ones((1, 5, 6, 4), jnp.bfloat16), jnp.ones((3, 3, 1, 8), jnp.bfloat16)
    with pytest.raises(error, match=message):
        jaxdw.depthwise_conv(x, kernel, epilogue=epilogue)
    for name, statistics in {"mean": (None, jnp.ones(4)), "var": (jnp.ones(4), None)}.items():
        with pytest.raises(TypeError, match=f"`{name}` is a NoneType, expected a JAX or NumPy array"):
            Epilogue.batch_norm(*statistics)
    with pytest.raises(ValueError, match=r"`epilogue\.activation` is array"):
        jaxdw.depthwise_conv(
            jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), epilogue=Epilogue(activation=np.array("a"))
        )
    with pytest.raises(ValueError, match=r"`var` has shape \(3,\), expected one number for each channel, as `mean`"):
        Epilogue.batch_norm(jnp.ones(4), jnp.ones(3))


@pytest.mark.parametrize("options", [{}, {"window_fn": lambda windows: windows * 2}, {"dtype": jnp.bfloat16}])
def test_both_modules_take_an_epilogue(options):
    x, epilogue = jnp.arange(2 * 5 * 6 * 4.0).reshape(2, 5, 6, 4), Epilogue(shift=jnp.ones(4), activation="relu6")
    layer = jaxdw.nnx.DepthwiseConv(4, (3, 3), rngs=nnx.Rngs(0), **options)
    twin = jaxdw.linen.DepthwiseConv(4, (3, 3), **options)
    parameters = {"params": {"kernel": layer.kernel[...], "bias": layer.bias[...]}}
    wide = {**options, "preferred_element_type": np.float32}
    sums = jaxdw.nnx.DepthwiseConv(4, (3, 3), rngs=nnx.Rngs(0), **wide)(x)
    expected = epilogues.checked(epilogue, Call.of(x, layer.kernel[...])).apply(sums, 2, layer(x).dtype)
    assert (layer(x, epilogue=epilogue) == expected).all()
    assert (twin.apply(parameters, x, epilogue=epilogue) == expected).all()
