"""Random problems that a kernel accepts, and the smallest one that shows a fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from bridge._conformance.features import Features
from bridge._conformance.problems import Problem

#: Channels of the problems of a kernel that takes any number, with odd ones.
_CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 17)

#: The greatest sizes by the number of spatial axes: of a kernel, and of x beyond the kernel.
_KERNEL = {1: 9, 2: 5, 3: 3}
_SPATIAL = {1: 24, 2: 9, 3: 5}


def draws(features: Features, kind: str, rng: np.random.Generator) -> Iterator[Problem]:
    """Yield random problems without end, all of them with an output."""
    ranks = sorted(features.base)
    while True:
        problem = _draw(features, kind, ranks[int(rng.integers(len(ranks)))], rng)
        if not problem.is_empty:
            yield problem


def _draw(features: Features, kind: str, rank: int, rng: np.random.Generator) -> Problem:
    alike = rng.random() < 0.25  # some kernels take square images alone

    def sizes(least: int, most: int, varies: bool = True) -> tuple[int, ...]:
        drawn = tuple(int(n) for n in rng.integers(least, most + 1, rank)) if varies else (least,) * rank
        return drawn[:1] * rank if alike else drawn

    kernel = sizes(1, _KERNEL[rank]) if features.any_kernel else features.base[rank].kernel_size
    if features.own_padding == "SAME":
        kernel = tuple(k - 1 + k % 2 for k in kernel)
    strides, dilation = sizes(1, 3, features.strides), sizes(1, 3, features.dilation)
    spans = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation))
    spatial = sizes(1, _SPATIAL[rank])
    least = features.base[rank].channels
    channels = int(rng.choice(_CHANNELS)) if least < 8 else least * int(rng.integers(1, 3))
    return Problem(
        kind,
        int(rng.integers(1, 4)),
        spatial,
        channels,
        int(rng.integers(1, 4)) if features.multiplier and rng.random() < 0.3 else 1,
        kernel,
        strides,
        _padding(features, kind, spans, alike, rng),
        dilation,
        tuple(int(rng.integers(0, max(pair))) if features.output_padding else 0 for pair in zip(strides, dilation)),
        features.bias and rng.random() < 0.5,
        features.state and rng.random() < 0.5,
        features.first.dtype,
    )


def _padding(
    features: Features, kind: str, spans: tuple[int, ...], alike: bool, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """Return the padding (low, high) of each axis: what is told, or what the kernel does by itself."""
    if kind == "causal":
        return ((spans[0] - 1, 0),)
    if not features.padding:
        is_same = features.own_padding == "SAME"
        return tuple(((span - 1) // 2, (span - 1) // 2) if is_same else (0, 0) for span in spans)
    pads = [int(rng.integers(0, span if kind == "transpose" else span + 1)) for span in spans]
    return tuple((p, p) for p in (pads[:1] * len(pads) if alike else pads))


def smallest(problem: Problem, fails: Callable[[Problem], bool], tries: int = 80) -> Problem:
    """Return the simplest problem that still fails, found by one change at a time.

    Args:
      fails: returns whether a problem fails as the first one does.
      tries: how many problems are run at most.
    """
    changed = True
    while changed and tries > 0:
        changed = False
        for other in problem.smaller():
            tries -= 1
            if tries < 0:
                break
            if fails(other):
                problem, changed = other, True
                break
    return problem


def with_sizes(problem: Problem, **sizes: object) -> Problem:
    """Return the problem with other sizes; the padding of a causal one follows its kernel."""
    other = dataclasses.replace(problem, **sizes)  # type: ignore[arg-type]
    return dataclasses.replace(other, padding=((other.spans[0] - 1, 0),)) if problem.kind == "causal" else other
