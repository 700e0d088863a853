"""Emulated TPUs and GPUs round what those do, bit for bit, and PRECISION names them; and no other rounding is theirs.

The oracle is NumPy: bfloat16 by ml_dtypes, TF32 by integers. In `exact_case` all products and sums are exact, so that
every order gives the same bits and what is left is what was rounded.
"""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import typer.testing
from hypothesis import given
from jax import lax
from jax.experimental import pallas as pl

from bridge import Case, Verdict, cli, implementation, parity
from bridge._implementations import emulated, jax_, knobs
from bridge._implementations.emulated import Parts
from bridge.audit import AuditSubject, audit, platform
from bridge.diagnosis.attribution import attribute
from bridge.diagnosis.elimination import eliminate
from bridge.diagnosis.precision import compiler_evidence, emulation
from bridge.numerics import same_bits
from tests.strategies import problems

VALUES = list(emulated.values())
METHODS = ("grouped", "patches", "unfold_matmul", "taps", "rows")


def to_bfloat16(a):
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the largest, and NaN that signal
        return a.astype(ml_dtypes.bfloat16).astype(np.float32)


def to_tf32(a):
    """To nearest, ties to even, on the bits: 13 of the significand are dropped."""
    bits = a.view(np.uint32)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(a), a, rounded.view(np.float32))


ROUND = {("tpu", 7): to_bfloat16, ("gpu", 10): to_tf32}


def in_parts(a, number, to=to_bfloat16):
    found = []
    for _ in range(number):
        found.append(to(a))
        a = a - found[-1]
    return found


def numbers(rng, count):
    """Of every size, ties among them, and those that are no usual numbers."""
    bits = rng.integers(0, 2**32, count, np.uint32)
    ties = bits & np.uint32(0xFFFF8000) | np.uint32(0x8000)
    small = bits & np.uint32(0x807FFFFF)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4028235e38, 1e-45, 1.1754944e-38], np.float32)
    return np.concatenate([*(each.view(np.float32) for each in (bits, ties, ties | np.uint32(0x1000), small)), special])


@pytest.mark.parametrize("platform_name, mantissa_bits", ROUND)
def test_operands_are_rounded_to_nearest_even_bit_for_bit(platform_name, mantissa_bits, seed, full):
    given_ = numbers(np.random.default_rng(seed), 1_000_000 if full else 20_000)
    (found,) = emulated.split(jnp.asarray(given_), Parts(1, mantissa_bits))
    assert same_bits(np.asarray(found), ROUND[platform_name, mantissa_bits](given_)).all()


@pytest.mark.parametrize("number", [2, 3])
def test_parts_are_what_is_left_rounded_again(number, seed):
    rng = np.random.default_rng(seed)
    a = np.ldexp(rng.standard_normal(20_000, np.float32), rng.integers(-60, 60, 20_000))
    parts = [np.asarray(part) for part in emulated.split(jnp.asarray(a), Parts(number, 7))]
    assert all(same_bits(found, expected).all() for found, expected in zip(parts, in_parts(a, number)))
    if number == 3:
        assert np.array_equal(sum(part.astype(np.float64) for part in parts), a)


def exact_case(rng, multiplier, quantity="y"):
    """13 bits times 9: sums of 8 such products below 16 need 24 bits. Two by two taps and outputs, three channels."""
    x = 1 + rng.integers(0, 2**10, (1, 3, 3, 3)) / 2**12
    kernel = 1 + rng.integers(0, 2**7, (2, 2, 1, 3 * multiplier)) / 2**8
    bits = 8 if quantity == "dkernel" else 12
    dy = 1 + rng.integers(0, 2 ** (bits - 2), (1, 2, 2, 3 * multiplier)) / 2**bits
    return Case(x.astype(np.float32), kernel.astype(np.float32), padding="VALID"), dy.astype(np.float32)


