"""What `bridge` needs beyond a base install, and from which version on."""

from __future__ import annotations

import importlib.metadata
import re

NEEDED = {
    "torch": (2, 6),
    "jax": (0, 8, 2),
    "typer": (0, 15),
    "rich": (13, 9),
    "pydantic": (2, 10),
    "ml_dtypes": (0, 5),
    "jinja2": (3, 1),
}

#: The newest releases that the tests have run with: docs/versions.md.
TESTED = {"jax": (0, 12), "flax": (0, 12), "torch": (2, 15)}


def unmet() -> str:
    """One line that says what is missing or too old; empty where all is well."""
    unfit = [name for name, version in NEEDED.items() if _installed(name) < version]
    if not unfit:
        return ""
    wanted = ", ".join(f"{name} {'.'.join(map(str, NEEDED[name]))} or newer" for name in unfit)
    return f"the command and the package `bridge` need {wanted}: pip install 'jaxdw[bridge]'"


def untested() -> str:
    """Return one line that names what is newer than the tests have run with; empty where nothing is."""
    newer = [
        f"{name} {importlib.metadata.version(name)}" for name, most in TESTED.items() if _installed(name)[:2] > most
    ]
    if not newer:
        return ""
    known = ", ".join(f"{name} {'.'.join(map(str, most))}" for name, most in TESTED.items())
    return f"Warning: {', '.join(newer)} is newer than what was tested: up to {known}."


def _installed(name: str) -> tuple[int, ...]:
    """The version of a package, () where there is none."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
