"""The numbers that make an implementation show the order in which it adds.

FPRev's probe (Xie et al., USENIX ATC 2025): one leaf is +M, one -M, all others 1, with M so large that M + n rounds
to M. Ones that join the sum before +M and -M have met are lost, so the result counts the leaves outside their common
subtree.

Here the same run also shows fused multiply-adds. The two masks are products (1 + 2^-a)(1 + 2^-b) 2^e, a + b = p + 1,
whose exact value exceeds the nearest p-bit number by r = 2^(e-p-1), a quarter of an ulp. A product that enters
rounded loses r. If product i enters unrounded where -M is (rounded) on the other side, r survives: y = +r + count; if
product j does, y = -r + count. The count stays below r/4, and r + count below half an ulp of M, so neither disturbs
the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from bridge.numerics import BFLOAT16, FLOAT16, FLOAT64, Format


@dataclasses.dataclass(frozen=True)
class Masks:
    """The values of one probe: x is the same everywhere, and the leaves differ in their weights.

    Attributes:
      x: value of every input.
      mask: weight of the leaf +M; -M is its negative.
      unit: weight of every leaf that is counted.
      bias_mask: value of the bias where it is the leaf +M: that of the rounded product.
      residue: r, what survives of an unrounded product; 0 where it is exact and none can show.
      capacity: how many units one run can count.
    """

    x: float
    mask: float
    unit: float
    bias_mask: float
    residue: float
    capacity: int

    def unit_sets(self, others: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the leaves to count, in as many runs as the capacity needs, at least one."""
        step = self.capacity if self.unit else max(1, len(others))
        for start in range(0, max(1, len(others)), step):
            yield others[start : start + step]

    def decode(self, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(sign, count, sound)`: y = sign r + count units, and whether it is that, with count <= most."""
        y = y.astype(np.float64)
        with np.errstate(all="ignore"):
            sign = np.rint(y / self.residue) if self.residue else np.zeros_like(y)
            unit = self.x * self.unit
            count = np.rint((y - sign * self.residue) / unit) if unit else np.zeros_like(y)
            sound = (np.abs(sign) <= 1) & (count >= 0) & (count <= most)
            sound &= sign * self.residue + count * unit == y
        integer = np.where(sound, [sign, count], 0).astype(np.int64)
        return integer[0], integer[1], sound


def fused(fmt: Format, terms: int) -> Masks:
    """Return masks for order and FMA in one run, for an accumulator in the format `fmt` of the data."""
    a = fmt.precision // 2
    b = fmt.precision + 1 - a
    steps = min((4 * terms + 4).bit_length(), fmt.precision - a - 1)  # of r down to a unit
    residue = 2.0 ** -(fmt.precision // 2)
    head = residue * 2.0 ** (fmt.precision + 1)
    x, mask = 1 + 2.0**-a, head * (1 + 2.0**-b)
    capacity = 2 ** (steps - 2) - 1
    return Masks(x, mask, residue * 2.0**-steps, head * (1 + 2.0**-a + 2.0**-b), residue, capacity)


def product_rounding(fmt: Format, accumulator: Format) -> Masks:
    """Return masks for FMA alone: all leaves but two are zero."""
    p = accumulator.precision
    a = p // 2
    b = p + 1 - a
    residue = 2.0 ** (2 - p) if fmt is FLOAT16 else 2.0**-p
    head = residue * 2.0 ** (p + 1)
    return Masks(1 + 2.0**-a, head * (1 + 2.0**-b), 0.0, head * (1 + 2.0**-a + 2.0**-b), residue, 1)


def wide(fmt: Format, *, subnormals: bool) -> Masks:
    """Return masks for the order alone, for any accumulator: M / unit is as large as the format allows.

    A float32 case may be summed in float64, in pairs of floats or exactly; a ratio of 2^120 shows the last of these.
    float16 reaches a float32 accumulator only with subnormal units, and counts few units without them.
    """
    if fmt is FLOAT16:
        return _plain(2.0**15, 2.0**-20, 2**11) if subnormals else narrow()
    exponent = 300 if fmt is FLOAT64 else 60
    return _plain(2.0**exponent, 2.0**-exponent, 2**fmt.precision if fmt is BFLOAT16 else 2**20)


def narrow() -> Masks:
    """Return masks for the order alone within the range of float16, for implementations that overflow on more.

    32 units are half an ulp of M in a float32 accumulator.
    """
    return _plain(2.0**15, 2.0**-14, 31)


def _plain(mask: float, unit: float, capacity: int) -> Masks:
    return Masks(1.0, mask, unit, mask, 0.0, capacity)
