"""Bounds, against arithmetic simulated in exact rationals: any order, any fusing, any flushing."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from bridge.case import Case
from bridge.numerics import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    TF32,
    Arithmetic,
    Products,
    difference_bound,
    error_bound,
    exact,
    exact_bias_gradient,
    exact_input_gradient,
    exact_kernel_gradient,
    exact_sum,
    format_of,
)
from tests.bridge.numerics.rationals import KINDS, infinite, operands, rounded, truncated

#: (the operands' format, the arithmetic)
DECLARED = {
    "float64": (FLOAT64, Arithmetic.of("float64")),
    "float32": (FLOAT32, Arithmetic.of("float32")),
    "bfloat16": (BFLOAT16, Arithmetic.of("bfloat16")),
    "float16": (FLOAT16, Arithmetic.of("float16")),
    "bfloat16, the bias added to the rounded sum": (BFLOAT16, Arithmetic.of("bfloat16", output_roundings=2)),
    "bfloat16 throughout": (BFLOAT16, Arithmetic(BFLOAT16, BFLOAT16, BFLOAT16)),
    "float16 throughout": (FLOAT16, Arithmetic(FLOAT16, FLOAT16, FLOAT16)),
    "float32 in float64": (FLOAT32, Arithmetic(FLOAT64, FLOAT64, FLOAT32)),
    "float32 products in float64 sums": (FLOAT32, Arithmetic(FLOAT32, FLOAT64, FLOAT32)),
    "tf32": (FLOAT32, Arithmetic.of("float32", input=TF32)),
    "tf32 truncated": (FLOAT32, Arithmetic.of("float32", input=TF32, input_truncated=True)),
    "bfloat16 inputs": (FLOAT32, Arithmetic.of("float32", input=BFLOAT16)),
    "bfloat16 inputs truncated": (FLOAT32, Arithmetic.of("float32", input=BFLOAT16, input_truncated=True)),
    "float16 inputs": (FLOAT32, Arithmetic.of("float32", input=FLOAT16)),
    "bfloat16 as float16": (BFLOAT16, Arithmetic.of("bfloat16", input=FLOAT16)),
    "bfloat16_3x": (FLOAT32, Arithmetic.of("float32", input=BFLOAT16, passes=3)),
    "bfloat16_6x": (FLOAT32, Arithmetic.of("float32", input=BFLOAT16, passes=6)),
    "tf32_3x": (FLOAT32, Arithmetic.of("float32", input=TF32, passes=3)),
    "float32, rounded to float16": (FLOAT32, Arithmetic(FLOAT32, FLOAT32, FLOAT16)),
}
DECLARED |= {
    f"{name}, flushed": (given, dataclasses.replace(arithmetic, flushes_subnormals=True))
    for name, (given, arithmetic) in DECLARED.items()
}


class Machine:
    """One run of a declared arithmetic: each choice that it leaves open is drawn."""

    def __init__(self, arithmetic, given, rng):
        self.arithmetic, self.given, self.rng = arithmetic, given, rng

    def coin(self):
        return self.rng.random() < 0.5

    def flush(self, value, fmt):
        """value, or zero where it is subnormal in `fmt` and the machine may flush there."""
        half_in_wider = fmt == FLOAT16 and self.arithmetic.accumulator != FLOAT16
        if not self.arithmetic.flushes_subnormals or half_in_wider or infinite(value):
            return value
        return Fraction(0) if abs(value) < Fraction(fmt.smallest_normal) and self.coin() else value

    def round(self, value, fmt):
        if infinite(value):
            return value
        return self.flush(rounded(self.flush(value, fmt), fmt), fmt)

    def inputs(self, value):
        """The parts of an operand, the most significant first."""
        fmt, rest, parts = self.arithmetic.input, self.flush(value, self.given), []
        if fmt is None:
            return [rest]
        for _ in range(self.arithmetic.parts):
            part = truncated(rest, fmt) if self.arithmetic.input_truncated else rounded(rest, fmt)
            parts.append(self.flush(part, fmt))
            rest = Fraction(0) if infinite(part) else rest - parts[-1]
        return parts

    def run(self, x, w, bias):
        """The sum of x w and bias in a random tree, products rounded or fused at random."""
        a = self.arithmetic
        products = []
        for xi, wi in zip(x, w):
            xs, ws = self.inputs(xi), self.inputs(wi)
            products += [
                (p, q) for (i, p), (j, q) in itertools.product(enumerate(xs), enumerate(ws)) if i + j < a.parts
            ]
        if any(infinite(v) for pair in products for v in pair):
            return math.inf
        nodes = [(p * q, True) for p, q in products]  # (value, whether it is an unrounded product)
        late_bias = bias is not None and a.output_roundings == 2 and self.coin()
        if bias is not None and not late_bias:
            nodes.append((self.flush(bias, self.given), False))
        chain = self.coin()
        while len(nodes) > 1:
            i = 0 if chain else int(self.rng.integers(len(nodes)))
            left = nodes.pop(i)
            right = nodes.pop(0 if chain else int(self.rng.integers(len(nodes))))
            fused = self.coin() and left[1] != right[1]
            values = [v if fused or not product else self.round(v, a.product) for v, product in (left, right)]
            if any(infinite(v) for v in values):
                return math.inf
            nodes.insert(0, (self.round(values[0] + values[1], a.accumulator), False))
        value, product = nodes[0]
        value = self.round(self.round(value, a.product), a.accumulator) if product else value
        if late_bias:
            value = self.round(value, a.output)
            value = value if infinite(value) else value + bias
        return self.round(value, a.output)


def columns(rng, fmt, kind, terms, count):
    x, w = operands(rng, fmt, (terms, count), kind)
    bias = operands(rng, fmt, (3, count), kind)[0][-1]
    finite = (np.isfinite(x) & np.isfinite(w)).all(axis=0) & np.isfinite(bias)
    return x[:, finite], w[:, finite], bias[finite]


def fractions(a):
    return [Fraction(float(v)) for v in a]


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", DECLARED)
def test_no_run_of_the_declared_arithmetic_leaves_its_bound(name, seed, full):
    given, arithmetic = DECLARED[name]
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        for terms in (1, 2, 5, 9):
            x, w, bias = columns(rng, given, kind, terms, 100 if full else 4)
            for b in (None, bias):
                total = exact_sum(Products.of([(p, q, True) for p, q in zip(x, w)], x.shape[1:], b))
                bound = error_bound(arithmetic, total)
                for k in range(x.shape[1]):
                    xs, ws, start = (
                        fractions(x[:, k]),
                        fractions(w[:, k]),
                        None if b is None else fractions(b[k : k + 1])[0],
                    )
                    y = sum(p * q for p, q in zip(xs, ws)) + (start or 0)
                    computed = Machine(arithmetic, given, rng).run(xs, ws, start)
                    if np.isinf(bound[k]):
                        continue
                    assert not infinite(computed), (kind, xs, ws, start)
                    assert abs(computed - y) <= Fraction(bound[k]), (kind, xs, ws, start)


def rational_bound(arithmetic, given, xs, ws, bias):
    """The formulas of the docstring in exact rationals, without overflow: the bound that `error_bound` rounds up."""
    a, r = arithmetic, arithmetic.parts
    holds = a.input is None or (
        a.input.precision >= given.precision and a.input.smallest_subnormal <= given.smallest_subnormal
    )
    fmt = a.input or given
    u_x = Fraction(0)
    if a.input is not None and a.input.precision < given.precision:
        u_x = Fraction(fmt.unit_roundoff) * (1 + a.input_truncated)

    def flushed(fmt):
        off = not a.flushes_subnormals or (fmt == FLOAT16 and a.accumulator != FLOAT16)
        return Fraction(0 if off else fmt.smallest_normal)

    lost = Fraction(0) if holds else Fraction(fmt.smallest_subnormal) / (1 if a.input_truncated else 2)
    lost = max(lost, flushed(fmt))

    def t(v):
        if r == 1:
            return min(abs(v), lost) if abs(v) < Fraction(fmt.smallest_normal) else Fraction(0)
        reach = 4 * Fraction(fmt.smallest_normal) / (u_x or 1) ** (r - 1)
        return (r + 1) * lost if 0 < abs(v) < reach else Fraction(0)

    start = [] if bias is None else [bias]
    S = sum((abs(p * q) for p, q in zip(xs, ws)), Fraction(0)) + sum(map(abs, start))
    Q = sum((abs(p) * t(q) + abs(q) * t(p) + t(p) * t(q) for p, q in zip(xs, ws)), Fraction(0)) + sum(map(t, start))
    orders = [i + j for i in range(r) for j in range(r)]
    kept, dropped = [o for o in orders if o < r], [o for o in orders if o >= r]
    E = ((1 + u_x**r) ** 2 - 1 + (1 + u_x) ** 2 * sum(u_x**o for o in dropped)) * S + (1 + u_x) * (1 + len(dropped)) * Q
    P = (1 + u_x) ** 2 * sum(u_x**o for o in kept) * S + (1 + u_x) * len(kept) * Q
    n = len(xs) * len(kept)
    m = n + len(start)
    bits = min(given.precision, fmt.precision)
    u_p = Fraction(0 if 2 * bits <= a.product.precision else a.product.unit_roundoff)
    g = (1 + u_p) * (1 + (m - 1) * Fraction(a.accumulator.unit_roundoff)) - 1
    lam = max(flushed(a.product), flushed(a.accumulator))
    eta = max(Fraction(a.product.smallest_subnormal), Fraction(a.accumulator.smallest_subnormal)) / 2
    U = (n + m - 1) * lam if lam else n * eta
    E += g * P + (1 + g) * U
    if a.output.precision < a.accumulator.precision:
        y = abs(sum(p * q for p, q in zip(xs, ws)) + sum(start))
        u, eta = Fraction(a.output.unit_roundoff), Fraction(a.output.smallest_subnormal) / 2 + flushed(a.output)
        if a.output_roundings == 2 and start:
            E += u * (y + abs(bias) + E) + eta
        E += u * (y + E) + eta
    return E


@pytest.mark.parametrize("name", DECLARED)
def test_the_bound_in_float64_is_not_below_the_bound_in_rationals_and_hardly_above(name, seed):
    given, arithmetic = DECLARED[name]
    rng = np.random.default_rng(seed)
    for kind, terms in itertools.product(KINDS, (1, 9)):
        x, w, bias = columns(rng, given, kind, terms, 6)
        for b in (None, bias):
            total = exact_sum(Products.of([(p, q, True) for p, q in zip(x, w)], x.shape[1:], b))
            bound = error_bound(arithmetic, total)
            for k in np.flatnonzero(np.isfinite(bound)):
                start = None if b is None else fractions(b[k : k + 1])[0]
                true = rational_bound(arithmetic, given, fractions(x[:, k]), fractions(w[:, k]), start)
                assert true <= Fraction(bound[k]) <= true * (1 + Fraction(2) ** -24) + Fraction(2) ** -1060


def test_a_sum_that_rounds_down_at_each_step_comes_near_the_bound():
    """1 + u + u + ... in float32 stays 1: the error is (n - 1) u, the bound n u S."""
    n = 1001
    x = np.full((1, n, 1), 2.0**-24, np.float32)
    x[0, 0] = 1
    total = exact(Case(x, np.ones((n, 1, 1), np.float32), padding="VALID"))
    error = abs(1.0 - total.reference)
    bound = error_bound(Arithmetic.of("float32"), total)
    assert 0.99 * bound < error <= bound


def test_the_bound_is_infinite_where_a_result_may_overflow():
    largest = np.finfo(np.float32).max
    x = np.array([[[largest], [largest], [1.0]]], np.float32)
    kernel = np.array([1.0, -1.0, 1.0], np.float32).reshape(3, 1, 1)
    total = exact(Case(x, kernel, padding="VALID"))
    assert total.value == 1
    assert error_bound(Arithmetic.of("float32"), total) == np.inf
    assert np.isfinite(error_bound(Arithmetic(FLOAT64, FLOAT64, FLOAT32), total))
    assert error_bound(Arithmetic(FLOAT64, FLOAT64, FLOAT32, input=FLOAT16), total) == np.inf


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_the_bound_is_infinite_where_an_operand_is_not_finite(bad):
    x = np.ones((1, 5, 1), np.float32)
    x[0, 4] = bad
    bound = error_bound(Arithmetic.of("float32"), exact(Case(x, np.ones((3, 1, 1), np.float32), padding="VALID")))
    assert np.isfinite(bound[0, :2]).all()
    assert bound[0, 2] == np.inf


def test_padding_adds_nothing_to_the_bound():
    x = np.ones((1, 5, 1), np.float32)
    bound = error_bound(Arithmetic.of("float32"), exact(Case(x, np.ones((3, 1, 1), np.float32), padding=1)))
    assert bound[0, 0] == bound[0, 4] < bound[0, 1] == bound[0, 2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_summed_by_numpy_lie_within_their_bounds(dtype, seed):
    """Summation in another order, by einsum over windows."""
    rng = np.random.default_rng(seed)
    x, kernel, dy = (rng.standard_normal(s).astype(dtype) for s in ((4, 9, 9, 3), (3, 3, 1, 3), (4, 7, 7, 3)))
    case = Case(x, kernel, padding="VALID")
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    dkernel = np.einsum("bhwcij,bhwc->ijc", windows, dy)[:, :, None]
    around = np.lib.stride_tricks.sliding_window_view(np.pad(dy, ((0, 0), (2, 2), (2, 2), (0, 0))), (3, 3), axis=(1, 2))
    dx = np.einsum("bhwcij,ijc->bhwc", around, kernel[::-1, ::-1, 0])
    arithmetic = Arithmetic.of(dtype)
    for computed, total in (
        (dx, exact_input_gradient(case, dy)),
        (dkernel, exact_kernel_gradient(case, dy)),
        (dy.sum(axis=(0, 1, 2)), exact_bias_gradient(case, dy)),
    ):
        error = np.abs(computed.astype(np.float64) - total.reference)
        assert (error <= error_bound(arithmetic, total) + total.reference_error).all()


def test_subnormal_operands_of_a_gradient_count_where_they_are_flushed():
    x, dy = (np.full((1, 6, 1), value, np.float32) for value in (2.0**-130, 2.0**100))
    total = exact_kernel_gradient(Case(x, np.ones((1, 1, 1), np.float32)), dy)
    assert error_bound(Arithmetic.of("float32"), total) < 6 * 2.0**-30 * 2.0**-20
    assert error_bound(Arithmetic.of("float32", flushes_subnormals=True), total) >= 6 * 2.0**-30


def test_a_bound_on_a_difference_is_not_below_the_sum(seed):
    a, b = np.random.default_rng(seed).uniform(0, 1, (2, 100))
    for p, q, bound in zip(a, b, difference_bound(a, b)):
        assert Fraction(p) + Fraction(q) <= Fraction(bound)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"passes": 2}, "`passes` is 2, expected 1, 3 or 6"),
        ({"passes": 3}, "`input` is None with `passes` 3, expected the format of the parts"),
        ({"output_roundings": 0}, "`output_roundings` is 0, expected 1 or 2"),
    ],
)
def test_an_arithmetic_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic.of("float32", **changes)


def test_the_conventional_arithmetic_of_a_narrow_dtype_adds_in_float32():
    for dtype in ("bfloat16", "float16"):
        assert Arithmetic.of(dtype) == Arithmetic(FLOAT32, FLOAT32, format_of(dtype))
