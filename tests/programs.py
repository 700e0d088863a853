"""Compiled programs, let go before there are too many of them."""

from pathlib import Path

import jax

#: Linux allows a process 65,530 memory mappings by default. XLA:CPU takes six a program, and crashes when they run out.
MOST_MAPPINGS = 30_000


def release_programs():
    """Clear JAX's caches where the process has many mappings; do nothing where they cannot be counted."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
