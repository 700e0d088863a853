"""Calls of the compiled kernels: bad ones are errors, threads do not block each other, XLA serves without them."""

import functools
import os
import platform
import re
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdw
from jaxdw import native
from jaxdw.geometry import Geometry
from jaxdw.native import calls
from tests.jaxdw.native import arrays

needs_kernels = pytest.mark.skipif(not native.is_available(), reason=native.status())

X, KERNEL, Y = (2, 1, 6, 5, 4), (1, 3, 3, 1, 4), (2, 1, 6, 5, 4)
ATTRIBUTES = {
    "strides": [1, 1, 1],
    "padding": [0, 1, 1],
    "kernel_dilation": [1, 1, 1],
    "input_dilation": [1, 1, 1],
    "bias_last": False,
    "flipped": False,
    "from_last_tap": False,
    "scaled": False,
    "residual": False,
    "activation": 0,
}


def call(x=X, kernel=KERNEL, y=Y, bias=None, dtypes=(np.float32,) * 3, target=None, rest=(), **attributes):
    """The handler of the convolution, called as no lowering calls it."""
    attributes = {
        name: np.array(value, np.int64) if isinstance(value, list) else value
        for name, value in (ATTRIBUTES | attributes).items()
        if value is not None
    }
    operands = [jnp.zeros(x, dtypes[0]), jnp.zeros(kernel, dtypes[1])]
    operands += [] if bias is None else [jnp.zeros(bias, dtypes[0])]
    operands += [jnp.zeros(shape, dtype) for shape, dtype in rest]
    run = jax.ffi.ffi_call(target or native.CONV, jax.ShapeDtypeStruct(y, dtypes[2]))
    return jax.jit(lambda *operands: run(*operands, **attributes))(*operands).block_until_ready()


BAD_CALLS = {
    "x of three axes": ({"x": (6, 5, 4)}, r"`x` has shape \(6, 5, 4\), expected more than 3 axes"),
    "kernel of four axes": ({"kernel": (1, 3, 3, 4)}, "`kernel` has shape .*, expected 5 axes"),
    "y of one axis": ({"y": (8,)}, "`y` has shape .*, expected 5 axes"),
    "other channels": ({"kernel": (1, 3, 3, 1, 5)}, "`kernel` has shape .*, expected 4 channels"),
    "two inputs for a channel": ({"kernel": (1, 3, 3, 2, 4)}, "`kernel` has shape .*, expected 1 before the last"),
    "other outputs": ({"y": (2, 1, 6, 5, 8)}, "`y` has shape .*, expected 4 channels"),
    "other images": ({"y": (3, 1, 6, 5, 4)}, "`y` has shape .*, expected 2 images"),
    "no input": ({"x": (2, 1, 0, 5, 4)}, "`x` has shape .*, expected sizes from 1"),
    "whole numbers": ({"dtypes": (np.int32,) * 3}, "`x` has an element type"),
    "two types": ({"dtypes": (np.float32, np.float16, np.float32)}, "`kernel` has another element type than `x`"),
    "another type out": ({"dtypes": (np.float32, np.float32, np.float16)}, "`y` has another element type than `x`"),
    "a long bias": ({"bias": (5,)}, r"`bias` has shape \(5\), expected \(4\)"),
    "a bias of two axes": ({"bias": (4, 1)}, "`bias` has shape"),
    "no stride": ({"strides": [1, 0, 1]}, "`strides` is .*, expected numbers from 1"),
    "huge stride": ({"strides": [1, 2**40, 1]}, "`strides` is .*, expected numbers from 1 to"),
    "no strides": ({"strides": []}, "`strides` has 0 numbers, expected 1 to 3"),
    "two paddings": ({"padding": [1, 1]}, "`padding` has 2 numbers, expected one for each of 3 spatial axes"),
    "huge padding": ({"padding": [0, -(2**62), 0]}, "`padding` is"),
    "no dilation": ({"kernel_dilation": [1, 1, -3]}, "`kernel_dilation` is"),
    "no input dilation": ({"input_dilation": [0, 1, 1]}, "`input_dilation` is"),
    "no scale": ({"scaled": True}, "there are 2 operands, expected 4, or one more with a bias"),
    "a long scale": ({"scaled": True, "rest": [((5,), np.float32)] * 2}, r"`scale` has shape \(5\), expected \(4\)"),
    "a scale of bfloat16": ({"scaled": True, "rest": [((4,), jnp.bfloat16)] * 2}, "`scale` has another element type"),
    "a small residual": ({"residual": True, "rest": [((4,), np.float32)]}, "`residual` has shape .*, expected"),
    "another activation": ({"activation": 9}, "`activation` is 9, expected a number from 0 to 5"),
    "an attribute is missing": ({"padding": None}, "Wrong number of attributes"),  # XLA names those that are there
    "an attribute of another type": ({"strides": True}, "Wrong attribute type"),
}


