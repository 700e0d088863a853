"""The causal convolution: the loop and PyTorch, streams, packed sequences, derivatives, layers, errors."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

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
from jaxdw import causal_primitive, native
from tests import oracle
from tests.jaxdw.test_derivatives import whole_numbers

needs_kernels = pytest.mark.skipif(not native.is_available(), reason=native.status())

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes and arguments; prints as something to paste."""

    batch: tuple
    length: int
    channels: int
    multiplier: int
    taps: int
    bias: bool
    seed: int

    def arrays(self, dtype=np.float32):
        """(x, kernel, bias or None, state)."""
        rng = np.random.default_rng(self.seed)
        features = self.channels * self.multiplier
        shapes = (
            (*self.batch, self.length, self.channels),
            (self.taps, 1, features),
            (features,),
            (*self.batch, self.taps - 1, self.channels),
        )
        x, kernel, bias, state = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        return x, kernel, bias if self.bias else None, state

    def ids(self, padded=False):
        """Ids of packed sequences, -1 for padding at the end of a row."""
        rng = np.random.default_rng(self.seed)
        ids = np.sort(rng.integers(0, 4, (*self.batch, self.length)), axis=-1).astype(np.int32)
        if padded:
            real = rng.integers(0, self.length + 1, self.batch)
            ids = np.where(np.arange(self.length) < real[..., None], ids, -1).astype(np.int32)
        return ids


