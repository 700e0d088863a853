"""Run all rows of all suites, and make the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from bridge.bench import jax_peers, torch_peers
from bridge.bench.convnext import convnext_problem
from bridge.bench.copies import copy_bandwidth
from bridge.bench.measure import measure
from bridge.bench.models import model_problem
from bridge.bench.problems import problem, special_problem
from bridge.bench.scaling import scaling
from bridge.bench.schema import OURS, BenchReport, BenchSettings, RowRecord, SuiteRecord
from bridge.bench.suites import SPECIAL, SUITES, DepthwiseLayer, select
from bridge.environment import environment
from jaxdw.methods import METHODS

#: Iterates over the rows of a suite, and shows the progress.
Track = Callable[[Sequence[Any], str], Iterable[Any]]

#: The peers of each suite: the default ones, and the others that can be asked for.
PEERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layers": (
        ("torch", "torch.channels_last", "lax.grouped", "nnx.Conv"),
        ("torch.compile", "torch.unfold", "lax.patches"),
    ),
    "gradients": (
        ("torch", "torch.channels_last", "lax.grouped"),
        ("torch.compile", "torch.unfold", "nnx.Conv", "lax.patches"),
    ),
    "windows": (("torch.unfold", "lax.patches"), ("torch.compile",)),
    "blocks": (("torch", "torch.channels_last", "torch.compile"), ("lax.grouped",)),
    "convnext": (("torch", "torch.channels_last"), ("torch.compile", "lax.grouped")),
    "models": (("torch", "torch.channels_last", "torch.compile"), ("lax.grouped",)),
    "transposed": (("torch", "torch.channels_last", "lax.grouped"), ()),
    "causal": (("torch", "torch.channels_last", "lax.grouped"), ()),
    "large": (("torch", "torch.channels_last", "torch.fft", "fft"), ()),
}

#: The suites that `tune` can compare the methods on.
TUNED = ("layers", "gradients")


def check(settings: BenchSettings) -> None:
    """Raise ValueError if a suite or a peer is unknown, or if the filters select no row."""
    for suite in settings.suites:
        if suite not in SUITES:
            raise ValueError(f"`--suite` is {suite!r}, expected one of {', '.join(SUITES)} or all")
        if settings.tune and suite not in TUNED:
            raise ValueError(f"`--suite` is {suite!r} with `--tune`, expected one of {', '.join(TUNED)}")
    if not any(select(suite, settings.layers, settings.batch) for suite in settings.suites):
        raise ValueError(
            f"`--layers` is {', '.join(settings.layers)!r}, which selects no row of {', '.join(settings.suites)}; "
            "expected a part of a row's or of a network's name, as 56x56 or MobileNetV2, or a whole layer as "
            "56x56x144:3:2"
        )
    suites = [suite for suite in settings.suites if suite in PEERS]
    known = list(dict.fromkeys(peer for suite in suites for peer in (*PEERS[suite][0], *PEERS[suite][1])))
    for peer in settings.peers:
        if peer not in known and settings.peers not in (("default",), ("all",)):
            raise ValueError(
                f"`--peers` is {', '.join(settings.peers)!r}, expected default, all, or some of {', '.join(known)}"
            )


def run(settings: BenchSettings, track: Track = lambda rows, _: rows) -> BenchReport:
    """Measure everything that the settings ask for.

    Raises:
      ValueError: settings that `check` refuses.
    """
    check(settings)
    began = time.perf_counter()
    rows = {suite: select(suite, settings.layers, settings.batch) for suite in settings.suites}
    suites = [
        _suite(suite, rows[suite], settings, track) for suite in settings.suites if suite in PEERS and rows[suite]
    ]
    moved = [row.nbytes for suite in suites for row in suite.rows if row.nbytes is not None]
    copies = [] if settings.tune or not moved else copy_bandwidth(max(moved), settings.seed)
    base = next(iter(rows.get("scaling", ())), None)
    scales = [] if base is None else scaling(DepthwiseLayer.parse(base), settings, track)
    return BenchReport(
        environment=environment() | _circumstances(),
        settings=settings,
        copies=copies,
        suites=suites,
        scaling=scales,
        base=base,
        seconds=time.perf_counter() - began,
    )


def _suite(suite: str, rows: Mapping[str, tuple[str, ...]], settings: BenchSettings, track: Track) -> SuiteRecord:
    began = time.perf_counter()
    peers, skipped = ((), _untimed()) if settings.tune else chosen_peers(suite, settings.peers)
    records = []
    for name in track(list(rows), suite):
        if suite == "models":
            each = model_problem(name, settings.size, settings.seed)
        elif suite in SPECIAL:
            each = special_problem(suite, name, rows[name], settings.batch, settings.seed)
        elif suite == "convnext":
            each = convnext_problem(name, rows[name], settings.batch, settings.seed)
        else:
            each = problem(suite, name, rows[name], settings.batch, settings.seed)
        if settings.tune:
            ways = [jax_peers.method_way(each, method) for method in METHODS if method not in skipped]
        else:
            ways = jax_peers.ways(each, [OURS]) + torch_peers.ways(each, peers) + jax_peers.ways(each, peers)
        records.append(
            RowRecord(
                name=name,
                networks=each.networks,
                batch=len(next(iter(each.inputs[0].values()))),
                nbytes=each.nbytes,
                flops=each.flops,
                ways=measure(each, ways, settings.rounds, settings.seed, alone=settings.alone),
                auto=jax_peers.auto_method(each) if settings.tune else None,
            )
        )
    return SuiteRecord.of(suite, records, skipped, time.perf_counter() - began)


def chosen_peers(suite: str, asked: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the peers that were asked for and are available, and the reasons for those that are not."""
    default, more = PEERS[suite]
    known = (*default, *more)
    groups: dict[tuple[str, ...], tuple[str, ...]] = {("default",): default, ("all",): known}
    names = groups.get(tuple(asked)) or tuple(name for name in known if name in asked)
    if "torch.compile" in names and (reason := torch_peers.compile_problem()):
        return tuple(name for name in names if name != "torch.compile"), {"torch.compile": reason}
    return names, {}


def _untimed() -> dict[str, str]:
    """Return the methods that `tune` leaves out, and the reasons."""
    reasons = {"fft": "its sums of whole numbers are not exact, as is checked here; the suite large times it"}
    if jax.default_backend() == "cpu":
        reasons["pallas"] = "a CPU interprets its kernels operation by operation, so its time says nothing about them"
    return reasons


def _circumstances() -> dict[str, str]:
    """Return what affects speed, besides the versions."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "logical processors used": str(available),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "jax platform": jax.default_backend(),
    }
