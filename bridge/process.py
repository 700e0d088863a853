"""Child processes, and modules of the current folder: no code of that folder runs unless the user named it.

All child processes start here, by `python -P bridge/process.py PATH MODULE ARGUMENT...`. Nothing else can be found when
a child starts, so only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import MappingProxyType, ModuleType

#: The two packages of this distribution, which lie in one folder.
PACKAGES = ("bridge", "jaxdw")

#: Top-level names of the modules that the user named, and of those that were found in the current folder.
_named: set[str] = set()
_found: set[str] = set()


class _Folder:
    """A finder of named modules in one folder.

    A folder on `sys.path` would serve every import, also `import torch` or the search for an optional package.
    """

    def __init__(self, folder: str, names: Sequence[str] = ()) -> None:
        self.folder = folder
        self.names = set(names)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder]) if path is None and name in self.names else None


class _UsersFolder(_Folder):
    """A finder that also serves what the modules that it found import themselves."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if path is None and _importer() in _found:
            self.names.add(name)
        spec = super().find_spec(name, path, target)
        if spec is not None:
            _found.add(name)
        return spec


def _importer() -> str:
    """Return the top-level name of the module that imports."""
    frame = sys._getframe(2)
    name = ""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in ("importlib", "_frozen_importlib", "_frozen_importlib_external"):
            return name
        frame = frame.f_back  # type: ignore[assignment]
    return name


def is_users(module: str) -> bool:
    """Return whether a module is of another package that the user named, or of the current folder.

    >>> is_users("jaxdw.nnx")
    False
    """
    return module.partition(".")[0] in (_named | _found).difference(PACKAGES)


def printing_to_stderr() -> contextlib.AbstractContextManager[object]:
    """Return a context for the user's code: what it prints is no part of a report on standard output."""
    return contextlib.redirect_stdout(sys.stderr)


def import_named(name: str) -> ModuleType:
    """Import a module that the user named: an installed one, else one of the current folder.

    A module of the current folder may import others of that folder, at any time. Nothing else is imported from there:
    not what an installed module lacks.
    What it prints goes to standard error.

    >>> import_named("bridge.case").Case.__name__
    'Case'
    """
    _named.add(name.partition(".")[0])
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # the folder was removed
        with printing_to_stderr():
            return importlib.import_module(name)
    _current(folder).names.add(name.partition(".")[0])
    with printing_to_stderr():
        return importlib.import_module(name)


@functools.cache
def _current(folder: str) -> _UsersFolder:
    finder = _UsersFolder(folder)
    sys.meta_path.append(finder)  # after all others, so that nothing installed is replaced
    return finder


def find_packages() -> None:
    """Let `bridge` and `jaxdw` be found where this file lies, whatever `sys.path` is."""
    sys.meta_path.insert(0, _Folder(str(Path(__file__).absolute().parent.parent), PACKAGES))


class Overtime(TimeoutError):
    """A process took longer than its limit; `printed` is what it had written by then."""

    def __init__(self, message: str, printed: str) -> None:
        super().__init__(message)
        self.printed = printed


def run_module(
    module: str,
    *arguments: str,
    time_limit: float,
    environment: Mapping[str, str] = MappingProxyType({}),
    capture: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a module of `bridge` as the main program of a process of its own, and wait for its end.

    The process imports from where this one does, and never from the current folder.

    Args:
      module: its full name.
      *arguments: of its command line.
      time_limit: seconds, after which the process is ended.
      environment: variables to add.
      capture: collect what it prints; else it prints where this process does.

    Raises:
      Overtime: it took longer than `time_limit`.
    """
    path = [entry for entry in sys.path if not _is_current(entry)]
    flags = ["-P", *["-E"] * sys.flags.ignore_environment, *["-s"] * sys.flags.no_user_site]
    try:
        return subprocess.run(
            [sys.executable, *flags, __file__, json.dumps(path), module, *arguments],
            env=_safe({**os.environ, **environment}),
            stdin=subprocess.DEVNULL,
            capture_output=capture,
            text=True,
            errors="replace",
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""  # bytes, whatever `text` says
        raise Overtime(
            f"{module} took longer than {time_limit:g} s in a process of its own",
            printed if isinstance(printed, str) else printed.decode(errors="replace"),
        ) from None


def last_line(text: str) -> str:
    """Return the last line of a process's output that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _is_current(entry: str) -> bool:
    """Return True for a part of a path that means the current folder: empty, or a dot."""
    return os.path.normpath(entry) == "."


def _safe(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what makes Python, here or in a child, import from the current folder."""
    path = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if not _is_current(entry)]
    others = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    return others | {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})


def _main(path: str, module: str, *arguments: str) -> None:
    sys.path[:] = json.loads(path)
    find_packages()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
