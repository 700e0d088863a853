"""parity over implementations, and no false alarm among the real ones."""

import jax
import numpy as np
import pytest
import torch

import jaxdw
from bridge import Case, Verdict, compare, implementation, parity
from bridge._implementations.torch_ import to_numpy, to_tensor
from bridge.case import DTYPES
from bridge.diagnosis import DEFAULT
from bridge.numerics import exact_input_gradient, exact_kernel_gradient
from bridge.selftest import random_case
from tests.bridge.diagnosis.mutations import in_order


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def of_dtype(case, dtype, rng):
    """Other normal numbers on the case's geometry, in a dtype."""
    arrays = {name: getattr(case, name) for name in ("x", "kernel", "bias")}
    return case.replace(
        **{name: None if a is None else rng.standard_normal(a.shape).astype(dtype) for name, a in arrays.items()}
    )


class Flipped:
    """`in_order` with the kernel flipped."""

    name = "flipped"

    def run(self, case):
        return in_order(case.replace(kernel=case.kernel[::-1]))

    def arithmetic(self, case, quantity="y"):
        return implementation("torch.conv2d").arithmetic(case, quantity)


def test_a_mistaken_implementation_is_the_verdict_of_every_pair_it_is_in(rng):
    x, kernel = rng.standard_normal((2, 9, 8, 6), np.float32), rng.standard_normal((3, 3, 1, 6), np.float32)
    case = Case(x, kernel, padding=1)
    diagnosis = parity(case, ["torch.conv2d", Flipped(), "jax.taps"], explain=False)
    assert diagnosis.verdict is Verdict.CONVENTION
    for other in ("torch.conv2d", "jax.taps"):
        assert diagnosis.between(other, "flipped").name == "kernel flipped"
    assert diagnosis.between("torch.conv2d", "jax.taps").verdict.passes
    assert [test.passed for test in diagnosis.integer_tests] == [True, False, True]


def with_numbers_of_same(x, weight):
    x = torch.nn.functional.pad(x, (0, 1, 0, 1))
    return torch.nn.functional.conv2d(x, weight, stride=2, groups=len(weight))


@pytest.mark.parametrize(
    ("mistaken", "fix"),
    [
        (
            lambda x, w: torch.nn.functional.conv2d(x, w.flip(2, 3), None, 2, 1, groups=6),
            "flip the weight: weight.flip(2, 3)",
        ),
        (lambda x, w: torch.nn.functional.conv2d(x, w.mT, None, 2, 1, groups=6), "weight back: its axes (3, 2) are in"),
        (lambda x, w: torch.nn.functional.conv2d(x.roll(1, 1), w, None, 2, 1, groups=6), "x[:, [1, 2, 3, 4, 5, 0]]"),
        (with_numbers_of_same, "`padding=1` instead of `padding=0 after F.pad(x, (0, 1, 0, 1))`"),
    ],
)
def test_a_user_of_pytorch_reads_the_fix_in_its_layout(rng, mistaken, fix):
    x, kernel = rng.standard_normal((2, 10, 8, 6), np.float32), rng.standard_normal((3, 3, 1, 6), np.float32)
    case = Case(x, kernel, padding=1, strides=2)
    diagnosis = parity(case, {"torch.conv2d": implementation("torch.conv2d"), "mine": mistaken}, explain=False)
    assert diagnosis.verdict is Verdict.CONVENTION and fix in diagnosis.comparisons[0].fix, diagnosis.comparisons


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_real_implementations_raise_no_false_alarm(rng, full, dtype):
    """Every pair of the seven: 21 comparisons a case, 20,000 over the dtypes in full."""
    for _ in range(64 if full else 2):
        geometry = random_case(rng)
        for _ in range(5 if full else 1):  # compiled once
            case = of_dtype(geometry, DTYPES[dtype], rng)
            diagnosis = parity(case, DEFAULT, explain=False)
            assert diagnosis.verdict.passes, (
                [c for c in diagnosis.comparisons if not c.verdict.passes],
                [t for t in diagnosis.integer_tests if not t.passed],
                case.geometry,
            )


def torch_gradients(case, dy):
    x, weight, y = (to_tensor(a) for a in (np.moveaxis(case.x, -1, 1), np.moveaxis(case.kernel, (-1, -2), (0, 1)), dy))
    x.requires_grad_(), weight.requires_grad_()
    g = case.geometry
    out = torch.nn.functional.conv2d(x, weight, None, g.strides, g.symmetric_padding, g.kernel_dilation, g.channels)
    dx, dw = torch.autograd.grad(out, (x, weight), y.movedim(-1, 1))
    return {"dx": to_numpy(dx.movedim(1, -1)), "dkernel": to_numpy(dw.permute(2, 3, 1, 0))}


def jax_gradients(case, dy):
    def forward(x, kernel):
        g = case.geometry
        return jaxdw.depthwise_conv(x, kernel, strides=g.strides, padding=g.padding, kernel_dilation=g.kernel_dilation)

    with jax.enable_x64(case.dtype == np.float64):
        _, pull = jax.vjp(forward, case.x, case.kernel)
        dx, dkernel = pull(jax.numpy.asarray(dy))
        return {"dx": np.asarray(dx), "dkernel": np.asarray(dkernel)}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_real_gradients_raise_no_false_alarm(rng, full, dtype):
    references = {"dx": exact_input_gradient, "dkernel": exact_kernel_gradient}
    done = 0
    while done < (200 if full else 1):
        case = of_dtype(random_case(rng, multiplier=1), DTYPES[dtype], rng).replace(bias=None)
        if case.geometry.symmetric_padding is None:
            continue
        done += 1
        dy = rng.standard_normal(case.geometry.output_shape).astype(case.dtype)
        gradients = (torch_gradients(case, dy), jax_gradients(case, dy))
        for quantity, reference in references.items():
            result = compare(
                *(g[quantity] for g in gradients), case, quantity=quantity, dy=dy, reference=reference(case, dy)
            )
            assert result.verdict.passes, (result, case.geometry)
