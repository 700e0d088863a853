"""`python -m bridge`, the same as the command `jaxdw`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from bridge.requirements import unmet, versions


def main() -> None:
    """Run the command line. Where its packages are missing or too old, one line says what to install.

    `--version` and `--help` answer even then.
    """
    if line := unmet():
        asked = set(sys.argv[1:])
        if "--version" in asked:
            print(versions())
        elif not asked or "--help" in asked:
            print(f"{_help()}\n\nNot installed here: {line}")
        else:
            print(f"jaxdw: {line}", file=sys.stderr)
            sys.exit(2)
        return
    try:
        from bridge.cli import run
    except (MemoryError, OSError, ImportError) as error:  # a library that does not fit into memory, or is broken
        print(f"jaxdw: cannot load its libraries: {' '.join(str(error).split()) or 'no memory'}", file=sys.stderr)
        sys.exit(2)
    run()


def _help() -> str:
    """Return the commands, one per line, from their source: it cannot be imported without its packages."""
    commands = [
        f"  {each.name:8} {(ast.get_docstring(each) or '').partition(chr(10))[0]}"
        for file in sorted((Path(__file__).parent / "cli").glob("*.py"))
        for each in ast.parse(file.read_text()).body
        if isinstance(each, ast.FunctionDef) and each.name == file.stem
    ]
    return "\n".join(["Usage: jaxdw [--version] [--help] COMMAND [ARGS]...", "", "Commands:", *commands])


if __name__ == "__main__":
    main()
