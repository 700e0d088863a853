"""Run implementations on one case, and keep a digest of each output, or the reason why there is none."""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from bridge._implementations import Implementation, implementation, implementations, knobs
from bridge.case import Case

_log = logging.getLogger("bridge")


class Unrunnable(RuntimeError):
    """An implementation that does not exist, or that failed on the case; the message is the reason."""


class CaseRuns:
    """The implementations that were run on one case, with digests of their outputs; equal digests are equal bits.

    Attributes:
      case: the case.
      failures: the reason by the name of each implementation that failed.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.failures: dict[str, str] = {}
        self._digests: dict[str, str] = {}

    @property
    def tried(self) -> int:
        """Number of implementations that were run."""
        return len(self._digests) + len(self.failures)

    def output(self, each: Implementation) -> np.ndarray:
        """Return the output.

        Raises:
          Unrunnable: the implementation failed; the message is the first line of its error.
        """
        if each.name in self.failures:
            raise Unrunnable(self.failures[each.name])
        _log.info("running %s", each.name)
        try:
            y = each.run(self.case)
        except (ValueError, TypeError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.failures[each.name] = reason
            raise Unrunnable(reason) from error
        self._digests[each.name] = digest(y)
        return y

    def digest(self, each: Implementation) -> str | None:
        """Return the digest of the output; run nothing twice. None if the implementation fails."""
        if each.name not in self._digests:
            try:
                self.output(each)
            except Unrunnable:
                return None
        return self._digests[each.name]


def digest(y: np.ndarray) -> str:
    """Return a digest of the bits of an array, in which every NaN is the same."""
    y = np.ascontiguousarray(y)
    if np.isnan(y).any():
        y = np.where(np.isnan(y), np.array(np.nan, y.dtype), y)
    return hashlib.sha256(f"{y.dtype.name} {y.shape}".encode() + y.tobytes()).hexdigest()


def neighbours(each: Implementation, case: Case) -> list[tuple[str, Implementation]]:
    """Return `(setting, implementation)` for each other algorithm, and for each other value of each knob.

    Implementations that are not `tried` are left out: a CPU interprets them, or they never have the bits of another.
    """
    names = implementations(untried=False)
    own = [implementation(name) for name in names if name.partition(".")[0] == each.framework]
    changes = [("algorithm", other.changed(**each.knobs)) for other in own if other.base != each.base]
    for knob, spec in knobs(each.framework).items():
        values = spec.others(each.knobs[knob])
        if knob == "dtype":  # the case's own, by name, is "same"
            values = [value for value in values if value != case.dtype.name]
        changes += [(knob, each.changed(**{knob: value})) for value in values]
    return changes


def another_draw(case: Case) -> Case:
    """Return the case with other normal random numbers, which no case drawn from a seed repeats by accident."""
    rng = np.random.default_rng(int(digest(case.x), 16))

    def draw(array: np.ndarray) -> np.ndarray:
        return np.asarray(rng.standard_normal(array.shape)).astype(array.dtype)

    return case.replace(x=draw(case.x), kernel=draw(case.kernel), bias=None if case.bias is None else draw(case.bias))
