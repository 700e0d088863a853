"""Model parity on disk, as `jaxdw model --json` writes it."""

from __future__ import annotations

from typing import Literal

from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.model.parity import ModelParity
from bridge.records import ComparisonRecord, Document, Number, Record

#: Name and version of the schema.
SCHEMA: Literal["jaxdw.model/4"] = "jaxdw.model/4"


class OperationRecord(Record):
    """One operation; the fields are those of `bridge.model.LayerParity`, and its verdict."""

    name: str
    torch: str
    kind: str
    shape: tuple[int, ...]
    verdict: Verdict
    isolated: ComparisonRecord | None
    reason: str
    growth: Number | None
    amplification: Number | None
    orders: dict[str, str]
    trees: dict[str, list[str]]


class LogitsRecord(Record):
    """The outputs; the fields are those of `bridge.model.Logits`."""

    classes: int
    different: int
    max_abs: Number
    scale: Number
    top: int
    same_top: float
    same_order: float
    same_first: float


class ModelReport(Document):
    """Both models; the fields are those of `bridge.model.ModelParity`, and `first_wrong` is the name of a layer."""

    schema_: Literal["jaxdw.model/4"] = SCHEMA
    name: str
    images: tuple[int, ...]
    layout: str
    same_bits: bool
    gradients: bool
    verdict: Verdict
    different: int
    explained: int
    first_wrong: str | None
    replaced: list[str]
    layers: list[OperationRecord]
    left: list[str]
    logits: LogitsRecord | None

    @classmethod
    def of(cls, parity: ModelParity) -> ModelReport:
        """Return the record of a parity, with this environment."""
        own = ("environment", "first_wrong", "schema_")
        fields = {name: getattr(parity, name) for name in cls.model_fields if name not in own}
        wrong = parity.first_wrong
        return cls.model_validate(
            fields | {"environment": environment(), "first_wrong": None if wrong is None else wrong.name}
        )