#: What is rounded before it is multiplied: (method, multiplier, quantity) -> operands on the TPU at its default, at its
#: high, and on the GPU at either. "windows": products, before they are added up.
BOTH = ("x", "kernel"), ("dy", "kernel"), ("x", "dy")
ROUNDED = {
    ("grouped", 1, "y"): (("x",), (), BOTH[0]),
    ("grouped", 2, "y"): (BOTH[0], BOTH[0], BOTH[0]),
    ("patches", 1, "y"): (("x",), ("x",), ("x",)),
    ("patches", 2, "y"): (BOTH[0], BOTH[0], BOTH[0]),
    ("unfold_matmul", 1, "y"): ((), (), ()),
    ("unfold_matmul", 2, "y"): (BOTH[0], BOTH[0], BOTH[0]),
    ("grouped", 1, "dx"): (("dy",), (), BOTH[1]),
    ("grouped", 2, "dx"): (BOTH[1], BOTH[1], BOTH[1]),
    ("patches", 1, "dx"): (("windows",), ("windows",), ("windows",)),
    ("unfold_matmul", 1, "dx"): ((), (), ()),
    ("unfold_matmul", 2, "dx"): (BOTH[1], BOTH[1], BOTH[1]),
    ("grouped", 1, "dkernel"): (BOTH[2], (), BOTH[2]),
    ("grouped", 2, "dkernel"): (BOTH[2], BOTH[2], BOTH[2]),
    ("patches", 1, "dkernel"): (("x",), ("x",), ("x",)),
    ("patches", 2, "dkernel"): (BOTH[2], BOTH[2], BOTH[2]),
    ("unfold_matmul", 1, "dkernel"): ((), (), ()),
} | {(method, m, q): ((), (), ()) for method in ("taps", "rows") for m in (1, 2) for q in ("y", "dx", "dkernel")}


def rounded_operands(method, multiplier, quantity, value):
    tpu_default, tpu_high, gpu = ROUNDED[method, multiplier, quantity]
    return {"tpu-default": tpu_default, "tpu-high": tpu_high, "gpu-default": gpu, "gpu-high": gpu}.get(value, ())


def oracle(case, dy, quantity, value, operands):
    """The sum of products of rounded operands, in float64, where it is exact."""
    to = to_tf32 if value.startswith("gpu") else to_bfloat16
    parts = 2 if value == "tpu-high" else 1
    names = {"y": BOTH[0], "dx": BOTH[1], "dkernel": BOTH[2]}[quantity]
    given_ = {"x": case.x, "kernel": case.kernel, "dy": dy}

    def split(name):
        return in_parts(given_[name], parts, to) if name in operands else [given_[name]]

    def back(products):
        products = products.astype(np.float32)  # exact
        return sum(in_parts(products, parts, to)).astype(np.float64) if "windows" in operands else products

    factors = [split(name) for name in names]
    last = max(map(len, factors)) - 1  # of two parts each, the product of the small ones is left out
    return sum(
        _convolved(case, quantity, *(a.astype(np.float64) for a in (first, second)), back)
        for i, first in enumerate(factors[0])
        for j, second in enumerate(factors[1])
        if i + j <= last
    )


def _convolved(case, quantity, a, b, back):
    c, m = case.geometry.channels, case.geometry.multiplier
    y, dx, dkernel = np.zeros((1, 2, 2, c, m)), np.zeros((1, 3, 3, c)), np.zeros((2, 2, 1, c, m))
    for i, j in np.ndindex(2, 2):
        if quantity == "y":
            y += a[:, i : i + 2, j : j + 2, :, None] * b[i, j, 0].reshape(c, m)
        elif quantity == "dx":
            dx[:, i : i + 2, j : j + 2] += back(a.reshape(y.shape) * b[i, j, 0].reshape(c, m)).sum(axis=-1)
        else:
            dkernel[i, j, 0] = (a[:, i : i + 2, j : j + 2, :, None] * b.reshape(y.shape)).sum(axis=(0, 1, 2))
    return {"y": y.reshape(1, 2, 2, c * m), "dx": dx, "dkernel": dkernel.reshape(2, 2, 1, c * m)}[quantity]


def emulate(method, case, dy, quantity, value):
    each = implementation(f"jax.{method}[precision={value}]")
    if quantity == "y":
        return each.run(case)
    if quantity == "dx":
        return each.input_gradient(case, dy)
    compute = {"grouped": jax_.grouped, "unfold_matmul": jax_.unfold_matmul}.get(method) or jax_.method(method)
    there = emulated.values()[value]

    def pullback(x, kernel, dy, geometry, precision):
        return jax.vjp(lambda kernel: compute(x, kernel, None, geometry, precision), kernel)[1](dy)[0]

    on = emulated.On(there.platform, pullback)
    return np.asarray(jax.jit(lambda *a: on(*a, case.geometry, lax.Precision(there.value)))(case.x, case.kernel, dy))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("method, multiplier, quantity", ROUNDED)
