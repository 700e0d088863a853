"""Model parity on disk, as `jaxdw model --json` writes it."""

from __future__ import annotations

from typing import Literal

import pydantic

from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.model.parity import ModelParity
from bridge.records import ComparisonRecord, Number

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.model/2"] = "jaxdw.model/2"


class OperationRecord(pydantic.BaseModel):
    """One operation; the fields are those of `bridge.model.LayerParity`, and its verdict."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    name: str
    torch: str
    kind: str
    shape: tuple[int, ...]
    verdict: Verdict
    isolated: ComparisonRecord | None
    reason: str
    growth: Number | None
    amplification: Number | None


class LogitsRecord(pydantic.BaseModel):
    """The outputs; the fields are those of `bridge.model.Logits`."""

    model_config = pydantic.ConfigDict(from_attributes=True)

    classes: int
    max_abs: Number
    scale: Number
    top: int
    same_top: float
    same_order: float
    same_first: float


class ModelReport(pydantic.BaseModel):
    """Both models; `first_wrong` is the name of a layer, `left` are PyTorch's operations without a counterpart."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    schema_: Literal["jaxdw.model/2"] = pydantic.Field(default=SCHEMA, alias="schema")
    environment: dict[str, str]
    name: str
    images: tuple[int, ...]
    verdict: Verdict
    first_wrong: str | None
    layers: list[OperationRecord]
    left: list[str]
    logits: LogitsRecord

    @classmethod
    def of(cls, parity: ModelParity) -> ModelReport:
        return cls(
            environment=environment(),
            name=parity.name,
            images=parity.images,
            verdict=parity.verdict,
            first_wrong=None if parity.first_wrong is None else parity.first_wrong.name,
            layers=[OperationRecord.model_validate(layer) for layer in parity.layers],
            left=list(parity.left),
            logits=LogitsRecord.model_validate(parity.logits),
        )

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
