"""The compiled kernels on addresses: for PyTorch, and for tests of threads and of instruction sets."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np

from jaxdw import native
from jaxdw.geometry import Geometry
from jaxdw.sum_order import SumOrder

#: Element types by number, as jaxdw/native/plain.cc has them.
TYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}

#: Activations by number, likewise.
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "hard_swish": 3, "hard_sigmoid": 4, "silu": 5}


def conv(
    x: int,
    kernel: int,
    bias: int | None,
    y: int,
    geometry: Geometry,
    dtype: str,
    *,
    bias_last: bool = False,
    scale: int | None = None,
    shift: int | None = None,
    residual: int | None = None,
    activation: str | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Write the convolution of dense arrays at these addresses, all of one dtype, to y.

    Args:
      geometry: with padding of zeros and a channel multiplier of 1.
      scale, shift: `(C,)`, both or none: float64 for float64, else float32.
      residual: of the shape and dtype of y.
      activation: a name of `ACTIVATIONS`.
      isa: the instruction set; None: that of JAXDW_ISA, or the widest.

    Raises:
      ValueError: there are no kernels for `isa` here.
      MemoryError, RuntimeError: the system failed.
    """
    numbers = geometry_numbers(geometry)
    _check(
        native.library().jaxdw_conv(
            *_start(isa, threads, dtype),
            _address(numbers.ctypes.data),
            *map(_address, (x, kernel, bias)),
            int(bias_last),
            *map(_address, (scale, shift, residual)),
            ACTIVATIONS[activation],
            _address(y),
        ),
        isa,
    )


def kernel_gradient(
    x: int, dy: int, gradient: int, geometry: Geometry, dtype: str, *, threads: int = 1, isa: str | None = None
) -> None:
    """Write the gradient by the kernel of dense arrays at these addresses; otherwise as `conv`."""
    numbers = geometry_numbers(geometry)
    _check(
        native.library().jaxdw_kernel_gradient(
            *_start(isa, threads, dtype),
            _address(numbers.ctypes.data),
            *map(_address, (x, dy, gradient)),
        ),
        isa,
    )


