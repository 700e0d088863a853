"""Networks whose every rounding is defined: the bits that the repository keeps, and what may not change them."""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bridge.accumulation.arithmetic import Accumulator
from bridge.numerics import FLOAT32, same_bits
from jaxdw import SumOrder, models, native, ordered_conv
from jaxdw.epilogue import relu6
from jaxdw.models import Arithmetic, with_arithmetic
from jaxdw.models.layers import Conv, GlobalAveragePool, Linear
from tests.jaxdw.models import logits
from tests.jaxdw.native import arrays
from tests.jaxdw.native.test_matmul import random_order

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

ROOT = pathlib.Path(__file__).parents[3]
KEPT = pathlib.Path(__file__).parent / "logits.txt"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("isa", arrays.isas() if native.is_available() else ())
def test_every_instruction_set_gives_the_logits_that_the_repository_keeps(isa, seed, full):
    """`logits.txt` has a SHA-256 for each of the four networks.

    All but the widest instruction set use one thread, and in a sample they compute one network.
    """
    environment = {**os.environ, "JAXDW_ISA": isa, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    networks = logits.NETWORKS if full or isa == arrays.isas()[-1] else logits.NETWORKS[seed % 4 :][:1]
    program = [sys.executable, logits.__file__, *networks, *(["alone"] if isa != arrays.isas()[-1] else [])]
    printed = subprocess.run(program, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in printed.splitlines()] == list(networks)
    assert set(printed.splitlines()) <= set(KEPT.read_text().splitlines())


def test_neither_the_batch_nor_the_surrounding_program_changes_a_bit(seed):
    name = logits.NETWORKS[seed % 4]
    model, images = logits.network(name, arithmetic="jaxdw")
    whole = np.asarray(logits.run(model, images))
    one = np.concatenate([logits.run(model, images[number : number + 1]) for number in range(3)])
    mapped = nnx.jit(lambda model, images: jax.vmap(lambda image: model(image))(images))(model, images)
    scaled = nnx.jit(lambda model, images: model(images * 2) * 2)(model, images / 2) / 2
    assert all(same_bits(np.asarray(other), whole).all() for other in (one, mapped, scaled))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_a_view_in_another_arithmetic_shares_the_parameters(name):
    model, images = logits.network(name)
    ours = with_arithmetic(model, "jaxdw")
    plain, defined = np.asarray(logits.run(model, images)), np.asarray(logits.run(ours, images))
    assert not same_bits(plain, defined).all()
    assert same_bits(np.asarray(logits.run(with_arithmetic(ours, None), images)), plain).all()
    ours.classifier.bias[...] += 1
    assert (model.classifier.bias[...] == ours.classifier.bias[...]).all()


def layers(model):
    found = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {path: each for path, each in found.items() if isinstance(each, (Linear, Conv, GlobalAveragePool))}


def orders(model, rng, pixels):
    """A random order for each layer. `pixels` is of a mean, by its path."""
    found = {}
    for path, layer in layers(model).items():
        if isinstance(layer, GlobalAveragePool):
            found[path] = random_order(rng, pixels[path], False)
        else:
            found[path] = random_order(rng, math.prod(layer.kernel.shape[:-1]), False)
    return found


#: Pixels of the means of `mobilenet_v3_small` for images of 64x64.
PIXELS = {"mean": 4, "blocks.0.squeeze_excite.mean": 256, "blocks.3.squeeze_excite.mean": 16}
PIXELS |= {f"blocks.{i}.squeeze_excite.mean": 16 for i in (4, 5, 6, 7)}
PIXELS |= {f"blocks.{i}.squeeze_excite.mean": 4 for i in (8, 9, 10)}


def test_every_layer_adds_in_the_order_that_is_given(seed):
    """The program of the network has the bits of its operations, run one by one in NumPy's float32."""
    model, images = logits.network("mobilenet_v3_small")
    given = orders(model, np.random.default_rng(seed), PIXELS)
    actual = logits.run(with_arithmetic(model, Arithmetic(given)), images)
    expected = InNumPy(given).network(model, np.asarray(images))
    assert same_bits(np.asarray(actual), expected).all()


class InNumPy:
    """The oracle: a network of `jaxdw.models` step by step, in the order of docs/arithmetic.md."""

    def __init__(self, given):
        self.orders, self.float32 = given, Accumulator(FLOAT32)

    def product(self, path, x, w, bias=None):
        """The program of an order, for all rows of x at once."""
        flat, stack = x.reshape(-1, x.shape[-1]), []
        for step in self.orders[path].steps:
            if step == -1:
                stack[-2:] = [stack[-2] + stack[-1]]
            elif step < 0:
                stack.append(np.zeros((len(flat), w.shape[1]), np.float32))
            elif step % 2:
                stack[-1] = self.float32.fma(flat[:, step // 2, None], w[step // 2], stack[-1])
            else:
                stack.append(flat[:, step // 2, None] * w[step // 2])
        y = stack[0] if bias is None else stack[0] + bias
        return y.reshape(*x.shape[:-1], w.shape[1])

    def conv(self, path, layer, x):
        kernel = np.asarray(layer.kernel[...])
        if isinstance(layer, Linear):
            return self.product(path, x, kernel)
        height, width = kernel.shape[:2]
        (pad, _), stride = np.broadcast_to(layer.padding, 2), np.broadcast_to(layer.strides, 2)[0]
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))[:, ::stride, ::stride]
        windows = np.moveaxis(windows, 3, 5)  # images, rows, columns, taps, channels
        if isinstance(layer, Conv):
            return self.product(path, windows.reshape(*windows.shape[:3], -1), kernel.reshape(-1, kernel.shape[-1]))
        total = np.zeros((*windows.shape[:3], kernel.shape[-1]), np.float32)
        for i in range(height):
            for j in range(width):
                total = self.float32.fma(windows[..., i, j, :], kernel[i, j, 0], total)
        return total

    def unit(self, path, unit, x, residual=None):
        y, norm = self.conv(f"{path}.conv", unit.conv, x), unit.norm
        mean, var, weight, bias = (np.asarray(v[...]) for v in (norm.mean, norm.var, norm.scale, norm.bias))
        scale = np.float32(1) / np.sqrt(var + np.float32(norm.epsilon)) * weight
        y = self.float32.fma(y, scale, self.float32.fma(-mean, scale, bias))
        y = y if residual is None else y + residual
        return y if unit.activation is None else self.activation(unit.activation, y)

    def activation(self, function, y):
        if function is nnx.relu:
            return np.where(y < 0, np.float32(0), y)
        clipped = np.clip(y + np.float32(3), np.float32(0), np.float32(6))
        return (clipped if function is nnx.hard_sigmoid else y * clipped) / np.float32(6)

    def mean(self, path, x):
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        ones = np.ones((1, pixels.shape[1]), np.float32)
        return np.stack([self.product(path, ones, image)[0] for image in pixels]) / np.float32(pixels.shape[1])

    def linear(self, path, layer, x):
        return self.product(path, x, np.asarray(layer.kernel[...]), np.asarray(layer.bias[...]))

    def network(self, model, x):
        x = self.unit("stem", model.stem, x)
        for number, block in enumerate(model.blocks):
            path, given = f"blocks.{number}", x
            x = x if block.expand is None else self.unit(f"{path}.expand", block.expand, x)
            x = self.unit(f"{path}.depthwise", block.depthwise, x)
            if block.squeeze_excite is not None:
                x = self.squeeze_excite(f"{path}.squeeze_excite", block.squeeze_excite, x)
            x = self.unit(f"{path}.project", block.project, x, given if block.residual else None)
        x = self.mean("mean", self.unit("head", model.head, x))
        x = self.activation(model.architecture.activation, self.linear("hidden", model.hidden, x))
        return self.linear("classifier", model.classifier, x)

    def squeeze_excite(self, path, module, x):
        gate = self.linear(f"{path}.reduce", module.reduce, self.mean(f"{path}.mean", x))
        gate = self.linear(f"{path}.expand", module.expand, self.activation(module.activation, gate))
        return x * self.activation(module.gate, gate)[:, None, None]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_dtypes_have_an_arithmetic_too(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        model, images = logits.network("mobilenet_v2", arithmetic="jaxdw", dtype=dtype)
        y = logits.run(model, images)
        assert y.dtype == dtype and jnp.isfinite(y).all()
        assert same_bits(np.asarray(y)[:1], np.asarray(logits.run(model, images[:1]))).all()


def test_a_convolution_has_the_derivatives_of_its_values(seed):
    rng = np.random.default_rng(seed)
    x, kernel = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in ((2, 7, 8, 3), (3, 3, 3, 4)))

    def squares(conv):
        return jax.grad(lambda x, kernel: (conv(x, kernel) ** 2).sum(), (0, 1))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), [(1, 1)] * 2, rhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return ordered_conv(x, kernel, strides=2, padding=1, kernel_dilation=2, order=SumOrder.blocks((9, 27)))

    assert np.array_equal(ours(x, kernel), plain(x, kernel))
    for one, other in zip(squares(ours)(x, kernel), squares(plain)(x, kernel)):
        assert np.array_equal(one, other)


def small(**changes):
    return nnx.eval_shape(lambda: models.mobilenet_v3_small(10, width=0.35, rngs=nnx.Rngs(0), **changes))


def complete(changes=None):
    model = small()
    return Arithmetic(orders(model, np.random.default_rng(0), PIXELS) | (changes or {}))


def without(path):
    return Arithmetic({name: order for name, order in complete().orders.items() if name != path})


def with_an_own_activation():
    model = small()
    model.blocks[1].depthwise.activation = jnp.tanh
    return model


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(arithmetic="torch"), "`arithmetic` is 'torch', expected 'jaxdw', a `jaxdw.models.Arithmetic`"),
        (lambda: small(arithmetic=without("stem.conv")), "has no order for stem.conv; expected one for every layer"),
        (lambda: small(arithmetic=complete({"tail": SumOrder.chain(3)})), "has tail, which are no layers"),
        (lambda: small(arithmetic=complete({"hidden": SumOrder.chain(3)})), r"\['hidden'\]` has 3 terms, expected"),
        (
            lambda: small(arithmetic=complete({"stem.conv": SumOrder.chain(27, bias_first=True)})),
            r"\['stem.conv'\]` has a bias, and the layer has none",
        ),
        (
            lambda: small(arithmetic=complete({"mean": SumOrder.chain(4, bias_first=True)})),
            r"\['mean'\]` has a bias, and a mean has none",
        ),
        (lambda: small(arithmetic="jaxdw", method="grouped"), "`method` is 'grouped' at 'blocks.0.depthwise.conv'"),
        (lambda: with_arithmetic(with_an_own_activation(), "jaxdw"), "blocks.1.depthwise.activation` is .*tanh"),
        (lambda: with_arithmetic(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "jaxdw"), "whose arithmetic is not defined"),
        (lambda: with_arithmetic(relu6, "jaxdw"), "`model` is a function, expected a model"),
        (lambda: Arithmetic([SumOrder.chain(3)]), "`orders` is a list, expected a mapping"),
        (lambda: Arithmetic({"mean": (1, 2)}), r"`orders\['mean'\]` is a tuple, expected a `jaxdw.SumOrder`"),
    ],
)
def test_what_has_no_arithmetic_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_training_with_an_arithmetic_is_an_error_where_an_activation_is_not_defined():
    model, images = logits.network("mobilenet_v3_small", arithmetic="jaxdw")
    model.train()
    with pytest.raises(ValueError, match=r"`arithmetic` has .*hard_swish.* in inference alone"):
        model(images)
    block = nnx.eval_shape(lambda: small(arithmetic="jaxdw")).blocks[0]
    block.train()
    with pytest.raises(ValueError, match="`arithmetic` has squeeze-and-excite in inference alone"):
        nnx.eval_shape(lambda block, x: block(x), block, jnp.ones((2, 8, 8, 8)))


def test_images_of_another_size_than_an_order_of_a_mean_are_an_error():
    model, images = logits.network("mobilenet_v3_small", arithmetic=complete())
    with pytest.raises(ValueError, match="`order` has 256 terms, expected 64"):
        model(images[:, :32, :32])


def test_arithmetics_are_equal_where_their_orders_are():
    assert complete() == complete() and hash(complete()) == hash(complete())
    assert complete() != complete({"stem.conv": SumOrder.blocks((9, 27))})
    assert dataclasses.replace(complete()) == complete()
