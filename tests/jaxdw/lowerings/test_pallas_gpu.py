"""The method "pallas" interpreted on a CPU, and lowered for NVIDIA GPUs without one. Nothing here runs on a GPU."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import jaxdw
from bridge.case import Case
from bridge.numerics import Arithmetic, error_bound, exact, exact_input_gradient, exact_kernel_gradient
from jaxdw import Geometry
from jaxdw._compat import mesh_of_no_axis
from jaxdw.lowerings import pallas_gpu
from tests.programs import release_programs
from tests.strategies import problems

ROOT = Path(__file__).parents[3]
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]

#: Few channels, and more than the eight that a program takes together at least.
any_problem = st.one_of(problems(max_size=7, max_channels=3), problems(max_size=7, min_channels=9, max_channels=11))


def with_gradients(method, **options):
    """Compiled: (y, dx, dkernel) of x, kernel, bias or None, and dy."""

    @jax.jit
    def run(x, kernel, bias, dy):
        y, pullback = jax.vjp(lambda x, k: jaxdw.depthwise_conv(x, k, bias, method=method, **options), x, kernel)
        return y, *pullback(dy)

    return run


def whole_numbers(seed, *shapes, dtype=np.float32):
    """So small that float32 holds every product and every sum, in any order; None for a shape that is None."""
    rng = np.random.default_rng(seed)
    return [None if shape is None else rng.integers(-3, 4, shape).astype(dtype) for shape in shapes]


def normal_numbers(seed, *shapes, dtype):
    rng = np.random.default_rng(seed)
    return [None if shape is None else rng.standard_normal(shape).astype(dtype) for shape in shapes]


def assert_equal(actual, expected):
    for name, a, b in zip(("y", "dx", "dkernel"), actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), name)


def assert_within_bounds(results, x, kernel, bias, dy, options):
    """y, dx and dkernel as float32 sums in any order, with any fusing, rounded once to their dtype.

    XLA adds up in dtype x's what several features, or several places of a padding that repeats x, give to one of x.
    """
    case = Case(x, kernel, bias, **options)
    once = Arithmetic.of(x.dtype, flushes_subnormals=True)
    added = case.geometry.multiplier > 1 or case.geometry.padding_mode != "zeros"
    narrow = dataclasses.replace(once, product=once.output, accumulator=once.output)
    sums = exact(case), exact_input_gradient(case, dy), exact_kernel_gradient(case, dy)
    for name, got, total, arithmetic in zip(
        ("y", "dx", "dkernel"), results, sums, (once, narrow if added else once, once)
    ):
        error = np.abs(np.asarray(got).astype(np.float64) - total.reference)
        outside = error > error_bound(arithmetic, total) + total.reference_error
        assert not outside.any(), f"{name}: {outside.sum()} of {outside.size} elements"


def check(x_shape, kernel_shape, bias, options, dtype, seed, same_bits=False):
    """The numbers of "taps" where sums are exact, elsewhere what bounds promise; of y and dx the bits, if so asked."""
    shapes = x_shape, kernel_shape, kernel_shape[-1:] if bias else None
    shapes = *shapes, Geometry.of(*shapes, **options).output_shape
    ours, taps = (with_gradients(method, **options) for method in ("pallas", "taps"))
    arrays = whole_numbers(seed, *shapes, dtype=dtype)
    assert_equal(ours(*arrays), taps(*arrays))
    arrays = normal_numbers(seed, *shapes, dtype=dtype)
    results = ours(*arrays)
    assert_within_bounds(results, *arrays, options)
    if same_bits:
        for actual, expected in zip(results[:2], taps(*arrays)[:2]):
            np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def test_random_geometries_have_the_sums_of_taps(full):
    @hypothesis.settings(max_examples=200 if full else 4)
    @given(any_problem, st.sampled_from(DTYPES))
    def run(problem, dtype):
        release_programs()
        check(problem.x_shape, problem.kernel_shape, problem.bias, problem.options, dtype, problem.seed)

    run()


#: (shape of x, of the kernel, options): what small random geometries do not reach, and what is empty.
TABLE = {
    "several blocks of columns and channels": ((1, 5, 40, 33), (3, 3, 1, 33), {}),
    "no batch": ((6, 5, 3), (3, 3, 1, 6), {"strides": 2}),
    "three batch axes": ((2, 1, 2, 4, 3), (3, 1, 3), {"padding": "CAUSAL"}),
    "an empty batch": ((0, 6, 5, 3), (3, 3, 1, 3), {}),
    "no rows": ((2, 0, 5, 3), (3, 3, 1, 3), {"padding": 2}),
    "no outputs": ((2, 2, 5, 3), (3, 3, 1, 3), {"padding": "VALID"}),
    "one of everything": ((1, 1, 1), (1, 1, 1), {}),
    "zeros between the inputs": ((1, 4, 5, 3), (4, 3, 1, 3), {"input_dilation": (3, 2), "strides": 2, "padding": 3}),
}


#: Where XLA:CPU makes one FMA of each product, as it does in "taps"; in long programs and in loops it may leave some.
SAME_BITS = ("several blocks of columns and channels", "no batch", "three batch axes")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", TABLE)
def test_each_kind_of_geometry_has_the_sums_of_taps(name, seed):
    x_shape, kernel_shape, options = TABLE[name]
    check(x_shape, kernel_shape, len(x_shape) == 4, options, np.float32, seed, name in SAME_BITS)


def test_a_loop_over_the_taps_has_their_sums_too(seed, monkeypatch):
    """As large kernels have it, which take long to compile here."""
    monkeypatch.setattr(pallas_gpu, "MOST_UNROLLED", 8)
    check(
        (2, 6, 5, 3), (3, 3, 1, 6), True, {"strides": (1, 2), "input_dilation": (2, 1), "padding": 2}, np.float32, seed
    )


@pytest.mark.parametrize("programs, taps", [(1, 16), (4, 2), (64, 5)])
def test_the_kernel_gradient_is_the_same_for_every_number_of_programs(programs, taps, monkeypatch):
    """Over images, lines and taps, with as many programs as a larger problem would give each of these to do."""
    monkeypatch.setattr(pallas_gpu, "ENOUGH_PROGRAMS", programs)
    monkeypatch.setattr(pallas_gpu, "MOST_TAPS", taps)
    geometry = Geometry.of((6, 5, 4, 3), (3, 3, 1, 3), strides=(2, 1), padding=1)
    x, dy = whole_numbers(0, geometry.x_shape, geometry.output_shape)
    f32 = np.dtype(np.float32)
    found = jax.jit(
        lambda x, dy: pallas_gpu.kernel_gradient(x, dy, geometry, f32, f32, interpret=True),
    )(x, dy)
    kernel = np.zeros(geometry.kernel_shape, f32)
    expected = exact_kernel_gradient(Case(x, kernel, strides=(2, 1), padding=1), dy).value
    np.testing.assert_array_equal(found, expected)


def lowered(platform, dtype, gradients=False, **options):
    """The module for a platform that need not be there, as text."""

    def conv(x, kernel):
        return jaxdw.depthwise_conv(x, kernel, method="pallas", **options)

    def both(x, kernel, dy):
        return jax.vjp(conv, x, kernel)[1](dy)

    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 9, 8, 10), (3, 3, 1, 10)))
    arrays = (x, kernel, jax.eval_shape(conv, x, kernel)) if gradients else (x, kernel)
    there = mesh_of_no_axis("NVIDIA H100 80GB HBM3", None, "gpu")  # else JAX 0.12 looks for one
    with jax.sharding.use_abstract_mesh(there) if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(both if gradients else conv).trace(*arrays)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.skipif(
    importlib.util.find_spec("jaxlib.mlir.dialects.triton") is None
    and importlib.util.find_spec("jaxlib.triton") is None,
    reason="this jaxlib has no Triton dialect",
)
@pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": 1}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_what_is_lowered_for_nvidia_gpus(dtype, options):
    """One for y; one for each gradient: nothing is left for XLA's own convolution."""
    for gradients, count in ((False, 1), (True, 2)):
        text = lowered("cuda", dtype, gradients, **options)
        assert re.findall(r"custom_call @([\w$.]+)", text) == ["__gpu$xla.gpu.triton"] * count
        assert "stablehlo.convolution" not in text


