"""The result of each operation in float64, and a rigorous bound on the error of float32 arithmetic.

Let u = 2^-24, g(k) = (1 + u)^k - 1, and lambda the smallest normal number, below which any operand or result may be
taken for zero. The bounds hold for any order of operations, fused or not.

*Convolution and matrix product*: sums of products, `bridge.numerics.bounds`.

*Batch normalization* with its statistics given, y = (x - m) a + b with a = s / sqrt(v + e). Frameworks compute it as
(x - m) a + b, or as x a + (b - m a). v and e are not negative, so rounding e and adding it moves v + e by two
roundings at most and its root by one; the reciprocal root is within 2 ulp, 4 u, of the true one (CUDA's guarantee for
`rsqrtf`; division by an IEEE root is within 2 u; XLA's on x86 within 1.3 u, over all floats in [1, 4)); the product
with s is one more: a is off by g(6) relatively. On the way from x, m, a and b to y no term passes more than three more
roundings: in the first form difference, product and sum; in the second, m a its product, difference and sum. Both give

    |computed - y| <= g(9) M + 8 lambda (1 + |a|) + lambda (|x| + |m|) (1 + 1 / sqrt(v + e)),
    M = (|x| + |m|) |a| + |b|

The terms with lambda are for what may be flushed: the operands x, m and b and four results after a cost lambda or
lambda |a| each; s and a cost the last term.

*Identity, ReLU, ReLU6* give one of their operands: 0, but for subnormal ones. *Hard sigmoid* c / 6,
c = min(max(x + 3, 0), 6): the sum rounds relatively, and min and max keep a relative error; then a division, or a
product with a rounded 1/6: g(3) |y| + 8 lambda. *Hard swish* x c / 6 has one product more: g(4) |y| + 8 lambda, where
x / 6 may be flushed before it is multiplied by c <= 6.

*Mean* of n numbers: a sum in any order, at most (n - 1) u sum |x| off (Rump 2012), then a division, or a product with a
rounded 1/n: ((1 + (n - 1) u) (1 + u)^2 - 1) sum |x| / n + 4 lambda, for n operands, n - 1 sums and a result flushed.

*Sum and product* of two: u |y| + 3 lambda, and u |y| + 3 lambda (1 + |x| + |z|).

The float64 evaluation errs by 2^-53 where float32 does by 2^-24, with at most twice as many roundings: a factor
1 + 2^-20 on the bound covers the error of the bound and that of the exact result together.
Where an intermediate result could exceed the largest number, the bound is infinite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bridge.diagnosis.target import Expected
from bridge.model.operations import Operation
from bridge.numerics import FLOAT32, FLOAT64, Arithmetic, ExactSum, Products, cast, error_bound
from bridge.numerics.products import Block, Term

_U, _TINY, _LARGEST = FLOAT32.unit_roundoff, FLOAT32.smallest_normal, FLOAT32.largest
_EVALUATED = 1 + 2.0**-20
#: Products taken together where a bound needs them one by one.
_TOGETHER = 64

#: A function from an array to one of the same shape.
Function = Callable[[np.ndarray], np.ndarray]


def expected(operation: Operation) -> Expected | None:
    """Return the exact result of an operation on its operands, and its bound; None where no bound is known.

    A convolution has a bound here only where it has one group.
    """
    if operation.kind in _SIMPLE:
        reference, allowed = _SIMPLE[operation.kind](operation)
        return Expected(reference, np.where(allowed <= _LARGEST, allowed, np.inf))
    total = matrix_sum(operation)
    return None if total is None else total.expected()


def matrix_sum(operation: Operation, rounding: Function | None = None) -> MatrixSum | None:
    """Return a convolution of one group or a fully connected layer as a matrix product; None for anything else.

    Args:
      operation: a recorded operation.
      rounding: a function to round input and weight beforehand.
    """
    x, weight = operation.operands[0], operation.parameters.get("weight")
    bias = operation.parameters.get("bias")
    if weight is None or operation.kind not in ("convolution", "linear"):
        return None
    if rounding is not None:
        x, weight = rounding(x), rounding(weight)
    if operation.kind == "convolution":
        if operation.settings["groups"] != 1 or x.ndim != 4:
            return None
        x = windows(x, weight.shape[2:], **{k: operation.settings[k] for k in ("stride", "padding", "dilation")})
        weight = weight.transpose(2, 3, 1, 0)
    else:
        weight = weight.T
    matrix = np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]))
    return MatrixSum.of(x.reshape(-1, len(matrix)), matrix, bias, operation.output.shape)


def windows(
    x: np.ndarray, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> np.ndarray:
    """Return the windows of `(N, H, W, C)`: `(N, oh, ow, kh, kw, C)`, the inputs under each output."""
    x = np.pad(x, ((0, 0), *((p, p) for p in padding), (0, 0)))
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation))
    view = np.lib.stride_tricks.sliding_window_view(x, extent, axis=(1, 2))
    view = view[:, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]
    return np.moveaxis(view, 3, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixSum:
    """The sums of a matrix product, by two products in float64.

    Products of float32 are exact there, and a sum of m leaves is within (m - 1) 2^-53 S, S the sum of magnitudes.

    Attributes:
      reference: float64, the sum to within `reference_error`.
      magnitude: float64, S, rounded up.
      products: the products.
      shape: of the result.
    """

    reference: np.ndarray
    reference_error: np.ndarray
    magnitude: np.ndarray
    products: Products
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, shape: tuple[int, ...]) -> MatrixSum:
        """Multiply x `(rows, n)` by w `(n, features)`, and add a bias `(features,)`; `shape` is the result's."""
        n = len(w)
        products = Products((len(x), w.shape[1]), x.dtype, x, w, np.full((1, 1), n), bias, _terms_of(x, w))
        wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
        with np.errstate(all="ignore"):
            reference = wide_x @ wide_w
            magnitude = np.abs(wide_x) @ np.abs(wide_w)
            if bias is not None:
                reference += bias
                magnitude += np.abs(bias)
            error = (n + 2) * FLOAT64.unit_roundoff
            magnitude *= 1 + 2 * error
            return cls(reference, magnitude * error, magnitude, products, shape)

    def expected(self) -> Expected:
        """Return the sums, and the bound of a conventional sum in float32."""
        nearest = cast(self.reference, np.dtype(np.float32))
        exact = ExactSum(nearest, self.reference, self.reference_error, self.magnitude, self.products)
        allowed = error_bound(Arithmetic.of("float32", flushes_subnormals=True), exact) + self.reference_error
        return Expected(self.reference.reshape(self.shape), allowed.reshape(self.shape))


