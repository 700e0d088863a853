"""Compare the bits of jaxdw with those of PyTorch on this machine."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np

from bridge._implementations import implementation
from bridge.case import Case
from bridge.environment import environment
from bridge.numerics import same_bits
from jaxdw import onednn
from jaxdw.bias import bias_comes_first
from jaxdw.geometry import Geometry

_log = logging.getLogger("bridge")


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The number of elements, how many have equal bits, and one line for each case that does not."""

    elements: int
    equal: int
    misses: list[str]


def taps_against_torch(cases: int, seed: int, *, rank: int = 2, multiplier: int = 1, short: bool = False) -> SelfTest:
    """Compare jax.taps with torch.conv2d on random float32 convolutions, `short_case` ones or `random_case` ones.

    The promise of equal bits is for `multiplier` 1: see docs/why-they-differ.md.
    """
    rng = np.random.default_rng(seed)
    taps, conv = implementation("jax.taps"), implementation("torch.conv2d")
    threads = int(environment()["torch threads"])
    elements = equal = 0
    misses = []
    number = 0
    while number < cases:
        case = short_case(rng, rank=rank) if short else random_case(rng, rank=rank, multiplier=multiplier)
        if is_left_to_pytorch(case.geometry, threads) or is_a_plain_loop(case.geometry):
            continue
        number += 1
        _log.info("self-test: convolution %d of %d", number, cases)
        same = same_bits(taps.run(case), conv.run(case))
        elements, equal = elements + same.size, equal + int(same.sum())
        if not same.all():
            misses.append(
                f"{same.size - same.sum()} of {same.size} elements, {case.geometry}, bias {case.bias is not None}"
            )
    return SelfTest(elements, equal, misses)


def is_left_to_pytorch(geometry: Geometry, threads: int) -> bool:
    """Return whether PyTorch computes this float32 convolution of two or more channels by a matrix product of its own.

    With one thread it does so where the last two kernel sizes are 1, nothing is strided or dilated, and the batch is
    below 16 (`use_mkldnn` in its Convolution.cpp). It gives all others to oneDNN.
    """
    ones = (*geometry.kernel_size[-2:], *geometry.strides, *geometry.kernel_dilation)
    return threads == 1 and math.prod(geometry.batch) < 16 and max(ones) == 1


def is_a_plain_loop(geometry: Geometry) -> bool:
    """Return whether oneDNN runs its reference loop, which rounds the products, for lack of memory.

    Where its depthwise kernels do not apply, it multiplies matrices, unless the windows take too much memory.
    """
    g = geometry
    if bias_comes_first(g) or (g.rank == 3 and max(g.kernel_dilation) == 1):
        return False
    elements = sum(map(math.prod, (g.x_shape, g.kernel_shape, g.output_shape)))
    return onednn.is_a_plain_loop(g.taps, g.output_spatial, elements)


def random_case(rng: np.random.Generator, *, rank: int = 2, multiplier: int | None = None) -> Case:
    """Draw a case: kernels of 1 to 7 (1 to 3 in 3-D), strides 1 to 3, dilation 1 to 2, padding 0 to 3 or SAME, C from
    2 to 64, multiplier 1 to 3, with and without bias.
    """
    channels = int(rng.choice([2, 3, 4, 7, 8, 12, 16, 17, 32, 64]))
    multiplier = multiplier or int(rng.choice([1, 1, 1, 2, 3]))
    size = {1: 40, 2: 20, 3: 9}[rank]
    kernel = tuple(int(k) for k in rng.integers(1, {1: 8, 2: 8, 3: 4}[rank], rank))
    dilation = tuple(int(d) for d in rng.integers(1, 3, rank))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    spatial = tuple(int(rng.integers(span, span + size)) for span in spans)
    padding = "SAME" if rng.random() < 0.25 else tuple((int(p), int(p)) for p in rng.integers(0, 4, rank))
    batch = int(rng.integers(1, 4))
    return Case(
        rng.standard_normal((batch, *spatial, channels), np.float32),
        rng.standard_normal((*kernel, 1, channels * multiplier), np.float32),
        rng.standard_normal(channels * multiplier, np.float32) if rng.random() < 0.5 else None,
        strides=tuple(int(s) for s in rng.integers(1, 4, rank)),
        padding=padding,
        kernel_dilation=dilation,
    )


def short_case(rng: np.random.Generator, *, rank: int) -> Case:
    """Draw a case with few channels, inputs of 1 to 11 that the kernel may exceed, and padding from none to more than
    the dilated kernel, mostly with a bias: these sizes decide where PyTorch adds the bias.
    """
    channels = int(rng.choice([2, 2, 3, 4, 5, 8, 9, 16, 17, 32]))
    kernel = tuple(int(k) for k in rng.integers(1, {1: 12, 2: 8, 3: 4}[rank], rank))
    dilation, strides = (
        tuple(int(v) for v in rng.integers(1, 4, rank)) if rng.random() < 0.5 else (1,) * rank for _ in range(2)
    )
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    padding = [int(rng.integers(0, span + 2)) for span in spans]
    least = [max(1, span - 2 * amount) for span, amount in zip(spans, padding)]
    spatial = tuple(int(rng.integers(low, low + {1: 11, 2: 7, 3: 5}[rank])) for low in least)
    return Case(
        rng.standard_normal((int(rng.choice([1, 1, 2, 3, 16])), *spatial, channels), np.float32),
        rng.standard_normal((*kernel, 1, channels), np.float32),
        rng.standard_normal(channels, np.float32) if rng.random() < 0.7 else None,
        strides=strides,
        padding="SAME" if rng.random() < 0.15 else tuple((amount, amount) for amount in padding),
        kernel_dilation=dilation,
    )
