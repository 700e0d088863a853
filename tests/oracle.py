"""The plain NumPy loop that every test measures against, from the user's words and not from Geometry."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Expected:
    """Outputs in float64, and the sum of the absolute values of what was added."""

    y: np.ndarray
    magnitude: np.ndarray
    terms: int

    def bound(self, dtype) -> np.ndarray:
        """The greatest |computed - y| of a sum in any order with any fusing, in dtype, for moderate data.

        float64 doubles it, since y itself is a float64 sum. Narrow dtypes are summed in float32 and rounded once
        (`n` more roundings are allowed to none). Flushed subnormals add 2 n times the smallest normal number.
        """
        import ml_dtypes

        dtype = np.dtype(dtype)
        narrow = dtype.itemsize == 2
        info = ml_dtypes.finfo(np.float32 if narrow else dtype)
        u = float(info.eps) / 2
        # gamma_k = k u / (1 - k u) >= (1 + u)^k - 1 (Higham 2002, Lemma 3.1); the last factor covers the rounding of
        # this line and of the float64 magnitude, at most (terms + 4) 2^-53 < 2^-40 relative
        k = self.terms + 1
        bound = (k * u / (1 - k * u) * self.magnitude + 2 * self.terms * float(info.tiny)) * (1 + 2.0**-40)
        if dtype == np.float64:
            bound = 2 * bound
        if narrow:
            out = ml_dtypes.finfo(dtype)
            bound = bound + float(out.eps) / 2 * (np.abs(self.y) + bound) + float(out.smallest_subnormal)
        return bound


def pad(x, kernel_size, *, strides, padding, kernel_dilation, input_dilation):
    """x dilated and padded, one axis after the other, as Flax defines each word."""
    rank = len(kernel_size)
    for axis in range(rank):
        at = x.ndim - 1 - rank + axis
        size = x.shape[at]
        span = (kernel_size[axis] - 1) * kernel_dilation[axis] + 1
        if padding == "CIRCULAR" or padding == "REFLECT":
            width = [(0, 0)] * x.ndim
            width[at] = ((span - 1) // 2, span // 2)
            x = np.pad(x, width, mode={"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding])
            continue
        if padding == "CAUSAL":
            low, high = span - 1, 0
        elif padding == "VALID":
            low = high = 0
        elif padding in ("SAME", "SAME_LOWER"):
            out = -(-size // strides[axis])
            total = max(0, (out - 1) * strides[axis] + span - size)
            low, high = total // 2, total - total // 2
            if padding == "SAME_LOWER":
                low, high = high, low
        else:
            pair = padding if isinstance(padding, int) else padding[axis]
            low, high = (pair, pair) if isinstance(pair, int) else pair
        spread = input_dilation[axis]
        dilated = (size - 1) * spread + 1 if size else 0
        moved = np.moveaxis(x, at, 0)
        result = np.zeros((max(0, dilated + low + high), *moved.shape[1:]), x.dtype)
        for i in range(size):
            if 0 <= i * spread + low < len(result):
                result[i * spread + low] = moved[i]
        x = np.moveaxis(result, 0, at)
    return x


def windows(x, kernel_size, *, strides=1, padding="SAME", kernel_dilation=1, input_dilation=1):
    """`(*batch, *out, *kernel_size, C)`."""
    rank = len(kernel_size)
    strides, kernel_dilation, input_dilation = (
        (v,) * rank if isinstance(v, int) else v for v in (strides, kernel_dilation, input_dilation)
    )
    padded = pad(
        x,
        kernel_size,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        input_dilation=input_dilation,
    )
    batch, spatial, channels = padded.shape[: -rank - 1], padded.shape[-rank - 1 : -1], padded.shape[-1]
    out = tuple(
        max(0, (n - (k - 1) * d - 1) // s + 1) for n, k, d, s in zip(spatial, kernel_size, kernel_dilation, strides)
    )
    result = np.zeros((*batch, *out, *kernel_size, channels), x.dtype)
    for position in np.ndindex(out):
        for tap in np.ndindex(kernel_size):
            at = tuple(p * s + t * d for p, s, t, d in zip(position, strides, tap, kernel_dilation))
            result[(..., *position, *tap, slice(None))] = padded[(..., *at, slice(None))]
    return result


def depthwise(x, kernel, bias=None, **options) -> Expected:
    """The convolution as the sum it is defined to be, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    kernel_size, features = kernel.shape[:-2], kernel.shape[-1]
    taken = windows(x, kernel_size, **options)
    rank = len(kernel_size)
    leading = taken.shape[: taken.ndim - rank - 1]
    y, magnitude = np.zeros((*leading, features)), np.zeros((*leading, features))
    multiplier = features // x.shape[-1]
    for tap in itertools.product(*map(range, kernel_size)):
        product = np.repeat(taken[(..., *tap, slice(None))], multiplier, axis=-1) * kernel[(*tap, 0)]
        y, magnitude = y + product, magnitude + abs(product)
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        y, magnitude = y + bias, magnitude + abs(bias)
    return Expected(y, magnitude, int(np.prod(kernel_size)) + (bias is not None))


def fma(a, b, c):
    """a*b + c rounded once to float32.

    The product is exact in float64, the sum is rounded to odd there, and rounding that to float32 is then correct
    (Boldo & Melquiond 2008).
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & (bits & 1 == 0), bits + toward, bits).view(np.float64).astype(np.float32)


def fma_chain(case, *, bias_first):
    """The float32 output of adding the taps in raster order, each multiply fused with its add; padding is skipped."""
    g = case.geometry
    start = case.bias if case.bias is not None and bias_first else np.float32(0)
    y = case.split_channels(np.broadcast_to(start, g.output_shape))
    for x, w, valid in case.tap_terms():
        y = np.where(valid, fma(x, w, y), y)
    y = y.reshape(g.output_shape)
    return y + case.bias if case.bias is not None and not bias_first else y
