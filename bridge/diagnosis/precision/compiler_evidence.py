"""Evidence of the compiler: what it rounds where it compiles this very convolution for an emulated platform.

This module loads JAX and the audit. So `parity` imports it only when an output needs it.
"""

from __future__ import annotations

import functools

from bridge.audit import AuditSubject, audit, platform
from bridge.audit.compiling import AuditMethod
from bridge.audit.precision import Rounding
from bridge.diagnosis.output import Output
from bridge.diagnosis.target import OPERANDS, WORDS

#: The platform that is compiled for, by the platform that is emulated.
_COMPILED_FOR = {"tpu": "tpu:v5e", "gpu": "cuda:h100"}


def compiler_evidence(output: Output) -> str:
    """Return what the compiler rounds, in words; empty where none is installed, or it cannot compile this."""
    each, case = output.emulated, output.target.case
    if each is None or (there := each.emulation) is None:
        return ""
    target = _COMPILED_FOR[there.platform]
    name = each.base.removeprefix("jax.") + ("" if there.value == "default" else f"[precision={there.value}]")
    try:
        AuditMethod.parse(name)
    except ValueError:  # no method of jaxdw
        return ""
    dtype = case.dtype.name if each.knobs["dtype"] == "same" else each.knobs["dtype"]
    subject = AuditSubject(case.geometry, dtype, case.bias is not None, output.target.quantity != "y")
    found = _compiled(name, subject, target)
    if found is None:
        return ""
    operands = set(OPERANDS[output.target.quantity])
    told = [rounding for rounding in found if operands.issuperset(rounding.arguments)]
    certain = [rounding for rounding in told if rounding.certain]
    rounded = {name: rounding for rounding in reversed(certain or told) for name in rounding.arguments}
    if not rounded:
        return f"compiled for {target}, the program of this very convolution rounds none of these"
    words = [f"{WORDS[name]} to {rounding.dtype} in {rounding.where}" for name, rounding in rounded.items()]
    return f"compiled for {target}, the program {'rounds' if certain else 'may round'} {', and '.join(sorted(words))}"


@functools.lru_cache(maxsize=64)
def _compiled(way: str, subject: AuditSubject, target: str) -> tuple[Rounding, ...] | None:
    """Return what the audit finds to be rounded; None where there is no compiler, or it fails."""
    if platform(target).missing:
        return None
    (found,) = audit([way], subject, target).findings
    return None if found.error else found.roundings