def test_products_and_gradients_are_those_of_the_oracle(method, multiplier, quantity, seed, full):
    """Bit for bit; taps and rows round nothing anywhere."""
    if not full and method in ("taps", "rows") and (multiplier == 2 or method == "rows"):
        pytest.skip("with the full counts: nothing is rounded, as in the cases beside it")
    case, dy = exact_case(np.random.default_rng(seed), multiplier, quantity)
    for value in VALUES if full else ("tpu-default", "tpu-high", "gpu-default"):
        expected = oracle(case, dy, quantity, value, rounded_operands(method, multiplier, quantity, value))
        assert np.array_equal(emulate(method, case, dy, quantity, value), expected), value


@pytest.mark.parametrize("value", VALUES)
def test_infinities_and_nan_stay_where_they_are(value):
    case, _ = exact_case(np.random.default_rng(0), 2)
    case.x[0, 0, 0] = np.inf, np.nan, -3.4028235e38
    y = implementation(f"jax.grouped[precision={value}]").run(case)
    assert np.isposinf(y[0, 0, 0, :2]).all() and np.isnan(y[0, 0, 0, 2:4]).all()
    assert np.isneginf(y[0, 0, 0, 4:]).all() and np.isfinite(y[0, 1:]).all()


def with_a_loop(x, kernel):
    """Tap by tap in a loop, with a product of matrices in it."""
    windows = jnp.stack([x[:, i : i + 2, j : j + 2] for i in range(2) for j in range(2)])

    def add(y, tap):
        window, weights = tap
        return y + jnp.repeat(jnp.matmul(window, jnp.eye(3)), 2, axis=-1) * weights, None

    weights = jnp.broadcast_to(kernel.reshape(4, 1, 1, 1, 6), (4, 1, 2, 2, 6))
    return lax.scan(add, jnp.zeros((1, 2, 2, 6)), (windows, weights))[0]


def convolved(x, kernel, precision=None):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=3, precision=precision
    )


def at_highest(x, kernel):
    return convolved(x, kernel, "highest")


def test_the_function_of_a_user_is_looked_into(seed):
    case, _ = exact_case(np.random.default_rng(seed), 2)
    plain = implementation("jax.taps").run(case)
    for value in ("tpu-default", "gpu-default"):
        own = implementation(f"{__name__}:with_a_loop[precision={value}]").run(case)
        named = implementation(f"{__name__}:at_highest[precision={value}]").run(case)
        assert not np.array_equal(own, plain) and np.array_equal(named, plain)


def checkpointed(x, kernel):
    return jax.checkpoint(convolved)(x, kernel)


@pytest.mark.parametrize("value", ["tpu-default", "tpu-high", "gpu-default"])
def test_a_product_within_a_checkpoint_is_rounded_as_outside_of_it(value, seed):
    case, dy = exact_case(np.random.default_rng(seed), 2)
    inside, outside = implementation(f"{__name__}:checkpointed"), implementation("jax.grouped")
    inside, outside = (each.changed(precision=value) for each in (inside, outside))
    assert same_bits(inside.run(case), outside.run(case)).all()
    assert same_bits(inside.input_gradient(case, dy), outside.input_gradient(case, dy)).all()


def with_a_fixed_algorithm(x, kernel):
    return jnp.einsum("nhwc,cd->nhwd", x[:, :2, :2], jnp.ones((3, 6)), precision="BF16_BF16_F32")


def in_a_kernel(x, kernel):
    def multiply(a, b, c):
        c[:] = jnp.dot(a[:], b[:])

    ones = jnp.ones((4, 3)), jnp.ones((3, 6))
    shape = jax.ShapeDtypeStruct((4, 6), jnp.float32)
    return pl.pallas_call(multiply, shape, interpret=True)(*ones).reshape(1, 2, 2, 6)


