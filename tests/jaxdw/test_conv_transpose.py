"""The transposed convolution: PyTorch's and Flax's arguments, their order of the sum, derivatives, layers, errors."""

import dataclasses
import itertools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from hypothesis import given

import jaxdw
import jaxdw.linen
import jaxdw.nnx
from jaxdw import native
from tests import oracle
from tests.jaxdw.test_derivatives import whole_numbers

CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and arguments; prints as something to paste."""

    batch: tuple
    spatial: tuple
    channels: int
    multiplier: int
    kernel_size: tuple
    strides: tuple
    padding: tuple
    output_padding: tuple
    kernel_dilation: tuple
    bias: bool
    seed: int

    @property
    def options(self):
        names = ("strides", "padding", "output_padding", "kernel_dilation")
        return {name: getattr(self, name) for name in names}

    def arrays(self, draw=np.random.Generator.standard_normal, dtype=np.float32):
        """(x, kernel, bias or None)."""
        rng = np.random.default_rng(self.seed)
        features = self.channels * self.multiplier
        shapes = ((*self.batch, *self.spatial, self.channels), (*self.kernel_size, 1, features), (features,))
        x, kernel, bias = (np.asarray(draw(rng, size=shape)).astype(dtype) for shape in shapes)
        return x, kernel, bias if self.bias else None

    def terms(self, x, kernel):
        """Each tap's outputs, as slices, and its products there, in the raster order of the kernel."""
        for tap in np.ndindex(self.kernel_size):
            inputs, outputs = [], []
            for n, out, t, s, d, p in zip(
                self.spatial, self.outputs, tap, self.strides, self.kernel_dilation, self.padding
            ):
                at = np.arange(n) * s + t * d - p
                inputs.append(np.flatnonzero((at >= 0) & (at < out)))
                outputs.append(at[(at >= 0) & (at < out)])
            lead = (slice(None),) * len(self.batch)
            wide = np.repeat(x, self.multiplier, axis=-1)
            yield lead + np.ix_(*outputs), wide[lead + np.ix_(*inputs)], kernel[(*tap, 0)]

    @property
    def outputs(self):
        sizes = zip(
            self.spatial, self.kernel_size, self.strides, self.padding, self.output_padding, self.kernel_dilation
        )
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, more, d in sizes)

    @property
    def zeros(self):
        return np.zeros((*self.batch, *self.outputs, self.channels * self.multiplier))

    def of_torch(self, x, kernel, bias):
        """`F.conv_transpose1d`, `2d` or `3d`, in PyTorch's layout and back."""
        flat = x.reshape(-1, *x.shape[len(self.batch) :])
        weight = np.moveaxis(kernel[..., 0, :], -1, 0).reshape(self.channels, self.multiplier, *self.kernel_size)
        y = CONV_TRANSPOSE[len(self.spatial) - 1](
            torch.tensor(np.moveaxis(flat, -1, 1)),
            torch.tensor(weight),
            None if bias is None else torch.tensor(bias),
            self.strides,
            self.padding,
            self.output_padding,
            self.channels,
            self.kernel_dilation,
        )
        return np.moveaxis(y.numpy(), 1, -1).reshape(self.zeros.shape)


@st.composite
def problems(draw, plain=False):
    """Any problem, or a plain one: 1-D or 2-D, several channels, no channel multiplier, no kernel dilation."""
    rank = draw(st.integers(1, 2 if plain else 3))
    cap = {1: 12, 2: 7, 3: 4}[rank]
    axes = lambda low, high: st.tuples(*[st.integers(low, high)] * rank)  # noqa: E731
    kernel_size, strides = draw(axes(1, {1: 7, 2: 5, 3: 3}[rank])), draw(axes(1, 3))
    dilation = draw(st.just((1,) * rank) if plain else st.one_of(st.just((1,) * rank), axes(1, 3)))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    problem = Problem(
        batch=tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        spatial=draw(axes(1, cap)),
        channels=draw(st.integers(1 + plain, 9 + 16 * plain)),
        multiplier=1 if plain else draw(st.sampled_from([1, 1, 2, 3])),
        kernel_size=kernel_size,
        strides=strides,
        padding=tuple(draw(st.integers(0, span)) for span in spans),
        output_padding=tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(strides, dilation)),
        kernel_dilation=dilation,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    hypothesis.assume(min(problem.outputs) > 0)
    return problem


