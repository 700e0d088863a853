"""The JSON report, as `jaxdw parity --json` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from bridge.diagnosis import Diagnosis, Verdict
from bridge.diagnosis.attribution import Attribution
from bridge.diagnosis.elimination import Elimination
from bridge.environment import environment
from jaxdw.geometry import Geometry

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.parity/2"] = "jaxdw.parity/2"


def _finite_or_word(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


#: JSON has no infinity: it is written as the word "inf".
Number = Annotated[float, pydantic.PlainSerializer(_finite_or_word, return_type=float | str)]


class CaseRecord(pydantic.BaseModel):
    """What was computed: shapes channels last, padding as (low, high) an axis."""

    name: str
    dtype: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: tuple[int, ...] | None
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]

    @classmethod
    def of(cls, g: Geometry, dtype: str, bias: bool, name: str = "") -> CaseRecord:
        return cls(
            name=name,
            dtype=dtype,
            x=g.x_shape,
            kernel=g.kernel_shape,
            bias=(g.features,) if bias else None,
            output=g.output_shape,
            strides=g.strides,
            padding=g.padding,
            padding_mode=g.padding_mode,
            kernel_dilation=g.kernel_dilation,
            input_dilation=g.input_dilation,
        )


class ComparisonRecord(pydantic.BaseModel):
    """One pair; the fields are those of `bridge.Comparison`."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    a: str
    b: str
    verdict: Verdict
    elements: int
    different: int
    max_abs: Number
    max_ulp: int
    max_bound_ratio: Number
    side_bound_ratios: tuple[Number, Number]
    where: tuple[int, ...] | None
    explained: int | None
    name: str
    cause: str
    fix: str
    place: str


class IntegerTestRecord(pydantic.BaseModel):
    """An implementation on small integers, where every sum is exact and nothing is tolerated."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    implementation: str
    verdict: Verdict
    comparison: ComparisonRecord


class OrderRecord(pydantic.BaseModel):
    """The order in which an implementation adds."""

    implementation: str
    dtype: str
    revealed: float
    fingerprint: dict[str, Any]
    classes: list[dict[str, Any]]


class FactorRecord(pydantic.BaseModel):
    """A setting in which two sides differ, and its share of their difference."""

    label: str
    name: str
    kind: str
    a: str
    b: str
    share: Number


class ConfigurationRecord(pydantic.BaseModel):
    """One cell of the factorial; the fields are those of `bridge.diagnosis.attribution.Configuration`."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    changed: tuple[str, ...]
    name: str
    value: Number | None
    different: int | None
    reason: str


class FlipRecord(pydantic.BaseModel):
    """One setting changed alone; the fields are those of `bridge.diagnosis.attribution.Flip`."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    side: str
    setting: str
    name: str
    different: int | None
    max_abs: Number
    error: Number
    reason: str


class AttributionRecord(pydantic.BaseModel):
    """What the difference of one pair is made of: the shares and `unexplained` sum to `total`, in `unit`."""

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


class ChangeRecord(pydantic.BaseModel):
    """A change that makes the pair identical: what to write, and median seconds of the changed sides."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    a: str
    b: str
    kinds: tuple[str, ...]
    code: tuple[str, ...]
    before: Number
    after: Number
    ratio: Number


class EliminationRecord(pydantic.BaseModel):
    """The changes that were found and verified, the cheapest first; `failed` has what could not be run, and why."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    a: str
    b: str
    identical: bool
    changes: list[ChangeRecord]
    tried: int
    failed: list[tuple[str, str]]


class Report(pydantic.BaseModel):
    """A whole diagnosis."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    schema_: Literal["jaxdw.parity/2"] = pydantic.Field(default=SCHEMA, alias="schema")
    environment: dict[str, str]
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
        case = diagnosis.case
        return cls(
            environment=environment() | ({"compiler": " ".join(compiler)} if compiler else {}),
            case=CaseRecord.of(case.geometry, case.dtype.name, case.bias is not None, case.name),
            quantity=diagnosis.quantity,
            verdict=diagnosis.verdict,
            comparisons=[ComparisonRecord.model_validate(c) for c in diagnosis.comparisons],
            integer_tests=[IntegerTestRecord.model_validate(t) for t in diagnosis.integer_tests],
            orders=[OrderRecord.model_validate(order.to_json()) for order in diagnosis.orders],
            attribution=None if attribution is None else AttributionRecord.of(attribution),
            elimination=None if elimination is None else EliminationRecord.model_validate(elimination),
        )

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