@pytest.mark.parametrize(
    "name, dtype, message",
    [
        (f"{__name__}:in_a_kernel[precision=tpu-high]", np.float32, "expected no product within 'pallas_call'"),
        ("jax.taps[precision=tpu-default]", np.float64, "`precision` is 'tpu-default' for float64 arrays, expected fl"),
        ("jax.grouped[precision=tpu-high]", np.float16, "how a TPU rounds float16 operands is not documented"),
        (f"{__name__}:with_a_fixed_algorithm[precision=gpu-high]", np.float32, "expected default, high or highest to"),
    ],
)
def test_what_cannot_be_emulated_is_refused(name, dtype, message):
    case, _ = exact_case(np.random.default_rng(0), 2)
    case = Case(case.x.astype(dtype), case.kernel.astype(dtype), padding="VALID")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        implementation(name).run(case)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("torch.conv2d[precision=tpu-default]", "expected one of compile, deterministic"),
        ("numpy.exact[precision=tpu-default]", "expected no knob"),
        ("jax.taps[precision=tpu]", "`precision` is 'tpu', expected one of default, high, highest, tpu-default, tpu-"),
    ],
)
def test_a_name_that_emulates_nothing_is_answered_with_what_there_is(name, message):
    with pytest.raises(ValueError) as caught:
        implementation(name)
    assert message in str(caught.value)


@pytest.fixture
def uncompiled(monkeypatch):
    """A machine without libtpu: the process that compiles takes seconds."""
    monkeypatch.setattr(compiler_evidence, "_compiled", lambda *_: None)


def normal_case(seed, multiplier=1, shape=(2, 6, 7, 3), kernel_size=(3, 3)):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((*kernel_size, 1, shape[-1] * multiplier), np.float32)
    case = Case(rng.standard_normal(shape, np.float32), kernel, padding="SAME")
    return case, rng.standard_normal(case.geometry.output_shape, np.float32)


def finding(case, name, dy=None):
    diagnosis = parity(case, ["jax.taps", name], explain=False, quantity="y" if dy is None else "dx", dy=dy)
    return diagnosis.between("jax.taps", name)