def expected(problem, x, kernel, bias):
    """The loop over inputs and taps, in float64."""
    y, magnitude = problem.zeros, problem.zeros
    for at, value, weight in problem.terms(x.astype(np.float64), kernel.astype(np.float64)):
        y[at] += value * weight
        magnitude[at] += abs(value * weight)
    if bias is not None:
        y, magnitude = y + bias.astype(np.float64), magnitude + abs(bias.astype(np.float64))
    return oracle.Expected(y, magnitude, int(np.prod(problem.kernel_size)) + (bias is not None))


def chain(problem, x, kernel, bias):
    """One chain of fused multiply-adds over the taps of the kernel in raster order, and then the bias; float32."""
    y = problem.zeros.astype(np.float32)
    for at, value, weight in problem.terms(x, kernel):
        y[at] = oracle.fma(value, np.broadcast_to(weight, value.shape), y[at])
    return y if bias is None else y + bias


def test_it_is_the_loop_and_pytorch_in_every_dtype(full):
    """In float32 it is one chain."""

    @hypothesis.settings(max_examples=500 if full else 15)
    @given(problems(), st.sampled_from([np.float32, np.float32, np.float16, ml_dtypes.bfloat16]))
    def check(problem, dtype):
        x, kernel, bias = problem.arrays(dtype=dtype)
        reference = expected(problem, x, kernel, bias)
        y = np.asarray(jaxdw.depthwise_conv_transpose(x, kernel, bias, method="taps", **problem.options))
        assert y.dtype == dtype and y.shape == reference.y.shape
        assert (abs(y.astype(np.float64) - reference.y) <= reference.bound(dtype)).all()
        if dtype != np.float32:
            return
        assert np.array_equal(y, chain(problem, x, kernel, bias))
        of_torch = problem.of_torch(x, kernel, bias)
        assert (abs(of_torch - reference.y) <= reference.bound(dtype)).all()

    check()


def test_it_has_the_bits_of_pytorch_where_its_order_is_that_chain(full):
    """In 1-D and 2-D, with several channels, without a channel multiplier and without kernel dilation."""
    if "avx" not in native.status():
        pytest.skip("PyTorch has other kernels on this processor")

    @hypothesis.settings(max_examples=500 if full else 12)
    @given(problems(plain=True))
    def check(problem):
        x, kernel, bias = problem.arrays()
        y = np.asarray(jaxdw.depthwise_conv_transpose(x, kernel, bias, method="taps", **problem.options))
        assert np.array_equal(y, problem.of_torch(x, kernel, bias))

    check()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["auto", "taps", "rows", "grouped", "patches", "pallas"])
def test_every_method_and_derivative_is_exact_on_whole_numbers(method, full):
    """The gradients are those of PyTorch, in float64."""

    @hypothesis.settings(max_examples=(100 if full else 4) if method != "pallas" else 1)
    @given(problems())
    def check(problem):
        x, kernel, bias = problem.arrays(lambda rng, size: rng.integers(-3, 4, size))
        (dy,) = whole_numbers(problem.seed, problem.zeros.shape, dtype=np.float32)
        arrays = [x, kernel] if bias is None else [x, kernel, bias]

        def conv(*arrays):
            return jaxdw.depthwise_conv_transpose(*arrays, method=method, **problem.options)

        y, pullback = jax.vjp(jax.jit(conv), *arrays)
        leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
        flat = torch.movedim(leaves[0].reshape(-1, *x.shape[len(problem.batch) :]), -1, 1)
        weight = leaves[1][..., 0, :].movedim(-1, 0).reshape(problem.channels, -1, *problem.kernel_size)
        of_torch = CONV_TRANSPOSE[len(problem.spatial) - 1](
            flat.contiguous(),  # else its gradients may fail: "grad_weight needs to be contiguous"
            weight.contiguous(),
            leaves[2] if bias is not None else None,
            problem.strides,
            problem.padding,
            problem.output_padding,
            problem.channels,
            problem.kernel_dilation,
        )
        of_torch = torch.movedim(of_torch, 1, -1).reshape(y.shape)
        gradients = torch.autograd.grad(of_torch, leaves, torch.tensor(dy, dtype=torch.float64))
        assert np.array_equal(y, of_torch.detach().numpy())
        for ours, theirs in zip(pullback(dy), gradients):
            assert np.array_equal(ours, theirs.numpy())
        _, tangent = jax.jvp(conv, arrays, arrays)  # of a bilinear function: twice the value, but for the bias
        assert np.array_equal(tangent, 2 * np.asarray(y) - (0 if bias is None else bias))
        kernels = np.stack([kernel, 2 * kernel, -kernel])
        mapped = jax.vmap(conv, (None, 0, *[None] * (len(arrays) - 2)))(x, kernels, *arrays[2:])
        each = np.stack([conv(x, k, *arrays[2:]) for k in kernels])
        assert np.array_equal(mapped, each)

    check()


