"""The answer of a diagnosis in plain sentences."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from bridge._implementations import implementation, is_exact
from bridge._implementations import knobs as knob_table
from bridge.accumulation import AccumulationOrder, divergence
from bridge.diagnosis import Comparison, Diagnosis, Verdict

LIBRARY = {"torch": "PyTorch", "jax": "JAX", "numpy": "NumPy"}


def answer(diagnosis: Diagnosis) -> list[str]:
    """Return the sentences: do they differ, why, is it rounding or a bug, and which implementations have equal bits."""
    reference = diagnosis.names[0]
    others = [diagnosis.between(reference, name) for name in diagnosis.names[1:] if not is_exact(name)]
    first = _differ(reference, others, [c for c in others if c.different])
    return [first, *reasons(diagnosis), same_bits(diagnosis)]


def reasons(diagnosis: Diagnosis) -> list[str]:
    """Return the sentences that say why the results differ, and whether it is rounding or a bug."""
    reference = diagnosis.names[0]
    others = [diagnosis.between(reference, name) for name in diagnosis.names[1:] if not is_exact(name)]
    sentences = [
        _unrepeatable(diagnosis),
        _why(diagnosis, reference, [c for c in others if c.different]),
        _noise_or_bug(diagnosis),
    ]
    return [sentence for sentence in sentences if sentence]


def _differ(reference: str, others: list[Comparison], differing: list[Comparison]) -> str:
    if not differing:
        return f"No: {', '.join(c.b for c in others) or 'nothing else'} gave the same bits as {reference}."
    parts = [
        f"{c.b} ({c.different} of {c.elements} elements), by at most {c.max_abs:.2g} ({c.max_ulp} ULP)"
        for c in differing
    ]
    return f"Yes. These differ from {reference}: {'; '.join(parts)}."


def _why(diagnosis: Diagnosis, reference: str, differing: list[Comparison]) -> str:
    """Return where the accumulation orders first diverge from the reference's, once for those that do it alike."""
    orders = {order.implementation: order for order in diagnosis.orders}
    told = [c.b for c in differing if c.b in orders and c.verdict is Verdict.EXPLAINED]
    if reference not in orders or not told:
        return ""
    why = " ".join(divergences(orders[reference], [orders[name] for name in told]))
    return f"Why: {why}"


def divergences(reference: AccumulationOrder, others: Sequence[AccumulationOrder]) -> list[str]:
    """Return where orders first diverge from that of a reference: one sentence for those that do it alike."""
    alike: dict[str, list[str]] = {}
    for order in others:
        unnamed = dataclasses.replace(order, implementation=_OTHER)
        alike.setdefault(divergence(reference, unnamed), []).append(order.implementation)
    return [_with_names(sentence, names) for sentence, names in alike.items()]


#: Stands for an implementation's name in a sentence that holds for several.
_OTHER = "\0"


def _with_names(sentence: str, names: list[str]) -> str:
    if len(names) == 1:
        return sentence.replace(_OTHER, names[0])
    listed = f"each of {', '.join(names[:-1])} and {names[-1]}"
    return sentence.replace(_OTHER, listed, 1).replace(_OTHER, "each of these")


def _unrepeatable(diagnosis: Diagnosis) -> str:
    names = [order.implementation for order in diagnosis.orders if not order.fingerprint.deterministic]
    if not names:
        return ""
    return f"Not repeatable: a second run of {', '.join(names)} with the same data gave other bits."


