"""The kernels for TPUs: interpreted on a CPU, and compiled ahead of time. Nothing here runs on a TPU."""

import functools
import importlib.util
import os
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
from bridge.audit.platforms import PLATFORMS
from bridge.case import Case
from bridge.numerics import Arithmetic, error_bound, exact_kernel_gradient
from jaxdw import Geometry
from jaxdw.lowerings import generic, pallas_tpu
from tests.programs import release_programs
from tests.strategies import problems

ROOT = Path(__file__).parents[3]
F32 = np.dtype(np.float32)
DTYPES = [np.dtype(dtype) for dtype in (np.float32, ml_dtypes.bfloat16, np.float16)]

#: Most of the time here goes into compiling programs that run once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@st.composite
def geometries(draw):
    """(geometry, whether there is a bias, seed): with columns in the sublanes mostly, or images that fill them."""
    problem = draw(problems(max_size=6, max_channels=2))
    images = draw(st.sampled_from([None, None, 8, 17]))
    x_shape = problem.x_shape if images is None else (images, *problem.x_shape[-problem.rank - 1 :])
    geometry = Geometry.of(x_shape, problem.kernel_shape, **problem.options)
    hypothesis.assume(0 not in geometry.x_shape + geometry.output_shape)
    return geometry, problem.bias, problem.seed


@pytest.fixture
def small(monkeypatch):
    """Programs of few products, which compile fast here; their loops go round where a small problem has one step."""
    for name, value in {"MOST_SUMS": 3, "MOST_WIDE": 1, "MOST_UNROLLED": 16, "MOST_TAPS": 4}.items():
        monkeypatch.setattr(pallas_tpu, name, value)


def convolved(x, kernel, bias, geometry, dtype=F32):
    run = functools.partial(
        pallas_tpu.conv, geometry=geometry, order="raster", compute=F32, dtype=dtype, interpret=True
    )
    return np.asarray(jax.jit(run, compiler_options=QUICK)(x, kernel, bias))


def kernel_gradient(x, dy, geometry, dtype=F32):
    run = functools.partial(pallas_tpu.kernel_gradient, geometry=geometry, compute=F32, dtype=dtype, interpret=True)
    return np.asarray(jax.jit(run, compiler_options=QUICK)(x, dy))


def whole_numbers(seed, geometry, bias=True, dtype=F32):
    """x, kernel, bias or None, and dy, so small that float32 holds every product and every sum, in any order."""
    rng = np.random.default_rng(seed)
    shapes = geometry.x_shape, geometry.kernel_shape, geometry.kernel_shape[-1:], geometry.output_shape
    x, kernel, start, dy = (rng.integers(-3, 4, shape).astype(dtype) for shape in shapes)
    return x, kernel, start if bias else None, dy


def assert_same_sums(geometry, bias, seed):
    x, kernel, start, dy = whole_numbers(seed, geometry, bias)
    y, gradient = convolved(x, kernel, start, geometry), kernel_gradient(x, dy, geometry)
    np.testing.assert_array_equal(y, generic.conv(x, kernel, start, geometry, "raster", F32))
    np.testing.assert_array_equal(gradient, generic.kernel_gradient(x, dy, geometry, F32))


def chain(x, kernel, bias, geometry):
    """Products rounded to float32 and then added to a float32 sum, in raster order."""
    case = Case(*(None if a is None else a.astype(np.float32) for a in (x, kernel, bias)), **as_options(geometry))
    y = (
        np.zeros(geometry.output_shape, np.float32)
        if bias is None
        else np.broadcast_to(case.bias, geometry.output_shape)
    )
    y = case.split_channels(y)
    for value, weight, _ in case.tap_terms():
        y = y + value * weight
    return y.reshape(geometry.output_shape)


def as_options(geometry):
    padding = geometry.padding if geometry.padding_mode == "zeros" else geometry.padding_mode.upper()
    options = {"strides": geometry.strides, "padding": padding}
    return options | {"kernel_dilation": geometry.kernel_dilation, "input_dilation": geometry.input_dilation}


def test_whole_numbers_have_one_sum(small, full):
    @hypothesis.settings(max_examples=200 if full else 2)
    @given(geometries())
    def check(drawn):
        release_programs()
        assert_same_sums(*drawn)

    check()


def test_numbers_of_few_bits_have_the_bits_of_the_chain_in_raster_order(small, full):
    """Products of 11 bits by 11 are exact in float32: whether they are fused with their additions changes no bit."""

    @hypothesis.settings(max_examples=100 if full else 2)
    @given(geometries(), st.sampled_from(DTYPES))
    def check(drawn, dtype):
        release_programs()
        geometry, with_bias, seed = drawn
        rng = np.random.default_rng(seed)
        shapes = geometry.x_shape, geometry.kernel_shape, geometry.kernel_shape[-1:]
        x, kernel, bias = (rng.standard_normal(shape).astype(np.float16).astype(dtype) for shape in shapes)
        bias = bias if with_bias else None
        # + 0: XLA drops the sum of +0 and the first product, so the sign of a zero may be that of the product
        y, expected = (
            (each + dtype.type(0)).astype(dtype).view(np.uint8)
            for each in (convolved(x, kernel, bias, geometry, dtype), chain(x, kernel, bias, geometry).astype(dtype))
        )
        np.testing.assert_array_equal(y, expected)

    check()