def test_it_is_the_gradient_by_x_of_the_convolution_with_the_same_arguments(seed):
    kernel, y, x = whole_numbers(seed, (3, 2, 1, 4), (2, 4, 2, 4), (2, 8, 7, 4), dtype=np.float32)
    options = {"strides": (2, 3), "padding": ((1, 0), (0, 1)), "kernel_dilation": (1, 2)}
    convolved, pullback = jax.vjp(lambda x: jaxdw.depthwise_conv(x, kernel, **options), x)
    assert convolved.shape == y.shape
    (dx,) = pullback(y)
    mine = jaxdw.depthwise_conv_transpose(y, kernel, output_padding=(0, 2), **options)
    assert mine.shape == dx.shape and np.array_equal(mine, dx)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
def test_words_and_transpose_kernel_are_those_of_flax(padding, seed, full):
    rng = np.random.default_rng(seed)
    for _ in range(60 if full else 4):
        rank = int(rng.integers(1, 4))
        spatial, kernel_size, strides, dilation = (
            tuple(map(int, rng.integers(1, high, rank))) for high in ((7, 7, 5)[rank - 1], 6 - rank, 4, 3)
        )
        transpose_kernel, multiplier = bool(rng.integers(2)), int(rng.integers(1, 3))
        flax = nnx.ConvTranspose(
            1,
            multiplier,
            kernel_size,
            strides,
            padding=padding,
            kernel_dilation=dilation,
            transpose_kernel=transpose_kernel,
            rngs=nnx.Rngs(0),
        )
        x, kernel, bias = whole_numbers(
            int(rng.integers(2**31)), (2, *spatial, 1), (*kernel_size, 1, multiplier), (multiplier,), dtype=np.float32
        )
        flax.kernel[...] = np.swapaxes(kernel, -1, -2) if transpose_kernel else kernel
        flax.bias[...] = bias
        y = jaxdw.depthwise_conv_transpose(
            x,
            kernel,
            bias,
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            transpose_kernel=transpose_kernel,
        )
        theirs = flax(x)
        assert y.shape == theirs.shape and np.array_equal(y, theirs), (spatial, kernel_size, strides, dilation)


def test_an_epilogue_follows_in_the_same_pass(seed):
    x, kernel, bias, residual = whole_numbers(seed, (2, 5, 4, 3), (3, 3, 1, 3), (3,), (2, 11, 9, 3), dtype=np.float32)
    y = jaxdw.depthwise_conv_transpose(x, kernel, bias, strides=2)
    epilogue = jaxdw.Epilogue(scale=jnp.full(3, 2.0), residual=jnp.asarray(residual), activation="relu")
    finished = jaxdw.depthwise_conv_transpose(x, kernel, bias, strides=2, epilogue=epilogue)
    assert np.array_equal(finished, np.maximum(2 * np.asarray(y) + residual, 0))


def test_sizes_may_be_symbolic(seed):
    x, kernel = whole_numbers(seed, (2, 5, 6, 3), (3, 2, 1, 3), dtype=np.float32)
    shape = jax.export.symbolic_shape("b, h, w, 3")

    def conv(x):
        return jaxdw.depthwise_conv_transpose(x, kernel, strides=2, padding=1, output_padding=1)

    exported = jax.export.export(jax.jit(conv))(jax.ShapeDtypeStruct(shape, np.float32))
    assert np.array_equal(exported.call(x), conv(x))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_layers_are_pytorchs(framework, seed):
    theirs = torch.nn.ConvTranspose2d(4, 8, (3, 2), (2, 3), (1, 0), (1, 1), groups=4, dilation=(1, 2))
    options = {"padding": (1, 0), "output_padding": (1, 1), "kernel_dilation": (1, 2), "channel_multiplier": 2}
    x = np.random.default_rng(seed).integers(-3, 4, (2, 5, 6, 4)).astype(np.float32)
    weight = np.random.default_rng(seed).integers(-3, 4, (4, 2, 3, 2)).astype(np.float32)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(weight))
        theirs.bias.copy_(torch.arange(8.0))
        of_size = theirs(torch.tensor(x).movedim(-1, 1), output_size=(9, 18)).movedim(1, -1)
        expected = theirs(torch.tensor(x).movedim(-1, 1)).movedim(1, -1)
    kernel = np.moveaxis(weight.reshape(8, 1, 3, 2), (0, 1), (-1, -2))
    if framework == "nnx":
        layer = jaxdw.nnx.DepthwiseConvTranspose(4, (3, 2), (2, 3), rngs=nnx.Rngs(0), **options)
        layer.kernel[...], layer.bias[...] = kernel, jnp.arange(8.0)
        run = layer
    else:
        layer = jaxdw.linen.DepthwiseConvTranspose(4, (3, 2), (2, 3), **options)
        shapes = jax.tree.map(jnp.shape, layer.init(jax.random.key(0), x)["params"])
        assert shapes == {"kernel": kernel.shape, "bias": (8,)}

        def run(x, **options):
            return layer.apply({"params": {"kernel": kernel, "bias": jnp.arange(8.0)}}, x, **options)

    assert np.array_equal(run(x), expected.numpy())
    assert np.array_equal(run(x, output_size=(9, 18)), of_size.numpy())
    with pytest.raises(ValueError, match=r"`output_size` is \(9, 30\), expected from \(9, 18\) to \(10, 20\)"):
        run(x, output_size=(9, 30))


