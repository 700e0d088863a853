"""Finding: why one output lies outside its proved bound."""

from __future__ import annotations

import dataclasses

from bridge.diagnosis.verdict import Verdict


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong with one side, in words.

    Attributes:
      verdict: PRECISION, CONVENTION or BUG.
      name: a short, stable name of the cause, such as "kernel flipped" or "tf32 inputs".
      cause: a sentence with the side as its subject.
      fix: what to change, in the user's terms; empty for a bug.
      place: where it is: operands, taps, channels, borders, elements.
    """

    verdict: Verdict
    name: str
    cause: str
    fix: str = ""
    place: str = ""
