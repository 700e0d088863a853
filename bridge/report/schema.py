"""The JSON report, as `jaxdw parity --json` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from bridge.diagnosis import Diagnosis, Verdict
from bridge.diagnosis.attribution import Attribution
from bridge.diagnosis.elimination import Elimination
from bridge.environment import environment
from bridge.records import CaseRecord, ComparisonRecord, Document, IntegerTestRecord, Number, Record

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.parity/2"] = "jaxdw.parity/2"


class OrderRecord(Record):
    """The accumulation order of an implementation."""

    implementation: str
    dtype: str
    revealed: float
    fingerprint: dict[str, Any]
    classes: list[dict[str, Any]]


class FactorRecord(Record):
    """A setting that differs in a pair, and its share of their difference."""

    label: str
    name: str
    kind: str
    a: str
    b: str
    share: Number


class ConfigurationRecord(Record):
    """One cell of the factorial; the fields are those of `bridge.diagnosis.attribution.Configuration`."""

    changed: tuple[str, ...]
    name: str
    value: Number | None
    different: int | None
    reason: str


class FlipRecord(Record):
    """One setting changed alone; the fields are those of `bridge.diagnosis.attribution.Flip`."""

    before: str
    setting: str
    name: str
    different: int | None
    max_abs: Number
    error: Number
    reason: str


class AttributionRecord(Record):
    """The shares of one pair's difference: they and `unexplained` sum to `total`, in `unit`."""

    a: str
    b: str
    unit: str
    total: Number
    factors: list[FactorRecord]
    unexplained: Number
    configurations: list[ConfigurationRecord]
    flips: list[FlipRecord]

    @classmethod
    def of(cls, attribution: Attribution) -> AttributionRecord:
        return cls(
            a=attribution.a,
            b=attribution.b,
            unit=attribution.unit,
            total=attribution.total,
            factors=[
                FactorRecord(label=label, name=factor.name, kind=factor.kind, a=factor.a, b=factor.b, share=share)
                for factor, (label, share) in zip(attribution.factors, attribution.shares)
            ],
            unexplained=attribution.unexplained,
            configurations=[ConfigurationRecord.model_validate(c) for c in attribution.configurations],
            flips=[FlipRecord.model_validate(f) for f in attribution.flips],
        )


class ChangeRecord(Record):
    """A change that makes the pair identical: what to write, and median seconds of what changed."""

    a: str
    b: str
    kinds: tuple[str, ...]
    code: tuple[str, ...]
    before: Number
    after: Number
    ratio: Number


class EliminationRecord(Record):
    """The changes that were verified, those that keep the windows first; `failed` lists what could not run, and why."""

    a: str
    b: str
    identical: bool
    changes: list[ChangeRecord]
    tried: int
    failed: list[tuple[str, str]]


class Report(Document):
    """A whole diagnosis."""

    schema_: Literal["jaxdw.parity/2"] = SCHEMA
    case: CaseRecord
    quantity: str
    verdict: Verdict
    comparisons: list[ComparisonRecord]
    integer_tests: list[IntegerTestRecord]
    orders: list[OrderRecord]
    attribution: AttributionRecord | None = None
    elimination: EliminationRecord | None = None

    @classmethod
    def of(
        cls,
        diagnosis: Diagnosis,
        attribution: Attribution | None = None,
        elimination: Elimination | None = None,
        compiler: Sequence[str] = (),
    ) -> Report:
        return cls(
            environment=environment() | ({"compiler": " ".join(compiler)} if compiler else {}),
            case=CaseRecord.of_case(diagnosis.case),
            quantity=diagnosis.quantity,
            verdict=diagnosis.verdict,
            comparisons=[ComparisonRecord.model_validate(c) for c in diagnosis.comparisons],
            integer_tests=[IntegerTestRecord.model_validate(t) for t in diagnosis.integer_tests],
            orders=[OrderRecord.model_validate(order.to_json()) for order in diagnosis.orders],
            attribution=None if attribution is None else AttributionRecord.of(attribution),
            elimination=None if elimination is None else EliminationRecord.model_validate(elimination),
        )
