"""`python -m bridge`, the same as the command `jaxdw`."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("torch", "typer", "rich", "pydantic", "ml_dtypes")


def main() -> None:
    """Runs the command line; a base install, which lacks its packages, is told in one line what to install."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"jaxdw: the command needs {', '.join(missing)}: pip install 'jaxdw[bridge]'")
    from bridge.cli import run

    run()


if __name__ == "__main__":
    main()