IDS = np.repeat(np.array([[0, 0, 1, -1]], np.int32), 2, axis=0)
LAYERS = {
    "transposed": lambda x, kernel: jaxdw.depthwise_conv_transpose(x, kernel, strides=2, padding=1, method="pallas"),
    "causal": lambda x, kernel: jaxdw.causal_conv1d(x, kernel, activation="silu", method="pallas"),
    "packed": lambda x, kernel: jaxdw.causal_conv1d(x, kernel, segment_ids=IDS, method="pallas"),
    "step": lambda x, kernel: jaxdw.causal_conv1d_step(x[:, 0], x[:, 1:], kernel, method="pallas")[0],
}


@pytest.mark.parametrize("platform, call", [("cuda", "triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_lowered_with_the_kernels(name, platform, call):
    """Packed sequences as windows; gradients as two kernels."""
    if platform == "cuda" and importlib.util.find_spec("jaxlib.triton") is None:
        pytest.skip("this jaxlib has no Triton dialect")
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 4, 9), (4, 1, 9))]
    gradients = jax.grad(lambda x, kernel: LAYERS[name](x, kernel).sum(), (0, 1))
    there = mesh_of_no_axis("NVIDIA H100 80GB HBM3", None, "gpu")
    for function, least in ((LAYERS[name], 1), (gradients, 2)):
        with jax.sharding.use_abstract_mesh(there) if platform == "cuda" else contextlib.nullcontext():
            text = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
        assert len(re.findall(rf"custom_call @\S*{call}", text)) >= least and "stablehlo.convolution" not in text


@pytest.mark.parametrize("gradients", [False, True])
def test_a_platform_without_kernels_is_told(gradients):
    with pytest.raises(ValueError, match="`method='pallas'` supports only NVIDIA GPUs and TPUs; use 'taps' or 'auto'"):
        lowered("rocm", np.float32, gradients)


def test_on_eight_devices_the_kernels_are_those_of_one():
    """In a process of its own: XLA makes the virtual devices when it starts."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"from {__name__} import on_eight_devices; on_eight_devices()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4_000:]


def on_eight_devices():
    """Rows, columns and channels over two devices each: on whole numbers y and both gradients of one device."""
    import jaxdw.sharding

    assert jax.device_count() == 8
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    spec = jax.sharding.PartitionSpec(None, "x", "y", "c")
    conv = functools.partial(jaxdw.sharding.depthwise_conv, method="pallas", spec=spec, mesh=mesh)
    x, kernel, dy = whole_numbers(0, (1, 8, 8, 4), (3, 3, 1, 4), (1, 8, 8, 4))
    y, pullback = jax.vjp(jax.jit(conv), x, kernel)
    assert len(y.sharding.device_set) == 8
    assert_equal((y, *pullback(dy)), with_gradients("pallas")(x, kernel, None, dy))
