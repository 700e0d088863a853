"""PRECISION of an emulated platform: what it does there, what its compiler says, and what to write, tried out."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from bridge.diagnosis.finding import Finding
from bridge.diagnosis.target import OPERANDS, WORDS
from bridge.diagnosis.verdict import Verdict
from bridge.implementations import Emulation, Implementation, counterpart, knobs

if TYPE_CHECKING:
    from bridge.audit.compiling import AuditSubject
    from bridge.audit.precision import Rounding
    from bridge.diagnosis.side import Side

#: What operands of products are rounded to by platform and precision, as findings name it.
_FORMATS = {
    ("tpu", "default"): ("bfloat16",),
    ("tpu", "high"): ("bfloat16_2x", "bfloat16_3x"),
    ("gpu", "default"): ("tf32",),
    ("gpu", "high"): ("tf32",),
}

#: What the audit compiles for.
COMPILED_FOR = {"tpu": "tpu:v5e", "gpu": "cuda:h100"}


def formats(each: Implementation) -> tuple[str, ...]:
    """What the platform that is emulated rounds operands to, as findings name it."""
    there = each.emulation
    return () if there is None else _FORMATS.get((there.platform, there.value), ())


def on_platform(side: Side, each: Implementation, found: Finding) -> Finding:
    """The finding in terms of the platform that `each` emulates; as it is where that platform does no such thing."""
    there = each.emulation
    if there is None or found.verdict is not Verdict.PRECISION or not _is_of(each, found):
        return found
    cause = f"{found.cause}; {there.about} may do so at {there.code}, emulated here"
    if evidence := _evidence(side, each, there):
        cause = f"{cause}; {evidence}"
    return dataclasses.replace(found, cause=cause, fix=_fix(side, each, there))


def _is_of(each: Implementation, found: Finding) -> bool:
    """Whether the platform rounds so: to nearest, before it multiplies, and no kernel without its input."""
    fmt, _, what = found.name.partition(" ")
    return (
        fmt in formats(each)
        and not {"output", "accumulator", "sum"}.intersection(what.split())
        and " truncated to " not in found.cause
        and found.place != "inputs: kernel"
    )


def _fix(side: Side, each: Implementation, there: Emulation) -> str:
    """What to write there; only what was run here and is within its bound."""
    known = knobs(each.framework)
    (knob,) = (name for name, value in each.knobs.items() if value in known[name].emulated)
    highest = known[knob].on(there.platform, "highest")
    ways = [(known[knob].emulated[highest].code, each.changed(**{knob: highest}))]
    if (taps := counterpart(each.framework, "taps")) is not None:
        ways.append((taps.algorithm.code, taps.changed(**each.knobs)))
    helps = [code for code, way in ways if _is_within_bound(side, way)]
    if not helps:
        return ""
    return f"{side.name}: on {there.about} write {', or '.join(helps)}; tried here, and within the bound"


def _is_within_bound(side: Side, way: Implementation) -> bool:
    target = side.target
    y = way.run(target.case) if target.dy is None else way.input_gradient(target.case, target.dy)
    arithmetic = way.arithmetic(target.case, target.quantity)
    return not dataclasses.replace(side, name=way.name, y=y, arithmetic=arithmetic).outside.any()


def _evidence(side: Side, each: Implementation, there: Emulation) -> str:
    """What the platform's own compiler rounds, where it is installed and can be asked for this."""
    from bridge.audit.compiling import AuditMethod, AuditSubject

    case, target = side.target.case, COMPILED_FOR[there.platform]
    name = each.base.removeprefix("jax.") + ("" if there.value == "default" else f"[precision={there.value}]")
    try:
        AuditMethod.parse(name)
    except ValueError:  # no method of jaxdw
        return ""
    dtype = case.dtype.name if each.knobs["dtype"] == "same" else each.knobs["dtype"]
    subject = AuditSubject(case.geometry, dtype, case.bias is not None, side.target.quantity != "y")
    found = _compiled(name, subject, target)
    if found is None:
        return ""
    operands = set(OPERANDS[side.target.quantity])
    told = [rounding for rounding in found if operands.issuperset(rounding.arguments)]
    certain = [rounding for rounding in told if rounding.certain]
    rounded = {name: rounding for rounding in reversed(certain or told) for name in rounding.arguments}
    if not rounded:
        return f"compiled for {target}, the program of this very convolution rounds none of these"
    words = [f"{WORDS[name]} to {rounding.dtype} in {rounding.where}" for name, rounding in rounded.items()]
    return f"compiled for {target}, the program {'rounds' if certain else 'may round'} {', and '.join(sorted(words))}"


@functools.lru_cache(maxsize=64)
def _compiled(way: str, subject: AuditSubject, target: str) -> tuple[Rounding, ...] | None:
    """What the audit finds to be rounded; None where there is no compiler, or it fails."""
    from bridge.audit import audit, platform

    if platform(target).missing:
        return None
    (found,) = audit([way], subject, target).findings
    return None if found.error else found.roundings
