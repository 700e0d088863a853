"""Results of one sample under conditions, here or in a process of its own, with their accumulation orders."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge._implementations import implementation
from bridge._implementations.isolated import load_case, save_case, stored
from bridge._invariance.conditions import Placement
from bridge.accumulation import AccumulationOrder, Fingerprint, NotASum, Tree, reveal
from bridge.case import Case
from bridge.numerics import same_bits
from bridge.process import last_line, run_module

#: Seconds after which a process is ended.
TIME_LIMIT = 300.0

#: Elements that are compared, at least.
LEAST_ELEMENTS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """An implementation of one sample, which computes it in a batch.

    Attributes:
      implementation: anything with a name and `.run(case)`.
      placement: the batch.
    """

    implementation: Any
    placement: Placement

    @property
    def name(self) -> str:
        return self.implementation.name

    def run(self, case: Case) -> np.ndarray:
        """Return the output of the sample, `(1, *output_spatial, C*M)`."""
        at = self.placement.position
        return self.implementation.run(self.placement.batch(case))[at : at + 1]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a sample under a condition.

    Attributes:
      y: the outputs of all samples; None if it could not be computed.
      order: its accumulation order, if it was revealed.
      error: why there is no output or no order.
    """

    y: np.ndarray | None = None
    order: AccumulationOrder | None = None
    error: str = ""


def samples(case: Case) -> list[Case]:
    """Return the case of one sample, and others with random numbers: two orders may agree on few elements by chance."""
    number = -(-LEAST_ELEMENTS // math.prod(case.geometry.output_shape))
    drawn = [case]
    for seed in range(1, number):
        rng = np.random.default_rng(seed)
        data = {
            name: None if given is None else np.asarray(rng.standard_normal(given.shape)).astype(case.dtype)
            for name, given in (("x", case.x), ("kernel", case.kernel), ("bias", case.bias))
        }
        drawn.append(case.replace(**data))
    return drawn


def results(each: Placed, case: Case) -> np.ndarray:
    """Return the outputs of all `samples`, along the first axis."""
    return np.concatenate([each.run(sample) for sample in samples(case)])


def compute(each: Placed, case: Case, reference: np.ndarray, explain: bool) -> Outcome:
    """Run one implementation on the samples; reveal its order if the bits are not those of the reference."""
    try:
        y = results(each, case)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return Outcome(error=_first_line(error))
    if not explain or same_bits(y, reference).all():
        return Outcome(y)
    return dataclasses.replace(order_of(each, case), y=y)


def order_of(each: Placed, case: Case) -> Outcome:
    """Return the accumulation order of an implementation on the sample, without its output."""
    try:
        return Outcome(order=reveal(each, case))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        return Outcome(error=_first_line(error))


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of the table, for a process of its own: a name, a batch, and the number of the reference output."""

    implementation: str
    placement: Placement
    reference: int


def compute_elsewhere(
    jobs: Sequence[Job],
    case: Case,
    references: Sequence[np.ndarray],
    explain: bool,
    environment: Mapping[str, str],
    stopped: threading.Event,
) -> list[Outcome]:
    """Return the outcome of each job, computed in a process with these variables; one that ends it has the reason.

    No further process starts once `stopped` is set.
    """
    found: list[Outcome] = []
    while (
        len(found) < len(jobs) and not stopped.is_set()
    ):  # if the process ends early, only the job that it worked on is lost
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_case(folder, case)
            for number, y in enumerate(references):
                np.save(folder / f"reference-{number}.npy", stored(y), allow_pickle=False)
            order = {"explain": explain, "jobs": [dataclasses.asdict(job) for job in jobs[len(found) :]]}
            (folder / "jobs.json").write_text(json.dumps(order))
            reason = ""
            try:
                done = run_module(__name__, str(folder), time_limit=TIME_LIMIT, environment=environment)
                if done.returncode:
                    reason = f"its process ended: {last_line(done.stderr)}"
            except TimeoutError as error:
                reason = str(error)
            for number in range(len(jobs) - len(found)):
                if not (folder / f"{number}.json").exists():
                    found.append(Outcome(error=reason or "its process ended without a result"))
                    break
                found.append(_load(folder, number, case))
    return found


def _save(folder: Path, number: int, outcome: Outcome) -> None:
    record: dict[str, Any] = {"error": outcome.error}
    if outcome.y is not None:
        np.save(folder / f"{number}-y.npy", stored(outcome.y), allow_pickle=False)
    if (order := outcome.order) is not None:
        record["order"] = {
            "implementation": order.implementation,
            "trees": list(map(str, order.trees)),
            "refusals": list(map(str, order.refusals)),
            "fingerprint": order.fingerprint.to_json(),
        }
        np.save(folder / f"{number}-labels.npy", order.labels, allow_pickle=False)
        np.save(folder / f"{number}-zero.npy", order.zero_start, allow_pickle=False)
    part = folder / f"{number}.part"
    part.write_text(json.dumps(record))
    part.rename(folder / f"{number}.json")


def _load(folder: Path, number: int, case: Case) -> Outcome:
    record = json.loads((folder / f"{number}.json").read_text())
    path = folder / f"{number}-y.npy"
    y = np.load(path, allow_pickle=False).view(case.dtype) if path.exists() else None
    order = None
    if "order" in record:
        found = record["order"]
        order = AccumulationOrder(
            found["implementation"],
            case.geometry,
            case.dtype,
            tuple(map(Tree.parse, found["trees"])),
            np.load(folder / f"{number}-labels.npy", allow_pickle=False),
            tuple(map(NotASum, found["refusals"])),
            np.load(folder / f"{number}-zero.npy", allow_pickle=False),
            Fingerprint.from_json(found["fingerprint"]),
        )
    return Outcome(y, order, record["error"])


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _main(folder: Path) -> None:
    case = load_case(folder)
    order = json.loads((folder / "jobs.json").read_text())
    for number, job in enumerate(order["jobs"]):
        reference = np.load(folder / f"reference-{job['reference']}.npy", allow_pickle=False).view(case.dtype)
        try:
            each = Placed(implementation(job["implementation"]), Placement(**job["placement"]))
        except (ValueError, ImportError) as error:
            _save(folder, number, Outcome(error=_first_line(error)))
            continue
        _save(folder, number, compute(each, case, reference, order["explain"]))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
