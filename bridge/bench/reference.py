"""Reference results of each suite, by plain NumPy, and the checks that compare a way's results with them.

*Sums of products* are checked on integers, and no error is allowed. `integers` draws them so that every product and
every partial sum, in any order, fused or not, is an integer below 2^24 and so exact in float32. One operand has up to
twelve bits, more than TF32 (11) and bfloat16 (8) hold: so the check also finds a way that rounds its inputs.

*Blocks* divide by a root, whose results are no integers. Let y = a (sum x w - m) + b with a = s / sqrt(v + e), over n
products, u = 2^-24, g(k) = (1 + u)^k - 1. The sum is within g(n) S of the exact sum, S = sum |x w|. The normalization,
as in `bridge.model.operation_bounds`, adds nine roundings. If a is multiplied into the weights first, each product has
those roundings instead, and m and b are one more leaf of the sum. In both cases

    |computed - y| <= g(n + 10) M + lambda (2 n + 18) (1 + |a|) (1 + X) (1 + W) + lambda (S + |m|) (1 + 1/sqrt(v + e)),
    M = (S + |m|) |a| + |b|

where lambda is the smallest normal number, below which any operand or result may become zero: n products, n sums and
18 operations around them lose at most lambda each, times their later factors. X and W are the greatest |x| and |w|. S
is taken as its upper bound X sum |w|. ReLU6 does not increase the distance of two numbers. A factor 1 + 2^-20 covers
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

#: Operands of an integer check: the greatest magnitude of the fine operand, and of the others; and the number of
#: positions that are not zero in an operand that is summed over all positions. 512 * 4095 * 7 < 2^24.
_FINE, _COARSE, _POSITIONS = 4095, 7, 512
#: Every integer below this is a float32.
_EXACT = 1 << 24


@dataclasses.dataclass(frozen=True)
class Check:
    """A computation whose result is known.

    Attributes:
      arrays: the inputs.
      misfit: describes the mistake in a result, given as arrays by name; empty if there is none.
    """

    arrays: Arrays
    misfit: Callable[[Arrays], str]


def within(expected: Arrays, allowed: Mapping[str, np.ndarray | float]) -> Callable[[Arrays], str]:
    """Return a check for elements farther from the expected than is allowed, for NaN, and for other shapes or names."""

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
    """Return a check for elements that are not the expected number."""
    return within(expected, dict.fromkeys(expected, 0.0))


def integers(rng: np.random.Generator, layer: DepthwiseLayer, batch: int, fine: str) -> dict[str, np.ndarray]:
    """Draw x, w and dy as whole numbers such that y, dx and dw are exact in float32.

    `fine` ("x" or "dy") has twelve bits. The other of x and dy is zero except at `_POSITIONS` positions, since dw sums
    their products over all positions.
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
    """Draw x and w as whole numbers such that sums of x |x| w are exact in float32."""
    g = layer.geometry(batch)
    largest = math.isqrt((_EXACT - 1) // (_COARSE * g.taps))
    return {"x": _whole(rng, g.x_shape, largest), "w": _whole(rng, g.kernel_shape, _COARSE)}


def convolve(x: np.ndarray, w: np.ndarray, layer: DepthwiseLayer) -> np.ndarray:
    """Return y, computed tap by tap in x's dtype."""
    y = np.zeros(layer.geometry(len(x)).output_shape, x.dtype)
    for image, out in zip(x, y):
        for tap, rows, columns in _taps(layer, out.shape):
            out += _padded(image, layer)[rows, columns] * w[tap][0]
    return y


def gradients(x: np.ndarray, w: np.ndarray, dy: np.ndarray, layer: DepthwiseLayer) -> tuple[np.ndarray, np.ndarray]:
    """Return dx and dw of sum(y dy), computed tap by tap in x's dtype."""
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
    """Compute ReLU6 of batch normalization of the convolution in float64, and a bound on the error of float32.

    Args:
      a: x, w, scale, bias, mean and var of float32.
      layer: its geometry.
      epsilon: added to the variance.

    Returns:
      `(y, bound)`; the bound `(C,)`, one per channel.
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
    """Yield every tap, and the rows and columns of the padded image under it."""
    s = layer.stride
    for i, j in np.ndindex(layer.kernel, layer.kernel):
        yield (i, j), slice(i, i + (out[0] - 1) * s + 1, s), slice(j, j + (out[1] - 1) * s + 1, s)
