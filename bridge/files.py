"""Files: written whole or not at all, never over other people's files; read only if they are regular files."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

#: Seconds to wait for another writer of the same file, where the system has no locks that end with their process.
_LOCK_WAIT = 60.0

#: The beginning of the files that the commands write, by their schema.
_BEGINNING = rb'\s*\{\s*"schema":\s*"%(schema)s/|(<!doctype html>\s*)?<!-- %(schema)s -->'

#: The beginning of the SARIF files of the pytest plugin, which name no schema of this package.
_SARIF_BEGINNING = (
    rb'\s*\{\s*"\$schema":\s*"[^"]*",\s*"version":\s*"2\.1\.0",\s*"runs":\s*\[\s*\{'
    rb'\s*"tool":\s*\{\s*"driver":\s*\{\s*"name":\s*"jaxdw"'
)

#: Names for paths that are not regular files.
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which replaces `path` when the block ends well; otherwise nothing stays.

    Raises:
      OSError: the disk is full or the folder is closed, with the name of the file.
    """
    path = path.resolve()  # a link stays, and what it points to is replaced
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    with _errors_named(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a new folder, which replaces `path` when the block ends well; otherwise nothing stays."""
    with _errors_named(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as room:
        new, old = Path(room, "new"), Path(room, "old")
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole; an interrupted run leaves no part of it."""
    with atomic_file(path) as file:
        file.write(text.encode())


def check_writable(path: Path, schema: str) -> None:
    """Fail before the work if a file could not be written after it.

    A file that is there will be replaced if it is empty, or if a command wrote it that writes the same kind of file.

    Args:
      path: the file to write.
      schema: what it will hold, such as "jaxdw.parity", or "jaxdw.sarif" for SARIF.

    Raises:
      OSError: the folder is missing or closed, or the path is a folder.
      FileExistsError: the file holds something else.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, expected one or a new name")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")
    if path.exists():
        with open_regular(path) as file:
            beginning = file.read(4096)
        pattern = _BEGINNING % {b"schema": re.escape(schema.encode())}
        if beginning and not re.match(_SARIF_BEGINNING if schema == "jaxdw.sarif" else pattern, beginning):
            raise FileExistsError(
                f"{path} exists and is not a report of the kind {schema}; only such a report is overwritten: "
                "choose a new name, or remove it"
            )
    check_free(path, force=True)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe or a device could make the reader wait forever.

    Raises:
      OSError: there is no such file, it cannot be opened, or it is something else; the message says what.
    """
    _check_regular(path, path.stat().st_mode)  # before it is opened, which for a device may be an action
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Return what a regular file of JSON holds.

    Raises:
      ValueError: the file is no JSON, is nested too deeply, names a key twice, or has a number that JSON lacks.
      OSError: as `open_regular`.
    """
    try:
        return parse_json(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def parse_json(text: bytes) -> Any:
    """Return what a JSON text in UTF-8 holds. Raises ValueError or RecursionError."""
    return json.loads(text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def read_npy(path: Path) -> np.ndarray:
    """Return the array of numbers in a regular `.npy` file, as large as it says that it is.

    Raises:
      ValueError: the file is no `.npy` file, is cut short, or holds something else than numbers.
      OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        shape, order, dtype = _npy_header(file, os.fstat(file.fileno()).st_size)
        return np.fromfile(file, dtype, math.prod(shape)).reshape(shape, order=order)


def parse_npy(data: bytes) -> np.ndarray:
    """Return the array of numbers in the bytes of an `.npy` file. Raises ValueError as `read_npy`."""
    file = io.BytesIO(data)
    shape, order, dtype = _npy_header(file, len(data))
    return np.frombuffer(bytearray(file.read()), dtype, math.prod(shape)).reshape(shape, order=order)


def check_tree(folder: Path) -> None:
    """Refuse a folder in which another package's reader could wait forever, at any depth.

    Raises:
      OSError: a pipe, a socket or a device is in it.
    """
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.exists():
                _check_regular(path, path.stat().st_mode)


@contextlib.contextmanager
def locked(file: BinaryIO, path: Path) -> Iterator[None]:
    """Lock a file against other users of this function, in other processes too.

    Raises:
      TimeoutError: where the system has no locks of its own, another writer has held the file for a minute.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
        return
    lock = path.with_name(f".{path.name}.lock")
    end = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            if time.monotonic() > end:
                raise TimeoutError(f"{path} is locked by another run; if there is none, remove {lock}") from None
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink()


def check_free(path: Path, force: bool = False) -> None:
    """Fail before the work if `path` exists, or cannot be written.

    Raises:
      OSError: something is there and `force` is not set, or the folder is missing or closed.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists, expected a new name: it is overwritten only with --force (`force=True`)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, expected a regular file")


def _npy_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    """Return shape, memory order and dtype, having checked that a file of that size holds their data."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if file.read(4) == b"PK\x03\x04":
        raise ValueError("expected one array, found an archive of several (.npz)")
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"its version is {version}, which arrays of numbers do not need")
        shape, fortran, dtype = readers[version](file)
    except Exception as error:  # NumPy's reader raises almost anything on a header that is damaged
        raise ValueError(f"it is damaged: {error or type(error).__name__}") from None
    plain = dtype.kind in "biufcV" and not (dtype.hasobject or dtype.fields or dtype.subdtype) and dtype.itemsize
    if not plain or min(shape, default=0) < 0 or len(shape) > 64:
        raise ValueError(f"it holds {dtype} of shape {shape}, expected numbers")
    claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed > held:
        raise ValueError(f"it claims {claimed} bytes of {dtype} {shape}, and has {held}: was it cut short?")
    return shape, "F" if fortran else "C", dtype


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"duplicate keys {', '.join(map(repr, twice))}")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"{path} was not written: {error.strerror or error}") from error
