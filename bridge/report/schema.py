"""The JSON report, as `jaxdw parity --json` writes it."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pydantic

from bridge.diagnosis import Diagnosis, Verdict
from bridge.environment import environment

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.parity/1"] = "jaxdw.parity/1"


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
    where: tuple[int, ...] | None
    explained: int | None
    cause: str
    mend: str


class Report(pydantic.BaseModel):
    """A whole diagnosis."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    schema_: Literal["jaxdw.parity/1"] = pydantic.Field(default=SCHEMA, alias="schema")
    environment: dict[str, str]
    case: CaseRecord
    verdict: Verdict
    comparisons: list[ComparisonRecord]

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> Report:
        case = diagnosis.case
        g = case.geometry
        record = CaseRecord(
            name=case.name,
            dtype=case.dtype.name,
            x=g.x_shape,
            kernel=g.kernel_shape,
            bias=None if case.bias is None else case.bias.shape,
            output=g.output_shape,
            strides=g.strides,
            padding=g.padding,
            padding_mode=g.padding_mode,
            kernel_dilation=g.kernel_dilation,
            input_dilation=g.input_dilation,
        )
        return cls(
            environment=environment(),
            case=record,
            verdict=diagnosis.verdict,
            comparisons=[ComparisonRecord.model_validate(c) for c in diagnosis.comparisons],
        )

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
