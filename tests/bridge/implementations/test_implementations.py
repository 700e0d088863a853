"""Every implementation computes the case, declares an arithmetic it keeps, and takes its knobs."""

import os

import hypothesis
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

import bridge
from bridge import Case
from bridge._implementations import counterpart, implementation, implementations, isolated, jax_, knobs
from bridge.accumulation import replay, reveal
from bridge.accumulation.tree import BIAS, Tree
from bridge.diagnosis import DEFAULT
from bridge.diagnosis.runs import neighbours
from bridge.numerics import error_bound, exact, same_bits
from tests import oracle
from tests.strategies import problems

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
KNOBBED = [
    "torch.conv2d[mkldnn=off]",
    "torch.conv2d[threads=1]",
    "torch.conv2d[fp32_precision=bf16]",
    "torch.unfold_einsum[fp32_precision=tf32]",
    "torch.unfold_einsum[matmul_precision=medium]",
    "torch.unfold_matmul[deterministic=on,matmul_precision=high]",
    "torch.unfold_matmul[mkldnn=off]",
    "jax.taps[jit=off]",
    "jax.grouped[precision=highest]",
]


def assert_within_declared_bound(name, case):
    reference = exact(case)
    y = implementation(name).run(case)
    bound = error_bound(implementation(name).arithmetic(case), reference)
    distance = np.abs(y.astype(np.float64) - reference.reference) - reference.reference_error
    assert (distance <= bound).all(), (name, np.nanmax(distance / bound))