@st.composite
def problems(draw, max_taps=7):
    return Problem(
        batch=tuple(draw(st.lists(st.integers(1, 3), max_size=2))),
        length=draw(st.integers(0, 20)),
        channels=draw(st.integers(1, 20)),
        multiplier=draw(st.integers(1, 2)),
        taps=draw(st.integers(1, max_taps)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def expected(x, kernel, bias=None, state=None, ids=None):
    """The loop in float64, of one row after the other; ids of x."""
    taps, features = kernel.shape[0], kernel.shape[-1]
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)[:, 0]
    before = np.zeros((*x.shape[:-2], taps - 1, x.shape[-1])) if state is None else state.astype(np.float64)
    inputs = np.concatenate([before, x], axis=-2)
    y, magnitude = np.zeros((*x.shape[:-1], features)), np.zeros((*x.shape[:-1], features))
    for row in np.ndindex(x.shape[:-2]):
        for t in range(x.shape[-2]):
            if ids is not None and ids[row][t] < 0:
                continue
            for k in range(taps):
                source = t + k - (taps - 1)
                if ids is not None and ids[row][max(source, 0)] != ids[row][t]:
                    continue
                product = np.repeat(inputs[row][t + k], features // x.shape[-1]) * kernel[k]
                y[row][t] += product
                magnitude[row][t] += abs(product)
            if bias is not None:
                y[row][t] += bias.astype(np.float64)
                magnitude[row][t] += abs(bias.astype(np.float64))
    return oracle.Expected(y, magnitude, taps + (bias is not None))


def same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    return actual.tobytes() == expected.tobytes()


def test_it_is_the_loop(full):
    @hypothesis.settings(max_examples=500 if full else 16)
    @given(problems(), st.sampled_from(DTYPES), st.sampled_from(["plain", "state", "packed", "packed, state"]))
    def check(problem, dtype, kind):
        x, kernel, bias, state = problem.arrays(dtype)
        ids = problem.ids(padded=True) if "packed" in kind else None
        state = state if "state" in kind else None
        reference = expected(x, kernel, bias, state, ids)
        with jax.enable_x64(dtype == np.float64):
            y = np.asarray(jaxdw.causal_conv1d(x, kernel, bias, state=state, segment_ids=ids))
        assert y.dtype == dtype and y.shape == reference.y.shape
        assert (abs(y.astype(np.float64) - reference.y) <= reference.bound(dtype)).all()

    check()


def test_it_has_the_bits_of_pytorch_without_a_channel_multiplier(full):
    if "avx" not in native.status():
        pytest.skip("PyTorch has other kernels on this processor")

    @hypothesis.settings(max_examples=500 if full else 12)
    @given(problems())
    def check(problem):
        # of one product PyTorch rounds it before it adds the bias
        hypothesis.assume(problem.length and problem.channels > 1 and problem.length * problem.taps > 1)
        problem = dataclasses.replace(problem, multiplier=1)
        x, kernel, bias, _ = problem.arrays()
        flat = torch.tensor(x.reshape(-1, *x.shape[-2:])).movedim(-1, 1).contiguous()
        weight = torch.tensor(kernel).permute(2, 1, 0).contiguous()
        padded = F.pad(flat, (problem.taps - 1, 0))
        y = F.conv1d(padded, weight, None if bias is None else torch.tensor(bias), groups=problem.channels)
        assert same_bits(jaxdw.causal_conv1d(x, kernel, bias), y.movedim(1, -1).contiguous().numpy().reshape(x.shape))

    check()


def streamed(chunks, state, *weights, ids=None, **options):
    """The outputs of consecutive calls, joined, and the last state."""
    ys = []
    for number, chunk in enumerate(chunks):
        own = None if ids is None else ids[number]
        y, state = jaxdw.causal_conv1d(chunk, *weights, state=state, segment_ids=own, return_state=True, **options)
        ys.append(np.asarray(y))
    return np.concatenate(ys, axis=-2), state


def test_streamed_in_chunks_of_any_lengths_it_has_the_bits_of_the_whole(full):
    @hypothesis.settings(max_examples=300 if full else 12)
    @given(problems(), st.sampled_from(DTYPES), st.sampled_from([None, "silu"]), st.booleans(), st.booleans())
    def check(problem, dtype, activation, from_zeros, zero_bias):
        x, kernel, bias, state = problem.arrays(dtype)
        if zero_bias and bias is not None:
            bias[::2] = -0.0
            x[..., :2, :] = 0
        rng = np.random.default_rng(problem.seed)
        cuts = sorted(rng.integers(0, problem.length + 1, rng.integers(0, 5)).tolist())
        state = None if from_zeros else state
        with jax.enable_x64(dtype == np.float64):
            y, last = jaxdw.causal_conv1d(x, kernel, bias, state=state, activation=activation, return_state=True)
            in_chunks = streamed(np.split(x, cuts, axis=-2), state, kernel, bias, activation=activation)
            steps, of_steps = [], jnp.zeros_like(last) if state is None else state
            for t in range(min(problem.length, 6)):
                one, of_steps = jaxdw.causal_conv1d_step(x[..., t, :], of_steps, kernel, bias, activation=activation)
                steps.append(one)
        assert same_bits(in_chunks[0], y) and same_bits(in_chunks[1], last)
        if steps:
            assert same_bits(jnp.stack(steps, axis=-2), y[..., : len(steps), :])

    check()


def test_without_compiled_kernels_a_stream_has_the_bits_of_the_whole(monkeypatch, seed):
    """The sums are XLA's; it computes SiLU too, with bits that may depend on the length."""
    monkeypatch.setattr("jaxdw.primitive.is_available", lambda: False)
    jax.clear_caches()
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 19, 9), np.float32), rng.standard_normal((4, 1, 9), np.float32)
    bias = rng.standard_normal(9).astype(np.float32)
    y = jaxdw.causal_conv1d(x, kernel, bias)
    for cuts in ([1, 2, 3, 11], [7], [0, 18]):
        assert same_bits(streamed(np.split(x, cuts, axis=-2), None, kernel, bias)[0], y)
    ids = np.repeat([[0, 1, 1, 2]], 2, axis=0).repeat([5, 1, 2, 11], axis=-1)
    packed = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=ids)
    alone = [jaxdw.causal_conv1d(part, kernel, bias) for part in np.split(x, [5, 8], axis=-2)]
    assert same_bits(packed, jnp.concatenate(alone, axis=-2))
    jax.clear_caches()


def test_a_packed_row_has_the_bits_of_its_sequences_alone_and_nothing_leaks(full):
    @hypothesis.settings(max_examples=200 if full else 5)
    @given(problems(), st.sampled_from(DTYPES), st.sampled_from([None, "silu"]))
    def check(problem, dtype, activation):
        x, kernel, bias, _ = problem.arrays(dtype)
        ids = problem.ids(padded=True)
        rng = np.random.default_rng(problem.seed)
        poisoned = int(rng.integers(-1, 4))
        x[ids == poisoned] = np.nan
        with jax.enable_x64(dtype == np.float64):
            y, state = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=ids, activation=activation, return_state=True)
            y, state = np.asarray(y), np.asarray(state)
            for row in np.ndindex(problem.batch):
                assert (y[row][ids[row] < 0] == 0).all()
                for name in set(ids[row].tolist()) - {-1}:
                    mine = x[row][ids[row] == name]
                    alone, last = jaxdw.causal_conv1d(mine, kernel, bias, activation=activation, return_state=True)
                    if name != poisoned:
                        assert same_bits(y[row][ids[row] == name], alone)
                if (real := ids[row][ids[row] >= 0]).size and real[-1] != poisoned:
                    _, last = jaxdw.causal_conv1d(x[row][ids[row] == real[-1]], kernel, bias, return_state=True)
                    assert same_bits(state[row], last)

    check()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint32])