def test_kernel_gradients_are_sums_of_float32_rounded_once(small, full):
    @hypothesis.settings(max_examples=100 if full else 2)
    @given(geometries(), st.sampled_from(DTYPES))
    def check(drawn, dtype):
        release_programs()
        geometry, _, seed = drawn
        rng = np.random.default_rng(seed)
        x, kernel, dy = (
            rng.standard_normal(shape).astype(dtype)
            for shape in (geometry.x_shape, geometry.kernel_shape, geometry.output_shape)
        )
        total = exact_kernel_gradient(Case(x, kernel, **as_options(geometry)), dy)
        bound = error_bound(Arithmetic.of(dtype, flushes_subnormals=True), total) + total.reference_error
        found = kernel_gradient(x, dy, geometry, dtype)
        assert found.dtype == dtype
        assert (np.abs(found.astype(np.float64) - total.reference) <= bound).all()

    check()


#: (shape of x, of the kernel, options): what small random geometries do not reach, and what is empty.
TABLE = {
    "several blocks of channels and of images": ((16, 2, 3, 129), (1, 2, 1, 258), {}),
    "several blocks of columns": ((1, 300, 2), (5, 1, 4), {"padding": ((7, -2),)}),
    "several blocks of columns, strided": ((1, 300, 1), (3, 1, 1), {"strides": 3, "kernel_dilation": 2}),
    "several blocks of columns, with zeros between": ((1, 150, 1), (4, 1, 1), {"input_dilation": 3, "padding": 5}),
    "blocks of rows and planes": ((1, 5, 6, 4, 2), (3, 2, 2, 1, 2), {"strides": (2, 1, 1)}),
    "more taps than are spelled out": ((1, 4, 4, 2), (5, 4, 1, 2), {"padding": 2}),
    "columns of x and y in the lanes": ((2, 5, 40, 12), (3, 3, 1, 24), {"strides": 2, "padding": 1}),
    "columns of x alone in the lanes": ((1, 3, 60, 40), (2, 2, 1, 40), {"strides": (1, 4)}),
    "columns of y alone in the lanes": ((2, 3, 10, 40), (2, 2, 1, 40), {"input_dilation": (1, 9), "padding": 1}),
    "no batch": ((6, 5, 3), (3, 3, 1, 6), {"strides": 2}),
    "one of everything": ((1, 1, 1), (1, 1, 1), {}),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", TABLE)
def test_each_kind_of_geometry_has_its_sums(name, small, seed, monkeypatch):
    small_blocks = {"several blocks of columns": 1 << 12, "several blocks": 1 << 15, "blocks": 1 << 15}
    most = next((most for start, most in small_blocks.items() if name.startswith(start)), pallas_tpu.BLOCK_BYTES)
    monkeypatch.setattr(pallas_tpu, "BLOCK_BYTES", most)
    x_shape, kernel_shape, options = TABLE[name]
    geometry = Geometry.of(x_shape, kernel_shape, **options)
    if name.startswith(("several", "blocks")):
        assert max(axis.tiles for axis in pallas_tpu._Volume.of(geometry).axes) > 1 or "channels" in name
    if "in the lanes" in name:
        volume = pallas_tpu._Volume.of(geometry)
        assert (volume.x_turned, volume.y_turned) == (" x " in name, " y " in name)
    assert_same_sums(geometry, True, seed)


def test_what_no_tap_reads_is_in_no_sum(small):
    """NaN there, in x cropped at its ends and skipped by the strides; and none of it in the kernel gradient."""
    geometry = Geometry.of((2, 7, 9, 3), (2, 2, 1, 3), strides=(3, 3), padding=((-1, 0), (0, -2)))
    x, kernel, bias, dy = whole_numbers(0, geometry)
    read = np.zeros(x.shape, bool)
    for i, j in np.ndindex(2, 2):
        rows, columns = (source[:, tap] for source, tap in zip(geometry.sources, (i, j)))
        read[:, rows[:, None], columns[None, :]] = True
    assert not read.all()
    holes = np.where(read, x, np.float32(np.nan))
    np.testing.assert_array_equal(convolved(holes, kernel, bias, geometry), convolved(x, kernel, bias, geometry))
    np.testing.assert_array_equal(kernel_gradient(holes, dy, geometry), kernel_gradient(x, dy, geometry))


def test_float64_is_refused(x64):
    geometry = Geometry.of((1, 4, 1), (3, 1, 1))
    x, kernel, _, dy = whole_numbers(0, geometry, dtype=np.float64)
    wide = np.dtype(np.float64)
    for run in (
        lambda: pallas_tpu.conv(x, kernel, None, geometry, "raster", wide, wide),
        lambda: pallas_tpu.kernel_gradient(x, dy, geometry, wide, wide),
    ):
        with pytest.raises(ValueError, match="`method='pallas'` adds in float32 on TPUs"):
            run()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_what_is_lowered_for_tpus(dtype):
    """One for y, one for each gradient: nothing is left for XLA's own convolution."""

    def conv(x, kernel):
        return jaxdw.depthwise_conv(x, kernel, strides=2, method="pallas")

    x, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 9, 8, 10), (3, 3, 1, 10)))
    dy = jax.eval_shape(conv, x, kernel)
    for function, arrays, count in (
        (conv, (x, kernel), 1),
        (lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy), (x, kernel, dy), 2),
    ):
        text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("custom_call @tpu_custom_call") == count
        assert "stablehlo.convolution" not in text