@needs_kernels
@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_call_that_does_not_fit_is_an_error_that_names_the_argument(name):
    changed, message = BAD_CALLS[name]
    with pytest.raises(Exception, match=message):
        call(**changed)
    assert call().shape == Y


@needs_kernels
def test_random_calls_give_errors_or_zeros(seed, full):
    """Shapes and numbers that need not fit each other: a sum of zeros, or an error."""
    rng = np.random.default_rng(seed)
    results = set()
    for _ in range(300 if full else 12):
        sizes = rng.integers(1, 6, 12)
        fits = rng.random() < 0.7
        channels = (sizes[3],) * 3 if fits else rng.integers(1, 4, 3)
        images = (sizes[4],) * 2 if fits else rng.integers(1, 3, 2)
        try:
            y = call(
                x=(images[0], *sizes[:3], channels[0]),
                kernel=(*sizes[5:8], 1, channels[1]),
                y=(images[1], *rng.integers(1, 40, 3), channels[2]),
                strides=rng.integers(0, 5, 3).tolist(),
                padding=rng.integers(-20, 20, 3).tolist(),
                kernel_dilation=rng.integers(0 if rng.random() < 0.2 else 1, 9, 3).tolist(),
                input_dilation=rng.integers(1, 5, 3).tolist(),
            )
            assert not np.asarray(y).any()
            results.add("zeros")
        except (ValueError, RuntimeError) as error:
            assert "`" in str(error)
            results.add("error")
    assert results


def drawn_call(rng):
    """A handler, the shapes and dtypes of its operands and results, and its attributes; they fit each other."""
    n, rows, terms, c = (int(size) for size in rng.integers(1, 6, 4))
    narrow = jnp.dtype(rng.choice(["float32", "bfloat16", "float16"]))

    def one(*shape, dtype=narrow):
        return shape, dtype

    sums, matrix, whole = one(c, dtype=jnp.dtype("float32")), one(rows, c), {"activation": int(rng.integers(0, 3))}
    norm = {"epsilon": float(rng.choice([0, 1e-5])), **whole}
    image, three = one(n, rows, terms, c), {"padding": [1, 1], "input_dilation": [1, 1], "kernel_dilation": [1, 1]}
    program = [-3, *(2 * term + 1 for term in rng.permutation(terms))]
    matmul = {"steps": program, "x_transposed": False, "w_transposed": False, "scaled": False, "residual": False}
    labels = one(rows, dtype=jnp.dtype("int32"))
    calls_ = [
        (native.KERNEL_GRADIENT, [image, image], [one(3, 3, 1, c)], {"strides": [1, 1], **three}),
        (native.MATMUL, [one(rows, terms), one(terms, c)], [matrix], {**matmul, "divisor": 1.0, **whole}),
        (native.BATCH_NORM, [matrix, sums, sums], [matrix, sums, sums], norm),
        (native.BATCH_NORM_GRADIENT, [matrix, *[sums] * 4, matrix], [matrix, sums, sums], norm),
        (native.CROSS_ENTROPY, [matrix, labels], [one()], {}),
        (native.CROSS_ENTROPY, [matrix, labels, one()], [matrix], {}),
        (native.AXPBY, [one(2, dtype=jnp.dtype("float32")), matrix, matrix], [matrix], {}),
    ]
    return calls_[rng.integers(len(calls_))]