def test_ids_of_every_integer_type_are_told_apart(dtype, seed):
    """Among them such as are equal, or negative, in 32 bits."""
    first = {np.uint8: 200, np.int64: 7, np.uint32: 2**31 + 1}[dtype]
    other = first + 2**32 if dtype == np.int64 else first + 1
    x, kernel = whole_numbers(seed, (10, 3), (4, 1, 3), dtype=np.float32)
    with jax.enable_x64(True):
        ids = np.array([first] * 4 + [other] * 6, dtype)
        y = jaxdw.causal_conv1d(x, kernel, segment_ids=ids)
    alone = [jaxdw.causal_conv1d(part, kernel) for part in (x[:4], x[4:])]
    assert np.array_equal(y, jnp.concatenate(alone))


def test_packed_and_ragged_chunks_have_the_bits_of_the_whole(full):
    """Ids of a chunk alone continue its first sequence from the state; with those of the state any cut is right."""

    @hypothesis.settings(max_examples=100 if full else 4)
    @given(problems())
    def check(problem):
        x, kernel, bias, _ = problem.arrays()
        ids, taps = problem.ids(), problem.taps
        cut = problem.seed % (problem.length + 1)
        whole, last = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=ids, return_state=True)
        first, state = jaxdw.causal_conv1d(x[..., :cut, :], kernel, bias, segment_ids=ids[..., :cut], return_state=True)
        if cut >= taps - 1:
            names = ids[..., cut - (taps - 1) :]
            second, end = jaxdw.causal_conv1d(
                x[..., cut:, :], kernel, bias, state=state, segment_ids=names, return_state=True
            )
            assert same_bits(jnp.concatenate([first, second], axis=-2), whole)
            assert same_bits(end, last) or cut == problem.length
        # rows of different lengths in one batch, each with its own state after its end
        ragged = problem.ids(padded=True)
        real = (ragged >= 0).sum(axis=-1)
        one = np.where(ragged >= 0, 0, -1)
        y, state = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=one, return_state=True)
        again, _ = jaxdw.causal_conv1d(x, kernel, bias, state=state, return_state=True)
        for row in np.ndindex(problem.batch):
            twice = np.concatenate([x[row][: real[row]], x[row]])
            expected = jaxdw.causal_conv1d(twice, kernel, bias)
            assert same_bits(np.concatenate([np.asarray(y)[row][: real[row]], np.asarray(again)[row]]), expected)

    check()


