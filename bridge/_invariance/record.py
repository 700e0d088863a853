"""The table of conditions, in the form that `jaxdw invariance --json` writes."""

from __future__ import annotations

from typing import Literal

from bridge.records import CaseRecord, Document, Number, Record

#: Name and version of the schema. The version grows when a field is added, removed or changes its meaning.
SCHEMA: Literal["jaxdw.invariance/1"] = "jaxdw.invariance/1"


class Cell(Record):
    """The result of one implementation under one condition.

    Attributes:
      implementation: its name.
      different: elements of all samples whose bits are not those of the reference; None where there is no result.
      max_abs: the greatest difference of finite elements, 0 without a result.
      max_ulp: the same in units of the last place.
      change: the number of the change in `changes`, from 0; None where no bit changed.
      applies: False where the condition does not apply to the implementation.
      reason: why there is no result.
    """

    implementation: str
    different: int | None = None
    max_abs: Number = 0.0
    max_ulp: int = 0
    change: int | None = None
    applies: bool = True
    reason: str = ""

    @property
    def symbol(self) -> str:
        """The cell in the table: "=", the number of elements, "-" where it does not apply, "?" without a result."""
        if self.different is None:
            return "?" if self.applies else "-"
        return str(self.different) if self.different else "="


class SettingRecord(Record):
    """The knobs and the environment variables that a condition changes for one framework."""

    knobs: dict[str, str]
    environment: dict[str, str]


class Row(Record):
    """One condition.

    Attributes:
      kind: "run", "batch", "position", "others", "threads", "layout", "isa", "jit", "compile" or "sharding".
      label: the condition in words.
      against: the result that it is compared with, in words.
      batch: samples in the batch; position: of the sample in it, from 0.
      settings: by framework, the knobs and the environment variables that it changes.
      cells: one per implementation.
    """

    kind: str
    label: str
    against: str
    batch: int
    position: int
    settings: dict[str, SettingRecord]
    cells: list[Cell]


class Change(Record):
    """Other bits of one implementation, whichever conditions give them.

    Attributes:
      implementation: its name.
      conditions: the labels of the rows that give these bits.
      different: elements whose bits changed; elements: of so many.
      explained: True if both accumulation orders were revealed in all elements, and replaying them gives every bit.
      explanation: where the two orders diverge, or what else is known.
    """

    implementation: str
    conditions: list[str]
    different: int
    elements: int
    explained: bool
    explanation: str


class Invariance(Document):
    """The table.

    Attributes:
      case: the case of one sample.
      samples: how many were computed: the case's own and others with random numbers.
      implementations: the names, in the order of the columns.
      rows: one per condition.
      changes: one per implementation and other bits.
    """

    schema_: Literal["jaxdw.invariance/1"] = SCHEMA
    case: CaseRecord
    samples: int
    implementations: list[str]
    rows: list[Row]
    changes: list[Change]

    @property
    def changed(self) -> list[str]:
        """The implementations whose bits changed."""
        return [name for name in self.implementations if any(each.implementation == name for each in self.changes)]

    @property
    def undecided(self) -> list[str]:
        """`implementation, condition: reason` of each cell that applies and has no result."""
        return [
            f"{cell.implementation}, {row.label}: {cell.reason}"
            for row in self.rows
            for cell in row.cells
            if cell.applies and cell.different is None
        ]

    @property
    def exit_code(self) -> int:
        """1 if bits changed, 4 if a cell has no result, else 0."""
        return 1 if self.changes else 4 if self.undecided else 0