#: (implementation, multiplier, whether the gradient) -> the words that must be found.
NAMED = {
    ("jax.grouped[precision=tpu-default]", 1, False): ("bfloat16", "the input rounded", "a TPU"),
    ("jax.patches[precision=tpu-default]", 2, False): ("bfloat16", "the input and the kernel rounded", "a TPU"),
    ("jax.patches[precision=tpu-high]", 1, False): ("bfloat16_2x", "two parts of bfloat16", "a TPU"),
    ("jax.patches[precision=tpu-high]", 2, False): ("bfloat16_3x", "three products for each one", "a TPU"),
    ("jax.grouped[precision=gpu-default]", 1, False): ("tf32", "rounded to tf32;", "an NVIDIA GPU"),
    ("jax.grouped[precision=tpu-default]", 1, True): ("bfloat16", "the gradient rounded", "a TPU"),
    ("jax.patches[precision=tpu-default]", 1, True): ("bfloat16", "each window's contribution rounded", "a TPU"),
    ("jax.patches[precision=tpu-high]", 2, True): ("bfloat16_3x", "each window's contribution rounded", "a TPU"),
    ("jax.patches[precision=gpu-default]", 2, True): ("tf32", "each window's contribution rounded", "an NVIDIA GPU"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name, multiplier, gradient", NAMED)
def test_precision_names_the_platform_what_it_rounds_and_a_fix_that_was_run(
    name, multiplier, gradient, seed, uncompiled
):
    case, dy = normal_case(seed, multiplier)
    dy = dy if gradient else None
    found = finding(case, name, dy)
    fmt, rounded, about = NAMED[name, multiplier, gradient]
    assert found.verdict is Verdict.PRECISION and found.name.split()[0] == fmt
    assert rounded in found.cause and f"; {about} may do so at precision=" in found.cause
    assert 'write precision="highest", or jaxdw.depthwise_conv(x, kernel, bias, ..., method="taps")' in found.fix
    there = implementation(name).emulation.platform
    for fixed in (
        name.replace("default", "highest").replace("high]", "highest]"),
        f"jax.taps[precision={there}-high]",
    ):
        assert finding(case, fixed, dy).verdict.passes


@pytest.mark.parametrize("name", ["grouped", "patches", "unfold_matmul"])
def test_three_parts_are_as_good_as_float32(name, seed):
    """One tap and a multiplier: no sum whose bound would hide what is dropped."""
    case, _ = normal_case(seed, 2, (2, 40, 4), (1,))
    assert finding(case, f"jax.{name}[precision=tpu-highest]").verdict.passes


def test_a_fix_that_does_not_help_is_not_given(seed, uncompiled, monkeypatch):
    monkeypatch.setattr(emulation, "_is_within_bound", lambda output, way: way.base == "jax.taps")
    case, _ = normal_case(seed)
    fix = finding(case, "jax.grouped[precision=gpu-default]").fix
    assert 'method="taps"' in fix and "highest" not in fix


def truncated(a, parts):
    if parts is None:
        return [a]
    bits = lax.bitcast_convert_type(a, jnp.uint32) >> (23 - parts.mantissa_bits) << (23 - parts.mantissa_bits)
    return [lax.bitcast_convert_type(bits, jnp.float32)]


TWINS = {
    "another format": ("PARTS", {**emulated.PARTS, "tpu": dict.fromkeys(emulated.PARTS["tpu"], Parts(1, 10))}),
    "no format": ("PARTS", {**emulated.PARTS, "tpu": dict.fromkeys(emulated.PARTS["tpu"], Parts(1, 6))}),
    "towards zero": ("split", truncated),
    "the kernel alone": ("_rounded", lambda *_: (None, Parts(1, 7))),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("twin", TWINS)
def test_another_rounding_is_not_called_that_of_the_platform(twin, seed, uncompiled, monkeypatch):
    monkeypatch.setattr(emulated, *TWINS[twin])
    jax.clear_caches()  # compiled with what the twin replaces
    case, _ = normal_case(seed)
    found = finding(case, "jax.grouped[precision=tpu-default]")
    assert not found.verdict.passes and "emulated here" not in found.cause and "tried here" not in found.fix
    jax.clear_caches()


def test_random_convolutions_are_precision_of_the_platform_or_better(full, uncompiled):
    @hypothesis.settings(max_examples=200 if full else 4)
    @given(problems(max_size=6, max_channels=3), st.sampled_from(METHODS), st.sampled_from(VALUES), st.booleans())
    def check(problem, method, value, gradient):
        case = Case(*problem.arrays(np.float32), **problem.options)
        dy = np.random.default_rng(problem.seed).standard_normal(case.geometry.output_shape).astype(np.float32)
        found = finding(case, f"jax.{method}[precision={value}]", dy if gradient else None)
        assert found.verdict.passes or found.verdict in (Verdict.PRECISION, Verdict.INCONCLUSIVE), found
        if found.verdict is Verdict.PRECISION:
            assert "emulated here" in found.cause and "tried here" in found.fix

    check()


@pytest.mark.parametrize("multiplier", [1, 2])
def test_what_libtpu_compiles_rounds_what_is_emulated(multiplier, seed, full, uncompiled):
    """All that its program is certain to round, and nothing beyond what it may."""
    target = platform("tpu:v5e")
    if target.missing:
        pytest.skip(target.missing)
    if multiplier == 2 and not full:
        pytest.skip("with the full counts: a program takes seconds to compile")
    ways = [f"{m}[precision={p}]" for m in ("grouped", "patches", "taps", "rows") for p in ("default", "highest")]
    case, _ = normal_case(seed, multiplier)
    for each in audit(ways, AuditSubject(case.geometry), "tpu:v5e").findings:
        assert not each.error
        method, _, precision = each.way.partition("[precision=")
        ours = finding(case, f"jax.{method}[precision=tpu-{precision.rstrip(']') or 'default'}]").place
        named = set(ours.removeprefix("inputs: ").split(", ")) - {""}
        certain = {name for r in each.roundings if r.certain for name in r.arguments}
        possible = {name for r in each.roundings for name in r.arguments}
        assert certain <= named <= possible, (each.way, certain, named, possible)


def test_what_the_compiler_rounds_is_told_where_it_can_be_asked(seed, monkeypatch):
    from bridge.audit.precision import Rounding

    asked = []

    def compiled(way, subject, target):
        asked.append((way, subject.gradient, target))
        return (
            Rounding("bf16", ("dy",), "copy.1", "copy", "main"),
            Rounding("bf16", ("x",), "copy.2", "copy", "main"),
            Rounding("bf16", ("kernel",), "conv", "convolution", "main", certain=False, precision="default"),
        )

    monkeypatch.setattr(compiler_evidence, "_compiled", compiled)
    case, _ = normal_case(seed)
    assert finding(case, "jax.taps[precision=tpu-default]").verdict.passes and not asked  # only where it is wanted
    cause = finding(case, "jax.grouped[precision=tpu-default]").cause
    assert cause.endswith("; compiled for tpu:v5e, the program rounds the input to bf16 in copy %copy.2 in %main")
    assert asked == [("grouped", False, "tpu:v5e")]
    monkeypatch.setattr(compiler_evidence, "_compiled", lambda *_: ())
    assert "rounds none of these" in finding(case, "jax.grouped[precision=tpu-default]").cause
    two, _ = normal_case(seed, 2)
    assert "compiled for" not in finding(two, "jax.unfold_matmul[precision=tpu-default]").cause  # none of jaxdw's own


@pytest.mark.parametrize("value", ["tpu-default", "gpu-default"])
def test_a_change_neither_leaves_a_platform_nor_emulates_one(value, seed, full):
    if value == "gpu-default" and not full:
        pytest.skip("with the full counts: as for the TPU")
    case, _ = normal_case(seed)
    there = eliminate(case, "torch.conv2d", f"jax.grouped[precision={value}]", isolated=False)
    assert there.best is not None and "Time: " not in " ".join(there.sentences())
    for change in there.changes:
        assert implementation(change.b).emulation.platform == value.partition("-")[0]
        assert implementation(change.b).input_bits(case) == 24
    here = eliminate(case, "torch.conv2d", "jax.grouped", isolated=False)
    assert all(implementation(each).emulation is None for change in here.changes for each in (change.a, change.b))


def test_a_coarser_precision_is_not_proposed(seed):
    """Equal they would be, in bfloat16."""
    case, _ = normal_case(seed, 2)
    found = eliminate(case, "jax.grouped[precision=tpu-default]", "jax.grouped[precision=tpu-highest]", isolated=False)
    assert all(implementation(change.b).input_bits(case) == 24 for change in found.changes)


def test_attribution_gives_the_platform_its_share(seed, monkeypatch):
    monkeypatch.setattr("bridge.diagnosis.attribution.neighbours", lambda *_: [])
    case, _ = normal_case(seed)
    result = attribute(case, "jax.grouped", "jax.grouped[precision=tpu-default]", isolated=False)
    assert result.shares == [("precision: default → tpu-default", result.total)] and result.total > 2**-11


def test_the_command_shows_it_in_every_report(tmp_path, uncompiled):
    names = "jax.taps,jax.patches[precision=tpu-default],jax.taps[precision=tpu-default]"
    arguments = ["parity", "--implementations", names, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html"]
    result = typer.testing.CliRunner().invoke(cli.app, list(map(str, arguments)))
    text = " ".join(result.output.split())
    assert result.exit_code == 3 and all(len(line) <= 80 for line in result.output.splitlines())
    for words in ("a TPU may do so at precision=", "the input rounded to bfloat16", "tried here, and within the bound"):
        assert words in text
    assert "jax.taps IDENTICAL 0 0 0 0 [precision=tpu-default]" in text  # a row of the table, its name on two lines
    (_, first, *_), page = (
        json.loads((tmp_path / "r.json").read_text())["comparisons"],
        (tmp_path / "r.html").read_text(),
    )
    assert {first["a"], first["b"]} <= set(names.split(",")) and "[precision=tpu-default]" in page


def test_every_value_says_how_to_write_it():
    knob = knobs("jax")["precision"]
    for value in VALUES:
        where = {"tpu": "on a TPU", "gpu": "on an NVIDIA GPU"}[value[:3]]
        assert knob.how_to(value).startswith(f'precision="{value[4:]}" {where} (emulated')
        assert all(other.startswith(value[:4]) for other in knob.others(value))
    assert knob.others("default") == ["high", "highest"]
    assert dataclasses.asdict(emulated.values()["tpu-high"])["code"] == 'precision="high"'
