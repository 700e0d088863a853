"""The remedy of a diagnosis: what to change, in words, and the lines to copy."""

from __future__ import annotations

import ast
import dataclasses
import math
import re

from bridge._implementations import Implementation, implementation, is_exact
from bridge._implementations import knobs as knob_table
from bridge.case import Case
from bridge.diagnosis import Diagnosis, Verdict
from bridge.diagnosis.elimination import Change, Elimination
from bridge.report.answer import LIBRARY

#: The import of each name that the lines use.
_IMPORTS = {
    "F": "import torch.nn.functional as F",
    "torch": "import torch",
    "bridge": "import bridge",
    "jax": "import jax",
    "jnp": "import jax.numpy as jnp",
    "lax": "from jax import lax",
    "jaxdw": "import jaxdw",
}

#: The names that the lines may use.
_KNOWN = {*_IMPORTS, "x", "weight", "kernel", "bias", "y"}


@dataclasses.dataclass(frozen=True)
class Remedy:
    """What to change.

    Attributes:
      sentence: the change in words.
      code: lines of Python to copy; empty where there are none.
    """

    sentence: str
    code: str = ""


def remedy(diagnosis: Diagnosis, elimination: Elimination | None = None) -> Remedy:
    """Return what to change, from the diagnosis or, where it was searched for, from the elimination."""
    reference, case = diagnosis.names[0], diagnosis.case
    if elimination is not None and elimination.changes:
        changes = [_changed(elimination, each, case) for each in elimination.changes]
        return next((each for each in changes if each.code), changes[0])
    if diagnosis.verdict is Verdict.IDENTICAL:
        return Remedy(f"Nothing to change: all results have the bits of {reference}.")
    found: dict[str, Implementation] = {}
    for each in filter(None, map(_found, diagnosis.identical_to(reference))):
        if each.base == reference.partition("[")[0]:  # the reference itself under a setting that changes no bit
            continue
        if each.framework not in found or each.algorithm.window_copies < found[each.framework].algorithm.window_copies:
            found[each.framework] = each
    code = "\n\n".join(filter(None, (code_of(each.name, case) for each in found.values())))
    lines = f"These lines give the bits of {reference}, on this case and this machine." if code else ""
    return Remedy(f"{_first_sentence(diagnosis)} {lines}".rstrip(), code)


def _changed(before: Elimination, after: Change, case: Case) -> Remedy:
    """Return one verified change; it has lines to copy where all of its parts can be written as such."""
    pairs = [(old, new) for old, new in ((before.a, after.a), (before.b, after.b)) if old != new]
    codes = [code_of(new, case) for _, new in pairs]
    told = " and ".join(f"{new} instead of {old}" for old, new in pairs)
    sentence = f"Use {told}: {after.a} and {after.b} then have the same bits."
    return Remedy(sentence, "\n\n".join(codes) if all(codes) else "")


def _first_sentence(diagnosis: Diagnosis) -> str:
    if diagnosis.verdict.passes:
        return "None is needed: the difference is rounding."
    failed = [(t.verdict, t.comparison) for t in diagnosis.integer_tests if not t.passed]
    found = [(c.verdict, c) for c in diagnosis.comparisons if not c.verdict.passes] or failed
    worst = max(found, key=lambda each: each[0].rank())[1]
    if worst.fix:
        return f"{worst.fix}."
    known = f"The cause: {worst.cause}" if worst.cause else f"{worst.a} and {worst.b} differ most at {worst.where}"
    return f"No fix is known. {known}."


def code_of(name: str, case: Case) -> str:
    """Return the lines that run an implementation on a case; empty where they are unknown or more than one call."""
    each = _found(name)
    if each is None:
        return ""
    g = case.geometry
    code = re.sub(r"(?<=, )\.\.\.(?=[,)])", _arguments(each, case), each.algorithm.code)
    code = re.sub(r"\b(groups|feature_group_count)=C\b", rf"\1={g.channels}", code)
    code = code.replace("conv2d", f"conv{g.rank}d")
    if case.bias is None:
        code = re.sub(r"\bbias\b", "None", code)
    settings = [knob.how_to(each.knobs[key]) for key, knob in knob_table(each.framework).items()
                if each.knobs[key] != knob.default]  # fmt: skip
    body = [*map(_line, settings), _line(code, "y = ")]
    used = {node.id for node in ast.walk(ast.parse(body[-1])) if isinstance(node, ast.Name)}
    if not used or used - _KNOWN:
        return ""
    run = "\n".join(line for line in body if not line.startswith("#"))
    imports = [statement for word, statement in _IMPORTS.items() if re.search(rf"(?<![\w.]){word}\.", run)]
    names, shapes = "x and kernel", f"{g.x_shape} and {g.kernel_shape}"
    if each.framework == "torch":
        names, shapes = (
            "x and weight",
            f"{(math.prod(g.batch), g.channels, *g.spatial)} and {(g.features, 1, *g.kernel_size)}",
        )
    return "\n".join([f"# {LIBRARY[each.framework]}: the shapes of {names} are {shapes}", *imports, *body])


def _found(name: str) -> Implementation | None:
    """Return an implementation whose code is known and computes here what it computes there."""
    try:
        found = implementation(name)
    except ValueError:  # one that was handed to `parity` as an object
        return None
    usable = ":" not in name and not is_exact(name) and found.emulation is None
    return found if usable else None


def _arguments(each: Implementation, case: Case) -> str:
    """Return the arguments of the geometry as the framework names them; "..." where it has no such argument."""
    g = case.geometry
    names = {
        "torch": ("stride", "padding", "dilation", ""),
        "jax": ("strides", "padding", "kernel_dilation", "input_dilation"),
    }
    if each.algorithm.code.startswith("lax."):
        stride, padding, dilation, inputs = "window_strides", "padding", "rhs_dilation", "lhs_dilation"
    else:
        stride, padding, dilation, inputs = names[each.framework]
    symmetric = all(low == high >= 0 for low, high in g.padding)
    pads: object = _short([low for low, _ in g.padding]) if symmetric and stride != "window_strides" else g.padding
    if g.padding_mode != "zeros":
        pads = repr(g.padding_mode.upper())
    lacks_padding = (each.framework == "torch" and not symmetric) or (
        g.padding_mode != "zeros" and not each.algorithm.code.startswith("jaxdw.")
    )
    given = [f"{stride}={g.strides if stride == 'window_strides' else _short(g.strides)}"]
    given.append("..." if lacks_padding else f"{padding}={pads}")
    if max(g.kernel_dilation) > 1:
        given.append(f"{dilation}={_short(g.kernel_dilation)}")
    if max(g.input_dilation) > 1:
        given.append(f"{inputs}={_short(g.input_dilation)}" if inputs else "...")
    return ", ".join(given)


def _short(values: tuple[int, ...] | list[int]) -> object:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _line(text: str, target: str = "") -> str:
    """Return a line of Python: an expression after its target, a statement as it is, other text as a comment."""
    for line in (target + text, text):
        try:
            ast.parse(line)
        except SyntaxError:
            continue
        return line
    return f"# {text}"
