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


def unmet() -> str:
    """One line that says what is missing or too old; empty where all is well."""
    unfit = [name for name, version in NEEDED.items() if _installed(name) < version]
    if not unfit:
        return ""
    wanted = ", ".join(f"{name} {'.'.join(map(str, NEEDED[name]))} or newer" for name in unfit)
    return f"the command and the package `bridge` need {wanted}: pip install 'jaxdw[bridge]'"


def _installed(name: str) -> tuple[int, ...]:
    """The version of a package, () where there is none."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