@pytest.mark.sampled(40)
@pytest.mark.parametrize("name", [*implementations(), *KNOBBED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_keeps_its_declared_bound(name, dtype, full):
    few = name == "jax.pallas"  # a second or two each

    @hypothesis.settings(max_examples=(20 if few else 150) if full else (1 if few else 6))
    @given(problems())
    def check(problem):
        assert_within_declared_bound(name, Case(*problem.arrays(DTYPES[dtype]), **problem.options))

    check()


@given(problems())
@hypothesis.settings(max_examples=60)
def test_a_case_reads_the_same_inputs_as_the_loop(problem):
    x, kernel, bias = problem.arrays(np.float32)
    case = Case(x, kernel, bias, **problem.options)
    expected = oracle.windows(x, kernel.shape[:-2], **problem.options)
    taps = [
        np.broadcast_to(x[..., 0], expected.shape[: -problem.rank - 1] + (x.shape[-2],)) for x, _, _ in case.tap_terms()
    ]
    actual = np.stack(taps, axis=-2).reshape(expected.shape)
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("name", implementations(untried=False))
def test_a_narrower_dtype_knob_is_computed_in_it_and_declared(name):
    if name == "numpy.exact":
        pytest.skip("numpy.exact has no knobs")
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((1, 6, 6, 3), np.float32), rng.standard_normal((3, 3, 1, 3), np.float32))
    narrow = f"{name}[dtype=bfloat16]"
    assert not np.array_equal(implementation(narrow).run(case), implementation(name).run(case))
    assert_within_declared_bound(narrow, case)


def test_channels_last_is_computed_in_that_layout():
    rng = np.random.default_rng(0)
    case = Case(rng.standard_normal((2, 9, 9, 4), np.float32), rng.standard_normal((3, 3, 1, 4), np.float32))
    assert_within_declared_bound("torch.conv2d[layout=channels_last]", case)
    flat = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    with pytest.raises(ValueError, match="`layout` is 'channels_last' in 1-D"):
        implementation("torch.conv2d[layout=channels_last]").run(flat)


def test_settings_are_as_before_even_after_an_error():
    before = torch.backends.mkldnn.enabled, torch.get_num_threads()
    case = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    implementation("torch.conv2d[mkldnn=off,threads=1]").run(case)
    with pytest.raises(RuntimeError), _broken():
        implementation("torch.conv2d[mkldnn=off,threads=1]").run(case)
    assert (torch.backends.mkldnn.enabled, torch.get_num_threads()) == before


def _broken():
    from unittest import mock

    return mock.patch("torch.nn.functional.conv1d", side_effect=RuntimeError("planted"))


STATE = {
    "matmul": lambda: torch.backends.mkldnn.matmul.fp32_precision,
    "convolution": lambda: torch.backends.mkldnn.conv.fp32_precision,
    "cuda": lambda: torch.backends.cuda.matmul.fp32_precision,
    "older": torch.get_float32_matmul_precision,
    "deterministic": torch.get_deterministic_debug_mode,
}


@pytest.mark.parametrize("older", ["highest", "medium"])
@pytest.mark.parametrize("knob", ["matmul_precision=medium", "matmul_precision=high", "fp32_precision=bf16"])
def test_precision_settings_are_as_before_even_after_an_error(older, knob):
    case = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    torch.set_float32_matmul_precision(older)
    try:
        before = {name: get() for name, get in STATE.items()}
        for name in (f"torch.conv2d[{knob},deterministic=on]", "torch.conv2d"):
            implementation(name).run(case)
            assert {name: get() for name, get in STATE.items()} == before
            with pytest.raises(RuntimeError, match="planted"), _broken():
                implementation(name).run(case)
            assert {name: get() for name, get in STATE.items()} == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_default_setting_is_float32_whatever_the_process_was_set_to(seed):
    rng = np.random.default_rng(seed)
    case = Case(rng.standard_normal((2, 28, 28, 32), np.float32), rng.standard_normal((3, 3, 1, 32), np.float32))
    expected = implementation("torch.unfold_einsum").run(case)
    torch.set_float32_matmul_precision("medium")
    try:
        assert np.array_equal(implementation("torch.unfold_einsum").run(case), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_written_by_hand_adds_in_raster_order(bias, seed):
    """Interpreted, each product is rounded or not as XLA pleases; the replay tells, and has every bit."""
    rng = np.random.default_rng(seed)
    x, kernel, b = (rng.standard_normal(shape, np.float32) for shape in ((1, 3, 4, 2), (2, 3, 1, 2), (2,)))
    case = Case(x, kernel, b if bias else None, padding=1)
    order = reveal(implementation("jax.pallas"), case)
    assert order.revealed == 1
    for tree in order.trees:
        taps = [leaf for leaf in tree.leaves if leaf != BIAS]
        assert unfused(tree) is Tree.chain([BIAS, *taps] if bias else taps)
    assert same_bits(replay(order, case), implementation("jax.pallas").run(case)).all()


def unfused(tree):
    """The tree with every FMA an addition of a rounded product."""
    children = [unfused(child) for child in tree.children]
    if tree.kind == "fma":
        return Tree.add(Tree.of(tree.leaf), *children)
    return Tree.add(*children) if tree.kind == "add" else tree


def test_what_a_cpu_interprets_runs_only_where_it_is_named(seed):
    assert "jax.pallas" in implementations() and "jax.pallas" not in implementations(untried=False)
    assert "jax.pallas" not in DEFAULT and counterpart("jax", "taps").name == "jax.taps"
    rng = np.random.default_rng(seed)
    case = Case(rng.standard_normal((1, 4, 4, 2), np.float32), rng.standard_normal((2, 2, 1, 2), np.float32))
    assert not any(each.base == "jax.pallas" for _, each in neighbours(implementation("jax.taps"), case))


def test_counterparts_are_of_one_family():
    for family in ("convolution", "windows", "channel loop", "taps"):
        names = [counterpart(framework, family).name for framework in ("torch", "jax")]
        assert [name.partition(".")[0] for name in names] == ["torch", "jax"]
    assert counterpart("numpy", "taps") is None


def test_every_setting_says_how_to_write_it():
    for framework in ("torch", "jax", "numpy"):
        for spec in knobs(framework).values():
            assert all(map(spec.how_to, [spec.default, *spec.others(spec.default)])) and spec.kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_flags_reach_a_process_of_their_own(dtype, seed):
    rng = np.random.default_rng(seed)
    x, kernel = rng.standard_normal((1, 6, 7, 3)), rng.standard_normal((3, 2, 1, 6))
    bias = rng.standard_normal(6).astype(DTYPES[dtype])
    case = Case(x.astype(DTYPES[dtype]), kernel.astype(DTYPES[dtype]), bias, strides=(2, 1), padding="REFLECT")
    before = dict(os.environ)
    assert_within_declared_bound("jax.taps[xla=O0]", case)
    assert dict(os.environ) == before


def test_a_process_of_its_own_measures_its_own_times():
    case = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    times = implementation("jax.taps[xla=AVX2]").seconds(case, 3)
    assert len(times) == 3 and min(times) > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--xla_no_such_flag=1", "this XLA does not know the flag --xla_no_such_flag=1"),
        ("--xla_backend_optimization_level=high", "Couldn't interpret value high"),
    ],
)
def test_a_flag_that_xla_does_not_know_is_named(flags, message, monkeypatch):
    monkeypatch.setitem(jax_.XLA, "O0", flags)
    case = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    with pytest.raises(RuntimeError) as caught:
        implementation("jax.taps[xla=O0]").run(case)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_process_of_its_own_has_a_time_limit(monkeypatch):
    monkeypatch.setattr(isolated, "TIME_LIMIT", 0.01)
    case = Case(np.zeros((1, 9, 4), np.float32), np.zeros((3, 1, 4), np.float32))
    with pytest.raises(RuntimeError, match=r"took longer than 0\.01 s in a process of its own"):
        implementation("jax.taps[xla=O0]").run(case)


