"""Free memory, errors that mean a lack of it, and a check that work fits."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

#: Words by which frameworks and the C++ library report a failed allocation.
_LACK = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|not enough memory|can't allocate memory|cannot allocate memory"
    r"|unable to allocate|failed to map segment|std::bad_alloc|failed to allocate|could not allocate",
    re.IGNORECASE,
)

#: Bytes from which on work is checked before it is done: the check itself takes time.
CHECKED = 1 << 26

#: Address space of a process with both frameworks and their threads, on 2 cores: what is not yet loaded will be.
_LOADED = 2 << 30

#: What to do.
ADVICE = "Use a smaller input or a smaller batch, fewer implementations at once, or allow more memory"


class Free(NamedTuple):
    """Bytes that are free, and what limits them."""

    nbytes: int
    limit: str

    def __str__(self) -> str:
        return f"{size(self.nbytes)} are free ({self.limit})"


def free() -> Free | None:
    """Return what is free on this machine, in this process and in its container; None where that is unknown."""
    return min(_limits(), key=lambda limit: limit.nbytes, default=None)


def check_fits(what: str, needed: int) -> None:
    """Refuse work that cannot fit.

    Raises:
      MemoryError: more bytes are needed than are free; the message gives both.
    """
    found = free() if needed >= CHECKED else None
    if found is not None and needed > found.nbytes:
        raise MemoryError(f"{what} needs about {size(needed)} of memory, and {found}. {ADVICE}")


@functools.cache
def check_starts() -> None:
    """Refuse to load the frameworks where they would crash for lack of address space, which nothing can catch.

    Raises:
      MemoryError: the process may not reserve as much as they do.
    """
    for limit in _own_limits():
        if not limit.nbytes:
            raise MemoryError(f"PyTorch and JAX take about {size(_LOADED)} of address space, and {limit}. {ADVICE}")


def lack_of_memory(error: BaseException | str) -> str:
    """Return one line on the lack of memory, if an error or the last output of a process means that; else ""."""
    text = " ".join(str(error).split())
    if ADVICE in text:
        return text
    if not isinstance(error, MemoryError) and not _LACK.search(text):
        return ""
    found = free()
    said = text[:300] or "an allocation failed"
    return f"not enough memory: {said}{f'; {found}' if found else ''}. {ADVICE}"


def size(count: int) -> str:
    """Return bytes in the unit that fits.

    >>> size(5 * 2**30), size(3 * 2**20)
    ('5.0 GiB', '3.0 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _limits() -> Iterator[Free]:
    memory = _table(Path("/proc/meminfo"))
    if "MemAvailable" in memory:
        swap = memory.get("SwapFree", 0)
        yield Free(1024 * (memory["MemAvailable"] + swap), "of this machine's memory")
    yield from _own_limits()
    for folder, most, used in _groups():
        try:
            left = int((folder / most).read_text()) - int((folder / used).read_text())
            cached = _table(folder / "memory.stat").get("inactive_file", 0)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        yield Free(max(0, left + cached), "of this container's memory")


def _own_limits() -> Iterator[Free]:
    """Yield what the process may still reserve, used or not."""
    own = _table(Path("/proc/self/status"))
    for name, used, command in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        limit = -1 if resource is None else resource.getrlimit(getattr(resource, name))[0]
        taken = max(1024 * own.get(used, 0), _LOADED if name == "RLIMIT_AS" else 0)
        if limit not in (-1, getattr(resource, "RLIM_INFINITY", -1)):
            yield Free(max(0, limit - taken), f"of the {size(limit)} that `{command}` allows")


def _groups() -> Iterator[tuple[Path, str, str]]:
    """Yield the control groups of this process, and the names of their files for the limit and the use."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    root = Path("/sys/fs/cgroup")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            own, names = root / path.lstrip("/"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            own, names = root / "memory" / path.lstrip("/"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                yield folder, *names


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number per line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = (re.match(r"(\w+):?\s+(\d+)", line) for line in lines)
    return {part[1]: int(part[2]) for part in parts if part}
