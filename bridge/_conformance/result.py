"""Results of the kit: one outcome per check, and the failures with the cases that show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bridge.case import Case
from bridge.diagnosis import Verdict


@dataclasses.dataclass(frozen=True, eq=False)
class Failure:
    """A fault of the kernel, on the smallest case that shows it.

    Attributes:
      check: the name of the check.
      case: input, kernel, bias and geometry. Of a transposed convolution it is `Case.transposed`; a state of a causal
        one is in front of x.
      verdict: CONVENTION, PRECISION, NONFINITE or BUG.
      name: a short, stable name of the mistake, such as "kernel flipped"; empty if none was recognised.
      cause: what is wrong; fix: what to change; place: where it is.
      called: how the kernel was called, in words.
      quantity: "y", or the gradient of sum(dy y): "dx", "dkernel" or "dbias"; dy: the gradient by the output.
      actual, expected: the kernel's result and the exact one; None if the kernel returned none.
      different: how many elements are wrong; where: the index of the first.
    """

    check: str
    case: Case
    verdict: Verdict
    name: str = ""
    cause: str = ""
    fix: str = ""
    place: str = ""
    called: str = ""
    quantity: str = "y"
    dy: np.ndarray | None = None
    actual: np.ndarray | None = None
    expected: np.ndarray | None = None
    different: int = 0
    where: tuple[int, ...] | None = None

    @property
    def sentence(self) -> str:
        """The verdict and the cause in one line."""
        named = f" ({self.name})" if self.name else ""
        return f"{self.verdict}{named}: {self.cause}"


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of one check.

    Attributes:
      tried: problems that were solved; failed: how many of them wrongly; refused: problems that the kernel refused.
      note: what else is to be known.
      failure: the greatest fault; None if there is none.
      reason: why the check does not apply; empty if it does.
    """

    tried: int = 0
    failed: int = 0
    refused: int = 0
    note: str = ""
    failure: Failure | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class CheckResult:
    """One row of the table.

    Attributes:
      name: of the check; about: what it compares.
      outcome: its outcome.
      seconds: how long it took.
    """

    name: str
    about: str
    outcome: Outcome
    seconds: float

    @property
    def status(self) -> str:
        """ "passed", "failed", or "skipped"."""
        if self.outcome.failure is not None:
            return "failed"
        return "skipped" if self.outcome.reason or not self.outcome.tried else "passed"


@dataclasses.dataclass(frozen=True, eq=False)
class Conformance:
    """The result of `bridge.conformance`: one row per check. Print it to see the table.

    Attributes:
      function: the name of the kernel.
      kind: "depthwise", "causal" or "transpose".
      framework: "torch", "jax" or "numpy"; called: how the kernel was called, in words.
      seed: of all random numbers; full: True for the full counts.
      accumulator: the format of the sums of half precision.
      refused: what the kernel does not accept, with its own message.
      checks: the rows.
    """

    function: str
    kind: str
    framework: str
    called: str
    seed: int
    full: bool
    accumulator: str
    refused: dict[str, str]
    checks: Sequence[CheckResult]

    @property
    def failures(self) -> list[Failure]:
        """The failures, one per check at most."""
        return [each.outcome.failure for each in self.checks if each.outcome.failure is not None]

    @property
    def passed(self) -> bool:
        """True if no check failed, and at least one was done."""
        return not self.failures and any(each.status == "passed" for each in self.checks)

    @property
    def verdict(self) -> Verdict:
        """The weakest verdict of a failure; IDENTICAL if none, INCONCLUSIVE if no check was done."""
        if self.failures:
            return max((each.verdict for each in self.failures), key=Verdict.rank)
        return Verdict.IDENTICAL if self.passed else Verdict.INCONCLUSIVE

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON."""
        from bridge._conformance.record import ConformanceRecord

        return ConformanceRecord.of(self).to_json(indent)

    def __rich__(self) -> object:
        from bridge.report.conformance import rendered

        return rendered(self)

    def __str__(self) -> str:
        from bridge.report.conformance import as_text

        return as_text(self)
