"""The bandwidth of plain copies, measured in the same run: no way that moves as many bytes can be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bridge.bench import jax_peers, torch_peers
from bridge.bench.figures import quartiles
from bridge.bench.measure import interleaved, started
from bridge.bench.problems import INPUTS, Way
from bridge.bench.reference import Arrays
from bridge.bench.schema import CopyRecord

#: Bytes moved by the smallest and the largest copy. Larger copies have the same bandwidth.
SMALLEST, LARGEST = 1 << 18, 1 << 28
_ROUNDS = 9


def copy_bandwidth(largest: int, seed: int) -> list[CopyRecord]:
    """Time copies that move 1/4 MiB, 1 MiB, 4 MiB ... by NumPy, JAX and PyTorch; the last moves `largest` or more."""
    records = []
    nbytes = SMALLEST
    while True:
        elements = nbytes // 8  # float32, read and written
        ways = [numpy_copy(elements), jax_peers.copy_way(elements), torch_peers.copy_way(elements)]
        records.append(copy_record(nbytes, copy_milliseconds(ways, _ROUNDS, seed)))
        if nbytes >= min(largest, LARGEST):
            return records
        nbytes *= 4


def copy_milliseconds(ways: Sequence[Way], rounds: int, seed: int, fill: float | None = None) -> dict[str, float]:
    """Return the median of each way's times; `fill` is as in `bridge.bench.measure`."""
    inputs = [{"value": np.array(turn, np.float32)} for turn in range(INPUTS)]
    made = {way.name: started(way, inputs, fill) for way in ways}
    calls = {name: each for name, (each, _) in made.items()}
    times = interleaved(calls, rounds, seed, counts={name: count for name, (_, count) in made.items()})
    return {name: quartiles([ms for ms in each if ms is not None]).median for name, each in times.items()}


def copy_record(nbytes: int, milliseconds: dict[str, float]) -> CopyRecord:
    """Return the record of a copy that moves so many bytes in these times."""
    return CopyRecord(nbytes=nbytes, gigabytes_a_second={name: nbytes / ms / 1e6 for name, ms in milliseconds.items()})


def numpy_copy(elements: int) -> Way:
    """Return a copy of float32 into memory at hand."""
    target = np.zeros(elements, np.float32)

    def start(arrays: Arrays) -> Callable[[], None]:
        source = np.full(elements, arrays["value"])
        return lambda: np.copyto(target, source)

    return Way("numpy", start)
