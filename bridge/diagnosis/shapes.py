"""What an output of the wrong shape looks like, in words to add to an error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bridge.case import Case

if TYPE_CHECKING:
    from bridge.diagnosis.target import Target


def likely_cause(shape: tuple[int, ...], target: Target) -> str:
    """Which axes look swapped, or which padding or stride gives this shape; empty if nothing is recognised."""
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
    found = [words for words, case in _alternatives(target.case) if case.geometry.output_shape == shape]
    extra = _extra(shape, expected)
    return "; ".join(filter(None, [extra, f"{found[0]} gives this shape" if found else ""]))


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


def _extra(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    differences = [(axis, n - m) for axis, (n, m) in enumerate(zip(shape, expected)) if n != m]
    words = [f"{abs(d)} {'more' if d > 0 else 'fewer'} along axis {axis}" for axis, d in differences]
    return " and ".join(words)


def _alternatives(case: Case) -> Iterator[tuple[str, Case]]:
    """Other options a user may have set, the likeliest first; those that cannot be are left out."""
    g = case.geometry
    swapped = {"strides": g.kernel_dilation, "kernel_dilation": g.strides}
    changes: list[dict[str, Any]] = [{"padding": word} for word in ("SAME", "VALID")]
    changes += [{"padding": tuple((k // 2, k // 2) for k in g.kernel_size)}]
    changes += [{**swapped, "padding": padding} for padding in (g.padding, case.padding)]
    changes += [{"strides": g.strides[::-1]}, {"kernel_dilation": g.kernel_dilation[::-1]}]
    changes += [{"strides": 1}, {"kernel_dilation": 1}, {"input_dilation": 1}]
    changes += [{"strides": s} for s in (2, 3, 4)]
    if g.padding_mode == "zeros":
        changes += [{"padding": g.padding[::-1]}]
        for all_sides in (1, -1, 2, -2):
            changes += [{"padding": tuple((low + all_sides, high + all_sides) for low, high in g.padding)}]
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


def spelled(value: Any) -> str:
    """An option's value as it stands in a call."""
    return f'"{value}"' if isinstance(value, str) else str(value)
