"""The census on disk: one line of JSON per model."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import pydantic

from bridge._census.census import LayerDiagnosis
from bridge.diagnosis import Verdict
from bridge.files import locked, read_regular
from bridge.records import CaseRecord, ComparisonRecord, Document, IntegerTestRecord, Record, first_problem

#: Name and version of the schema.
SCHEMA: Literal["jaxdw.census/2"] = "jaxdw.census/2"

#: How each line begins.
_START = f'{{"schema":"{SCHEMA}"'.encode()


class CensusSettings(Record):
    """The options of a census; a model is not run again with the same options."""

    size: int | None
    batch: int
    seed: int
    pretrained: bool
    weights: str | None
    implementations: tuple[str, ...]
    explain: bool


class CensusLayerRecord(Record):
    """One depthwise convolution; `integer_tests` are those that failed."""

    layer: str
    kind: str
    also: list[str]
    note: str
    case: CaseRecord
    verdict: Verdict
    own: ComparisonRecord
    comparisons: list[ComparisonRecord]
    integer_tests: list[IntegerTestRecord]
    seconds: float

    @classmethod
    def of(cls, diagnosis: LayerDiagnosis, seconds: float) -> CensusLayerRecord:
        """Return the record of one diagnosis, which took so many seconds."""
        fields = {name: getattr(diagnosis, name) for name in cls.model_fields if name != "seconds"}
        failed = [test for test in diagnosis.integer_tests if test.verdict is not Verdict.IDENTICAL]
        changed = {"case": CaseRecord.of_case(diagnosis.case), "integer_tests": failed, "seconds": round(seconds, 3)}
        return cls.model_validate(fields | changed)

    @property
    def weakest(self) -> ComparisonRecord:
        """The comparison with the weakest verdict."""
        tests = [test.comparison.model_copy(update={"verdict": test.verdict}) for test in self.integer_tests]
        return max([self.own, *self.comparisons, *tests], key=lambda each: each.verdict.rank())


class CensusRecord(Document):
    """One model; `verdict` is None where no depthwise convolution ran, `error` says why it could not be run."""

    schema_: Literal["jaxdw.census/2"] = SCHEMA
    model: str
    settings: CensusSettings
    seconds: float
    verdict: Verdict | None
    layers: list[CensusLayerRecord]
    idle: list[str]
    passed_over: list[str]
    error: str

    @property
    def seconds_per_layer(self) -> float:
        """Seconds of the diagnosis per layer, without making and running the model."""
        return sum(layer.seconds for layer in self.layers) / max(1, len(self.layers))

    @property
    def max_bound_ratio(self) -> float:
        """The greatest of any pair on any layer."""
        return max((each.max_bound_ratio for layer in self.layers for each in layer.comparisons), default=0.0)

    def counts(self) -> dict[Verdict, int]:
        """Count the layers of each verdict, strongest first."""
        found = Counter(layer.verdict for layer in self.layers)
        return {verdict: found[verdict] for verdict in Verdict if found[verdict]}

    def identical(self) -> list[int]:
        """Count, for each implementation but the first, the layers on which it has the bits of the first.

        Pairs come in the order of the implementations, those with the first before all others.
        """
        others = range(len(self.settings.implementations) - 1)
        return [sum(layer.comparisons[at].verdict is Verdict.IDENTICAL for layer in self.layers) for at in others]


def read_records(path: Path) -> list[CensusRecord]:
    """Return every whole line of a file of results; none if there is no file. A last line that was cut is left out.

    Raises:
      ValueError: a line that is no result; the message has its number.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(read_regular(path).splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            _check_cut(path, line)
            break
        try:
            records.append(CensusRecord.model_validate_json(line))
        except pydantic.ValidationError as error:
            raise ValueError(f"{path}, line {number} is no result of a census: {first_problem(error)}") from None
    return records


def append_record(path: Path, record: CensusRecord) -> None:
    """Add a line, whole or not at all; the rest of a line that an interrupted run left is removed first.

    Other runs may add to the same file meanwhile: no line is lost.

    Raises:
      ValueError: the file has come to hold something else.
      OSError: the disk is full or the folder closed; the file is as it was.
    """
    line = record.to_json(indent=None).encode()
    with open(path, "a+b", buffering=0) as file, locked(file, path):
        whole = _whole_lines(path, file)
        try:
            file.truncate(whole)
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(whole)
            raise type(error)(error.errno, f"{path} was not written: {error.strerror}") from error


def finished(
    records: Sequence[CensusRecord], settings: CensusSettings, environment: dict[str, str]
) -> dict[str, CensusRecord]:
    """Return the latest result of each model that ran with these settings on this machine and these versions."""
    return {
        record.model: record
        for record in records
        if not record.error and record.settings == settings and record.environment == environment
    }


def _whole_lines(path: Path, file: BinaryIO) -> int:
    """Return the number of bytes of the whole lines, in a file that begins and ends as a file of results does."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    for line in (content[: len(_START)], content[whole:]):
        _check_cut(path, line)
    return whole


def _check_cut(path: Path, line: bytes) -> None:
    """Refuse what is not the beginning of a result."""
    if not line.startswith(_START) and not _START.startswith(line):
        raise ValueError(f"{path} holds something else than results of a census: choose a new name, or remove it")
