"""What the kernels do to a sum before they store it: the bits of docs/arithmetic.md, "Epilogue"."""

import ctypes
import ctypes.util
import dataclasses
import math

import numpy as np
import pytest

from bridge.numerics import same_bits
from jaxdw import native
from jaxdw.native.calls import ACTIVATIONS
from tests import oracle
from tests.jaxdw.native import arrays

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.status())


@dataclasses.dataclass
class Finish:
    """An epilogue of random numbers, some of them special; `expected` is its definition in NumPy."""

    scale: np.ndarray | None
    shift: np.ndarray | None
    residual: np.ndarray | None
    activation: str | None

    @classmethod
    def drawn(cls, rng, shape, dtype):
        wide = np.float64 if dtype == np.float64 else np.float32

        @np.errstate(over="ignore")
        def array(shape, dtype):
            numbers = rng.standard_normal(shape).astype(dtype)
            special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 3e38, -6, 6, -3]).astype(dtype)
            return np.where(rng.random(shape) < 0.1, rng.choice(special, shape), numbers)

        scaled, residual = rng.random(2) < 0.5
        scale, shift = (array(shape[-1:], wide) if scaled else None for _ in range(2))
        return cls(scale, shift, array(shape, dtype) if residual else None, rng.choice([*ACTIVATIONS]))

    def expected(self, total, dtype):
        with np.errstate(all="ignore"):
            if self.scale is not None:
                total = fma(total, *(np.broadcast_to(a, total.shape) for a in (self.scale, self.shift)))
            if self.residual is not None:
                total = total + self.residual.astype(total.dtype)
            return activated(total, self.activation).astype(dtype)


def activated(a, activation):
    clipped = np.where(a < 0, a.dtype.type(0), a)
    if activation == "relu":
        return clipped
    if activation == "relu6":
        return np.where(clipped > 6, a.dtype.type(6), clipped)
    if activation == "hard_swish":
        return a * activated(a + a.dtype.type(3), "relu6") / a.dtype.type(6)
    if activation == "hard_sigmoid":
        return activated(a + a.dtype.type(3), "relu6") / a.dtype.type(6)
    return silu(a) if activation == "silu" else a


#: Of the exponential: ln 2 in two parts, its inverse, where the result is 0 or infinity, and the degree.
EXPONENTIAL = {
    np.dtype(np.float32): ("0x1.62e4p-1", "0x1.7f7d1cp-20", "0x1.715476p0", 120, 7),
    np.dtype(np.float64): ("0x1.62e42fefap-1", "0x1.cf79abc9e3b3ap-40", "0x1.71547652b82fep0", 760, 13),
}


def silu(a):
    """s / (1 + exp(-s)), as docs/arithmetic.md defines it."""
    dtype = a.dtype.type
    *numbers, most, degree = EXPONENTIAL[a.dtype]
    ln2, rest, per_ln2 = (np.full_like(a, float.fromhex(number)) for number in numbers)
    z = np.clip(-a, -dtype(most), dtype(most))
    magic = np.full_like(a, 1.5 * 2.0 ** (23 if dtype == np.float32 else 52))
    n = fma(z, per_ln2, magic) - magic
    r = fma(n, -rest, fma(n, -ln2, z))
    total = np.full_like(a, dtype(1) / dtype(math.factorial(degree)))
    for k in reversed(range(degree)):
        total = fma(total, r, np.full_like(a, dtype(1) / dtype(math.factorial(k))))
    half = np.rint(n / 2)
    whole, half = (np.nan_to_num(each).astype(int) for each in (n, half))
    return a / (1 + np.ldexp(np.ldexp(total, half), whole - half))


def fma(a, b, c):
    if a.dtype == np.float32:
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        wide = a.astype(np.float64) * b.astype(np.float64) + c  # the product of two float32 is exact here
        return np.where(finite, oracle.fma(a, b, c), wide.astype(np.float32))
    once = ctypes.CDLL(ctypes.util.find_library("m")).fma
    once.restype, once.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return np.vectorize(once, otypes=[np.float64])(a, b, c)


@pytest.mark.parametrize("isa", native.ISAS)
def test_the_kernels_finish_a_sum_as_it_is_defined(isa, seed, full):
    if isa not in arrays.isas():
        pytest.skip(f"this processor has no {isa}")
    rng = np.random.default_rng(seed)
    for number in range(2000 if full else 100):
        problem = arrays.problem(rng)
        dtype = problem.x.dtype
        wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        if number % 3 == 0:  # sums with signed zeros, subnormal numbers and infinities
            scale = rng.choice([0.0, -0.0, 1e-38, 1e-41, 1e38], problem.x.shape)
            with np.errstate(all="ignore"):
                problem = dataclasses.replace(problem, x=(problem.x.astype(wide) * scale).astype(dtype))
        operands = [None if a is None else a.astype(wide) for a in (problem.x, problem.kernel, problem.bias)]
        options = {"bias_last": problem.bias_last, "isa": isa, "threads": 1 + number % 3}
        total = arrays.conv(*operands, problem.geometry, **options)
        finish = Finish.drawn(rng, total.shape, dtype)
        expected = finish.expected(total, dtype)
        actual = arrays.conv(
            problem.x, problem.kernel, problem.bias, problem.geometry, **options, **dataclasses.asdict(finish)
        )
        assert same_bits(actual, expected).all(), (number, problem.geometry, dtype, finish)
