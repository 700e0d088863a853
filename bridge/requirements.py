"""The packages that `bridge` needs beyond a base install, and their least versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

NEEDED = {
    "torch": (2, 6),
    "jax": (0, 8, 2),
    "typer": (0, 15),
    "rich": (13, 9),
    "pydantic": (2, 10),
    "ml_dtypes": (0, 5),
    "jinja2": (3, 1),
    "scipy": (1, 14),
}

#: The newest releases that the tests have run with: docs/versions.md.
TESTED = {"jax": (0, 12), "flax": (0, 12), "torch": (2, 15), "Python": (3, 13)}


def unmet() -> str:
    """Return one line that names what is missing or too old; empty where all is well."""
    unfit = [name for name, version in NEEDED.items() if _installed(name) < version]
    if not unfit:
        return ""
    wanted = ", ".join(f"{name} {'.'.join(map(str, NEEDED[name]))} or newer" for name in unfit)
    return f"the command and the package `bridge` need {wanted}: pip install 'jaxdw[bridge]'"


def versions() -> str:
    """Return the versions of jaxdw, JAX, Flax, PyTorch and Python in one line; "none" if not installed.

    >>> versions().partition(" ")[0]
    'jaxdw'
    """
    source = Path(__file__).parent.parent / "jaxdw" / "__init__.py"  # not imported: JAX may be what is amiss
    own = re.search(r'^__version__ = "(.*)"', source.read_text(), re.MULTILINE)
    others = (f"{name} {_version(name) or 'none'}" for name in ("jax", "flax", "torch"))
    return ", ".join([f"jaxdw {own[1] if own else 'unknown'}", *others, f"Python {platform.python_version()}"])


def untested() -> str:
    """Return one line that names what is newer than the tested versions; empty where nothing is."""
    newer = [f"{name} {_version(name)}" for name, most in TESTED.items() if _installed(name)[:2] > most]
    if not newer:
        return ""
    known = ", ".join(f"{name} {'.'.join(map(str, most))}" for name, most in TESTED.items())
    return f"Warning: {', '.join(newer)} is newer than the tested versions, up to {known}."


def _installed(name: str) -> tuple[int, ...]:
    """Return the version of a package or of Python, () if it is not installed."""
    return tuple(int(part) for part in re.findall(r"\d+", _version(name).partition("+")[0])[:3])


def _version(name: str) -> str:
    if name == "Python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