def test_every_derivative_is_exact_on_whole_numbers(full, monkeypatch):
    """Against the matrix of the linear map, which the loop gives."""

    @hypothesis.settings(max_examples=60 if full else 4)
    @given(problems(max_taps=5), st.booleans(), st.booleans(), st.booleans())
    def check(problem, packed, with_state, in_pieces):
        monkeypatch.setattr(causal_primitive, "WINDOW_BYTES", 1000 if in_pieces else 1 << 26)
        problem = dataclasses.replace(problem, batch=problem.batch[:1], length=min(problem.length, 8), channels=2)
        shapes = [a.shape for a in problem.arrays() if a is not None]
        arrays = whole_numbers(problem.seed, *shapes, dtype=np.float32)
        x, kernel, *rest = arrays
        bias, state = rest if problem.bias else (None, *rest)
        ids = problem.ids(padded=True) if packed else None
        given = {"x": x, "kernel": kernel, "bias": bias, "state": state if with_state else None}
        given = {name: array for name, array in given.items() if array is not None}

        def conv(given):
            more = {name: given.get(name) for name in ("bias", "state")}
            return jaxdw.causal_conv1d(given["x"], given["kernel"], **more, segment_ids=ids)

        def loop(**given):
            names = ("x", "kernel", "bias", "state")
            return expected(*(given.get(name) for name in names), ids).y

        y, pullback = jax.vjp(jax.jit(conv), given)
        assert np.array_equal(y, loop(**given))
        (dy,) = whole_numbers(problem.seed + 1, y.shape, dtype=np.float32)
        (gradients,) = pullback(dy)
        none = {name: np.zeros_like(array) for name, array in given.items()}
        for name, array in given.items():
            gradient = np.zeros(array.size)
            for number in range(array.size):
                moved = np.zeros_like(array)
                moved.flat[number] = 1
                at = {**given, name: moved}
                if name == "bias":
                    at = {**none, name: moved}
                elif name == "state":
                    at = {**none, "kernel": kernel, name: moved}
                elif "bias" in at:
                    at = {**at, "bias": none["bias"]}
                if name == "x" and with_state:
                    at = {**at, "state": none["state"]}
                gradient[number] = (loop(**at) * dy).sum()
            assert np.array_equal(np.asarray(gradients[name]).ravel(), gradient), name
        _, tangent = jax.jvp(conv, (given,), (given,))
        assert np.array_equal(tangent, 2 * np.asarray(y) - loop(**{**none, **({"bias": bias} if problem.bias else {})}))
        second = jax.grad(lambda given: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.vjp(conv, given)[1](dy))))(given)
        assert all(np.isfinite(np.asarray(each)).all() for each in jax.tree.leaves(second))

    check()


def test_gradients_through_chunks_are_those_of_the_whole(seed):
    x, kernel, bias, dy = whole_numbers(seed, (2, 13, 3), (4, 1, 6), (6,), (2, 13, 6), dtype=np.float32)

    def whole(x, kernel, bias):
        return jnp.sum(jaxdw.causal_conv1d(x, kernel, bias) * dy)

    def chunked(x, kernel, bias):
        ys, state = [], None
        for chunk in jnp.split(x, [2, 3, 9], axis=-2):
            y, state = jaxdw.causal_conv1d(chunk, kernel, bias, state=state, return_state=True)
            ys.append(y)
        return jnp.sum(jnp.concatenate(ys, axis=-2) * dy)

    for one, other in zip(jax.grad(whole, (0, 1, 2))(x, kernel, bias), jax.grad(chunked, (0, 1, 2))(x, kernel, bias)):
        assert np.array_equal(one, other)


def test_the_gradient_of_silu_is_that_of_jax(seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((2, 9, 3), np.float32), rng.standard_normal((4, 1, 3), np.float32)
    x[0, :4] = [[200.0], [-200.0], [0.0], [-80.0]]
    ours = jax.grad(lambda x: jaxdw.causal_conv1d(x, kernel, activation="silu").sum())(x)
    theirs = jax.grad(lambda x: jax.nn.silu(jaxdw.causal_conv1d(x, kernel)).sum())(x)
    assert np.isfinite(np.asarray(ours)).all() and np.array_equal(ours, theirs)


def test_silu_is_within_its_bound(seed):
    """exp is within 1.5 ULP, and two roundings follow; the sum 1 + exp keeps at most that."""
    z = np.concatenate([np.linspace(-87, 100, 4001), np.random.default_rng(seed).standard_normal(4000)])
    x = z.astype(np.float32)[:, None]
    y = np.asarray(jaxdw.causal_conv1d(x, np.ones((1, 1, 1), np.float32), activation="silu"))
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (abs(y - exact) <= 3.5 * 2.0**-23 * abs(exact)).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["taps", "rows", "grouped", "patches", "pallas"])
def test_every_method_agrees_on_whole_numbers(method, seed):
    x, kernel, bias, state = whole_numbers(seed, (2, 9, 3), (4, 1, 6), (6,), (2, 3, 3), dtype=np.float32)
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 2, -1]] * 2)
    for options in ({}, {"state": state}, {"segment_ids": ids}, {"state": state, "segment_ids": ids}):
        y = jaxdw.causal_conv1d(x, kernel, bias, method=method, **options)
        assert np.array_equal(y, expected(x, kernel, bias, options.get("state"), options.get("segment_ids")).y)


