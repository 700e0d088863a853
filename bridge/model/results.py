"""The arrays in a model's result by name, and which result of one model is which of the other's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def named(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of mappings, dataclasses, tuples and lists by their paths; None has none.

    >>> list(named({"logits": 1, "hidden": (2, 3), "loss": None}))
    [('logits', 1), ('hidden.0', 2), ('hidden.1', 3)]
    """
    items: Any
    if result is None:
        return
    if isinstance(result, Mapping):
        items = result.items()
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        items = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    elif isinstance(result, tuple) and hasattr(result, "_asdict"):
        items = result._asdict().items()
    elif isinstance(result, (tuple, list)):
        items = enumerate(result)
    else:
        yield name, result
        return
    for key, value in items:
        yield from named(value, f"{name}.{key}" if name else str(key))


def paired(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Return which result of JAX is which of PyTorch's: by name, else by place.

    PyTorch may give more: the rest is not compared. One result of JAX without a name is PyTorch's `logits`, or its
    first.

    Raises:
      ValueError: JAX gives one that PyTorch does not give.

    >>> paired(["b", "a"], ["a", "c", "b"]), paired([""], ["loss", "logits"])
    ([(0, 2), (1, 0)], [(0, 1)])
    """
    if set(ours) & set(theirs):
        if unknown := [name for name in ours if name not in theirs]:
            raise ValueError(f"`model` gives {unknown[0]!r}, and PyTorch gives only {', '.join(map(repr, theirs))}")
        return [(i, theirs.index(name)) for i, name in enumerate(ours)]
    if len(ours) == 1 and "logits" in theirs:
        return [(0, theirs.index("logits"))]
    if not ours or len(ours) > len(theirs):
        raise ValueError(
            f"`model` gives {len(ours)} arrays, and PyTorch {len(theirs)}: return the same from both, in one order"
        )
    return [(i, i) for i in range(len(ours))]
