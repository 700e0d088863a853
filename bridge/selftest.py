"""Whether jaxdw has PyTorch's bits on this machine."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from bridge.case import Case
from bridge.implementations import implementation
from bridge.numerics import same_bits

_log = logging.getLogger("bridge")


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """Attributes: elements compared, how many have equal bits, and one line for each case that has not."""

    elements: int
    equal: int
    misses: list[str]


def taps_against_torch(cases: int, seed: int, *, rank: int = 2) -> SelfTest:
    """jax.taps and torch.conv2d on random float32 convolutions with multiplier 1.

    With a channel multiplier PyTorch multiplies matrices, and where there are few output positions the order of its
    sums depends on their number; `jaxdw reveal torch.conv2d` shows it.
    """
    rng = np.random.default_rng(seed)
    taps, conv = implementation("jax.taps"), implementation("torch.conv2d")
    elements = equal = 0
    misses = []
    for number in range(1, cases + 1):
        _log.info("self-test: convolution %d of %d", number, cases)
        case = random_case(rng, rank=rank, multiplier=1)
        same = same_bits(taps.run(case), conv.run(case))
        elements, equal = elements + same.size, equal + int(same.sum())
        if not same.all():
            misses.append(
                f"{same.size - same.sum()} of {same.size} elements, {case.geometry}, bias {case.bias is not None}"
            )
    return SelfTest(elements, equal, misses)


def random_case(rng: np.random.Generator, *, rank: int = 2, multiplier: int | None = None) -> Case:
    """Kernels of 1 to 7 (1 to 3 in 3-D), strides 1 to 3, dilation 1 to 2, padding 0 to 3 or SAME, C from 2 to 64,
    multiplier 1 to 3, with and without bias.
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
