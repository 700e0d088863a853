"""The bits of the compiled kernels: those of docs/arithmetic.md, on every instruction set and any number of threads."""

import dataclasses
import hashlib
import itertools
import pathlib
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from bridge import Case
from bridge.numerics import same_bits
from jaxdw import native
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry
from jaxdw.native import calls
from tests import oracle
from tests.jaxdw.native import arrays, test_training

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())

DIGESTS = pathlib.Path(__file__).parent / "digests.txt"
CASES = 500
ISAS_OF_ARM = ("neon", "scalar")


@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set_has_the_bits_that_the_repository_keeps(isa):
    """`digests.txt` has a line of SHA-256 (its first 16 digits) for each of 500 random cases."""
    if isa not in arrays.isas():
        pytest.skip(f"this processor has no {isa}")
    rng = np.random.default_rng(20260115)
    actual = [arrays.problem(rng).digest(isa=isa, threads=1 + number % 3).hex()[:16] for number in range(CASES)]
    expected = DIGESTS.read_text().split()
    different = [number for number in range(CASES) if actual[number] != expected[number]]
    assert not different


def test_an_emulated_arm_processor_has_the_same_bits(tmp_path, full):
    """NEON code, in full also scalar code, and optimised: that takes a minute, and changes no bit."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64: apt-get install g++-aarch64-linux-gnu qemu-user")
    source, driver = pathlib.Path(native.__file__).parent, tmp_path / "driver"
    flags = ["-std=c++17", "-O2" if full else "-O0", "-ffp-contract=off", "-static", "-pthread", "-I", str(source)]
    objects = []
    for isa, part in itertools.product(ISAS_OF_ARM, ("kernels", "matmul", "norm", "training", "causal")):
        objects.append(tmp_path / f"{part}_{isa}.o")
        arguments = ["-DJAXDW_ISA=" + isa, "-c", str(source / f"{part}.cc"), "-o", str(objects[-1])]
        subprocess.run([compiler, *flags, *arguments], check=True)
    files = [
        *objects,
        *(source / f"{part}.cc" for part in ("dispatch", "order", "plain")),
        DIGESTS.parent / "driver.cc",
    ]
    subprocess.run([compiler, *flags, *map(str, files), "-o", str(driver)], check=True)

    rng = np.random.default_rng(20260115)
    problems = [arrays.problem(rng) for _ in range(CASES)]
    given = b"".join(problem.as_bytes() for problem in problems)
    expected = DIGESTS.read_text().split()
    for isa in ISAS_OF_ARM if full else ISAS_OF_ARM[:1]:
        output = subprocess.run([emulator, str(driver), isa], input=given, check=True, capture_output=True).stdout
        for number, problem in enumerate(problems):
            size = (problem.dy.size + problem.kernel.size) * problem.x.itemsize
            assert hashlib.sha256(output[:size]).hexdigest()[:16] == expected[number], (isa, problem.geometry)
            output = output[size:]
        assert output == b""
        given_steps = test_training.problems_as_bytes()
        command = [emulator, str(driver), isa, "training"]
        output = subprocess.run(command, input=given_steps, check=True, capture_output=True).stdout
        assert hashlib.sha256(output).hexdigest() == test_training.DIGEST, isa


@pytest.mark.parametrize("isa", native.ISAS)
def test_from_the_last_tap_is_the_convolution_of_what_is_mirrored(isa, seed, full):
    if isa not in arrays.isas():
        pytest.skip(f"this processor has no {isa}")
    rng = np.random.default_rng(seed)
    for number in range(2000 if full else 100):
        problem = arrays.problem(rng)
        geometry = dataclasses.replace(problem.geometry, from_last_tap=True)
        batch, rank = len(geometry.batch), geometry.rank
        residual = problem.dy if number % 3 == 0 else None
        mirrored = [
            None if array is None else np.flip(array, range(first, first + rank)).copy()
            for first, array in ((batch, problem.x), (0, problem.kernel), (batch, residual))
        ]
        options = {"bias_last": problem.bias_last, "threads": 1 + number % 3}
        expected = arrays.conv(
            *mirrored[:2], problem.bias, geometry.mirrored, residual=mirrored[2], isa="scalar", **options
        )
        actual = arrays.conv(problem.x, problem.kernel, problem.bias, geometry, residual=residual, isa=isa, **options)
        assert same_bits(actual, np.flip(expected, range(batch, batch + rank))).all(), (number, geometry)


@pytest.mark.parametrize("strides, channels", [(1, 96), (2, 96), (1, 100)])
@pytest.mark.parametrize("offset, from_last_tap", [(0, False), (4, False), (0, True)])
def test_arrays_larger_than_the_caches_have_the_bits_of_their_images(strides, channels, offset, from_last_tap, seed):
    """Their next row is fetched ahead, and where y is aligned it is stored past the caches."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((11, 64, 65, channels), np.float32)
    kernel, bias = rng.standard_normal((3, 3, 1, channels), np.float32), rng.standard_normal(channels, np.float32)
    whole, one = (
        dataclasses.replace(Geometry.of(shape, kernel.shape, strides=strides, padding=1), from_last_tap=from_last_tap)
        for shape in (x.shape, x[:1].shape)
    )
    expected = np.concatenate([arrays.conv(image[None], kernel, bias, one, isa="scalar") for image in x])
    memory = np.empty(expected.size + 32, np.float32)
    start = -memory.ctypes.data % 64 // 4 + offset
    y = memory[start:][: expected.size]
    for isa in arrays.isas():
        y[:] = 0
        addresses = (array.ctypes.data for array in (x, kernel, bias, y))
        calls.conv(*addresses, whole, "float32", threads=3, isa=isa)
        assert (y.reshape(expected.shape) == expected).all(), isa


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads, seed):
    rng = np.random.default_rng(seed)
    shapes = [((5, 20, 19, 24), (3, 3)), ((1, 3000, 8), (9,)), ((9, 7, 7, 96), (7, 7)), ((2, 9, 8, 7, 40), (3, 2, 3))]
    for x_shape, kernel_size in shapes:
        geometry = Geometry.of(x_shape, (*kernel_size, 1, x_shape[-1]))
        x, kernel, dy = (
            rng.standard_normal(shape, np.float32) for shape in (x_shape, geometry.kernel_shape, geometry.output_shape)
        )
        of_one = arrays.conv(x, kernel, None, geometry), arrays.kernel_gradient(x, dy, geometry)
        of_more = (
            arrays.conv(x, kernel, None, geometry, threads=threads),
            arrays.kernel_gradient(x, dy, geometry, threads=threads),
        )
        for one, more in zip(of_one, of_more):
            assert same_bits(one, more).all()


