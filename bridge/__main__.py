"""`python -m bridge`, the same as the command `jaxdw`."""

from __future__ import annotations

import importlib.metadata
import re
import sys

#: What the command needs, and from which version on.
_NEEDED = {
    "torch": (2, 13),
    "jax": (0, 10, 2),
    "typer": (0, 15),
    "rich": (13, 9),
    "pydantic": (2, 10),
    "ml_dtypes": (0, 5),
    "jinja2": (3, 1),
}


def main() -> None:
    """Runs the command line; where its packages are missing or too old, one line says what to install."""
    unfit = [name for name, version in _NEEDED.items() if _installed(name) < version]
    if unfit:
        wanted = ", ".join(f"{name} {'.'.join(map(str, _NEEDED[name]))} or newer" for name in unfit)
        sys.exit(f"jaxdw: the command needs {wanted}: pip install 'jaxdw[bridge]'")
    from bridge.cli import run

    run()


def _installed(name: str) -> tuple[int, ...]:
    """The version of a package, () where there is none."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


if __name__ == "__main__":
    main()
