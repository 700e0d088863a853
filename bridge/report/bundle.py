"""A diagnosis on disk, to be repeated elsewhere: inputs, outputs, environment and hashes in one folder.

    manifest.json    what is here; `BundleManifest` is its schema
    x.npy, kernel.npy, bias.npy (where there is a bias), output-0.npy, output-1.npy, ...

bfloat16, which .npy cannot name, is stored as its bits (uint16); the manifest has the dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import pydantic

from bridge._implementations import FRAMEWORKS, Implementation, implementation
from bridge.case import DTYPES, Case
from bridge.diagnosis import Diagnosis, Verdict, compare, parity
from bridge.environment import environment
from bridge.files import atomic_folder, check_free, parse_npy, read_json, read_regular
from bridge.memory import check_fits
from bridge.numerics import same_bits
from bridge.records import CaseRecord, Document, Record, first_problem

#: Name and version of the manifest's schema.
SCHEMA: Literal["jaxdw.bundle/2"] = "jaxdw.bundle/2"
_MANIFEST = "manifest.json"

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


#: The arrays of a case.
Given = Literal["x", "kernel", "bias"]


class ArrayRecord(Record):
    """One array: its file, the SHA-256 of that file, and what it holds."""

    file: Annotated[str, pydantic.Field(pattern=r"^[a-z0-9-]+\.npy$")]
    sha256: str
    dtype: str
    shape: tuple[int, ...]


class OutputRecord(ArrayRecord):
    """An implementation's output."""

    implementation: str


class SavedCase(CaseRecord):
    """The case. `padding_word` is the padding that was asked for, if it was a word such as "SAME"."""

    padding_word: str | None


class SavedVerdict(Record):
    """The verdict of one pair."""

    a: str
    b: str
    verdict: Verdict


class BundleManifest(Document):
    """The contents of a bundle."""

    schema_: Literal["jaxdw.bundle/2"] = SCHEMA
    case: SavedCase
    arrays: dict[Given, ArrayRecord]
    outputs: list[OutputRecord]
    verdict: Verdict
    verdicts: list[SavedVerdict]


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle in memory: the manifest, and the arrays that it names."""

    manifest: BundleManifest
    case: Case
    outputs: Mapping[str, np.ndarray]


def check_new_folder(folder: Path, *, replace: bool = False) -> None:
    """Fail before the work if `save_bundle` could not write the folder after it; `replace` allows an older bundle.

    Raises:
      OSError: the folder holds something, is a file, or its parent is missing or closed.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()) and not (replace and _is_bundle(folder)):
        raise FileExistsError(f"{folder} is not empty, expected a new or an empty folder")
    check_free(folder.absolute(), force=True)


def _is_bundle(folder: Path) -> bool:
    """Return whether a folder has a manifest of ours, of any version, and nothing that none of ours has."""
    try:
        content: Any = read_json(folder / _MANIFEST)
    except (ValueError, OSError):
        return False
    schema = content.get("schema") if isinstance(content, dict) else None
    others = [path for path in folder.iterdir() if path.suffix != ".npy" and path.name != _MANIFEST]
    return str(schema).startswith("jaxdw.bundle/") and not others