def test_kernels_are_lowered_with_64_bits_enabled(x64):
    x, kernel = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 9, 8, 10), (3, 3, 1, 10)))
    text = (
        jax.jit(functools.partial(jaxdw.depthwise_conv, method="pallas"))
        .trace(x, kernel)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert text.count("custom_call @tpu_custom_call") == 1


def test_blocks_end_where_the_array_or_what_is_declared_beyond_it_does():
    """A TPU clips what a block asks for beyond an array only where that is declared; the interpreter does not tell."""

    def check(geometry):
        volume = pallas_tpu._Volume.of(geometry)
        for axis, size in zip(volume.axes, _declared(volume.read_spec(1), volume)):
            last = max(axis.start(i) for i in range(axis.tiles))
            assert size.block_size == axis.block and last + axis.block <= axis.size + size.padding[1]

    for x_shape, kernel_shape, options in TABLE.values():
        if 0 not in x_shape and 0 not in Geometry.of(x_shape, kernel_shape, **options).output_shape:
            check(Geometry.of(x_shape, kernel_shape, **options))
    check(Geometry.of((2, 130, 1004, 128), (3, 3, 1, 128)))
    turned = pallas_tpu._Volume.of(Geometry.of((64, 112, 112, 144), (3, 3, 1, 144), padding=1))
    assert turned.x_turned and turned.read_spec(1).block_shape[-2].padding == (0, 112)


def _declared(spec, volume):
    sizes = spec.block_shape[1:]
    return [*sizes[:3], sizes[4 if volume.x_turned else 3]]


TPUS = ("v5e", "v5p", "v6e")

#: (shape of x, of the kernel, options, dtype): what is compiled for each TPU.
COMPILED = [
    ((8, 56, 56, 144), (3, 3, 1, 144), {"strides": 2}, "float32"),
    ((8, 14, 15, 10), (7, 7, 1, 20), {"kernel_dilation": 2}, "bfloat16"),
    ((1, 40, 41, 33), (31, 31, 1, 33), {}, "float32"),
    ((3, 3000, 3), (5, 1, 3), {"strides": 3, "padding": 7}, "bfloat16"),
    ((1, 1000, 3), (5, 1, 3), {"input_dilation": 3, "padding": 7}, "float32"),
    ((2, 5, 6, 7, 130), (3, 3, 2, 1, 130), {"strides": (1, 2, 1)}, "float16"),
]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jaxdw[tpu]'"
)
def test_kernels_compile_for_each_tpu(full):
    """In a process of its own, since the compiler reads its variables once. A sample: each geometry for one TPU."""
    command = [sys.executable, "-c", f"from {__name__} import compile_for_each_tpu; compile_for_each_tpu({full})"]
    environment = {**os.environ, **PLATFORMS["tpu:v5e"].environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4_000:]
    assert done.stdout.split() == [name for name in TPUS for _ in range(len(COMPILED) if full else len(COMPILED) // 3)]


def compile_for_each_tpu(full):
    """Prints a line a program, which has y, dx and the kernel's gradient in it."""
    from jax.experimental import topologies

    for number, name in enumerate(TPUS):
        device = topologies.get_topology_desc(**PLATFORMS[f"tpu:{name}"].topology).devices[0]
        place = jax.sharding.SingleDeviceSharding(device)
        for x_shape, kernel_shape, options, dtype in COMPILED if full else COMPILED[number::3]:

            def conv(x, kernel, options=options):
                return jaxdw.depthwise_conv(x, kernel, method="pallas", **options)

            def all_three(x, kernel, dy, conv=conv):
                y, pullback = jax.vjp(conv, x, kernel)
                return y, *pullback(dy)

            y_shape = Geometry.of(x_shape, kernel_shape, **options).output_shape
            arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in (x_shape, kernel_shape, y_shape)]
            program = jax.jit(all_three).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
            assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
            print(name, flush=True)