def chain_of_fmas(x, dy, g):
    """The kernel's gradient as docs/arithmetic.md defines it, for float32."""
    rank = g.rank
    rows = int(np.prod(g.output_spatial[:-1]))
    images = []
    for image in range(len(x)):
        blocks = []
        for first in range(0, rows, 16):
            sums = np.zeros((*g.kernel_size, g.channels), np.float32)
            for row in range(first, min(rows, first + 16)):
                at = (*np.unravel_index(row, g.output_spatial[:-1]),) if rank > 1 else ()
                for column in range(g.output_spatial[-1]):
                    output = (*at, column)
                    for tap in np.ndindex(g.kernel_size):
                        source = tuple(g.sources[a][output[a], tap[a]] for a in range(rank))
                        if min(source) >= 0:
                            sums[tap] = oracle.fma(x[(image, *source)], dy[(image, *output)], sums[tap])
            blocks.append(sums)
        images.append(pairwise(blocks))
    return pairwise(images)


def pairwise(arrays_):
    while len(arrays_) > 1:
        pairs = [arrays_[i] + arrays_[i + 1] for i in range(0, len(arrays_) - 1, 2)]
        arrays_ = pairs + arrays_[len(pairs) * 2 :]
    return arrays_[0]


@pytest.mark.parametrize(
    "x_shape, kernel_size, options",
    [
        ((3, 21, 5, 3), (3, 3), {}),
        ((2, 6, 7, 5), (3, 2), {"strides": 2, "padding": ((1, 2), (0, 1))}),
        ((7, 9, 4), (4,), {"kernel_dilation": 2, "padding": 3}),
        ((1, 4, 6, 3, 2), (2, 3, 1), {"padding": 1}),
        ((2, 5, 6, 3), (3, 3), {"input_dilation": (2, 3), "padding": 2, "strides": (1, 2)}),
    ],
)
def test_the_gradient_by_the_kernel_is_the_documented_tree(x_shape, kernel_size, options, seed):
    rng = np.random.default_rng(seed)
    g = Geometry.of(x_shape, (*kernel_size, 1, x_shape[-1]), **options)
    x, dy = rng.standard_normal(x_shape, np.float32), rng.standard_normal(g.output_shape, np.float32)
    expected = chain_of_fmas(x, dy, g).reshape(g.kernel_shape)
    for isa in arrays.isas():
        assert same_bits(arrays.kernel_gradient(x, dy, g, isa=isa), expected).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 24])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_subnormal_numbers_are_kept(channels, multiplier, seed):
    rng = np.random.default_rng(seed)
    scale = np.float32(2.0**-70)
    case = Case(
        rng.standard_normal((2, 8, 9, channels), np.float32) * scale,
        rng.standard_normal((3, 3, 1, channels * multiplier), np.float32) * scale,
        padding=1,
    )
    y = jaxdw.depthwise_conv(case.x, case.kernel, padding=1, method="taps")
    assert same_bits(np.asarray(y), oracle.fma_chain(case, bias_first=True)).all()
    assert np.any((np.asarray(y) != 0) & (abs(np.asarray(y)) < 2.0**-126))


