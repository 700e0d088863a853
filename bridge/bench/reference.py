"""What each suite's results must be, by plain NumPy, and how a result is held to it before anything is timed.

*Sums of products* are checked on integers and allowed no error at all: `integers` draws them so that every product
and every partial sum, in whatever order, fused or not, is an integer below 2^24 and so exact in float32. One operand
has up to twelve bits, more than TF32 (11) and bfloat16 (8) hold: a way which rounds its inputs is found out too.

*Blocks* divide by a root, which integers do not survive. Let y = a (sum x w - m) + b with a = s / sqrt(v + e), over n
products, u = 2^-24, g(k) = (1 + u)^k - 1. The sum is within g(n) S of the exact one, S = sum |x w|, and the
normalization as in `bridge.model.expected` adds nine roundings; where a is multiplied into the weights beforehand, each
product carries those roundings instead, and m and b one more leaf of the sum. Either way

    |computed - y| <= g(n + 10) M + lambda (2 n + 18) (1 + |a|) (1 + X) (1 + W) + lambda (S + |m|) (1 + 1/sqrt(v + e)),
    M = (S + |m|) |a| + |b|

lambda being the smallest normal number, below which any operand or result may become zero: n products, n sums and 18
operations around them lose at most lambda each, times what they are multiplied by later; X and W are the greatest |x|
and |w|. S is taken as X sum |w|, which it cannot exceed. ReLU6 moves no two numbers apart. A factor 1 + 2^-20 covers
the float64 arithmetic of the reference and of the bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bridge.bench.suites import DepthwiseLayer
from bridge.numerics import FLOAT32

Arrays = Mapping[str, np.ndarray]

#: Of the operands of an integer check: the greatest magnitudes of the fine one and of the others, and how many
#: positions of an operand that is summed over all positions are not zero. 512 * 4095 * 7 < 2^24.
_FINE, _COARSE, _POSITIONS = 4095, 7, 512
#: Every integer below it is a float32.
_EXACT = 1 << 24


@dataclasses.dataclass(frozen=True)
class Check:
    """A computation whose result is known.

    Attributes:
      arrays: what goes in.
      misfit: of a result by name, what is wrong with it in words; empty where nothing is.
    """

    arrays: Arrays
    misfit: Callable[[Arrays], str]


def within(expected: Arrays, allowed: Mapping[str, np.ndarray | float]) -> Callable[[Arrays], str]:
    """A misfit: any element farther from the expected one than is allowed, NaN included; or another shape or name."""

    def misfit(result: Arrays) -> str:
        if result.keys() != expected.keys():
            return f"it gives {', '.join(result)}, expected {', '.join(expected)}"
        for name, wanted in expected.items():
            got = result[name]
            if got.shape != wanted.shape:
                return f"{name} has shape {got.shape}, expected {wanted.shape}"
            inside = np.abs(got - wanted) <= allowed[name]
            if not inside.all():
                where = tuple(map(int, np.unravel_index(int(np.argmin(inside)), inside.shape)))
                most = np.broadcast_to(allowed[name], wanted.shape)[where]
                return (
                    f"{name} is wrong in {int((~inside).sum())} of {inside.size} elements: {got[where]} at {where}, "
                    f"expected {wanted[where]}" + (f" within {most:.3g}" if most else " exactly")
                )
        return ""

    return misfit


def exactly(expected: Arrays) -> Callable[[Arrays], str]:
    """A misfit: any element that is not the expected number."""
    return within(expected, dict.fromkeys(expected, 0.0))


def integers(rng: np.random.Generator, layer: DepthwiseLayer, batch: int, fine: str) -> dict[str, np.ndarray]:
    """x, w and dy as whole numbers, `fine` ("x" or "dy") with twelve bits, such that y, dx and dw are exact in float32.

    The other of x and dy is zero but at `_POSITIONS` positions, since dw sums their products over all positions.
    """
    g = layer.geometry(batch)
    coarse = _whole(rng, g.x_shape if fine == "dy" else g.output_shape, _COARSE)
    places = coarse.reshape(-1, layer.channels)
    if len(places) > _POSITIONS:
        places[rng.choice(len(places), len(places) - _POSITIONS, replace=False)] = 0
    largest = min(_FINE, (_EXACT - 1) // (_COARSE * max(g.taps, _POSITIONS)))
    full = _whole(rng, g.output_shape if fine == "dy" else g.x_shape, largest)
    x, dy = (coarse, full) if fine == "dy" else (full, coarse)
    return {"x": x, "w": _whole(rng, g.kernel_shape, _COARSE), "dy": dy}


def squarable(rng: np.random.Generator, layer: DepthwiseLayer, batch: int) -> dict[str, np.ndarray]:
    """x and w as whole numbers, such that sums of x |x| w are exact in float32."""
    g = layer.geometry(batch)
    largest = math.isqrt((_EXACT - 1) // (_COARSE * g.taps))
    return {"x": _whole(rng, g.x_shape, largest), "w": _whole(rng, g.kernel_shape, _COARSE)}


def convolve(x: np.ndarray, w: np.ndarray, layer: DepthwiseLayer) -> np.ndarray:
    """y, tap by tap in x's dtype."""
    y = np.zeros(layer.geometry(len(x)).output_shape, x.dtype)
    for image, out in zip(x, y):
        for tap, rows, columns in _taps(layer, out.shape):
            out += _padded(image, layer)[rows, columns] * w[tap][0]
    return y