def _noise_or_bug(diagnosis: Diagnosis) -> str:
    worst = max(diagnosis.comparisons, key=lambda c: (c.verdict.rank(), c.max_bound_ratio))
    if worst.verdict is Verdict.IDENTICAL:
        return "There is no difference to explain."
    wrong = [t.implementation for t in diagnosis.integer_tests if not t.passed]
    if worst.verdict.passes and wrong:
        return (
            f"Every difference is within its proved bound, and yet {', '.join(wrong)} went wrong on small integers, "
            "where every sum is exact: that is not rounding."
        )
    if worst.verdict.passes:
        proved = all(c.verdict in (Verdict.IDENTICAL, Verdict.EXPLAINED) for c in diagnosis.comparisons)
        declared = any(re.match("declared formats: [^;]*(input|output) ", c.cause) for c in diagnosis.comparisons)
        what = (
            "some round their inputs or results to the narrower format that their names declare; the rest is order"
            if declared
            else "all add the same products, but in different orders or with different intermediate roundings"
            if proved
            else "a different accumulation order, or different intermediate roundings, can make as much"
        )
        one_sided = dict.fromkeys(c.cause.partition("fused or not; ")[2] for c in diagnosis.comparisons)
        return (
            f"It is rounding, not a bug: {what}. Every difference of every pair is within its proved bound; "
            f"the greatest is {worst.max_bound_ratio:.2g} of it ({worst.a} and {worst.b})."
            + "".join(f" But {words}." for words in one_sided if words)
        )
    if worst.verdict is Verdict.NONFINITE:
        return f"NaN or infinities differ: {worst.cause}."
    if worst.verdict is Verdict.INCONCLUSIVE:
        return f"It could not be decided: {worst.cause}."
    return (
        f"It is more than rounding: {worst.a} and {worst.b} differ by {worst.max_bound_ratio:.3g} times the proved "
        f"bound at {worst.where}. {_sentence('Cause', worst.cause)}".rstrip()
    )


def fix(diagnosis: Diagnosis) -> str:
    """Return what to change, in a sentence or two; the lines to copy are those of `diagnosis.remedies`."""
    reference = diagnosis.names[0]
    if diagnosis.verdict is Verdict.IDENTICAL:
        return f"Nothing to change: all results have the bits of {reference}."
    if not diagnosis.verdict.passes:
        failed = [c for c in diagnosis.comparisons if not c.verdict.passes]
        failed = failed or [t.comparison for t in diagnosis.integer_tests if not t.passed]
        worst = max(failed, key=lambda c: c.verdict.rank())
        if worst.fix:
            return f"{worst.fix}."
        where = f"{worst.a} and {worst.b} differ most at {worst.where}"
        return f"No fix is known. {_sentence('The cause', worst.cause) or f'{where}.'}"
    if not diagnosis.remedies:
        return same_bits(diagnosis)
    return (
        f"add as {reference} does, and keep the windows; fn is your function of them. Run here and on other numbers, "
        f"these lines gave every bit of {reference}:"
    )


def _sentence(label: str, text: str) -> str:
    return f"{label}: {text}." if text else ""


def same_bits(diagnosis: Diagnosis) -> str:
    """Return which implementations have the bits of the first one, and how to write them."""
    reference = diagnosis.names[0]
    equal = [name for name in diagnosis.identical_to(reference) if not is_exact(name)]
    same = [_how_to(name) for name in equal if not emulates(name)]
    if equal and not same:
        return f"Only these emulated implementations match {reference} bit for bit: {', '.join(equal)}."
    if not same:
        return f"No other implementation matches {reference} bit for bit on this case."
    return f"To match {reference} bit for bit, use: {'; '.join(same)}. Checked here, on this case and this machine."


def emulates(name: str) -> bool:
    """Return whether an implementation emulates another platform."""
    try:
        return implementation(name).emulation is not None
    except ValueError:  # one that was handed to `parity` as an object
        return False


def _how_to(name: str) -> str:
    """Return how to write an implementation in the user's own code."""
    try:
        found = implementation(name)
    except ValueError:  # one that was handed to `parity` as an object
        return name
    knobs = [
        knob.how_to(found.knobs[key])
        for key, knob in knob_table(found.framework).items()
        if found.knobs[key] != knob.default
    ]
    return f"{found.algorithm.code} in {LIBRARY[found.framework]}" + (f", with {', '.join(knobs)}" if knobs else "")
