"""The rows of the suites "transposed", "causal" and "large": their layers, data and checks.

All checks are on whole numbers. Sums are exact in float32 in any order. SiLU and Fourier transforms are not:

- SiLU of an exact sum s takes an exponential, a sum, and a quotient or a product. Exponentials of 4 ulp and three
  roundings are off by at most 16 units of roundoff together; where the result is subnormal, by the smallest normal
  number.
- Numbers are -1, 0 and 1 where a way computes by Fourier transforms. It may be off by `bridge.numerics.fourier_error`
  for the longest transform that holds input and kernel, which is a power of three with the most stages. Up to 2 results
  for each axis may lie on one another in a shorter transform.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from bridge.bench.reference import Arrays, Check, exactly, within
from bridge.numerics import FLOAT32, fourier_error

_FORMS = (
    ("transposed", r"(?P<size>\d+x\d+)x(?P<channels>\d+):(?P<kernel>\d+):(?P<stride>\d+)"),
    ("image", r"(?P<batch>\d+)x(?P<size>\d+x\d+)x(?P<channels>\d+):(?P<kernel>\d+)"),
    ("causal", r"causal:(?P<batch>\d+)x(?P<size>\d+)x(?P<channels>\d+):(?P<kernel>\d+)"),
    ("long", r"long:(?P<batch>\d+)x(?P<size>\d+)x(?P<channels>\d+):(?P<kernel>\d+)"),
    ("step", r"step:(?P<batch>\d+)x(?P<channels>\d+):(?P<kernel>\d+)"),
)


@dataclasses.dataclass(frozen=True)
class SpecialLayer:
    """A layer of these suites.

    Attributes:
      kind: "transposed" (its output has `stride` times the size), "image" (padded by kernel // 2), "causal" (with bias
        and SiLU), "long" (causal, without), or "step" (one input of a stream, with bias and SiLU).
      batch, size, channels: of x; a step has no size.
      kernel: taps along each axis.

    >>> SpecialLayer.parse("causal:8x512x1536:4", 1)
    SpecialLayer(kind='causal', batch=8, size=(512,), channels=1536, kernel=4, stride=1)
    """

    kind: str
    batch: int
    size: tuple[int, ...]
    channels: int
    kernel: int
    stride: int = 1

    @classmethod
    def parse(cls, name: str, batch: int) -> SpecialLayer:
        """Parse a row's name; where it has no batch, `batch` is taken.

        Raises:
          ValueError: another form.
        """
        for kind, form in _FORMS:
            if match := re.fullmatch(form, name):
                found = match.groupdict()
                size = tuple(map(int, filter(None, found.get("size", "").split("x"))))
                numbers = {"batch": batch} | {key: int(value) for key, value in found.items() if key != "size"}
                return cls(kind, size=size, **numbers)
        raise ValueError(f"`--layers` has {name!r}, expected a name as in docs/speed.md")

    @property
    def padding(self) -> int:
        """What a transposed layer cuts off at each end."""
        return (self.kernel - self.stride + 1) // 2

    @property
    def output_padding(self) -> int:
        return 2 * self.padding + self.stride - self.kernel

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs by name: x, w, and what there is of b and state."""
        x = (self.batch, *self.size, self.channels)
        shapes: dict[str, tuple[int, ...]] = {"x": x, "w": (*(self.kernel,) * max(1, len(self.size)), 1, self.channels)}
        if self.kind in ("causal", "step"):
            shapes["b"] = (self.channels,)
        if self.kind == "step":
            shapes["state"] = (self.batch, self.kernel - 1, self.channels)
        return shapes

    @property
    def results(self) -> tuple[str, ...]:
        return ("y", "state") if self.kind == "step" else ("y",)

    @property
    def nbytes(self) -> int:
        """The bytes that any way must move in float32."""
        written = math.prod(self.shapes["x"]) * (self.stride**2 if self.kind == "transposed" else 1)
        kept = math.prod(self.shapes.get("state", (0,)))
        return 4 * (sum(map(math.prod, self.shapes.values())) + written + kept)


def normal(rng: np.random.Generator, layer: SpecialLayer) -> Arrays:
    """Draw standard normal inputs."""
    return {name: rng.standard_normal(shape, np.float32) for name, shape in layer.shapes.items()}


def checks(rng: np.random.Generator, layer: SpecialLayer) -> Sequence[Check]:
    """Return the check on whole numbers."""
    greatest = 1 if layer.kind in ("image", "long") else 3
    whole = {
        name: rng.integers(-greatest, greatest + 1, shape).astype(np.float32) for name, shape in layer.shapes.items()
    }
    y = _sums(whole, layer)
    if layer.kind == "transposed":
        return [Check(whole, exactly({"y": y}))]
    if layer.kind in ("image", "long"):
        return [Check(whole, within({"y": y}, {"y": _fourier_bound(whole, layer)}))]
    y = y + whole["b"]
    with np.errstate(over="ignore"):
        y = y / (1 + np.exp(-y))
    expected, allowed = {"y": y}, {"y": 16 * FLOAT32.unit_roundoff * np.abs(y) + FLOAT32.smallest_normal}
    if layer.kind == "step":
        expected["state"] = np.concatenate([whole["state"][:, 1:], whole["x"][:, None]], axis=1)
        allowed["state"] = np.zeros(())
    return [Check(whole, within(expected, allowed))]


def _sums(whole: Arrays, layer: SpecialLayer) -> np.ndarray:
    """Return the sums of products, which are whole numbers; float64 holds those of transforms to within one half."""
    x, w = (whole[name].astype(np.float64) for name in ("x", "w"))
    if layer.kind == "step":
        return np.einsum("nkc,kc->nc", np.concatenate([whole["state"], whole["x"][:, None]], axis=1), w[:, 0])
    axes = tuple(range(1, 1 + len(layer.size)))
    before = layer.kernel // 2 if layer.kind == "image" else layer.kernel - 1
    if layer.kind == "transposed":
        before = layer.padding
        wide = np.zeros((len(x), *(n * layer.stride for n in layer.size), layer.channels))
        wide[:, :: layer.stride, :: layer.stride] = x
        x = wide
    else:
        w = np.flip(w, tuple(range(len(layer.size))))  # the transforms convolve
        before = layer.kernel - 1 - before
    lengths = [n + layer.kernel for n in x.shape[1:-1]]
    product = np.fft.rfftn(x, lengths, axes) * np.fft.rfftn(w[None, ..., 0, :], lengths, axes)
    full = np.fft.irfftn(product, lengths, axes)
    return np.rint(full[(slice(None), *(slice(before, before + n) for n in x.shape[1:-1]))])


def _fourier_bound(whole: Arrays, layer: SpecialLayer) -> np.ndarray:
    lengths = [3 ** math.ceil(math.log(n + layer.kernel, 3)) for n in layer.size]
    error = fourier_error(whole["x"], whole["w"][..., 0, :, None], lengths, FLOAT32, whole=True)[..., 0]
    return 2 ** len(lengths) * error.reshape(layer.batch, *(1,) * len(lengths), layer.channels)
