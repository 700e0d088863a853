"""Records: what the reports write as JSON, each made from an object with attributes of the same names.

These are the base of all records, and those that several reports share. `bridge.report`, `bridge.census`,
`bridge.model` and `bridge.bench` stand above them.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pydantic

from bridge.case import Case
from bridge.diagnosis import Verdict
from jaxdw.geometry import Geometry


def _finite_or_word(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)


#: JSON has no infinity: it is written as the word "inf".
Number = Annotated[float, pydantic.PlainSerializer(_finite_or_word, return_type=float | str)]


class Record(pydantic.BaseModel):
    """The base of all records. `schema_` is "schema" in JSON, since pydantic has a method of that name."""

    model_config = pydantic.ConfigDict(
        from_attributes=True, populate_by_name=True, alias_generator=lambda name: name.rstrip("_")
    )


class Document(Record):
    """The base of the records that are a whole file.

    Attributes:
      schema_: name and version; the version grows when a field is added, removed or changes its meaning.
      environment: versions, processor, threads and flags.
    """

    schema_: str
    environment: dict[str, str]

    def to_json(self, indent: int | None = 2) -> str:
        """Return the JSON text, with a newline at its end; on one line where `indent` is None."""
        return self.model_dump_json(by_alias=True, indent=indent) + "\n"


def first_problem(error: pydantic.ValidationError) -> str:
    """Return where the first wrong field of a document is, and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"`{where}`: {first['msg']}" if where else first["msg"]


class CaseRecord(Record):
    """A case without its data: shapes channels last, padding as (low, high) per axis."""

    name: str
    dtype: str
    x: tuple[int, ...]
    kernel: tuple[int, ...]
    bias: tuple[int, ...] | None
    output: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str
    kernel_dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]

    @classmethod
    def of(cls, g: Geometry, dtype: str, bias: bool, name: str = "") -> CaseRecord:
        """Return the record of a geometry."""
        return cls(
            name=name,
            dtype=dtype,
            x=g.x_shape,
            kernel=g.kernel_shape,
            bias=(g.features,) if bias else None,
            output=g.output_shape,
            strides=g.strides,
            padding=g.padding,
            padding_mode=g.padding_mode,
            kernel_dilation=g.kernel_dilation,
            input_dilation=g.input_dilation,
        )

    @classmethod
    def of_case(cls, case: Case) -> CaseRecord:
        """Return the record of a case."""
        return cls.of(case.geometry, case.dtype.name, case.bias is not None, case.name)


class ComparisonRecord(Record):
    """One pair; the fields are those of `bridge.Comparison`."""

    a: str
    b: str
    verdict: Verdict
    elements: int
    different: int
    max_abs: Number
    max_ulp: int
    max_bound_ratio: Number
    own_bound_ratios: tuple[Number, Number]
    where: tuple[int, ...] | None
    explained: int | None
    name: str
    cause: str
    fix: str
    place: str


class IntegerTestRecord(Record):
    """An implementation on small integers, where every sum is exact and nothing is tolerated."""

    implementation: str
    verdict: Verdict
    comparison: ComparisonRecord