def matmul(
    x: np.ndarray,
    w: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    order: SumOrder,
    *,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: str | None = None,
    divisor: float = 1.0,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Write the product of x `([batch,] rows, terms)` and w `([batch,] terms, columns)` to y.

    Args:
      x, w: with any strides, of one dtype.
      y: `([batch,] rows, columns)`, dense, of the same dtype.
      bias: `(columns,)`, likewise, or None.
      order: of the terms, and of the bias if there is one; see `jaxdw.SumOrder`.
      scale, shift, residual, activation: what happens to the sums, as for `conv`; scale and shift are `(columns,)`.
      divisor: of each sum, before that.

    Raises:
      ValueError: arrays that do not fit each other or the order; otherwise as `conv`.
    """
    expected = (*(x.shape[:-2] or w.shape[:-2]), x.shape[-2], w.shape[-1])
    if x.shape[-1] != w.shape[-2] or y.shape != expected or (x.ndim == w.ndim == 3 and len(x) != len(w)):
        raise ValueError(f"`x`, `w` and `y` have shapes {x.shape}, {w.shape} and {y.shape}, which do not fit")
    if order.terms != x.shape[-1] or order.has_bias != (bias is not None):
        given = "a bias" if bias is not None else "no bias"
        raise ValueError(f"`order` is {order}, expected {x.shape[-1]} terms and {given}")
    if 0 in expected:
        return
    sizes = np.array([expected[0] if len(expected) == 3 else 1, *x.shape[-2:], w.shape[-1]], np.int64)
    steps = np.array(order.steps, np.int64)
    strides = np.array(
        [
            step // array.itemsize
            for array in (x, w)
            for step in (*(array.strides if array.ndim == 3 else (0, *array.strides)),)
        ],
        np.int64,
    )
    pointers = [
        _address(None if array is None else array.ctypes.data) for array in (x, w, bias, scale, shift, residual)
    ]
    _check(
        native.library().jaxdw_matmul(
            *_start(isa, threads, x.dtype.name),
            *(_address(array.ctypes.data) for array in (sizes, strides, steps)),
            ctypes.c_int64(len(steps)),
            *pointers,
            ACTIVATIONS[activation],
            ctypes.c_double(divisor),
            _address(y.ctypes.data),
        ),
        isa,
    )


def batch_norm(
    arrays: Sequence[int],
    shape: tuple[int, int],
    dtype: str,
    *,
    epsilon: float,
    activation: str | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Write y, mean and variance of dense arrays; see `jaxdw.batch_norm`.

    Args:
      arrays: the addresses of x, scale, bias, y, mean and variance.
      shape: rows and channels of x and y, which are of `dtype`. All else is float64 for float64, else float32.
      activation: None, "relu" or "relu6".

    Raises:
      as `conv`.
    """
    _check(
        native.library().jaxdw_batch_norm(
            *_start(isa, threads, dtype),
            *map(ctypes.c_int64, shape),
            ctypes.c_double(epsilon),
            ACTIVATIONS[activation],
            *map(_address, arrays),
        ),
        isa,
    )


def batch_norm_gradient(
    arrays: Sequence[int],
    shape: tuple[int, int],
    dtype: str,
    *,
    epsilon: float,
    activation: str | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Write dx, dscale and dbias; otherwise as `batch_norm`.

    Args:
      arrays: the addresses of x, scale, bias, mean, variance, dy, dx, dscale and dbias; dx may be dy.
    """
    _check(
        native.library().jaxdw_batch_norm_gradient(
            *_start(isa, threads, dtype),
            *map(ctypes.c_int64, shape),
            ctypes.c_double(epsilon),
            ACTIVATIONS[activation],
            *map(_address, arrays),
        ),
        isa,
    )


def cross_entropy(
    logits: int,
    labels: int,
    ct: int | None,
    result: int,
    shape: tuple[int, int],
    dtype: str,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Write the mean cross entropy, one number; with `ct`, one number, the gradient by the logits instead.

    Args:
      labels: int32, one for each row.
      shape: rows and classes.

    Raises:
      as `conv`.
    """
    addresses = map(_address, (logits, labels, ct, result))
    _check(
        native.library().jaxdw_cross_entropy(*_start(isa, threads, dtype), *map(ctypes.c_int64, shape), *addresses), isa
    )


def axpby(arrays: Sequence[int], count: int, dtype: str, *, threads: int = 1, isa: str | None = None) -> None:
    """Write a x + b y of `count` numbers.

    Args:
      arrays: the addresses of the factors a and b, float64 for float64, else float32; of x, y and the result.

    Raises:
      as `conv`.
    """
    addresses = map(_address, arrays)
    _check(native.library().jaxdw_axpby(*_start(isa, threads, dtype), ctypes.c_int64(count), *addresses), isa)


def _start(isa: str | None, threads: int, dtype: str) -> tuple[bytes | None, ctypes.c_int64, int]:
    return None if isa is None else isa.encode(), ctypes.c_int64(threads), TYPES[dtype]


def three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    """Return one value for each of three spatial axes, the last ones being given."""
    return (missing,) * (3 - len(values)) + values


def geometry_numbers(geometry: Geometry) -> np.ndarray:
    """Return the geometry as jaxdw/native/plain.cc reads it."""
    if geometry.multiplier != 1 or geometry.padding_mode != "zeros":
        raise ValueError(f"`geometry` is {geometry}, expected multiplier 1 and padding_mode 'zeros'")
    low = tuple(low for low, _ in geometry.padding)
    axes = ((geometry.spatial, 1), (geometry.kernel_size, 1), (geometry.output_spatial, 1), (geometry.strides, 1))
    factors = ((low, 0), (geometry.kernel_dilation, 1), (geometry.input_dilation, 1))
    sizes = (math.prod(geometry.batch), geometry.channels)
    numbers = [*sizes, *(v for values, one in axes + factors for v in three(values, one)), geometry.from_last_tap]
    return np.array(numbers, np.int64)


def _address(value: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _check(failure: int, isa: str | None) -> None:
    if failure == 1:
        raise ValueError(f"`isa` is {isa!r}, expected an instruction set that this processor and this library have")
    if failure == 2:
        raise MemoryError("the compiled kernels are out of memory")
    if failure:
        raise RuntimeError("the compiled kernels failed")
