"""Run a case through implementations, and compare every pair."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bridge._implementations import Implementation, implementation, is_exact
from bridge.accumulation import MOST_TAPS, replay, reveal
from bridge.accumulation.gradient import InputGradient, has_input_gradient_case, input_gradient_case
from bridge.case import Case
from bridge.diagnosis._compare import compare_outputs
from bridge.diagnosis.diagnosis import Diagnosis
from bridge.diagnosis.integers import integer_test
from bridge.diagnosis.judgement import Judgement
from bridge.diagnosis.output import Output
from bridge.diagnosis.remedy import remedies
from bridge.diagnosis.target import Target
from bridge.memory import check_fits
from bridge.numerics import Arithmetic

_log = logging.getLogger("bridge")

#: The implementations that `parity` compares by default.
DEFAULT = (
    "torch.conv2d",
    "torch.unfold_matmul",
    "torch.unfold_einsum",
    "torch.windows",
    "jax.grouped",
    "jax.patches",
    "jax.taps",
    "numpy.exact",
)

#: Most output elements times taps for which `parity` explains by default.
EXPLAINED_UNASKED = 1_000_000

#: Bytes per element of a result that the exact sums, the bounds and a comparison take at once; measured.
_WORKING_BYTES = 128


def parity(
    case: Case,
    implementations: Sequence[str | Implementation | Callable[..., Any]] | Mapping[str, Any] | None = None,
    *,
    explain: bool | None = None,
    quantity: str = "y",
    dy: np.ndarray | None = None,
    remedy: bool = True,
) -> Diagnosis:
    """Run the case through each implementation and compare every pair.

    Args:
      case: input, kernel, bias and geometry.
      implementations: names, Implementations, or functions and layers of your own, or a mapping of names to these. The
        first is the reference; one function alone is compared with "torch.conv2d". None compares PyTorch's
        convolution, its unfold and multiply in two ways, `bridge.torch_windows`, lax's convolution, jaxdw's methods and
        the exact result.
      explain: reveal each implementation's accumulation order and replay it, which can prove EXPLAINED and takes about
        2 n runs for n taps; None does so if the output is small and the window has at most `MOST_TAPS` taps.
      quantity: "y", the output, or "dx", the gradient of sum(dy y) by the input, from each framework's own
        differentiation. No integers are tested for a gradient.
      dy: the gradient by the output, of its shape and dtype, for "dx".
      remedy: where an implementation differs by rounding, look for `Diagnosis.remedies`, which takes a few runs more.

    Raises:
      ValueError: an unknown name, a name given twice, fewer than two names, or another quantity.
      bridge.errors.ImplementationError: a function raised, or returned another shape or type.

    >>> rng = np.random.default_rng(0)
    >>> case = Case(rng.standard_normal((1, 5, 5, 2), np.float32), rng.standard_normal((3, 3, 1, 2), np.float32))
    >>> import torch.nn.functional as F
    >>> parity(case, {"mine": lambda x, w, padding=0: F.conv2d(x, w, padding=padding, groups=len(w))}).verdict
    <Verdict.IDENTICAL: 'IDENTICAL'>
    """
    chosen = _chosen(implementations, case)
    if explain is None:
        explain = (
            case.geometry.taps <= MOST_TAPS
            and math.prod(case.geometry.output_shape) * case.geometry.taps <= EXPLAINED_UNASKED
        )
    if quantity not in ("y", "dx"):
        raise ValueError(f"`quantity` is {quantity!r}, expected 'y' or 'dx'")
    target = Target(case, quantity, dy)
    subject: Case | None = case
    if dy is not None:  # a gradient that is itself a depthwise convolution is explained as that convolution
        subject = input_gradient_case(case, dy) if has_input_gradient_case(case) else None
    size = math.prod(target.shape)
    check_fits(
        f"The comparison of {len(chosen)} implementations with {size} elements each",
        size * (_WORKING_BYTES + len(chosen) * case.dtype.itemsize),
    )
    outputs, tests, orders = [], [], []
    for each in chosen:
        _log.info("running %s", each.name)
        arithmetic = _declared(each, case, quantity, subject)
        is_sum = arithmetic is None or arithmetic.normwise is None  # else it has no order, and is exact on no integers
        replayed = None
        if is_exact(each.name):
            y = replayed = target.exact.value  # the one result that no accumulation order can change
        else:
            y = each.run(case) if dy is None else each.input_gradient(case, dy)
            if explain and subject is not None and is_sum:
                _log.info("revealing the accumulation order of %s", each.name)
                orders.append(reveal(each if dy is None else InputGradient(each, case), subject))
                replayed = replay(orders[-1], subject)
        emulated = each if isinstance(each, Implementation) and each.emulation else None
        framework = each.framework if isinstance(each, Implementation) else ""
        outputs.append(Output(each.name, y, target, arithmetic, replayed, emulated, framework))
        if dy is None and is_sum:
            tests.append(integer_test(each, case, arithmetic))
    _log.info("comparing %s", ", ".join(output.name for output in outputs))
    judged = [Judgement(output, _evidence) for output in outputs]
    comparisons = [compare_outputs(a, b) for a, b in itertools.combinations(judged, 2)]
    results = {output.name: output.y for output in outputs}
    rounding = [c.b for c in comparisons if c.a == chosen[0].name and c.different and c.verdict.passes]
    rounding = [name for name in rounding if not is_exact(name)]
    wanted = remedy and rounding and dy is None and not is_exact(chosen[0].name)
    return Diagnosis(
        case,
        results,
        comparisons,
        tests,
        orders,
        quantity,
        dy,
        {each.name: each.called for each in chosen if getattr(each, "called", "")},
        remedies(case, chosen[0], results, rounding) if wanted else (),
    )


def _declared(each: Implementation, case: Case, quantity: str, subject: Case | None) -> Arithmetic | None:
    """Return the arithmetic that an implementation declares for a quantity, which is the output of `subject`.

    Raises:
      ValueError: there is no such convolution, and the bound needs one.
    """
    arithmetic = each.arithmetic(case, quantity)
    if quantity == "y" or arithmetic is None or arithmetic.normwise is None:
        return arithmetic
    if subject is None:
        raise ValueError(
            f"`implementations` has {each.name} for a gradient with {case.geometry.padding_mode} padding and a channel "
            f"multiplier of {case.geometry.multiplier}, expected zeros and 1: its bound is one of convolutions"
        )
    return dataclasses.replace(arithmetic, normwise=each.arithmetic(subject).normwise)


def _chosen(implementations: Sequence[Any] | Mapping[str, Any] | None, case: Case) -> list[Implementation]:
    if isinstance(implementations, str) or callable(implementations):
        raise TypeError(
            f"`implementations` is {implementations!r}, expected a list of names, Implementations or functions, or a "
            "mapping of names to these"
        )
    if isinstance(implementations, Mapping):
        chosen = [_one(each, case, name) for name, each in implementations.items()]
    else:
        chosen = [_one(each, case) for each in implementations or DEFAULT]
    if len(chosen) == 1 and _is_users(chosen[0]):
        chosen.insert(0, implementation(DEFAULT[0]))
    names = [each.name for each in chosen]
    if len(chosen) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`implementations` is {names}, expected at least two, each once")
    return chosen


def _is_users(each: Any) -> bool:
    return isinstance(each, Implementation) and each.algorithm.function is not None


def _one(given: Any, case: Case, name: str = "") -> Implementation:
    """Return the implementation of a name, a function, a layer, or an object with a name, run and arithmetic."""
    if isinstance(given, str):
        return implementation(given, case)
    if all(hasattr(given, member) for member in ("name", "run", "arithmetic")):
        return given
    if not callable(given):
        raise TypeError(
            f"`implementations` has {given!r}, expected names, functions, or objects with a name, run and arithmetic"
        )
    own = name or getattr(given, "__name__", "") or type(given).__name__
    return implementation(own.strip("<>"), case, function=given)


def _evidence(output: Output) -> str:
    from bridge.diagnosis.precision.compiler_evidence import compiler_evidence  # loads JAX and the audit

    return compiler_evidence(output)