def _terms_of(x: np.ndarray, w: np.ndarray) -> Callable[[Block], Iterator[Term]]:
    def terms(block: Block) -> Iterator[Term]:
        rows, columns = block
        for k in range(0, len(w), _TOGETHER):
            some = slice(k, k + _TOGETHER)
            left = x[rows, some].T.astype(np.float64)[:, :, None]
            yield Term(left, w[some, columns].astype(np.float64)[:, None, :], np.ones((1, 1, 1), bool))

    return terms


def _batch_norm(operation: Operation) -> Expected:
    p = {name: array.astype(np.float64) for name, array in operation.parameters.items()}
    x, m, b = operation.operands[0].astype(np.float64), p["running_mean"], p.get("bias", np.zeros(1))
    root = np.sqrt(p["running_var"] + operation.settings["eps"])
    a = p.get("weight", np.ones(1)) / root
    sizes = np.abs(x) + np.abs(m)
    M = sizes * np.abs(a) + np.abs(b)
    allowed = _growth(9) * M + 8 * _TINY * (1 + np.abs(a)) + _TINY * sizes * (1 + 1 / root)
    return _if_below((x - m) * a + b, allowed, np.maximum(M, sizes))


def _selection(choose: Function) -> Callable[[Operation], Expected]:
    """Return the bound of an operation whose result is one of its operands, or a constant."""

    def bound(operation: Operation) -> Expected:
        x = operation.operands[0].astype(np.float64)
        y = choose(x)
        return Expected(y, np.where(np.abs(x) < _TINY, np.abs(y), 0.0))

    return bound


def _hard_sigmoid(operation: Operation) -> Expected:
    y = _gate(operation.operands[0])
    return Expected(y, (_growth(3) * y + 8 * _TINY) * _EVALUATED)


def _hard_swish(operation: Operation) -> Expected:
    x = operation.operands[0]
    y = x.astype(np.float64) * _gate(x)
    return _if_below(y, _growth(4) * np.abs(y) + 8 * _TINY, 6 * np.abs(y))


def _gate(x: np.ndarray) -> np.ndarray:
    return np.clip(x.astype(np.float64) + 3, 0, 6) / 6


def _mean(operation: Operation) -> Expected:
    x = operation.operands[0].astype(np.float64)
    axes = tuple(range(1, x.ndim - 1))
    n = math.prod(x.shape[1:-1])
    size = np.abs(x).mean(axes)
    allowed = ((1 + (n - 1) * _U) * (1 + _U) ** 2 - 1) * size + 4 * _TINY
    found = _if_below(x.mean(axes), allowed, n * size)
    return Expected(*(array.reshape(operation.output.shape) for array in found))


def _add(operation: Operation) -> Expected:
    x, z = (each.astype(np.float64) for each in operation.operands)
    return _if_below(x + z, _U * np.abs(x + z) + 3 * _TINY, np.abs(x + z))


def _multiply(operation: Operation) -> Expected:
    x, z = (each.astype(np.float64) for each in operation.operands)
    return _if_below(x * z, _U * np.abs(x * z) + 3 * _TINY * (1 + np.abs(x) + np.abs(z)), np.abs(x * z))


def _if_below(reference: np.ndarray, allowed: np.ndarray, intermediate: np.ndarray) -> Expected:
    """Return an infinite bound where an intermediate result, but for its own rounding, may overflow."""
    return Expected(reference, np.where(intermediate < _LARGEST / 2, allowed * _EVALUATED, np.inf))


def _growth(roundings: int) -> float:
    return (1 + _U) ** roundings - 1


_SIMPLE: Mapping[str, Callable[[Operation], Expected]] = {
    "batch norm": _batch_norm,
    "identity": _selection(lambda x: x),
    "relu": _selection(lambda x: np.maximum(x, 0)),
    "relu6": _selection(lambda x: np.clip(x, 0, 6)),
    "hard sigmoid": _hard_sigmoid,
    "hard swish": _hard_swish,
    "mean": _mean,
    "add": _add,
    "multiply": _multiply,
}


def nearest(operation: Operation) -> np.ndarray | None:
    """Return the result of a transcendental function of one operand, rounded once to float32; None for any other.

    It is computed in float64, whose own error can decide the rounding of one result in millions.
    """
    if operation.kind not in _TRANSCENDENTAL:
        return None
    with np.errstate(all="ignore"):
        return _TRANSCENDENTAL[operation.kind](operation.operands[0].astype(np.float64)).astype(np.float32)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_TRANSCENDENTAL: Mapping[str, Function] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": lambda x: x / 2 * _erfc(-x / math.sqrt(2)),
    "gelu (tanh)": lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}

#: The kinds with one operand whose bound is known, element by element.
ELEMENTWISE = ("identity", "relu", "relu6", "hard sigmoid", "hard swish")
