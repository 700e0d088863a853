"""conformance: test anybody's depthwise kernel against exact results."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from bridge._conformance.checks import CHECKS, Check
from bridge._conformance.features import Features, Unsuitable, find_features
from bridge._conformance.kit import Kit
from bridge._conformance.problems import KINDS
from bridge._conformance.result import CheckResult, Conformance
from bridge._conformance.subject import Subject
from bridge._implementations import FRAMEWORKS, user
from bridge.progress import log

#: What the argument `accumulator` accepts.
ACCUMULATORS = ("float32", "same")


def conformance(
    function: Callable[..., Any] | str,
    kind: str = "depthwise",
    *,
    checks: Sequence[str] | None = None,
    seed: int | None = None,
    full: bool = False,
    accumulator: str = "float32",
    device: str = "",
    jit: bool = True,
) -> Conformance:
    """Test a depthwise kernel: geometry, edge sizes, dtypes, NaN, gradients, invariance, streams, races and memory.

    Results are compared with exact ones: on small integers every output must be exact, and random numbers must lie
    within the proved bound of rounding of any order of addition. No tolerance is chosen.

    Args:
      function: a function of PyTorch tensors, JAX arrays or NumPy arrays, or the class of a layer; or its name as
        "package.module:function", with `[axes=channels_last]` or `[framework=torch]` behind it where the code does not
        say it. The names of its parameters say what it takes (docs/own-functions.md). What it does not take is not
        tested.
      kind: "depthwise", "causal" (along time, output t reads the inputs t-K+1 to t) or "transpose".
      checks: names of some checks; None is all.
      seed: of all random numbers; None draws one. The result has it.
      full: the full counts, in place of a sample of some seconds.
      accumulator: the format of the sums of float16 and bfloat16: "float32", or "same" for that of the input.
      device: where PyTorch or JAX runs it, as "cuda"; empty for PyTorch's CPU and JAX's default.
      jit: compile a function of JAX arrays by `jax.jit`.

    Returns:
      The result: print it for the table. `.failures` has one failure per check at most, each with the smallest case
      that shows it.

    Raises:
      ValueError, TypeError: an argument that does not fit, or a function that computes no such convolution.

    >>> import torch.nn.functional as F
    >>> def kernel(x, weight, bias=None, stride=1, padding=0):
    ...     return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])
    >>> conformance(kernel, checks=["geometry"], seed=0).failures
    []
    """
    chosen = _chosen(checks)
    kit = make_kit(function, kind, seed=seed, full=full, accumulator=accumulator, device=device, jit=jit)
    results = []
    for each in chosen:
        log.info("%s: %s", kit.subject.function.spelled, each.name)
        results.append(run_check(kit, each))
    return Conformance(
        kit.subject.function.spelled,
        kind,
        kit.subject.framework,
        kit.subject.told,
        kit.seed,
        full,
        accumulator,
        dict(kit.features.refused),
        results,
    )


def make_kit(
    function: Callable[..., Any] | str,
    kind: str,
    *,
    seed: int | None,
    full: bool,
    accumulator: str,
    device: str,
    jit: bool,
) -> Kit:
    """Return the kit of a function, and what the function accepts. The arguments are those of `conformance`."""
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}, expected one of {', '.join(KINDS)}")
    if accumulator not in ACCUMULATORS:
        raise ValueError(f"`accumulator` is {accumulator!r}, expected one of {', '.join(ACCUMULATORS)}")
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` is {seed!r}, expected an integer that is not negative, or None")
    subject, features = _subject(_user_function(function), kind, device, jit)
    return Kit(subject, features, kind, seed=seed, full=full, accumulator=accumulator)


def run_check(kit: Kit, check: Check) -> CheckResult:
    """Return the row of one check."""
    start = time.perf_counter()
    outcome = check.run(kit)
    return CheckResult(check.name, check.about, outcome, time.perf_counter() - start)


def _chosen(names: Sequence[str] | None) -> list[Check]:
    known = {each.name: each for each in CHECKS}
    if names is None:
        return list(CHECKS)
    wrong = [name for name in names if name not in known]
    if isinstance(names, str) or not names or wrong:
        raise ValueError(f"`checks` is {names!r}, expected some of {', '.join(known)}")
    return [each for each in CHECKS if each.name in names]


def _user_function(function: Callable[..., Any] | str) -> user.UserFunction:
    if isinstance(function, str):
        base, _, said = function.partition("[")
        if ":" not in base:
            raise ValueError(f"`function` is {function!r}, expected package.module:function")
        found = user.load(base)
        pairs = [item.partition("=") for item in said.removesuffix("]").split(",") if item.strip()]
        unknown = [key for key, _, _ in pairs if key.strip() not in user.SETTINGS]
        if unknown:
            raise ValueError(f"`function` is {function!r}, expected in brackets {' or '.join(user.SETTINGS)}")
        found = found.told_to({key.strip(): value.strip() for key, _, value in pairs})
    else:
        name = getattr(function, "__name__", type(function).__name__)
        found = user.UserFunction(name, function)
    if user.layer_framework(found.target) and not isinstance(found.target, type):
        raise ValueError(
            f"`function` is a layer of class {type(found.target).__name__}, which has one geometry; expected a "
            "function or the class of a layer"
        )
    return found


def _subject(function: user.UserFunction, kind: str, device: str, jit: bool) -> tuple[Subject, Features]:
    """Return the kernel and what it accepts, in the framework that its code names, or the first that it takes."""
    reasons = {}
    for framework in [function.framework] if function.framework else FRAMEWORKS:
        subject = Subject(function, framework, device=device, jit=jit)
        try:
            return subject, find_features(subject, kind)
        except Unsuitable as error:
            reasons[framework] = str(error)
    told = "; ".join(f"with arrays of {framework}: {reason}" for framework, reason in reasons.items())
    raise ValueError(f"`function` is {function.spelled}, which computes no {kind} convolution; {told}")
