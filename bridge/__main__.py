"""`python -m bridge`, the same as the command `jaxdw`."""

from __future__ import annotations

import sys

from bridge.requirements import unmet


def main() -> None:
    """Runs the command line; where its packages are missing or too old, one line says what to install."""
    if line := unmet():
        print(f"jaxdw: {line}", file=sys.stderr)
        sys.exit(2)
    try:
        from bridge.cli import run
    except (MemoryError, OSError, ImportError) as error:  # a library that does not fit into memory, or is broken
        print(f"jaxdw: its libraries cannot be loaded: {' '.join(str(error).split()) or 'no memory'}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
