"""The cost model: growth of jaxdw's time and memory with batch, channels, size and kernel, measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bridge.bench import jax_peers
from bridge.bench.figures import exponent
from bridge.bench.measure import interleaved
from bridge.bench.problems import problem
from bridge.bench.schema import BenchSettings, PointRecord, ScaleRecord
from bridge.bench.suites import SCALES, DepthwiseLayer

#: The suite that has the problems of each kind of work.
WORK = {"forward": "layers", "gradients": "gradients"}

#: The quantity that each varied field stands for: the side and the kernel are squared.
_QUANTITIES = {"batch": "batch", "channels": "channels", "side": "positions", "kernel": "taps"}


def scaling(
    base: DepthwiseLayer, settings: BenchSettings, track: Callable[[Sequence[Any], str], Iterable[Any]]
) -> list[ScaleRecord]:
    """Vary each quantity over two decades, forward and with both gradients; the others are as in the base.

    Raises:
      RuntimeError: a result is wrong.
    """
    pairs = [(field, work) for field in SCALES for work in WORK]
    return [_scale(base, field, work, settings) for field, work in track(pairs, "scaling")]


def _scale(base: DepthwiseLayer, field: str, work: str, settings: BenchSettings) -> ScaleRecord:
    points: dict[int, PointRecord] = {}
    calls: dict[str, Sequence[Callable[[], Any]]] = {}
    for value in SCALES[field]:
        batch = value if field == "batch" else settings.batch
        changed = {"batch": {}, "side": {"height": value, "width": value}}.get(field, {field: value})
        layer = dataclasses.replace(base, **changed)
        each = problem(WORK[work], str(layer), (), batch, settings.seed)
        way, memory = jax_peers.way_and_memory(each)
        for check in each.checks():
            if wrong := check.misfit(way.fetch(way.start(check.arrays)())):
                raise RuntimeError(f"{work} of {layer}, batch {batch}: {wrong}")
        quantity = value**2 if field in ("side", "kernel") else value
        points[quantity] = PointRecord(value=quantity, name=str(layer), batch=batch, milliseconds=[], **memory)
        calls[str(quantity)] = [way.start(arrays) for arrays in each.inputs]
    for name, times in interleaved(calls, settings.rounds, settings.seed).items():
        points[int(name)].milliseconds = [ms for ms in times if ms is not None]
    found = [points[value] for value in sorted(points)]
    return ScaleRecord(
        quantity=_QUANTITIES[field],
        work=work,
        points=found,
        time_exponent=_exponent(found, [point.median for point in found]),
        memory_exponent=_exponent(found, [point.temporary_bytes for point in found]),
    )


def _exponent(points: Sequence[PointRecord], costs: Sequence[float]) -> float | None:
    """Fit the exponent over the greater half of the decades; None if a cost there is zero."""
    middle = math.sqrt(points[0].value * points[-1].value)
    upper = [(point.value, cost) for point, cost in zip(points, costs) if point.value >= middle]
    if len(upper) < 2 or min(cost for _, cost in upper) <= 0:
        return None
    return exponent([value for value, _ in upper], [cost for _, cost in upper])
