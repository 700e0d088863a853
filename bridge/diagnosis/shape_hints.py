"""Hints on an output of the wrong shape, in words for an error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from bridge.case import Case
from bridge.diagnosis.target import Target
from jaxdw.geometry import Geometry


def likely_cause(shape: tuple[int, ...], target: Target) -> str:
    """Return the axes that look swapped, or an option that gives this shape, in words; empty if none is found."""
    expected = target.shape
    if len(shape) != len(expected):
        return f"expected {len(expected)} axes, found {len(shape)}"
    if sorted(shape) == sorted(expected):
        return _order(shape, expected, len(target.case.geometry.batch))
    if target.quantity != "y":
        return ""
    g, batch = target.case.geometry, len(target.case.geometry.batch)
    if shape[:batch] != g.batch:
        return f"the batch is {shape[:batch]}, expected {g.batch}"
    if shape[-1] != g.features:
        return f"{shape[-1]} channels on the last axis, expected {g.features}"
    differences = [(axis, n - m) for axis, (n, m) in enumerate(zip(shape, expected)) if n != m]
    words = " and ".join(f"{abs(d)} {'more' if d > 0 else 'fewer'} along axis {axis}" for axis, d in differences)
    for option, case in _alternatives(target.case):
        if case.geometry.output_shape == shape:
            return f"{words}; {option} gives this shape{_uncut(g, case.geometry)}"
    return words


def _uncut(g: Geometry, other: Geometry) -> str:
    """Return a hint if causal padding was made by padding both ends, and the surplus at the end was left."""
    causal = [pair == (span - 1, 0) and span > 1 for pair, span in zip(g.padding, g.spans)]
    both = [pair == (span - 1, span - 1) for pair, span in zip(other.padding, other.spans)]
    left = any(c and b for c, b in zip(causal, both)) and g.spans == other.spans
    return ": causal padding whose surplus at the end was not cut off" if left else ""


def _order(shape: tuple[int, ...], expected: tuple[int, ...], batch: int) -> str:
    if shape == (*expected[:batch], expected[-1], *expected[batch:-1]):
        return "it looks channels-first; move the channels to the last axis"
    for i, j in itertools.combinations(range(len(shape)), 2):
        swapped = list(expected)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        if tuple(swapped) == shape:
            return f"axes {i} and {j} look swapped"
    order = next(p for p in itertools.permutations(range(len(shape))) if tuple(expected[i] for i in p) == shape)
    return f"the axes look transposed by {order}"


def _alternatives(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield other options that a user may have set, in words, with the case; the likeliest first, and no invalid ones.

    One option is likelier than two, a word or a number for all axes than pairs, and causal padding than other pairs.
    """
    g = case.geometry
    swapped = {"strides": g.kernel_dilation, "kernel_dilation": g.strides}
    changes: list[dict[str, Any]] = [{"padding": word} for word in ("SAME", "VALID")]
    symmetric: list[dict[str, Any]] = []
    if g.padding_mode == "zeros":
        symmetric = [{"padding": n} for n in sorted(range(max(g.spans) + 3), key=lambda n: _distance(g, n))]
        changes += [{"padding": tuple(k // 2 for k in sizes)} for sizes in (g.kernel_size, g.spans)]
        changes += [each for each in symmetric if _distance(g, each["padding"]) <= 2 * g.rank]
    steps: list[dict[str, Any]] = [{"strides": g.strides[::-1]}, {"kernel_dilation": g.kernel_dilation[::-1]}]
    steps += [{"strides": 1}, {"kernel_dilation": 1}, {"input_dilation": 1}]
    steps += [{"strides": s} for s in (2, 3, 4)] + [{"kernel_dilation": d} for d in (2, 3)]
    changes += steps
    changes += [{**swapped, "padding": padding} for padding in (g.padding, case.padding)]
    changes += symmetric
    if g.rank == 1:
        changes += [{"padding": "CAUSAL"}]
    changes += [{**step, "padding": word} for step in steps for word in ("SAME", "VALID")]
    if g.padding_mode == "zeros":
        changes += [{"padding": g.padding[::-1]}]
        changes += [{"padding": sizes} for sizes in itertools.product(range(min(8, max(g.spans) + 1)), repeat=g.rank)]
        axes = itertools.product((False, True), repeat=g.rank)
        causal = [
            ((span - 1, 0) if here else pair for here, span, pair in zip(some, g.spans, g.padding)) for some in axes
        ]
        changes += [{"padding": tuple(pairs)} for pairs in causal]
        changes += [{"padding": ((low + n, high + n) for low, high in g.padding)} for n in (1, -1, 2, -2)]
        around = sorted(itertools.product(range(-2, 3), repeat=2 * g.rank), key=lambda d: (sum(map(abs, d)), d))
        for d in around[1:]:
            pairs = ((low + d[2 * a], high + d[2 * a + 1]) for a, (low, high) in enumerate(g.padding))
            changes += [{"padding": tuple(pairs)}]
    for change in changes:
        try:
            other = case.replace(**change)
        except ValueError:
            continue
        yield ", ".join(f"{name}={spelled(value)}" for name, value in change.items()), other


def _distance(g: Geometry, n: int) -> int:
    """Return how far padding by n is from the case's."""
    return sum(abs(n - low) + abs(n - high) for low, high in g.padding)


def spelled(value: Any) -> str:
    """Return an option's value as code, as short as it can be: one number for all axes, or for both ends of an axis."""
    while isinstance(value, tuple):
        inner = tuple(pair[0] if isinstance(pair, tuple) and len(set(pair)) == 1 else pair for pair in value)
        if len(set(inner)) == 1 and not isinstance(inner[0], tuple):
            return str(inner[0])
        if inner == value:
            break
        value = inner
    return f'"{value}"' if isinstance(value, str) else str(value)
