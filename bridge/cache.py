"""What was measured on this machine before, in files under the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.files import write_atomically


def cache_file(kind: str, parts: Sequence[str]) -> Path:
    """Return the file for one environment; its name is a hash of all that can change what was measured."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "jaxdw", f"{kind}-{hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:16]}.json")


def read_cache(path: Path) -> Any:
    """Return the JSON value of a file; None where no readable file is."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def write_cache(path: Path, value: Any) -> None:
    """Write a JSON value. A cache that cannot be written costs time, no more."""
    if not path.is_absolute():  # nobody's home
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value))
    except OSError:
        pass