def spoiled(rng, operands, results, attributes):
    """The same with another size, number of axes, dtype, number of operands or attribute in one place."""
    operands, results, attributes = list(operands), list(results), dict(attributes)
    arrays_ = operands if rng.random() < 0.7 else results
    at, what = rng.integers(len(arrays_)), rng.integers(5)
    shape, dtype = arrays_[at]
    if what == 0:
        shape = tuple(int(size) for size in np.maximum(0, np.array(shape, int) + rng.integers(-1, 2, len(shape))))
    elif what == 1:
        shape = shape[1:] if rng.random() < 0.5 else (*shape, int(rng.integers(1, 3)))
    elif what == 2:
        dtype = jnp.dtype(rng.choice(["float32", "bfloat16", "int32", "int8"]))
    elif what == 3 and attributes:
        name = rng.choice(sorted(attributes))
        value = attributes[name]
        if isinstance(value, list):
            attributes[name] = rng.integers(-4, 12, rng.integers(0, 6)).tolist()
        elif not isinstance(value, bool):
            attributes[name] = type(value)(rng.integers(-9, 9))
        else:
            attributes[name] = not value
    elif what == 4:
        operands.append(operands[rng.integers(len(operands))])
    arrays_[at] = shape, dtype
    return operands, results, attributes


@needs_kernels
def test_random_calls_of_every_handler_give_results_or_errors(seed, full):
    rng, fits = np.random.default_rng(seed), 0
    for number in range(2000 if full else 50):
        target, *given = drawn_call(rng)
        operands, results, attributes = given if number % 3 == 0 else spoiled(rng, *given)
        attributes = {
            name: np.array(value, np.int64) if isinstance(value, list) else value for name, value in attributes.items()
        }
        call_ = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*each) for each in results])
        try:
            jax.block_until_ready(call_(*(jnp.ones(*each) for each in operands), **attributes))
            fits += 1
        except (ValueError, RuntimeError) as error:
            assert number % 3, (target, given, error)
            assert "jaxdw: " in str(error) or "Wrong number" in str(error)
    assert fits


@needs_kernels
def test_an_instruction_set_that_is_not_here_is_an_error():
    x = np.ones((1, 4, 2), np.float32)
    geometry = Geometry.of(x.shape, (3, 1, 2))
    with pytest.raises(ValueError, match="`isa` is 'sse9', expected"):
        arrays.conv(x, np.ones((3, 1, 2), np.float32), None, geometry, isa="sse9")
    with pytest.raises(ValueError, match=r"`geometry` is .*, expected multiplier 1"):
        calls.conv(0, 0, None, 0, Geometry.of((1, 4, 2), (3, 1, 4)), "float32")


PROGRAM = """
import warnings
warnings.simplefilter("error")
import numpy as np, jaxdw
from jaxdw import native
x, kernel = np.ones((1, 5, 6, 4), np.float32), np.ones((3, 3, 1, 4), np.float32)
try:
    assert float(jaxdw.depthwise_conv(x, kernel).sum()) == 4 * 13 * 16
    print(native.status())
except (ValueError, RuntimeWarning) as error:
    print(type(error).__name__, error)
"""


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout


def test_without_the_kernels_xla_computes():
    assert run(JAXDW_NATIVE="off") == "no compiled kernels: JAXDW_NATIVE is off\n"


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("JAXDW_NATIVE", "no", "ValueError `JAXDW_NATIVE` is 'no', expected 'on', 'off' or"),
        pytest.param("JAXDW_ISA", "sse9", "ValueError `JAXDW_ISA` is 'sse9', expected one of", marks=needs_kernels),
        pytest.param("JAXDW_ISA", "scalar", "compiled kernels: scalar", marks=needs_kernels),
    ],
)
def test_the_environment_chooses_the_kernels(variable, value, message):
    assert run(**{variable: value}).startswith(message)


