"""Finding: why an output lies outside its bound."""

from __future__ import annotations

import dataclasses

from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Finding:
    """The cause of an output's error, in words.

    Attributes:
      verdict: PRECISION, CONVENTION or BUG.
      name: a short, stable name of the cause, such as "kernel flipped" or "tf32 inputs".
      cause: a sentence with the name of the output as its subject.
      fix: what to change, in the user's terms; empty for a bug.
      place: operands, taps, channels, borders or elements that are affected.
    """

    verdict: Verdict
    name: str
    cause: str
    fix: str = ""
    place: str = ""