def test_names_are_canonical():
    assert implementation("torch.conv2d[threads=1,mkldnn=off]").name == "torch.conv2d[mkldnn=off,threads=1]"
    assert implementation("torch.conv2d[mkldnn=on]").name == "torch.conv2d"
    assert bridge.implementation("jax.taps").framework == "jax"


@pytest.mark.parametrize(
    "name, message",
    [
        ("torch.conv", "`implementation` is 'torch.conv', expected a function of your own as package.module:function"),
        ("mxnet.conv2d", "or one of torch.conv2d, "),
        ("torch.conv2d[", "or one of torch.conv2d, "),
        (
            "torch.conv2d[color=red]",
            "with knob 'color=red', expected one of compile, deterministic, dtype, fp32_precision, ",
        ),
        ("torch.conv2d[mkldnn=maybe]", "`mkldnn` is 'maybe', expected one of on, off"),
        ("torch.conv2d[threads=0]", "`threads` is '0', expected a positive integer"),
    ],
)
def test_a_wrong_name_is_answered_with_what_there_is(name, message):
    with pytest.raises(ValueError) as caught:
        implementation(name)
    assert message in str(caught.value)


def test_sharding_on_one_device_says_how_to_get_more():
    case = Case(np.ones((2, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32))
    with pytest.raises(ValueError, match="`sharding` is 'batch' on one device, expected two or more: XLA_FLAGS"):
        implementation("jax.grouped[sharding=batch]").run(case)


def test_what_takes_long_is_used_only_where_it_is_named():
    case = Case(np.ones((2, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32))
    tried = {knob for name in ("torch.conv2d", "jax.taps") for knob, _ in neighbours(implementation(name), case)}
    assert "jit" in tried and not tried & {"compile", "sharding"}


def test_every_knob_is_listed():
    assert set(knobs("torch")) == {
        "compile",
        "deterministic",
        "dtype",
        "fp32_precision",
        "layout",
        "matmul_precision",
        "mkldnn",
        "threads",
    }
    assert set(knobs("jax")) == {"dtype", "jit", "precision", "sharding", "xla"} and set(knobs("numpy")) == set()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"x": [1.0]}, TypeError, "`x` is a list, expected a NumPy array"),
        ({"x": np.zeros((1, 5, 5, 2), int)}, TypeError, "`x` has dtype int64, expected one of float32"),
        ({"bias": np.zeros(2)}, TypeError, "`bias` has dtype float64; expected one dtype for all"),
        ({"bias": np.zeros(3, np.float32)}, ValueError, "`bias` has shape (3,), expected (2,)"),
    ],
)
def test_a_case_names_what_does_not_fit(changes, error, message):
    given = {"x": np.zeros((1, 5, 5, 2), np.float32), "kernel": np.zeros((3, 3, 1, 2), np.float32), **changes}
    with pytest.raises(error) as caught:
        Case(**given)
    assert message in str(caught.value)