def test_a_library_that_cannot_be_loaded_is_one_warning(tmp_path, monkeypatch):
    (tmp_path / "libjaxdw_kernels.so").write_bytes(b"of another machine")
    monkeypatch.setenv("JAXDW_NATIVE", "on")
    monkeypatch.setattr(native, "__path__", [str(tmp_path)])
    native._status.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"libjaxdw_kernels\.so cannot be used: .*") as warned:
            assert not native.is_available() and not native.is_available()
        assert len(warned) == 1 and native.status().startswith("no compiled kernels: libjaxdw_kernels.so cannot be")
        with pytest.raises(native.UnavailableError, match="cannot be used"):
            native.library()
    finally:
        native._status.cache_clear()


STRESS = """
import functools, jax, jax.numpy as jnp, numpy as np, jaxdw
from jax.sharding import PartitionSpec as P
assert jax.device_count() == 8
rng = np.random.default_rng(0)
kernel = rng.standard_normal((3, 3, 1, 32), np.float32)
conv = functools.partial(jaxdw.depthwise_conv, method="taps")

def step(x, kernel):
    y, pull = jax.vjp(conv, x, kernel)
    return y, *pull(y)

mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
on_devices = jax.pmap(step, in_axes=(0, None))
shared = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("batch"), P()), out_specs=(P("batch"), P("batch"), P())))
x = rng.standard_normal((8, 2, 40, 40, 32), np.float32)
expected = [np.stack(parts) for parts in zip(*(jax.jit(step)(part, kernel) for part in x))]
text = shared.lower(x.reshape(16, 40, 40, 32), kernel).as_text()
assert text.count("jaxdw_conv") >= 2 and "jaxdw_kernel_gradient" in text
for _ in range(100):
    results = [on_devices(x, kernel) for _ in range(3)]  # dispatched before the first is waited for
    whole = shared(x.reshape(16, 40, 40, 32), kernel)
    for result in results:
        assert all((np.asarray(a) == b).all() for a, b in zip(result, expected))
    assert (np.asarray(whole[0]) == expected[0].reshape(16, 40, 40, 32)).all()
    assert (np.asarray(whole[1]) == expected[1].reshape(16, 40, 40, 32)).all()
print("done")
"""


@needs_kernels
def test_no_call_of_eight_virtual_devices_waits_for_ever():
    """A call waits only for parts that have begun: with eight devices on few threads all of them advance."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "ignore", "-c", STRESS]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=500)
    assert done.stdout == "done\n", done.stderr


@needs_kernels
def test_a_program_with_the_kernels_has_no_loop_of_its_own_and_compiles_to_a_call():
    x, kernel = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 1, 4))
    text = jax.jit(lambda x, k: jaxdw.depthwise_conv(x, k, method="taps")).lower(x, kernel).as_text()
    assert f"@{native.CONV}" in text and "multiply" not in text


@needs_kernels
def test_gradients_compile_to_two_calls_and_nothing_else():
    """Each other operation, as a flip of the kernel or a copy of the result, costs tens of milliseconds to compile."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 8, 9, 4), (3, 3, 1, 4)))
    pull = jax.jit(lambda x, k, dy: jax.vjp(functools.partial(jaxdw.depthwise_conv, method="taps"), x, k)[1](dy))
    text = pull.lower(x, kernel, x).compile().as_text()
    assert text.count("custom-call(") == 2 and "fusion(" not in text and "copy(" not in text
    dx, _ = pull(x, kernel, x)
    assert (dx == jaxdw.depthwise_conv_transpose(x, kernel, padding=1, method="taps")).all()


def page_faults(function, x):
    """The page faults of a call."""
    run = jax.jit(function)
    counts = []
    for _ in range(3):
        run(x).block_until_ready()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[2] - counts[1]


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")
def test_what_xla_computes_beside_a_convolution_has_large_pages_too():
    pages, kernel = 8192, jnp.ones((3, 3, 1, 8))
    x = jnp.ones((1, 1024, 1024, 8))
    conv = functools.partial(jaxdw.depthwise_conv, kernel=kernel, padding="SAME", method="taps")
    if page_faults(conv, x) > pages / 4:
        pytest.skip("the system gives no large pages")
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 11):
        pytest.skip("before Linux 6.11 the system does not say which memory belongs together")

    def program(x):
        y = conv(x)
        z = jnp.sin(y)
        return (conv(z) + y * z).sum()

    assert page_faults(program, x) < pages / 2
