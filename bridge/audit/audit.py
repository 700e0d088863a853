"""The audit of one convolution: each way compiled for a platform, and what is in the program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from bridge.audit.compiling import Compiled, Subject, Way, compile_ways
from bridge.audit.hazards import hazards
from bridge.audit.hlo import Module
from bridge.audit.platforms import Platform, platform
from bridge.audit.precision import Rounding, narrowest, roundings
from bridge.audit.steps import VIEWS, Step, passes, steps, target
from jaxdw.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Finding:
    """What an audit says of one way.

    Attributes:
      way: its name; method: what "auto" stands for there, else empty.
      error: why there is nothing to say; empty where there is.
      steps: all that the program runs; passes: those over arrays as large as the output.
      narrowest: HLO's name of the narrowest type that touches the data; roundings: where it gets narrower.
      hazards: sentences.
      kernels: names of hand-written kernels in the program.
      optimal_seconds: the compiler's own estimate; None where it has none.
      estimated_cycles: its other estimate, summed over the steps; None where it notes none, and where a step is a
        hand-written kernel, for which it never does.
      bytes_accessed, flops: as the compiler counts, None where it does not.
      memory_bytes: moved between main memory and the program's steps, whole operands and whole tiles.
      temporary_bytes: what the compiler allocates; temporaries: over the padded input.
      compile_seconds: how long compiling took.
    """

    way: str
    method: str = ""
    error: str = ""
    steps: tuple[Step, ...] = ()
    passes: tuple[Step, ...] = ()
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

    @property
    def form(self) -> str:
        """The passes in words: "fused loop", "copy, convolution (EmitDepthwise...), copy"."""
        kinds: dict[str, int] = {}
        for each in self.passes:
            kinds[str(each)] = kinds.get(str(each), 0) + each.times
        return ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items())


@dataclasses.dataclass(frozen=True)
class Audit:
    """Findings of one convolution on one platform."""

    platform: Platform
    subject: Subject
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether a way could not be compiled."""
        return any(each.error for each in self.findings)


def audit(ways: Sequence[str] | None, subject: Subject, on: str = "cpu") -> Audit:
    """Compiles each way ahead of time and reads what the compiler made.

    Args:
      ways: methods, "auto", or functions of the user's own as "package.module:function"; None: `default_ways`.
      subject: the convolution.
      on: a key of `bridge.audit.platforms.PLATFORMS`; it need not be there.

    Raises:
      ValueError: no such platform or method, or float64 on a TPU.
      ModuleNotFoundError: the platform's compiler is not installed.

    >>> from jaxdw import Geometry
    >>> geometry = Geometry.of((2, 8, 8, 16), (3, 3, 1, 16), padding=1)
    >>> audit(["taps"], Subject(geometry)).findings[0].narrowest
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
    chosen = [Way.parse(name) for name in ways or default_ways(target)]
    compiled = compile_ways([(way, subject) for way in chosen], target)
    return Audit(target, subject, tuple(finding(each, subject, target.backend) for each in compiled))


def default_ways(target: Platform) -> list[str]:
    """Every method that is meant for the platform, and "auto"."""
    return [name for name in METHODS if name != "pallas" or target.backend != "cpu"] + ["auto"]


def finding(compiled: Compiled, subject: Subject, backend: str) -> Finding:
    """What a compiled program says about itself."""
    if compiled.error:
        return Finding(compiled.way, compiled.method, compiled.error)
    g, module = subject.geometry, Module.parse(compiled.text)
    ran = steps(module, backend)
    rounded = roundings(module, list(subject.arguments), backend, subject.dtype)
    kernels = tuple(each.detail for each in ran if each.kind == "hand-written kernel")
    counted = steps(Module.parse(compiled.scheduled), backend) if kernels and compiled.scheduled else ran
    cycles = [each.times * each.cycles for each in counted if each.cycles is not None]
    if any(each.kind == "hand-written kernel" and each.cycles is None for each in counted):
        cycles = []
    padded_bytes = math.prod((*g.batch, *g.padded_spatial)) * g.channels * _itemsize(subject.dtype)
    return Finding(
        compiled.way,
        compiled.method,
        steps=tuple(ran),
        passes=tuple(passes(ran, math.prod(g.output_shape))),
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
    )


def _estimate(seconds: float | None, module: Module) -> float | None:
    """The compiler's seconds, without the -1 that libtpu adds for every view that joins parts."""
    if seconds is None:
        return None
    views = sum(target(each) in VIEWS for computation in module.computations.values() for each in computation)
    return seconds + views if seconds + views > 0 else None


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[dtype]
