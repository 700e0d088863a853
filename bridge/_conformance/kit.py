"""The kit: a kernel, the problems that are drawn for it, and what is made of a fault."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from bridge._conformance.drawing import draws, smallest
from bridge._conformance.features import Features
from bridge._conformance.problems import Problem
from bridge._conformance.result import Failure, Outcome
from bridge._conformance.subject import Crashed, Refused, Subject, WrongShape
from bridge.case import DTYPES, Case
from bridge.diagnosis import Verdict, compare
from bridge.diagnosis.target import Target, products
from bridge.numerics import FLOAT64, Arithmetic, ExactSum, error_bound, exact_sum, format_of

#: CPU seconds for the search of the mistakes behind all failures of one run.
_SEARCH_SECONDS = 20.0

#: Wrong elements of the fault that is explained: the more, the better, but a large result takes long.
_MANY = 256

#: Wrong elements that the smallest case keeps if the first one has them: fewer do not tell one mistake from another.
_TELLING = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Fault:
    """A result that is proved to be wrong.

    Attributes:
      case: the data.
      wrong: where the result is wrong, bool of its shape; None if there is no result, or it is not a number of it.
      actual, expected: the results; None as `wrong`.
      quantity: "y", "dx", "dkernel" or "dbias"; dy: the gradient by the output.
      sentence: what is wrong, where no comparison can say it; verdict, name: of it.
      context: how the result was computed, in words that begin the sentence; empty for one plain call.
    """

    case: Case
    wrong: np.ndarray | None = None
    actual: np.ndarray | None = None
    expected: np.ndarray | None = None
    quantity: str = "y"
    dy: np.ndarray | None = None
    sentence: str = ""
    verdict: Verdict = Verdict.BUG
    name: str = ""
    context: str = ""

    @property
    def count(self) -> int:
        return 0 if self.wrong is None else int(np.count_nonzero(self.wrong))


#: Runs the kernel on a problem; returns a fault, or None.
Judge = Callable[[Problem], Fault | None]


class Kit:
    """What all checks need.

    Attributes:
      subject: the kernel; features: what it accepts; kind: of `KINDS`.
      seed: of all draws.
      full: True for the full counts.
      accumulator: "float32" or "same": the format of the sums of half precision.
    """

    def __init__(
        self, subject: Subject, features: Features, kind: str, *, seed: int, full: bool, accumulator: str
    ) -> None:
        self.subject, self.features, self.kind = subject, features, kind
        self.seed, self.full, self.accumulator = seed, full, accumulator
        self._search_until = _SEARCH_SECONDS

    def rng(self, check: str) -> np.random.Generator:
        """Return the random numbers of one check: they do not depend on the other checks."""
        return np.random.default_rng([self.seed, *check.encode()])

    def draws(self, check: str) -> Iterator[Problem]:
        """Yield random problems without end."""
        return draws(self.features, self.kind, self.rng(check))

    def number(self, sample: int, full: int) -> int:
        """Return how many problems a check has."""
        return full if self.full else sample

    def arithmetic(self, dtype: str, quantity: str = "y", bias: bool = True) -> Arithmetic:
        """Return the declared arithmetic: any order, fused or not, subnormals flushed or not.

        Sums of half precision are kept in float32, unless the user says otherwise. Those of a gradient need not be.
        """
        declared = Arithmetic.of(dtype, flushes_subnormals=True, output_roundings=2 if bias and quantity == "y" else 1)
        if DTYPES[dtype].itemsize > 2 or (self.accumulator == "float32" and quantity == "y"):
            return declared
        return dataclasses.replace(declared, product=declared.output, accumulator=declared.output)

    def fault(
        self, case: Case, actual: np.ndarray | None, *, quantity: str = "y", dy: np.ndarray | None = None, exact: bool
    ) -> Fault | None:
        """Return a fault where a result is not the exact value, or not within the bound of the declared arithmetic.

        NaN and infinities must be those of the exact result.
        """
        if actual is None:
            return Fault(case, sentence=f"there is no gradient by {quantity[1:]}", name="gradient missing")
        total = exact_sum(products(case, quantity, dy))
        wrong = ~_equal(actual, total.value)
        if not exact:
            wrong &= ~self._within(total, actual, case.dtype.name, quantity)
        if not wrong.any():
            return None
        return Fault(case, wrong, actual, total.value, quantity, dy)

    def _within(self, total: ExactSum, y: np.ndarray, dtype: str, quantity: str) -> np.ndarray:
        """Return where finite numbers are within the bound of finite ones, or where overflow leaves no bound."""
        bias = total.products.bias is not None
        allowed = error_bound(self.arithmetic(dtype, quantity, bias), total) + total.reference_error
        with np.errstate(invalid="ignore"):
            distance = np.abs(y.astype(np.float64) - total.reference)
        finite = np.isfinite(y.astype(np.float64)) & np.isfinite(total.value.astype(np.float64))
        return (finite & (distance <= allowed)) | (np.isinf(allowed) & np.isfinite(total.magnitude))

    def examine(self, check: str, problems: Iterable[Problem], judge: Judge, number: int | None = None) -> Outcome:
        """Return the outcome of a check: the greatest fault among the problems, with its smallest case.

        Args:
          number: of problems that the kernel must solve; those that it refuses are replaced, up to nine times as many.
        """
        refused: dict[str, str] = {}
        tried = refusals = failed = 0
        worst: tuple[Problem, Fault] | None = None
        for problem in problems:
            if number is not None and (tried >= number or tried + refusals >= 10 * number):
                break
            try:
                fault = self.judged(problem, judge)
            except Refused as error:
                refusals += 1
                refused.setdefault(str(error), describe(problem))
                continue
            tried += 1
            if fault is not None:
                failed += 1
                if worst is None or min(worst[1].count, _MANY) < min(fault.count, _MANY):
                    worst = problem, fault
        self.subject.forget()
        shown = [(where, textwrap.shorten(message, 100, placeholder=" ...")) for message, where in refused.items()]
        note = "; ".join(f"refuses {where}: {message}" for where, message in shown[:2])
        failure = None if worst is None else self._failure(check, *worst, judge)
        self.subject.forget()
        return Outcome(tried, failed, refusals, note, failure)

    def judged(self, problem: Problem, judge: Judge) -> Fault | None:
        """Return the fault of a problem, also if the kernel returned no result.

        Raises:
          Refused: as the kernel; also where its own padding, which is found by trial, gives another shape.
        """
        try:
            return judge(problem)
        except WrongShape as error:
            if self.features.own_padding:
                raise Refused(str(error)) from error
            return Fault(problem.normal(self.seed), sentence=str(error), name="no result")
        except Crashed as error:
            return Fault(problem.normal(self.seed), sentence=str(error), name="no result")

    def _failure(self, check: str, problem: Problem, fault: Fault, judge: Judge) -> Failure:
        """Return the failure of a fault with its smallest case and its verdict."""
        found: dict[Problem, Fault] = {problem: fault}

        def fails(other: Problem) -> bool:
            try:
                again = self.judged(other, judge)
            except (Refused, ValueError, TypeError):
                return False
            if again is None or (again.quantity, again.name) != (fault.quantity, fault.name):
                return False
            if again.count < min(_TELLING, fault.count):
                return False
            found[other] = again
            return True

        least = smallest(problem, fails)
        fails(least)  # the last call is the one that is told
        small = found[least]
        failure = self._diagnosed(check, small)
        if least == problem or fault.sentence:
            return failure
        before = self._diagnosed(check, fault)
        if before.name == failure.name:
            return failure
        # A small case may agree with a mistake by accident: what is said must hold of the first one.
        cause = f"on {describe(problem)}: {before.cause}"
        return dataclasses.replace(
            failure, verdict=before.verdict, name=before.name, cause=cause, fix=before.fix, place=before.place
        )

    def _diagnosed(self, check: str, fault: Fault) -> Failure:
        told: dict[str, Any] = {"verdict": fault.verdict, "name": fault.name, "cause": fault.sentence}
        where = None
        if fault.wrong is not None and fault.actual is not None and fault.expected is not None:
            where = tuple(map(int, np.argwhere(fault.wrong)[0]))
            if not fault.sentence:
                told = self._compared(fault, fault.actual, fault.expected)
        told["cause"] = f"{fault.context}: {told['cause']}" if fault.context else told["cause"]
        return Failure(
            check=check,
            case=fault.case,
            called=self.subject.told,
            quantity=fault.quantity,
            dy=fault.dy,
            actual=fault.actual,
            expected=fault.expected,
            different=fault.count,
            where=where,
            **told,
        )

    def _compared(self, fault: Fault, actual: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
        """Return the verdict of a comparison with the exact result, and its sentences."""
        if self._search_until <= 0:
            return {"verdict": Verdict.BUG, "cause": "no mistake was searched: the time of this run is used up"}
        start = time.process_time()
        dtype = fault.case.dtype
        bias = Target(fault.case, fault.quantity, fault.dy).has_bias
        once = Arithmetic.of(dtype, product=FLOAT64, accumulator=FLOAT64, output=format_of(dtype))
        declared = self.arithmetic(dtype.name, fault.quantity, bias)
        comparison = compare(
            actual,
            expected,
            fault.case,
            names=(self.subject.function.spelled, "the exact result"),
            arithmetics=(declared, once),
            quantity=fault.quantity,
            dy=fault.dy,
        )
        self._search_until -= time.process_time() - start
        told = {field: getattr(comparison, field) for field in ("verdict", "name", "cause", "fix", "place")}
        if comparison.verdict.passes:  # within the bounds of both sides, or within none that random numbers have
            inexact = "sums of small integers are not exact, though every conventional sum of them is"
            beyond = f"{comparison.own_bound_ratios[0]:.3g} times the bound of the declared arithmetic is reached"
            integers = is_integer(fault.case)
            told |= {"verdict": Verdict.BUG, "name": "integers not exact" if integers else "just outside the bound"}
            told |= {"cause": inexact if integers else beyond}
        return told


def is_integer(case: Case) -> bool:
    """Return whether the inputs of a case are integers."""
    with np.errstate(invalid="ignore"):
        return bool((case.x == np.round(case.x.astype(np.float64))).all())


def describe(problem: Problem) -> str:
    """Return the sizes of a problem in words."""
    g = problem.call
    words = [f"x {g.x_shape}", f"kernel {g.kernel_size}"]
    words += [f"strides {g.strides}"] * (max(g.strides) > 1) + [f"dilation {g.kernel_dilation}"] * (
        max(g.kernel_dilation) > 1
    )
    words += [problem.dtype] * (problem.dtype != "float32")
    return ", ".join(words)


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where two arrays have the same number; zeros of either sign are equal, and two NaN are."""
    with np.errstate(invalid="ignore"):
        return (a == b) | (np.isnan(a) & np.isnan(b))
