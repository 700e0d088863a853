"""A census of many models, one after the other: one record per model, also of one that failed."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bridge._census.calls import CapturedCall
from bridge._census.census import diagnose
from bridge._census.record import CensusLayerRecord, CensusRecord, CensusSettings
from bridge._census.zoo import make
from bridge._implementations import ImplementationError
from bridge.diagnosis import Verdict
from bridge.environment import environment
from bridge.memory import lack_of_memory

_log = logging.getLogger("bridge")

Track = Callable[[Sequence[CapturedCall]], Iterable[CapturedCall]]


def survey(name: str, settings: CensusSettings, weights: Path | None = None, track: Track = iter) -> CensusRecord:
    """Make one model, run it, and diagnose its depthwise convolutions.

    The record of a model that cannot be made, run or diagnosed has an `error`, and the layers diagnosed before it.

    Args:
      name: as `bridge._census.zoo.expand` gives it.
      settings: of the model, its input and the comparison.
      weights: a checkpoint to load.
      track: wraps the loop over the captured calls, for a progress bar.
    """
    from bridge._census.capture import capture

    start = time.perf_counter()
    layers: list[CensusLayerRecord] = []
    idle: Sequence[str] = ()
    passed_over: Sequence[str] = ()
    error = ""
    with tempfile.TemporaryDirectory(prefix="jaxdw-census-") as folder:
        try:
            _log.info("%s: making it", name)
            asked = settings.model_dump(include={"size", "batch", "seed", "pretrained"})
            subject = make(name, weights=weights, **asked)
            _log.info("%s: running it", name)
            captured = capture(*subject, Path(folder))
            del subject  # its weights make room for the diagnosis
            idle, passed_over = captured.idle, captured.passed_over
            for call in track(captured.calls):
                before = time.perf_counter()
                found = diagnose(call, settings.implementations, explain=settings.explain)
                layers.append(CensusLayerRecord.of(found, time.perf_counter() - before))
        except (Exception, SystemExit) as failure:
            # a model is anybody's code, and may not fit into memory: the others go on
            named = isinstance(failure, (ValueError, ImplementationError))
            error = lack_of_memory(failure) or f"{'' if named else type(failure).__name__ + ': '}{failure}"
    _release_programs()
    return CensusRecord(
        model=name,
        settings=settings,
        environment=environment(),
        seconds=round(time.perf_counter() - start, 3),
        verdict=max((layer.verdict for layer in layers), key=Verdict.rank, default=None),
        layers=layers,
        idle=list(idle),
        passed_over=list(passed_over),
        error=" ".join(error.split()),
    )


def _release_programs() -> None:
    """Release JAX's compiled programs: two per geometry, about a megabyte each; models share few of them."""
    if "jax" in sys.modules:  # if an implementation brought it
        sys.modules["jax"].clear_caches()


def exit_code(records: Sequence[CensusRecord], fail_on: Verdict | None = None) -> int:
    """Return the exit code of the gravest result.

    1 for CONVENTION, BUG or NONFINITE; 2 if a model could not be run; 4 if INCONCLUSIVE or nothing was compared;
    3 for PRECISION; 0 else. With `fail_on` it is not 0 for this verdict or a weaker one.
    """
    verdicts = {record.verdict for record in records if record.verdict is not None}
    codes = {verdict.exit_code for verdict in verdicts} if verdicts else {Verdict.INCONCLUSIVE.exit_code}
    if any(record.error for record in records):
        codes.add(2)
    if fail_on is not None and any(verdict.rank() >= fail_on.rank() for verdict in verdicts):
        codes = codes - {0} or {1}
    return next(code for code in (1, 2, 4, 3, 0) if code in codes)