def test_vmap_maps_streams(seed):
    x, kernel, state = whole_numbers(seed, (3, 2, 9, 4), (4, 1, 4), (3, 2, 3, 4), dtype=np.float32)
    run = lambda x, state: jaxdw.causal_conv1d(x, kernel, state=state, return_state=True)  # noqa: E731
    for mapped, whole in zip(jax.vmap(run)(x, state), run(x, state)):
        assert np.array_equal(mapped, whole)


def test_sizes_may_be_symbolic(seed):
    x, kernel, state = whole_numbers(seed, (2, 9, 3), (4, 1, 3), (2, 3, 3), dtype=np.float32)
    b, t = jax.export.symbolic_shape("b, t")
    ids = np.array([[0] * 4 + [1] * 5] * 2, np.int32)
    for options in ({}, {"state": state}, {"segment_ids": ids}):
        shapes = {"state": (b, 3, 3), "segment_ids": (b, t)}
        given = {name: jax.ShapeDtypeStruct(shapes[name], array.dtype) for name, array in options.items()}

        def run(x, options):
            return jaxdw.causal_conv1d(x, kernel, return_state=True, **options)

        exported = jax.export.export(jax.jit(run))(jax.ShapeDtypeStruct((b, t, 3), np.float32), given)
        for symbolic, plain in zip(exported.call(x, options), run(x, options)):
            assert np.array_equal(symbolic, plain)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layers_stream(framework, dtype, seed):
    x = np.random.default_rng(seed).standard_normal((2, 9, 4), np.float32)
    options = {"channel_multiplier": 2, "activation": "silu", "dtype": dtype}
    if framework == "nnx":
        layer = jaxdw.nnx.CausalConv1d(4, 3, rngs=nnx.Rngs(0), **options)
        assert layer.kernel.shape == (3, 1, 8) and layer.bias.shape == (8,)
        call, step, start = layer, layer.step, layer.initial_state((2,))
    else:
        module = jaxdw.linen.CausalConv1d(4, (3,), **options)
        variables = module.init(jax.random.key(0), x)
        assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (3, 1, 8), "bias": (8,)}
        call = lambda x, **options: module.apply(variables, x, **options)  # noqa: E731
        step = lambda x, state: module.apply(variables, x, state, method="step")  # noqa: E731
        start = module.initial_state((2,))
    y, last = call(x, return_state=True)
    assert y.dtype == (dtype or np.float32) and start.shape == (2, 2, 4)
    first, state = call(x[:, :5], state=start, return_state=True)
    steps = []
    for t in range(5, 9):
        one, state = step(x[:, t], state)
        steps.append(one)
    assert same_bits(jnp.concatenate([first, jnp.stack(steps, axis=1)], axis=1), y) and same_bits(state, last)
    packed = call(x, segment_ids=np.array([[0] * 4 + [1] * 5] * 2))
    assert same_bits(packed[:, 4:], call(x[:, 4:]))


def digest():
    """Of packed sequences and of steps, in every dtype and with channels that fill no vector."""
    rng = np.random.default_rng(0)
    found = hashlib.sha256()
    for dtype in DTYPES:
        shapes = (3, 9, 87), (4, 1, 87), (87,)
        x, kernel, bias = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        ids = np.sort(rng.integers(-1, 3, (3, 9)), axis=-1)[:, ::-1]
        with jax.enable_x64(dtype == np.float64):
            packed = jaxdw.causal_conv1d(x, kernel, bias, segment_ids=ids, activation="silu")
            step = jaxdw.causal_conv1d_step(x[:, 0], x[:, 1:4], kernel, bias, activation="silu")
        for array in (packed, *step):
            found.update(np.asarray(array).tobytes())
    return found.hexdigest()


@needs_kernels
def test_every_instruction_set_has_the_same_bits(seed, full):
    own = native.status().rpartition(" ")[2]
    others = [isa for isa in ("scalar", "avx2") if "avx" in own and isa != own] or [own]
    for isa in others if full else [others[seed % len(others)]]:
        code = f"from {__name__} import digest; print(digest())"
        environment = {**os.environ, "JAXDW_ISA": isa, "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
        )
        assert done.stdout.split() == [digest()], isa


