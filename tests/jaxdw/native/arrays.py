"""The compiled kernels on NumPy arrays, with a number of threads and an instruction set; and random cases for them."""

import dataclasses
import hashlib

import ml_dtypes
import numpy as np

from jaxdw import native
from jaxdw.geometry import Geometry
from jaxdw.native import calls

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)


def isas():
    """The instruction sets that can run here, scalar code first."""
    if not native.is_available():
        return []
    return [isa for isa in native.ISAS if native.library().jaxdw_isa(isa.encode())]


def conv(x, kernel, bias, geometry, **options):
    y = np.empty(geometry.output_shape, x.dtype)
    start = None if bias is None else bias.ctypes.data
    arrays = {name: options.pop(name, None) for name in ("scale", "shift", "residual")}  # in memory until the end
    pointers = {name: array.ctypes.data for name, array in arrays.items() if array is not None}
    calls.conv(x.ctypes.data, kernel.ctypes.data, start, y.ctypes.data, geometry, x.dtype.name, **options, **pointers)
    return y


def kernel_gradient(x, dy, geometry, **options):
    gradient = np.empty(geometry.kernel_shape, x.dtype)
    calls.kernel_gradient(x.ctypes.data, dy.ctypes.data, gradient.ctypes.data, geometry, x.dtype.name, **options)
    return gradient


@dataclasses.dataclass(frozen=True)
class Problem:
    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None
    dy: np.ndarray
    geometry: Geometry
    bias_last: bool

    def digest(self, **options) -> bytes:
        """The SHA-256 of the output and of the kernel's gradient."""
        y = conv(self.x, self.kernel, self.bias, self.geometry, bias_last=self.bias_last, **options)
        gradient = kernel_gradient(self.x, self.dy, self.geometry, **options)
        return hashlib.sha256(y.tobytes() + gradient.tobytes()).digest()

    def as_bytes(self) -> bytes:
        """As `driver.cc` reads it."""
        head = [calls.TYPES[self.x.dtype.name], self.bias is not None, self.bias_last]
        operands = (self.x, self.kernel, *(() if self.bias is None else (self.bias,)), self.dy)
        numbers = np.array([*head, *calls.geometry_numbers(self.geometry)], np.int64)
        return b"".join(array.tobytes() for array in (numbers, *operands))


def problem(rng: np.random.Generator) -> Problem:
    """A small problem of any rank, type, stride, padding and dilation; every eighth has numbers of every magnitude."""
    rank = int(rng.integers(1, 4))
    dtype = DTYPES[rng.integers(4)]
    channels = int(rng.choice([1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 32, 40, 100, 130]))
    draw = lambda low, high: tuple(int(v) for v in rng.integers(low, high, rank))  # noqa: E731
    kernel_size, dilation, strides = draw(1, {1: 12, 2: 6, 3: 4}[rank]), draw(1, 3), draw(1, 4)
    spread = draw(1, 4) if rng.random() < 0.3 else (1,) * rank
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    padding = [tuple(int(v) for v in rng.integers(0, span + 1, 2)) for span in spans]
    spatial = tuple(int(rng.integers(span, span + {1: 40, 2: 12, 3: 5}[rank])) for span in spans)
    geometry = Geometry.of(
        (int(rng.integers(1, 4)), *spatial, channels),
        (*kernel_size, 1, channels),
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        input_dilation=spread,
    )
    extreme = rng.random() < 1 / 8

    def array(shape):
        # from random bits, not by functions whose last bits NumPy may change
        numbers = rng.integers(-(2**20), 2**20, shape).astype(np.float64) * 2.0**-20
        if extreme:
            numbers = np.ldexp(numbers, rng.integers(-60, 3, shape))
        return numbers.astype(dtype)

    shapes = (geometry.x_shape, geometry.kernel_shape, geometry.output_shape)
    x, kernel, dy = map(array, shapes)
    bias = array((channels,)) if rng.random() < 0.5 else None
    return Problem(x, kernel, bias, dy, geometry, bool(rng.integers(2)))
