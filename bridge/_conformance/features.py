"""What a kernel accepts: found from the names of its parameters, and by calls with one small problem each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from bridge._conformance.problems import Problem
from bridge._conformance.subject import Crashed, Refused, Subject
from bridge._implementations.arguments import takes
from bridge.case import DTYPES

#: Sizes of the first problem: no two axes of x or of the kernel have the same one, so that the order of axes shows.
_SPATIAL = {1: (11,), 2: (11, 6), 3: (5, 6, 7)}

#: The dtypes in the order in which the first problem is tried.
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Unsuitable(Exception):
    """The function computes no such convolution; the message has its own errors."""


@dataclasses.dataclass(frozen=True)
class Features:
    """What a kernel accepts.

    Attributes:
      base: by the number of spatial axes, a problem that it accepts.
      bias, multiplier, strides, dilation, padding, output_padding: True if it takes them.
      own_padding: how it pads if it takes no padding: "SAME", "VALID", or empty. With "SAME" there are no strides: it
        is not known what it means then.
      any_kernel: False if its own padding suits the kernel size of `base` alone.
      state, return_state, activation: True if it has these parameters of a causal convolution.
      dtypes: the dtypes that it accepts.
      refused: by what it does not accept, the reason.
    """

    base: Mapping[int, Problem]
    bias: bool
    multiplier: bool
    strides: bool
    dilation: bool
    padding: bool
    output_padding: bool
    own_padding: str
    any_kernel: bool
    state: bool
    return_state: bool
    activation: bool
    dtypes: Sequence[str]
    refused: Mapping[str, str]

    @property
    def first(self) -> Problem:
        """A problem that it accepts, with two spatial axes if possible."""
        return self.base.get(2) or next(iter(self.base.values()))


def find_features(subject: Subject, kind: str) -> Features:
    """Return what a kernel accepts.

    Raises:
      Unsuitable: it accepts not one of the first problems; the message has its own.
    """
    refused: dict[str, str] = {}
    base = {}
    own_padding = ""
    for rank in (1,) if kind == "causal" else (2, 1, 3):
        found = _base(subject, kind, rank, refused)
        if found is not None:
            base[rank], word = found
            own_padding = own_padding or word
    if not base:
        raise Unsuitable("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    first = base.get(2) or next(iter(base.values()))
    tells = {
        role: subject.is_layer or takes(subject.function.target, role)
        for role in ("strides", "kernel_dilation", "padding", "output_padding")
    }
    causal = {role: kind == "causal" and role in subject.causal for role in ("state", "return_state", "activation")}
    return Features(
        base,
        bias=_accepts(subject, dataclasses.replace(first, bias=True), "a bias", refused),
        multiplier=_accepts(subject, dataclasses.replace(first, multiplier=2), "a channel multiplier", refused),
        strides=tells["strides"] and own_padding != "SAME",
        dilation=tells["kernel_dilation"] and (own_padding != "SAME" or _half(subject, first, (3,), 2, refused)),
        padding=tells["padding"] and kind != "causal",
        output_padding=tells["output_padding"] and kind == "transpose",
        own_padding=own_padding,
        any_kernel=own_padding != "SAME" or all(_half(subject, first, sizes, 1, refused) for sizes in ((5,), (3, 5))),
        **causal,
        dtypes=[name for name in DTYPES if _accepts(subject, dataclasses.replace(first, dtype=name), name, refused)],
        refused=refused,
    )


def _base(subject: Subject, kind: str, rank: int, refused: dict[str, str]) -> tuple[Problem, str] | None:
    """Return the first problem of so many axes that the kernel accepts, and how it pads by itself."""
    fixed = kind != "depthwise" or subject.is_layer or takes(subject.function.target, "padding")
    sizes = ((5, _SPATIAL[rank]), (8, _SPATIAL[rank]), (5, (9,) * rank), (64, (9,) * rank))
    ones = (1,) * rank
    for (channels, spatial), word, dtype in itertools.product(sizes, [""] if fixed else ["SAME", "VALID"], _DTYPES):
        padding = ((1, 1) if kind == "depthwise" and word != "VALID" else (0, 0),) * rank
        if kind == "causal":
            padding = ((2, 0),)
        problem = Problem(kind, 2, spatial, channels, 1, (3,) * rank, ones, padding, ones, (0,) * rank, dtype=dtype)
        if _accepts(subject, problem, f"{rank}-D", refused):
            refused.pop(f"{rank}-D", None)
            return problem, word
    return None


def _half(subject: Subject, first: Problem, sizes: Sequence[int], dilation: int, refused: dict[str, str]) -> bool:
    """Return whether the kernel pads by half of another kernel, too; `sizes` are repeated over the axes."""
    kernel = tuple(sizes[axis % len(sizes)] for axis in range(first.rank))
    half = tuple(dilation * (k // 2) for k in kernel)
    problem = dataclasses.replace(
        first, kernel_size=kernel, padding=tuple((n, n) for n in half), dilation=(dilation,) * first.rank
    )
    return _accepts(subject, problem, "dilation" if dilation > 1 else f"a kernel of sizes {kernel}", refused)


def _accepts(subject: Subject, problem: Problem, name: str, refused: dict[str, str]) -> bool:
    """Return whether the kernel returns an output of the right shape; else note the reason."""
    try:
        subject.run(problem, problem.normal(0))
    except (Refused, Crashed, ValueError, TypeError) as error:
        refused.setdefault(name, str(error))
        return False
    return True
