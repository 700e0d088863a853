"""PRECISION of an emulated platform: what it rounds, what its compiler says, and which fix was run here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bridge._implementations import Emulation, Implementation, counterpart, knobs
from bridge.diagnosis.finding import Finding
from bridge.diagnosis.output import Output
from bridge.diagnosis.verdict import Verdict

#: Returns what the compiler of the platform that an output emulates says of it, in words; empty for nothing.
Evidence = Callable[[Output], str]

#: Formats to which operands of products are rounded by platform and precision, as findings name them.
_FORMATS = {
    ("tpu", "default"): ("bfloat16",),
    ("tpu", "high"): ("bfloat16_2x", "bfloat16_3x"),
    ("gpu", "default"): ("tf32",),
    ("gpu", "high"): ("tf32",),
}


def formats(each: Implementation | None) -> tuple[str, ...]:
    """Return the formats to which the emulated platform rounds operands, as findings name them."""
    there = each.emulation if each else None
    return () if there is None else _FORMATS.get((there.platform, there.value), ())


def on_platform(output: Output, found: Finding, evidence: Evidence | None) -> Finding:
    """Return the finding in terms of the emulated platform; unchanged if that platform does no such thing."""
    each = output.emulated
    if each is None or (there := each.emulation) is None or not _is_of(each, found):
        return found
    cause = f"{found.cause}; {there.about} may do so at {there.code}, emulated here"
    if evidence is not None and (told := evidence(output)):
        cause = f"{cause}; {told}"
    return dataclasses.replace(found, cause=cause, fix=_fix(output, each, there))


def _is_of(each: Implementation, found: Finding) -> bool:
    """Return whether the platform rounds so: to nearest, before it multiplies, and no kernel without its input."""
    fmt, _, what = found.name.partition(" ")
    return (
        found.verdict is Verdict.PRECISION
        and fmt in formats(each)
        and not {"output", "accumulator", "sum"}.intersection(what.split())
        and " truncated to " not in found.cause
        and found.place != "inputs: kernel"
    )


def _fix(output: Output, each: Implementation, there: Emulation) -> str:
    """Return what to write on the platform: only what was run here and is within its bound."""
    known = knobs(each.framework)
    (knob,) = (name for name, value in each.knobs.items() if value in known[name].emulated)
    highest = known[knob].on(there.platform, "highest")
    ways = [(known[knob].emulated[highest].code, each.changed(**{knob: highest}))]
    if (taps := counterpart(each.framework, "taps")) is not None:
        ways.append((taps.algorithm.code, taps.changed(**each.knobs)))
    helps = [code for code, way in ways if _is_within_bound(output, way)]
    if not helps:
        return ""
    return f"{output.name}: on {there.about} write {', or '.join(helps)}; tried here, and within the bound"


def _is_within_bound(output: Output, way: Implementation) -> bool:
    target = output.target
    y = way.run(target.case) if target.dy is None else way.input_gradient(target.case, target.dy)
    arithmetic = way.arithmetic(target.case, target.quantity)
    return not dataclasses.replace(output, name=way.name, y=y, declared=arithmetic).outside.any()
