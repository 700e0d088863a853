"""Files and folders that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which takes its name when the block ends well; otherwise nothing stays.

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
    """A folder to fill beside `path`, which takes its name when the block ends well; otherwise nothing stays.

    What was at `path` is replaced only then.
    """
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
    """Writes a text file whole; an interrupted run leaves no part of it."""
    with atomic_file(path) as file:
        file.write(text.encode())


def check_writable(path: Path) -> None:
    """Fails before the work if a file could not be written after it; one that is there will be replaced.

    Raises:
      OSError: the folder is missing or closed, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file, expected one or a new name")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")
    check_free(path, force=True)


def check_free(path: Path, force: bool = False) -> None:
    """Fails before the work if `path` is taken, or cannot be written.

    Raises:
      OSError: something is there and `force` is not set, or the folder is missing or closed.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists, expected a new name: it is overwritten only with --force (`force=True`)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: permission denied")


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"{path} was not written: {error.strerror or error}") from error