def save_bundle(diagnosis: Diagnosis, folder: Path, *, replace: bool = False) -> None:
    """Write the bundle whole; an interrupted run leaves no part of it. With `replace` an older bundle is replaced.

    Raises:
      OSError: as `check_new_folder` says.
    """
    check_new_folder(folder, replace=replace)
    case = diagnosis.case
    given: dict[Given, np.ndarray | None] = {"x": case.x, "kernel": case.kernel, "bias": case.bias}
    with atomic_folder(folder.absolute()) as new:
        manifest = BundleManifest(
            environment=environment(),
            case=SavedCase(
                **dict(CaseRecord.of_case(case)), padding_word=case.padding if isinstance(case.padding, str) else None
            ),
            arrays={name: _write(new, name, array) for name, array in given.items() if array is not None},
            outputs=[
                OutputRecord(implementation=name, **dict(_write(new, f"output-{number}", y)))
                for number, (name, y) in enumerate(diagnosis.outputs.items())
            ],
            verdict=diagnosis.verdict,
            verdicts=[SavedVerdict.model_validate(each) for each in diagnosis.comparisons],
        )
        (new / _MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every hash.

    Raises:
      ValueError: a manifest that is malformed or of a newer schema, a missing file, or one that was cut or changed.
    """
    manifest = _manifest(folder)
    arrays = {name: _read(folder, record) for name, record in manifest.arrays.items()}
    outputs = {record.implementation: _read(folder, record) for record in manifest.outputs}
    saved = manifest.case
    try:
        case = Case(
            **arrays,
            strides=saved.strides,
            padding=saved.padding_word or saved.padding,
            kernel_dilation=saved.kernel_dilation,
            input_dilation=saved.input_dilation,
            name=saved.name,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _MANIFEST} does not describe a valid case: {error}") from None
    if (case.geometry.padding, case.geometry.padding_mode) != (saved.padding, saved.padding_mode):
        raise ValueError(
            f"{folder / _MANIFEST} has padding {saved.padding} of {saved.padding_mode}, but padding_word "
            f"{saved.padding_word} gives {case.geometry.padding} of {case.geometry.padding_mode}"
        )
    g = case.geometry
    padded = (*g.batch, *g.padded_spatial, g.channels)
    check_fits(f"the input of {folder}, padded to {padded},", 8 * math.prod(padded))
    for name, y in outputs.items():
        if y.shape != case.geometry.output_shape or y.dtype != case.dtype:
            expected = f"{case.dtype} {case.geometry.output_shape}"
            raise ValueError(f"{folder} has an output {name} of {y.dtype} {y.shape}, expected {expected}")
    return Bundle(manifest, case, outputs)


def replay_bundle(folder: Path, *, import_functions: bool = False) -> tuple[Diagnosis, list[str]]:
    """Repeat a diagnosis on this machine, and return it with what changed since the bundle was saved.

    Args:
      folder: what `save_bundle` wrote.
      import_functions: import and run implementations that the bundle names as `package.module:function`. Only for a
        bundle that you trust, since any function installed here can be named.

    Returns:
      The diagnosis of those implementations that run here, and of arrays that no implementation is named after, as
      they were saved; and one line for each change: an implementation that does not run here, the environment, an
      output's bits, a verdict. No line: nothing changed.

    Raises:
      ValueError: as `load_bundle`, or fewer than two outputs can be compared here.
    """
    bundle = load_bundle(folder)
    chosen, kept, absent = [], {}, []
    for name, y in bundle.outputs.items():
        if _is_array(name):
            kept[name] = y
            continue
        try:
            chosen.append(_runnable(name, bundle.case, import_functions))
        except (ValueError, ImportError) as error:
            absent.append(f"not run here: {name} ({error})")
    if len(chosen) + len(kept) < 2:
        raise ValueError(f"{folder} cannot be repeated: fewer than two implementations run here: {'; '.join(absent)}")
    names = [name for name in bundle.outputs if name in kept or any(each.name == name for each in chosen)]
    diagnosis = _compared(bundle.case, names, chosen, kept) if kept else parity(bundle.case, chosen)
    changes = [*absent, *_environment(bundle), *_outputs(bundle, diagnosis), *_verdicts(bundle, diagnosis)]
    return diagnosis, changes


def _is_array(name: str) -> bool:
    """Return whether an output is no implementation's, but an array that `assert_parity` was given."""
    framework, dot, _ = name.partition(".")
    return ":" not in name and not (dot and framework in FRAMEWORKS)


def _compared(
    case: Case, names: Sequence[str], chosen: Sequence[Implementation], kept: Mapping[str, np.ndarray]
) -> Diagnosis:
    """Return the comparisons of implementations that run, and of arrays as they were saved."""
    runnable = {each.name: each for each in chosen}
    outputs = {name: kept[name] if name in kept else runnable[name].run(case) for name in names}
    arithmetics = {name: each.arithmetic(case) for name, each in runnable.items()}
    comparisons = [
        compare(outputs[a], outputs[b], case, names=(a, b), arithmetics=(arithmetics.get(a), arithmetics.get(b)))
        for a, b in itertools.combinations(names, 2)
    ]
    return Diagnosis(case, outputs, comparisons)


def _runnable(name: str, case: Case, import_functions: bool) -> Implementation:
    if ":" in name and not import_functions:
        raise ValueError("a function is imported only with --import-functions (`import_functions=True`)")
    return implementation(name, case)


def _environment(bundle: Bundle) -> Iterator[str]:
    then, now = bundle.manifest.environment, environment()
    for key in dict.fromkeys((*then, *now)):
        if then.get(key) != now.get(key):
            yield f"environment: {key} was {_quoted(then.get(key))}, is {_quoted(now.get(key))}"


def _quoted(value: str | None) -> str:
    return "absent" if value is None else value or "empty"


def _outputs(bundle: Bundle, diagnosis: Diagnosis) -> Iterator[str]:
    for name, now in diagnosis.outputs.items():
        saved = bundle.outputs[name]
        changed = int(np.count_nonzero(~same_bits(saved, now)))
        if changed:
            with np.errstate(invalid="ignore"):
                distance = np.abs(saved.astype(np.float64) - now.astype(np.float64))
            most = np.max(distance, where=np.isfinite(distance), initial=0.0)
            yield f"output: {name} has different bits in {changed} of {saved.size} elements, by at most {most:.2g}"


def _verdicts(bundle: Bundle, diagnosis: Diagnosis) -> Iterator[str]:
    if diagnosis.verdict is not bundle.manifest.verdict:
        yield f"verdict: of the whole diagnosis, was {bundle.manifest.verdict}, is {diagnosis.verdict}"
    for saved in bundle.manifest.verdicts:
        if not {saved.a, saved.b} <= diagnosis.outputs.keys():
            continue
        now = diagnosis.between(saved.a, saved.b).verdict
        if now is not saved.verdict:
            yield f"verdict: of {saved.a} and {saved.b}, was {saved.verdict}, is {now}"


def _write(folder: Path, name: str, array: np.ndarray) -> ArrayRecord:
    stored = array.view(np.uint16) if array.dtype == _BFLOAT16 else array
    buffer = io.BytesIO()
    np.save(buffer, stored, allow_pickle=False)
    data = buffer.getvalue()
    file = f"{name}.npy"
    (folder / file).write_bytes(data)
    return ArrayRecord(file=file, sha256=hashlib.sha256(data).hexdigest(), dtype=array.dtype.name, shape=array.shape)


def _read(folder: Path, record: ArrayRecord) -> np.ndarray:
    path = folder / record.file
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is a link that leads out of the bundle, expected a file of its own")
    try:
        data = read_regular(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} is an incomplete bundle: {record.file} is missing") from None
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise ValueError(f"{path} was cut or changed: its SHA-256 is not the manifest's")
    try:
        array = parse_npy(data)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid array: {error}") from None
    if record.dtype == _BFLOAT16.name and array.dtype == np.uint16:
        array = array.view(_BFLOAT16)
    if array.dtype not in DTYPES.values() or array.dtype.name != record.dtype or array.shape != record.shape:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected {record.dtype} {record.shape}")
    return array


def _manifest(folder: Path) -> BundleManifest:
    path = folder / _MANIFEST
    try:
        content: Any = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is not a bundle: it has no {_MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"{path} was cut or changed: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        _refuse(path, schema)
    try:
        return BundleManifest.model_validate(content)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path} is malformed: {first_problem(error)}") from None


def _refuse(path: Path, schema: object) -> None:
    kind, _, version = str(schema).partition("/")
    expected_kind, _, expected = SCHEMA.partition("/")
    if kind == expected_kind and version.isdecimal() and int(version) > int(expected):
        raise ValueError(f"{path} has schema {schema!r}, newer than {SCHEMA!r}: read it with a newer jaxdw")
    raise ValueError(f"{path} has schema {schema!r}, expected {SCHEMA!r}")
