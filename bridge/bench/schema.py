"""The records that `jaxdw bench --json` writes.

docs/speed.md explains every field, and a test holds it to this file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import pydantic

from bridge.bench.figures import geometric_mean, quartiles
from bridge.records import Record

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.bench/1"] = "jaxdw.bench/1"

#: The name of jaxdw's way, and those of PyTorch's two eager ways.
OURS = "jaxdw"
EAGER = ("torch", "torch.channels_last")


class BenchSettings(Record):
    """The settings of a run."""

    suites: tuple[str, ...]
    batch: int = pydantic.Field(default=8, ge=1)
    size: int = pydantic.Field(default=224, ge=64)
    rounds: int = pydantic.Field(default=15, ge=1)
    layers: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("default",)
    threads: int | None = None
    alone: bool = False
    tune: bool = False
    seed: int = 0


class WayRecord(Record):
    """One way to compute a row."""

    name: str
    milliseconds: list[float | None]
    low: float | None
    median: float | None
    high: float | None
    first_call_seconds: float | None
    wrong: str = ""
    failed: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        milliseconds: list[float | None],
        first_call_seconds: float | None = None,
        *,
        wrong: str = "",
        failed: str = "",
    ) -> WayRecord:
        """Return the record of these times, which may be none."""
        timed = [ms for ms in milliseconds if ms is not None]
        low, median, high = quartiles(timed) if timed else (None, None, None)
        return cls(
            name=name,
            milliseconds=milliseconds,
            low=low,
            median=median,
            high=high,
            first_call_seconds=first_call_seconds,
            wrong=wrong,
            failed=failed,
        )


class RowRecord(Record):
    """One row of a suite."""

    name: str
    networks: tuple[str, ...]
    batch: int
    nbytes: int | None
    flops: int | None
    ways: list[WayRecord]
    auto: str | None = None

    def median(self, name: str) -> float | None:
        """Return the milliseconds of a way, None if it was not timed."""
        return next((way.median for way in self.ways if way.name == name), None)

    @property
    def best_eager(self) -> float | None:
        """Milliseconds of the faster of PyTorch's eager layouts."""
        return min((ms for ms in map(self.median, EAGER) if ms is not None), default=None)

    def ratio(self, peer: str, ours: str = OURS) -> float | None:
        """Return our median over the peer's; "best torch" is the faster of PyTorch's eager ways."""
        own, theirs = self.median(ours), self.best_eager if peer == BEST else self.median(peer)
        return own / theirs if own is not None and theirs is not None else None


#: The name in summaries for the faster of PyTorch's eager layouts, row by row.
BEST = "best torch"


class SummaryRecord(Record):
    """jaxdw's time over a peer's, over all rows where both were timed: below 1 jaxdw is faster."""

    peer: str
    rows: int
    geometric_mean: float
    least: float
    greatest: float
    greatest_at: str


class SuiteRecord(Record):
    """A suite; `skipped` has the peers that were not available, and the reasons."""

    suite: str
    rows: list[RowRecord]
    summaries: list[SummaryRecord]
    skipped: dict[str, str]
    seconds: float

    @classmethod
    def of(cls, suite: str, rows: list[RowRecord], skipped: dict[str, str], seconds: float) -> SuiteRecord:
        return cls(suite=suite, rows=rows, summaries=summaries(rows), skipped=skipped, seconds=seconds)


class CopyRecord(Record):
    """Bandwidth of a copy that moves `nbytes`, half read and half written: 10^9 bytes per second, by framework."""

    nbytes: int
    gigabytes_a_second: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.gigabytes_a_second.values())


class PointRecord(Record):
    """One size of one quantity in `scaling`."""

    value: int
    name: str
    batch: int
    milliseconds: list[float]
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int

    @property
    def median(self) -> float:
        """Milliseconds."""
        return quartiles(self.milliseconds).median


class ScaleRecord(Record):
    """The growth of jaxdw's cost with one quantity. The others are as in the base."""

    quantity: str
    work: str
    points: list[PointRecord]
    time_exponent: float | None
    memory_exponent: float | None


class BenchReport(Record):
    """A whole run."""

    schema_: Literal["jaxdw.bench/1"] = SCHEMA
    environment: dict[str, str]
    settings: BenchSettings
    copies: list[CopyRecord]
    suites: list[SuiteRecord]
    scaling: list[ScaleRecord]
    base: str | None = None
    seconds: float

    @property
    def wrong(self) -> list[str]:
        """Every way whose result was wrong, with the mistake."""
        return [
            f"{suite.suite}, {row.name}: {way.name}: {way.wrong}"
            for suite in self.suites
            for row in suite.rows
            for way in row.ways
            if way.wrong
        ]

    def to_json(self) -> str:
        return compact_json(json.loads(self.model_dump_json(by_alias=True)), depth=4)


def compact_json(value: Any, depth: int) -> str:
    """Return JSON text whose containers have lines of their own down to `depth`; deeper ones are one line each.

    >>> print(compact_json({"rows": [{"name": "a", "times": [1, 2]}] * 2}, depth=2), end="")
    {
     "rows": [
      {"name": "a", "times": [1, 2]},
      {"name": "a", "times": [1, 2]}
     ]
    }
    """
    return _json(value, depth, 0) + "\n"


def _json(value: Any, depth: int, level: int) -> str:
    if level >= depth or not isinstance(value, dict | list) or not value or (level > 1 and not _is_nested(value)):
        return json.dumps(value, ensure_ascii=False)
    parts = [_json(each, depth, level + 1) for each in (value.values() if isinstance(value, dict) else value)]
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {part}" for key, part in zip(value, parts)]
    indent = "\n" + " " * (level + 1)
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}{indent}{f',{indent}'.join(parts)}{indent[:-1]}{last}"


def _is_nested(value: dict[str, Any] | list[Any]) -> bool:
    return any(isinstance(each, dict | list) for each in (value.values() if isinstance(value, dict) else value))


def summaries(rows: Sequence[RowRecord], ours: str = OURS) -> list[SummaryRecord]:
    """Return a summary for every peer of `ours`, and for the faster of PyTorch's eager ways."""
    names = dict.fromkeys(way.name for row in rows for way in row.ways if way.name != ours)
    found = []
    for peer in (*names, *((BEST,) if all(name in names for name in EAGER) else ())):
        ratios = {row.name: ratio for row in rows if (ratio := row.ratio(peer, ours)) is not None}
        if ratios:
            worst = max(ratios, key=ratios.__getitem__)
            found.append(
                SummaryRecord(
                    peer=peer,
                    rows=len(ratios),
                    geometric_mean=geometric_mean(list(ratios.values())),
                    least=min(ratios.values()),
                    greatest=ratios[worst],
                    greatest_at=worst,
                )
            )
    return found