def test_one_key_gives_both_layers_the_same_parameters():
    x = jnp.ones((1, 4, 4))
    nnx_layer = jaxdw.nnx.DepthwiseConvTranspose(4, (3,), rngs=nnx.Rngs(params=0), bias_init=nn.initializers.normal())
    linen_layer = jaxdw.linen.DepthwiseConvTranspose(4, (3,), use_bias=False)
    assert "bias" not in linen_layer.init(jax.random.key(0), x)["params"]
    assert nnx_layer.kernel.shape == (3, 1, 4) and nnx_layer.bias.shape == (4,)
    masked = jaxdw.nnx.DepthwiseConvTranspose(4, (3,), mask=jnp.zeros((3, 1, 4)), use_bias=False, rngs=nnx.Rngs(0))
    assert not masked(x).any()


X, KERNEL = np.zeros((1, 5, 5, 3), np.float32), np.zeros((3, 3, 1, 3), np.float32)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"strides": 0}, ValueError, "`strides` is 0, expected a positive int or 2 of them"),
        ({"padding": "CAUSAL"}, ValueError, "`padding` is 'CAUSAL', expected one of SAME, VALID, CIRCULAR, an int"),
        ({"padding": (1, 2, 3)}, ValueError, r"`padding` is \(1, 2, 3\), expected an int, 2 ints or 2 \(low, high\)"),
        ({"padding": 0.5}, TypeError, "`padding` is 0.5, expected"),
        ({"output_padding": 1}, ValueError, r"`output_padding` is 1, expected at most \(0, 0\): less than the stride"),
        ({"output_padding": -1, "strides": 2}, ValueError, "`output_padding` is -1, expected a non-negative int"),
        (
            {"output_padding": 1, "strides": 2, "padding": "SAME"},
            ValueError,
            "`output_padding` is 1 with `padding` 'SAME', expected 0: the word says how long the result is",
        ),
        ({"transpose_kernel": 1}, TypeError, "`transpose_kernel` is 1, expected True or False"),
        ({"method": "fast"}, ValueError, "`method` is 'fast', expected one of"),
        ({"kernel_dilation": "2"}, TypeError, "`kernel_dilation` is '2', expected integers"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_was_expected(options, error, said):
    with pytest.raises(error, match=said):
        jaxdw.depthwise_conv_transpose(X, KERNEL, **options)


@pytest.mark.parametrize(
    "x, kernel, said",
    [
        (X[0, 0, 0], KERNEL, r"`x` has shape \(3,\), expected \(\*batch, \*spatial, channels\)"),
        (X, np.zeros((3, 3, 3, 3), np.float32), r"`kernel` has shape \(3, 3, 3, 3\), expected \(3, 3, 1, 3\)"),
        (X, np.zeros((3, 3), np.float32), r"`kernel` has shape \(3, 3\), expected \(\*kernel_size, 1, features\)"),
        (X[:, :0], KERNEL, "'CIRCULAR' padding, expected at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, kernel, said):
    with pytest.raises(ValueError, match=said):
        jaxdw.depthwise_conv_transpose(x, kernel, padding="CIRCULAR" if x.size == 0 else 0)


def test_empty_batches_and_results_have_their_shapes():
    for batch, spatial in itertools.product([(), (0,), (2, 0)], [(0, 3), (4, 3)]):
        y = jaxdw.depthwise_conv_transpose(jnp.zeros((*batch, *spatial, 3)), KERNEL, jnp.ones(3), strides=2)
        sizes = tuple((n - 1) * 2 + 3 if n else 2 for n in spatial)
        assert y.shape == (*batch, *sizes, 3)
