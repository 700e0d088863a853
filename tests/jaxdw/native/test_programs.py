"""The bits of a convolution and of its gradients in random programs, whatever comes before and after.

XLA cannot see into the calls of the kernels. So the output has the bits of docs/arithmetic.md for the operands that the
program itself returns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from bridge import Case
from bridge.numerics import same_bits
from jaxdw import native
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from jaxdw.lowerings.cpu_fused import in_memory
from tests import oracle
from tests.programs import release_programs

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

#: Tests, which pytest-xdist can run at once, and the programs in each, with --full.
PARTS, PROGRAMS = 20, 250


def _standardised(a):
    axes = tuple(range(a.ndim - 1))
    centred = a - a.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + 1e-5)


#: What computes new numbers of the same shape: XLA may compute them once for each loop that reads them.
COMPUTED = {
    "scaled and shifted": lambda a: a * 1.7 + 0.3,
    "centred": lambda a: a - a.mean(0, keepdims=True),
    "standardised": _standardised,
    "softmax": lambda a: jax.nn.softmax(a, -1),
    "residual": lambda a: a + a * a * 0.5,
    "hard swish": lambda a: a * jnp.clip(a + 3, 0, 6) / 6,
    "times its reverse": lambda a: a * a[::-1],
    "summed up": lambda a: jnp.cumsum(a, 0) * 0.7,
}

#: What moves numbers in an array of the same shape.
MOVED = {
    "channels reversed": lambda a, _: a[..., ::-1],
    "rolled": lambda a, _: jnp.roll(a, 1, 0),
    "channels gathered": lambda a, rng: a[..., rng.integers(0, a.shape[-1], a.shape[-1])],
    "rows gathered": lambda a, rng: jnp.take(a, rng.integers(0, a.shape[1], a.shape[1]), axis=1),
    "first row everywhere": lambda a, _: jnp.broadcast_to(a[:, :1], a.shape),
    "first channel everywhere": lambda a, _: jnp.broadcast_to(a[..., :1], a.shape),
    "channels repeated and cut": lambda a, _: jnp.repeat(a, 2, -1)[..., : a.shape[-1]],
}

#: What makes an array of another shape.
RESHAPED = {
    "channels repeated": lambda a, _: jnp.repeat(a, 2, -1),
    "padded with zeros": lambda a, rng: jnp.pad(a, _widths(a, rng)),
    "padded with the border": lambda a, rng: jnp.pad(a, _widths(a, rng), mode="edge"),
    "rows cut off": lambda a, _: a[:, a.shape[1] // 3 :],
    "every second row": lambda a, _: a[:, ::2],
    # in memory: XLA stores it in two layouts, for the kernels and for whoever reads it next, and computes it for each
    "axes exchanged": lambda a, _: in_memory(jnp.swapaxes(a, 1, -1))[0],
    "stacked": lambda a, _: jnp.concatenate([a, -a], 0),
    "one channel": lambda a, _: a[..., -1:],
}


def _widths(a, rng):
    return [(0, 0), *((int(low), int(high)) for low, high in rng.integers(0, 3, (a.ndim - 2, 2))), (0, 0)]


def steps(rng, kinds, most):
    """Draw up to `most` functions of these kinds, by name; those that move numbers draw as they did at first."""
    drawn = {}
    for _ in range(rng.integers(0, most + 1)):
        kind = kinds[rng.integers(len(kinds))]
        name = list(kind)[rng.integers(len(kind))]
        draws = int(rng.integers(2**32))
        step = kind[name]
        drawn[name] = step if kind is COMPUTED else lambda a, step=step, n=draws: step(a, np.random.default_rng(n))
    return drawn


def applied(drawn, a):
    return functools.reduce(lambda a, step: step(a), drawn.values(), a)


@dataclasses.dataclass
class Program:
    """Operands, what the program does to them, and the arguments of its convolution."""

    operands: list[np.ndarray]
    before: list[dict]
    moved: dict
    after: dict
    options: dict

    def __call__(self, *operands):
        x, kernel, *bias = map(applied, self.before, operands)
        y, pull = jax.vjp(lambda x, kernel: self.conv(x, kernel, *bias), x, kernel)
        dy = applied(self.after, y)
        return (x, kernel, *bias), applied(self.moved, y), dy, pull(dy)

    def conv(self, x, kernel, bias=None):
        return jaxdw.depthwise_conv(x, kernel, bias, method="taps", **self.options)


def random_program(rng) -> Program:
    """Draw ranks 1 to 3, channels from 1, multipliers 1 to 3, every padding; a third has subnormal numbers."""
    rank, multiplier = (int(rng.integers(1, 4)) for _ in range(2))
    channels = int(rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 16, 17, 24, 40]))
    spatial = rng.integers(1, {1: 40, 2: 14, 3: 7}[rank], rank)
    subnormal = rng.random() < 1 / 3
    changes = (COMPUTED, MOVED, RESHAPED)
    scale = [2.0**-70, 2.0**-72, 2.0**-140] if subnormal else [1] * 3
    if subnormal and rng.random() < 1 / 2:
        changes = changes[1:]

    def array(shape, scale):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    x = array((rng.integers(1, 4), *spatial, channels), scale[0])
    before = steps(rng, changes, 3)
    shape = jax.eval_shape(functools.partial(applied, before), x).shape
    kernel_shape = (*map(int, rng.integers(1, {1: 8, 2: 6, 3: 4}[rank], rank)), 1, shape[-1] * multiplier)
    options = random_options(rng, shape, kernel_shape)
    operands = [x, array(kernel_shape, scale[1])]
    of_each = [before, steps(rng, changes[: len(changes) - 1], 2)]
    if rng.random() < 1 / 2:
        operands.append(array(kernel_shape[-1:], scale[2]))
        of_each.append(steps(rng, [COMPUTED], 1))
    return Program(operands, of_each, steps(rng, (MOVED, RESHAPED), 2), steps(rng, (COMPUTED, MOVED), 2), options)


def random_options(rng, x_shape, kernel_shape):
    rank = len(kernel_shape) - 2
    while True:
        draw = lambda high: tuple(map(int, rng.integers(1, high + 1, rank)))  # noqa: E731
        options = {"strides": draw(3), "kernel_dilation": draw(2)}
        kind = rng.integers(4)
        if kind == 0:
            options["padding"] = str(rng.choice(["SAME", "SAME_LOWER", "VALID"]))
        elif kind == 1:
            options["padding"] = str(rng.choice(["CIRCULAR", "REFLECT"]))
        else:
            options["padding"] = [tuple(map(int, pair)) for pair in rng.integers(0, 5, (rank, 2))]
            options["input_dilation"] = draw(3) if kind == 2 else (1,) * rank
        try:
            geometry = Geometry.of(x_shape, kernel_shape, **options)
        except ValueError:  # the padding does not fit
            continue
        if not geometry.is_empty and 0 not in geometry.output_shape:
            return options


def expected_output(operands, options):
    """Return y as docs/arithmetic.md defines it; XLA, which adds a bias that comes last, flushes subnormal numbers."""
    case = Case(*operands, **options)
    if case.bias is None or bias_comes_first(case.geometry):
        return oracle.fma_chain(case, bias_first=True)
    chain = oracle.fma_chain(case.replace(bias=None), bias_first=False)
    return flushed(flushed(chain) + flushed(case.bias))


def flushed(a):
    return np.where(abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_surrounding_program_changes_a_bit(part, seed, full):
    for number in range(PROGRAMS if full else 1):
        check_program([seed, part, number])
        if number % 100 == 99:
            release_programs()


def test_a_program_that_exchanges_axes_keeps_every_bit():
    check_program([198300961, 4, 0])


def check_program(seed):
    program = random_program(np.random.default_rng(seed))
    (x, kernel, *bias), moved, dy, gradients = jax.jit(program.__call__)(*program.operands)
    y = expected_output(jax.tree.map(np.asarray, (x, kernel, *bias)), program.options)
    named = (seed, program, x.shape)
    assert same_bits(np.asarray(moved), np.asarray(applied(program.moved, jnp.asarray(y)))).all(), named
    alone = jax.vjp(functools.partial(program.conv, bias=bias[0] if bias else None), x, kernel)[1](dy)
    for a, b in zip(gradients, alone):
        assert same_bits(np.asarray(a), np.asarray(b)).all(), named


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["standardised", "centred"])
@pytest.mark.parametrize("mapped", [(None, 0, None), (1, None, None), (0, 1, 0), (2, 2, None), (3, 0, None)])
def test_what_vmap_reshapes_is_what_the_program_has(name, mapped, seed):
    """The mapped axis becomes one of channels: the kernels read what the program has, not what the reshape computes."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 12, 13, 32), (3, 5, 1, 32), (32,)]
    operands = [
        rng.standard_normal(shape if axis is None else (*shape[:axis], 4, *shape[axis:]), np.float32)
        for shape, axis in zip(shapes, mapped)
    ]

    def conv(x, kernel, bias):
        return jaxdw.depthwise_conv(x, kernel, bias, method="taps")

    @jax.jit
    def program(*operands):
        operands = tuple(map(COMPUTED[name], operands))
        y, pull = jax.vjp(jax.vmap(conv, in_axes=mapped), *operands)
        return operands, y, pull(y)

    operands, y, gradients = program(*operands)
    for i in range(4):
        one = [np.asarray(a if axis is None else jnp.take(a, i, axis)) for a, axis in zip(operands, mapped)]
        assert same_bits(np.asarray(y[i]), expected_output(one, {})).all()
    alone = jax.vjp(jax.vmap(conv, in_axes=mapped), *operands)[1](y)
    for a, b in zip(gradients[:2], alone):
        assert same_bits(np.asarray(a), np.asarray(b)).all()


@pytest.mark.parametrize("multiplier, padding", [(3, "SAME"), (1, "REFLECT"), (1, "CIRCULAR"), (2, "CIRCULAR")])
def test_what_a_copy_of_x_reads_is_what_the_program_has(multiplier, padding, seed):
    """The kernels read a copy with the channels repeated or the padding in it; XLA fused what computes x with it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 12, 13, 17)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 1, 17 * multiplier)).astype(np.float32)
    program = Program([x, kernel], [{"standardised": _standardised}] * 2, {}, {}, {"padding": padding})
    (x, kernel), y, _, _ = jax.jit(program.__call__)(*program.operands)
    expected = expected_output((np.asarray(x), np.asarray(kernel)), program.options)
    assert same_bits(np.asarray(y), expected).all()
