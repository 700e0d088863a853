"""The kit as a class of pytest: one test per check."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from bridge._conformance.checks import CHECKS, Check
from bridge._conformance.conformance import conformance, make_kit, run_check
from bridge._conformance.kit import Kit
from bridge._conformance.record import FailureRecord
from bridge._conformance.result import Failure
from bridge.testing import Failure as AssertionFailure


class ConformanceFailure(AssertionFailure):
    """A check of the kit failed.

    Attributes:
      failure: the failure with its smallest case.
    """

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure
        self.verdict, self.meaning = str(failure.verdict), failure.verdict.meaning
        self.cause, self.fix = failure.cause, failure.fix

    def documents(self, command: str) -> dict[str, str]:
        return {"json": FailureRecord.of(self.failure).model_dump_json(by_alias=True, indent=2) + "\n"}

    def save_bundle(self, folder: Path) -> str:
        return "the JSON has the arrays of a small case"


class Suite:
    """A class of tests for pytest: one test per check of `bridge.conformance`.

    A check that does not apply is skipped, with its reason. The message of a failed test has the seed.

    Attributes:
      function: the kernel: `staticmethod(kernel)`, or its name as "package.module:function".
      kind, seed, full, accumulator, device, jit: as `bridge.conformance` takes them.
    """

    function: ClassVar[Callable[..., Any] | str]
    kind: ClassVar[str] = "depthwise"
    seed: ClassVar[int | None] = None
    full: ClassVar[bool] = False
    accumulator: ClassVar[str] = "float32"
    device: ClassVar[str] = ""
    jit: ClassVar[bool] = True

    @classmethod
    @functools.cache  # once per class
    def _kit(cls) -> Kit:
        if not hasattr(cls, "function"):
            raise TypeError(f"{cls.__name__} has no `function`, expected `function = staticmethod(kernel)`")
        options = {name: getattr(cls, name) for name in ("kind", "seed", "full", "accumulator", "device", "jit")}
        return make_kit(cls.function, **options)


def _test(check: Check) -> Callable[[Suite], None]:
    """Return the test of one check."""

    def test(self: Suite) -> None:
        __tracebackhide__ = True
        import pytest  # only where tests run

        from bridge.report.conformance import failure_lines

        kit = type(self)._kit()
        result = run_check(kit, check)
        failure = result.outcome.failure
        if failure is not None:
            seed = f"seed {kit.seed}: set `seed = {kit.seed}` in the class to repeat it"
            lines = [textwrap.fill(line, 108, subsequent_indent="  ") for line in (*failure_lines(failure), seed)]
            raise ConformanceFailure("\n".join(lines), failure)
        if result.status == "skipped":
            pytest.skip(result.outcome.reason or result.outcome.note)

    test.__name__, test.__qualname__ = f"test_{check.name}", f"Suite.test_{check.name}"
    test.__doc__ = f"{check.about[0].upper()}{check.about[1:]}."
    return test


for each in CHECKS:
    setattr(Suite, f"test_{each.name}", _test(each))

conformance.Suite = Suite  # type: ignore[attr-defined]
