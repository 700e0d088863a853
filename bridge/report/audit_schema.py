"""An audit as JSON, as `jaxdw audit --json` writes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Literal

from bridge.audit import Audit, AuditFinding
from bridge.records import CaseRecord, Document, Record

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.audit/1"] = "jaxdw.audit/1"

#: The packages that decide which program a compiler makes. Those that are not installed are left out.
_COMPILERS = ("jaxdw", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


class PlatformRecord(Record):
    """The platform that the programs were compiled for."""

    name: str
    about: str
    backend: str


class AuditReport(Document):
    """A whole audit."""

    schema_: Literal["jaxdw.audit/1"] = SCHEMA
    platform: PlatformRecord
    case: CaseRecord
    gradient: bool
    precision: str
    findings: tuple[AuditFinding, ...]

    @classmethod
    def of(cls, audit: Audit) -> AuditReport:
        """Return the report of an audit."""
        subject = audit.subject
        return cls(
            environment=_environment(),
            platform=PlatformRecord.model_validate(audit.platform),
            case=CaseRecord.of(subject.geometry, subject.dtype, subject.bias),
            gradient=subject.gradient,
            precision=subject.precision,
            findings=audit.findings,
        )


def _environment() -> dict[str, str]:
    """The versions and flags that decide the program. Nothing is imported for it."""
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
