"""An audit as JSON, as `jaxdw audit --json` writes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Literal

import pydantic

from bridge.audit import Audit
from bridge.records import CaseRecord

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.audit/1"] = "jaxdw.audit/1"

#: What decides which program a compiler makes; those that are not installed are left out.
_COMPILERS = ("jaxdw", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(from_attributes=True, populate_by_name=True)


class PlatformRecord(_Record):
    """What was compiled for."""

    name: str
    about: str
    backend: str


class RoundingRecord(_Record):
    """A place where data gets narrower; the fields are those of `bridge.audit.precision.Rounding`."""

    dtype: str
    arguments: tuple[str, ...]
    instruction: str
    opcode: str
    computation: str
    certain: bool
    precision: str


class StepRecord(_Record):
    """One instruction that runs; the fields are those of `bridge.audit.steps.Step`, arrays as text."""

    name: str
    computation: str
    kind: str
    detail: str
    times: int
    elements: int
    results: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    cycles: int | None

    @pydantic.field_validator("results", mode="before")
    @classmethod
    def _as_text(cls, shapes: tuple[object, ...]) -> tuple[str, ...]:
        return tuple(map(str, shapes))


class FindingRecord(_Record):
    """What the audit says of one way; the fields are those of `bridge.audit.Finding`."""

    way: str
    method: str
    error: str
    form: str
    narrowest: str
    roundings: tuple[RoundingRecord, ...]
    hazards: tuple[str, ...]
    kernels: tuple[str, ...]
    optimal_seconds: float | None
    estimated_cycles: int | None
    bytes_accessed: float | None
    flops: float | None
    memory_bytes: int
    temporary_bytes: int
    temporaries: float
    compile_seconds: float
    steps: tuple[StepRecord, ...]

    @property
    def label(self) -> str:
        """The name, and what "auto" stands for."""
        return f"{self.way} ({self.method})" if self.method else self.way

    @property
    def type_seen(self) -> str:
        """The narrowest type; with a question mark where hardware, a library or a hand-written kernel decides."""
        return f"{self.narrowest}?" if self.is_open else self.narrowest

    @property
    def is_open(self) -> bool:
        """Whether the program does not say which type is the narrowest."""
        certain = [each.certain for each in self.roundings if each.dtype == self.narrowest]
        return not any(certain) if certain else bool(self.kernels)


class AuditReport(_Record):
    """A whole audit."""

    schema_: Literal["jaxdw.audit/1"] = pydantic.Field(default=SCHEMA, alias="schema")
    environment: dict[str, str]
    platform: PlatformRecord
    case: CaseRecord
    gradient: bool
    precision: str
    findings: tuple[FindingRecord, ...]

    @classmethod
    def of(cls, audit: Audit) -> AuditReport:
        subject = audit.subject
        return cls(
            environment=_environment(),
            platform=PlatformRecord.model_validate(audit.platform),
            case=CaseRecord.of(subject.geometry, subject.dtype, subject.bias),
            gradient=subject.gradient,
            precision=subject.precision,
            findings=tuple(FindingRecord.model_validate(each) for each in audit.findings),
        )

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def _environment() -> dict[str, str]:
    """Versions and flags that decide the program; nothing is imported for it."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _COMPILERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        if os.environ.get(name):
            found[name] = os.environ[name]
    return found
