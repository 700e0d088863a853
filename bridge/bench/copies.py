"""The bandwidth of plain copies, measured in the same run: what memory allows any way that moves as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from bridge.bench import jax_peers, torch_peers
from bridge.bench.measure import interleaved
from bridge.bench.problems import INPUTS
from bridge.bench.schema import CopyRecord

#: Bytes moved by the smallest copy, and by the greatest: beyond, more bytes have no other bandwidth.
SMALLEST, GREATEST = 1 << 18, 1 << 28
_ROUNDS = 9


def copy_bandwidth(greatest: int, seed: int) -> list[CopyRecord]:
    """Copies that move 1/4 MiB, 1 MiB, ... up to `greatest` bytes or one more, by NumPy, JAX and PyTorch in turn."""
    records = []
    nbytes = SMALLEST
    while True:
        elements = nbytes // 8  # float32, read and written
        makers = {"numpy": _numpy_call, "jax": jax_peers.copy_call, "torch": torch_peers.copy_call}
        made = {name: make(elements) for name, make in makers.items()}
        calls = {name: [functools.partial(call, turn) for turn in range(INPUTS)] for name, call in made.items()}
        times = interleaved(calls, _ROUNDS, seed)
        medians = {name: float(np.median([ms for ms in each if ms is not None])) for name, each in times.items()}
        records.append(
            CopyRecord(nbytes=nbytes, gigabytes_a_second={name: nbytes / ms / 1e6 for name, ms in medians.items()})
        )
        if nbytes >= min(greatest, GREATEST):
            return records
        nbytes *= 4


def _numpy_call(elements: int) -> Callable[[int], None]:
    sources = [np.full(elements, i, np.float32) for i in range(INPUTS)]
    target = np.zeros(elements, np.float32)
    return lambda turn: np.copyto(target, sources[turn])