def gradients(x: np.ndarray, w: np.ndarray, dy: np.ndarray, layer: DepthwiseLayer) -> tuple[np.ndarray, np.ndarray]:
    """dx and dw of sum(y dy), tap by tap in x's dtype."""
    dx, dw = np.empty_like(x), np.zeros_like(w)
    p = layer.padding
    for image, out, dout in zip(x, dx, dy):
        padded = _padded(image, layer)
        dpadded = np.zeros_like(padded)
        for tap, rows, columns in _taps(layer, dout.shape):
            dpadded[rows, columns] += dout * w[tap][0]
            dw[tap][0] += (padded[rows, columns] * dout).sum((0, 1))
        out[...] = dpadded[p : p + layer.height, p : p + layer.width]
    return dx, dw


def block(a: Arrays, layer: DepthwiseLayer, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """ReLU6 of batch normalization of the convolution, in float64, and how far float32 may be from it.

    Args:
      a: x, w, scale, bias, mean and var of float32.
      layer: its geometry.
      epsilon: added to the variance.

    Returns:
      `(y, bound)`; the bound `(C,)`, one a channel.
    """
    u, tiny = FLOAT32.unit_roundoff, FLOAT32.smallest_normal
    wide = {name: array.astype(np.float64) for name, array in a.items()}
    x, w, m, b = (wide[name] for name in ("x", "w", "mean", "bias"))
    root = np.sqrt(wide["var"] + epsilon)
    scale = wide["scale"] / root
    y = np.clip((convolve(x, w, layer) - m) * scale + b, 0, 6)
    n, X, W = layer.kernel**2, np.abs(x).max(), np.abs(w).max()
    sizes = X * np.abs(w).sum((0, 1, 2)) + np.abs(m)
    size = np.abs(scale)
    allowed = ((1 + u) ** (n + 10) - 1) * (sizes * size + np.abs(b))
    allowed += tiny * ((2 * n + 18) * (1 + size) * (1 + X) * (1 + W) + sizes * (1 + 1 / root))
    return y, allowed * (1 + 2.0**-20)


def _whole(rng: np.random.Generator, shape: tuple[int, ...], largest: int) -> np.ndarray:
    return rng.integers(-largest, largest, shape, np.int32, endpoint=True).astype(np.float32)


def _padded(image: np.ndarray, layer: DepthwiseLayer) -> np.ndarray:
    p = layer.padding
    return np.pad(image, ((p, p), (p, p), (0, 0)))


def _taps(layer: DepthwiseLayer, out: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], slice, slice]]:
    """Every tap, and the rows and columns of the padded image under it."""
    s = layer.stride
    for i, j in np.ndindex(layer.kernel, layer.kernel):
        yield (i, j), slice(i, i + (out[0] - 1) * s + 1, s), slice(j, j + (out[1] - 1) * s + 1, s)