@pytest.mark.parametrize("padding, rank", [(4, 1), (4, 2), (1, 3)])
def test_a_bias_that_is_added_last_keeps_subnormal_numbers(padding, rank, seed):
    rng = np.random.default_rng(seed)
    case = Case(
        rng.standard_normal((2, *(5,) * rank, 6), np.float32) * np.float32(2.0**-70),
        rng.standard_normal((*(3,) * rank, 1, 6), np.float32) * np.float32(2.0**-72),
        rng.standard_normal(6, np.float32) * np.float32(2.0**-141),
        padding=padding,
    )
    assert not bias_comes_first(case.geometry)
    y = jaxdw.depthwise_conv(case.x, case.kernel, case.bias, padding=padding, method="taps")
    assert same_bits(np.asarray(y), oracle.fma_chain(case, bias_first=False)).all()
    assert np.any((np.asarray(y) != 0) & (abs(np.asarray(y)) < 2.0**-126))


def test_padding_is_not_multiplied():
    """A weight that is infinite or NaN counts only where its tap reads an input."""
    kernel = np.array([np.inf, 1, np.nan], np.float32).reshape(3, 1, 1)
    y = np.asarray(jaxdw.depthwise_conv(np.ones((1, 3, 1), np.float32), kernel, padding=1, method="taps"))
    assert np.isnan(y[0, :2, 0]).all() and y[0, 2, 0] == np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_are_summed_in_float32_and_rounded_once(dtype, seed):
    rng = np.random.default_rng(seed)
    narrow = jnp.dtype(dtype)
    x, kernel = (rng.standard_normal(s, np.float32).astype(narrow) for s in ((2, 9, 10, 20), (3, 3, 1, 20)))
    y = np.asarray(jaxdw.depthwise_conv(x, kernel, method="taps"))
    wide = Case(x.astype(np.float32), kernel.astype(np.float32))
    assert (y == oracle.fma_chain(wide, bias_first=True).astype(narrow)).all()


def test_values_of_narrow_types_convert_alike_on_every_instruction_set():
    """Every bfloat16 and float16, and sums that lie between two of them, overflow, or are not a number."""
    for dtype in arrays.DTYPES[2:]:
        every = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, -1, 16)
        geometry = Geometry.of(every.shape, (2, 1, 16))
        for kernel in (np.ones((2, 1, 16)), np.full((2, 1, 16), 0.7), np.full((2, 1, 16), 3)):
            results = [arrays.conv(every, kernel.astype(dtype), None, geometry, isa=isa) for isa in arrays.isas()]
            with np.errstate(all="ignore"):
                assert all(((r == results[0]) | ((r != r) & (results[0] != results[0]))).all() for r in results)


if __name__ == "__main__":  # writes the digests anew: only where docs/arithmetic.md changes
    rng = np.random.default_rng(20260115)
    DIGESTS.write_text("\n".join(arrays.problem(rng).digest(isa="scalar").hex()[:16] for _ in range(CASES)) + "\n")
    print(hashlib.sha256(DIGESTS.read_bytes()).hexdigest())
