"""The findings of an audit, in the form that `jaxdw audit --json` writes."""

from __future__ import annotations

import dataclasses

import pydantic

from bridge.audit.compiling import AuditSubject
from bridge.audit.platforms import Platform
from bridge.audit.precision import Rounding


class StepRecord(pydantic.BaseModel):
    """One instruction that runs. The fields are those of `bridge.audit.steps.ProgramStep`, with arrays as text."""

    model_config = pydantic.ConfigDict(from_attributes=True)

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


class AuditFinding(pydantic.BaseModel):
    """The findings about one method or function.

    Attributes:
      way: its name.
      method: the method that "auto" stands for there; empty for other names.
      error: the reason why there is no program; empty if there is one.
      form: the steps over arrays at least as large as the output, in words: "fused loop", "2 x copy, library call".
      narrowest: HLO's name of the narrowest type that the data is rounded to.
      roundings: the places where the data gets narrower.
      hazards: one sentence each.
      kernels: names of the hand-written kernels in the program.
      optimal_seconds: the compiler's own estimate; None if it has none.
      estimated_cycles: the compiler's second estimate, summed over the steps; None if it notes none, or if a step is a
        hand-written kernel without a count.
      bytes_accessed, flops: as the compiler counts them; None if it does not.
      memory_bytes: moved between the main memory and the steps: whole operands, whole tiles.
      temporary_bytes: what the compiler allocates.
      temporaries: `temporary_bytes` over the bytes of the padded input.
      compile_seconds: the time that compiling took.
      steps: everything that the program runs.
    """

    way: str
    method: str = ""
    error: str = ""
    form: str = ""
    narrowest: str = ""
    roundings: tuple[Rounding, ...] = ()
    hazards: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    optimal_seconds: float | None = None
    estimated_cycles: int | None = None
    bytes_accessed: float | None = None
    flops: float | None = None
    memory_bytes: int = 0
    temporary_bytes: int = 0
    temporaries: float = 0.0
    compile_seconds: float = 0.0
    steps: tuple[StepRecord, ...] = ()

    @property
    def label(self) -> str:
        """The name, and the method that "auto" stands for."""
        return f"{self.way} ({self.method})" if self.method else self.way

    @property
    def type_seen(self) -> str:
        """The narrowest type; with a question mark if hardware, a library or a hand-written kernel decides."""
        return f"{self.narrowest}?" if self.is_open else self.narrowest

    @property
    def is_open(self) -> bool:
        """True if the program does not say which type is the narrowest."""
        certain = [each.certain for each in self.roundings if each.dtype == self.narrowest]
        return not any(certain) if certain else bool(self.kernels)


@dataclasses.dataclass(frozen=True)
class Audit:
    """The findings of one convolution on one platform."""

    platform: Platform
    subject: AuditSubject
    findings: tuple[AuditFinding, ...]
