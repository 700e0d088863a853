"""The result of the kit, in the form that `jaxdw conformance --json` writes."""

from __future__ import annotations

from typing import Literal

from bridge._conformance.result import CheckResult, Conformance, Failure
from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.records import CaseRecord, Document, Record

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.conformance/1"] = "jaxdw.conformance/1"

#: The greatest number of elements of an array that is written whole.
_WRITTEN = 4096


class FailureRecord(Record):
    """A failure; the fields are those of `bridge._conformance.result.Failure`.

    Attributes:
      data: the arrays of the case by name, and "actual" and "expected", as nested lists of numbers; empty where they
        are large. NaN and infinities are words.
    """

    check: str
    case: CaseRecord
    verdict: Verdict
    name: str
    cause: str
    fix: str
    place: str
    called: str
    quantity: str
    different: int
    where: tuple[int, ...] | None
    data: dict[str, list]

    @classmethod
    def of(cls, failure: Failure) -> FailureRecord:
        """Return the record of a failure."""
        case = failure.case
        arrays = {
            "x": case.x,
            "kernel": case.kernel,
            "bias": case.bias,
            "dy": failure.dy,
            "actual": failure.actual,
            "expected": failure.expected,
        }
        given = {name: each for name, each in arrays.items() if each is not None}
        small = all(each.size <= _WRITTEN for each in given.values())
        return cls(
            **{field: getattr(failure, field) for field in cls.model_fields if field not in ("case", "data")},
            case=CaseRecord.of_case(case),
            data={name: _as_list(each.astype("float64").tolist()) for name, each in given.items()} if small else {},
        )


class CheckRecord(Record):
    """One check.

    Attributes:
      status: "passed", "failed" or "skipped".
      tried, failed, refused: numbers of problems.
      note: what else is to be known; reason: why it was skipped.
    """

    name: str
    about: str
    status: str
    tried: int
    failed: int
    refused: int
    note: str
    reason: str

    @classmethod
    def of(cls, check: CheckResult) -> CheckRecord:
        """Return the record of a check."""
        outcome = check.outcome
        return cls(
            name=check.name,
            about=check.about,
            status=check.status,
            **{field: getattr(outcome, field) for field in ("tried", "failed", "refused", "note", "reason")},
        )


class ConformanceRecord(Document):
    """The result; the fields are those of `bridge._conformance.result.Conformance`."""

    schema_: Literal["jaxdw.conformance/1"] = SCHEMA
    function: str
    kind: str
    framework: str
    called: str
    seed: int
    full: bool
    accumulator: str
    verdict: Verdict
    refused: dict[str, str]
    checks: list[CheckRecord]
    failures: list[FailureRecord]

    @classmethod
    def of(cls, result: Conformance) -> ConformanceRecord:
        """Return the record of a result."""
        fields = ("function", "kind", "framework", "called", "seed", "full", "accumulator", "verdict", "refused")
        return cls(
            environment=environment(),
            **{field: getattr(result, field) for field in fields},
            checks=[CheckRecord.of(each) for each in result.checks],
            failures=[FailureRecord.of(each) for each in result.failures],
        )


def _as_list(value):
    """Return nested lists of numbers in which NaN and infinities are words, as JSON has none."""
    if isinstance(value, list):
        return [_as_list(each) for each in value]
    return value if abs(value) < float("inf") else str(value)
