"""Orders that were revealed before, on this machine with these versions: in memory, and in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bridge.accumulation.tree import Tree
from bridge.cache import cache_file, read_cache, write_cache
from bridge.environment import environment
from bridge.model.operations import Operation
from bridge.model.orders import Order, Revealed, Run, revealed

#: Settings of the libraries that choose kernels.
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "XLA_FLAGS", "JAXDW_ISA")


class KnownOrders:
    """The orders of operations by framework, shapes, layout and settings.

    An order from the cache is only a guess: it is replayed on the operation's own data like any other, and revealed
    again where it does not hold.

    Args:
      path: of the cache; None keeps orders in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, Sequence[Order]] = {}
        self._stored = _read(path) if path is not None else {}

    @classmethod
    def of_this_machine(cls) -> KnownOrders:
        """Return those of this processor, these versions, threads and settings."""
        return cls(cache_file("orders", [*environment().values(), *(os.environ.get(n, "") for n in _VARIABLES)]))

    def revealed(self, operation: Operation, framework: str, run: Run, y: np.ndarray) -> Revealed:
        """Return the orders of an operation, proved on its operands; see `bridge.model.orders.revealed`."""
        key = _key(operation, framework)
        if key not in self._known and key in self._stored:
            self._known[key] = _orders(self._stored[key])
        found = revealed(operation, run, y, self._known.get(key, ()))
        self._known[key] = found.orders
        return found

    def save(self) -> None:
        """Write all orders to the cache."""
        if self._path is None:
            return
        new = {key: [_stored(order) for order in orders] for key, orders in self._known.items()}
        if any(self._stored.get(key) != orders for key, orders in new.items()):
            write_cache(self._path, {**self._stored, **new})


def _key(operation: Operation, framework: str) -> str:
    """Return all that an order may depend on, in words."""
    shapes = [each.shape for each in (operation.operands[0], *(p for n, p in sorted(operation.parameters.items())))]
    settings = {name: value for name, value in operation.settings.items() if name not in ("eps", "momentum")}
    return f"{framework} {operation.kind} {operation.layout} {shapes} {settings}"


def _read(path: Path) -> Mapping[str, list[list[str]]]:
    stored = read_cache(path)
    return stored if isinstance(stored, dict) else {}


def _stored(order: Order) -> list[str]:
    return [str(order.tree), str(order.from_zero), order.finish]


def _orders(stored: object) -> Sequence[Order]:
    """Return orders that `save` wrote; none where they cannot be read."""
    try:
        return [Order(Tree.parse(tree), zero == "True", finish) for tree, zero, finish in stored]  # type: ignore
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
