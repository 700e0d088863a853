"""The audit of one convolution: each method is compiled for a platform, and its program is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from bridge.audit.compiling import AuditMethod, AuditSubject, Compiled, compile_methods
from bridge.audit.hazards import hazards
from bridge.audit.hlo import Module
from bridge.audit.platforms import Platform, platform
from bridge.audit.precision import narrowest, roundings
from bridge.audit.records import Audit, AuditFinding, StepRecord
from bridge.audit.steps import VIEWS, passes, steps, target
from bridge.case import DTYPES
from jaxdw.methods import METHODS


def audit(methods: Sequence[str] | None, subject: AuditSubject, on: str = "cpu") -> Audit:
    """Compile each method ahead of time, and read the program that the compiler made.

    Args:
      methods: methods of jaxdw, "auto", or the user's own functions as "package.module:function"; None means
        `default_methods`.
      subject: the convolution.
      on: a key of `bridge.audit.platforms.PLATFORMS`. The platform need not be present.

    Raises:
      ValueError: no such platform or method, or float64 on a TPU.
      ModuleNotFoundError: the platform's compiler is not installed.

    >>> from jaxdw import Geometry
    >>> geometry = Geometry.of((2, 8, 8, 16), (3, 3, 1, 16), padding=1)
    >>> audit(["taps"], AuditSubject(geometry)).findings[0].narrowest
    'f32'
    """
    target = platform(on)
    if subject.dtype == "float64" and target.backend == "tpu":
        raise ValueError(
            f"`dtype` is 'float64', expected float32, float16 or bfloat16 on {on}: a TPU has no float64, and XLA "
            "makes it of pairs of float32, which the audit does not follow"
        )
    if target.missing:
        raise ModuleNotFoundError(target.missing)
    jobs = [(AuditMethod.parse(name), subject) for name in methods or default_methods(target)]
    return Audit(
        target, subject, tuple(finding(each, subject, target.backend) for each in compile_methods(jobs, target))
    )


def default_methods(target: Platform) -> list[str]:
    """Return every method that is meant for the platform, and "auto"; "fft" is for kernels of many taps alone."""
    left_out = ("fft", "pallas") if target.backend == "cpu" else ("fft",)
    return [name for name in METHODS if name not in left_out] + ["auto"]


def finding(compiled: Compiled, subject: AuditSubject, backend: str) -> AuditFinding:
    """Read a compiled program."""
    if compiled.error:
        return AuditFinding(way=compiled.way, method=compiled.method, error=compiled.error)
    g, module = subject.geometry, Module.parse(compiled.text)
    ran = steps(module, backend)
    rounded = roundings(module, list(subject.arguments), backend, subject.dtype)
    kernels = tuple(each.detail for each in ran if each.kind == "hand-written kernel")
    counted = steps(Module.parse(compiled.scheduled), backend) if kernels and compiled.scheduled else ran
    cycles = [each.times * each.cycles for each in counted if each.cycles is not None]
    if any(each.kind == "hand-written kernel" and each.cycles is None for each in counted):
        cycles = []
    kinds = Counter[str]()
    for each in passes(ran, math.prod(g.output_shape)):
        kinds[str(each)] += each.times
    padded_bytes = math.prod((*g.batch, *g.padded_spatial)) * g.channels * DTYPES[subject.dtype].itemsize
    return AuditFinding(
        way=compiled.way,
        method=compiled.method,
        form=", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()),
        narrowest=narrowest(rounded, subject.dtype),
        roundings=tuple(rounded),
        hazards=tuple(
            hazards(
                module,
                ran,
                rounded,
                g,
                backend,
                temporary_bytes=compiled.temporary_bytes,
                padded_bytes=padded_bytes,
                sums=2 if subject.gradient else 1,
            )
        ),
        kernels=kernels,
        optimal_seconds=_estimate(compiled.optimal_seconds, module),
        estimated_cycles=sum(cycles) if cycles else None,
        bytes_accessed=compiled.bytes_accessed,
        flops=compiled.flops,
        memory_bytes=sum(each.times * (each.read_bytes + each.written_bytes) for each in ran),
        temporary_bytes=compiled.temporary_bytes,
        temporaries=compiled.temporary_bytes / padded_bytes if padded_bytes else 0.0,
        compile_seconds=compiled.compile_seconds,
        steps=tuple(StepRecord.model_validate(each) for each in ran),
    )


def _estimate(seconds: float | None, module: Module) -> float | None:
    """Return the compiler's seconds without the -1 that libtpu adds for every view that joins parts."""
    if seconds is None:
        return None
    views = sum(target(each) in VIEWS for computation in module.computations.values() for each in computation)
    return seconds + views if seconds + views > 0 else None