BAD_CALLS = {
    "x": ([(2, 3), (2, 3, 5), (4, 1, 5)], {}, "`x` has shape"),
    "state": ([(2, 6, 5), (2, 2, 5), (4, 1, 5)], {}, r"`state` has shape \(2, 2, 5\), expected \(2, 3, 5\)"),
    "kernel": ([(2, 6, 5), (2, 3, 5), (4, 1, 4)], {}, r"`kernel` has shape \(4, 1, 4\), expected \(4, 1, 5\)"),
    "bias": ([(2, 6, 5), (2, 3, 5), (4, 1, 5), (4,)], {"biased": True}, r"`bias` has shape \(4\), expected \(5\)"),
    "no bias": ([(2, 6, 5), (2, 3, 5), (4, 1, 5)], {"biased": True}, "there are 3 operands, expected 4"),
    "ids": ([(2, 6, 5), (2, 3, 5), (4, 1, 5), (2, 9)], {}, "`ids` is no array of int32"),
    "activation": ([(2, 6, 5), (2, 3, 5), (4, 1, 5)], {"activation": 2}, "`activation` is 2, expected 0 or 5"),
}


@needs_kernels
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_of_the_kernel_that_does_not_fit_is_an_error(name):
    shapes, attributes, message = BAD_CALLS[name]
    results = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 6, 5), (2, 3, 5))]
    call = jax.ffi.ffi_call(native.CAUSAL, results)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(*map(jnp.ones, shapes), **{"biased": False, "activation": 0, **attributes}))


X, KERNEL = np.zeros((2, 5, 3), np.float32), np.zeros((4, 1, 3), np.float32)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"x": X[0, 0]}, ValueError, r"`x` has shape \(3,\), expected \(\*batch, time, channels\)"),
        ({"kernel": KERNEL[:, 0]}, ValueError, r"`kernel` has shape \(4, 3\), expected \(K, 1, features\)"),
        ({"kernel": KERNEL[:0]}, ValueError, r"`kernel` has shape \(0, 1, 3\), expected \(K, 1, features\)"),
        ({"kernel": KERNEL[..., :2]}, ValueError, "`kernel` has 2 output channels, expected a positive multiple"),
        ({"bias": np.zeros(2, np.float32)}, ValueError, r"`bias` has shape \(2,\), expected \(3,\)"),
        (
            {"state": X[:, :2]},
            ValueError,
            r"`state` has shape \(2, 2, 3\), expected \(2, 3, 3\): the K-1 inputs before `x`, for K=4",
        ),
        ({"state": X[:, :3].astype(np.float16)}, TypeError, "`state` has dtype float16; expected one dtype for all"),
        ({"activation": "gelu"}, ValueError, "`activation` is 'gelu', expected one of silu"),
        ({"method": "fast"}, ValueError, "`method` is 'fast', expected one of"),
        (
            {"segment_ids": np.zeros((2, 4), int)},
            ValueError,
            r"`segment_ids` has shape \(2, 4\), expected \(2, 5\), one per position",
        ),
        (
            {"segment_ids": np.zeros((2, 4), int), "state": X[:, :3]},
            ValueError,
            r"`segment_ids` has shape \(2, 4\), expected \(2, 5\), one per position, or \(2, 8\) with those of the",
        ),
        (
            {"segment_ids": np.zeros((2, 5), np.float32)},
            TypeError,
            "`segment_ids` has dtype float32, expected integers",
        ),
        ({"segment_ids": [[0] * 5] * 2}, TypeError, "`segment_ids` is a list, expected a JAX or NumPy array"),
    ],
)
def test_errors_name_the_argument_its_value_and_what_was_expected(options, error, said):
    with pytest.raises(error, match=said):
        jaxdw.causal_conv1d(**{"x": X, "kernel": KERNEL, **options})


def test_errors_of_steps_and_layers():
    with pytest.raises(TypeError, match="`state` is None, expected an array"):
        jaxdw.causal_conv1d_step(X[:, 0], None, KERNEL)
    with pytest.raises(ValueError, match=r"`x` has shape \(\), expected \(\*batch, channels\)"):
        jaxdw.causal_conv1d_step(jnp.ones(()), X, KERNEL)
    with pytest.raises(ValueError, match=r"`kernel_size` is \(3, 3\), expected one int"):
        jaxdw.nnx.CausalConv1d(3, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`activation` is 'relu', expected one of silu"):
        jaxdw.linen.CausalConv1d(3, 3, activation="relu").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"`inputs` has shape \(2, 5, 3\), expected 4 channels"):
        jaxdw.nnx.CausalConv1d(4, 3, rngs=nnx.Rngs(0))(X)
