"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Fails before the work if the file could not be written after it.

    Raises:
      OSError: the folder is missing or closed, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{path} cannot be written: permission denied")


def write_atomically(path: Path, text: str) -> None:
    """Writes to a temporary file beside it, then renames; an interrupted run leaves no part of the file."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
