"""Compile every method for TPUs on the layers of known networks. Nothing runs, and no TPU is needed.

python benchmarks/tpu.py [--platform tpu:v5e ...] [--layer 56x56x144:3:1 ...] [--batch 8] [--out tpu.json]

This needs the extra `tpu`, and takes about a quarter of an hour per platform. It shows the compiler's two estimates,
which often disagree. `optimal_seconds` counts bytes and little else; for a hand-written kernel it is what the kernel's
author wrote. `estimated_cycles` is from a model of costs, and for hand-written kernels a count of their instructions.
Neither is a measurement.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bridge.audit import PLATFORMS, AuditFinding, AuditSubject, platform
from bridge.audit.compiling import AuditMethod, compile_methods
from bridge.audit.findings import finding
from bridge.audit.platforms import Platform
from bridge.bench.figures import geometric_mean
from bridge.bench.schema import compact_json
from bridge.bench.suites import DepthwiseLayer, layers_of
from bridge.files import check_writable, write_atomically
from jaxdw.auto import choose

#: "auto" is one of the first two. It is not compiled again.
COMPILED = ("taps", "pallas", "grouped", "grouped[precision=highest]", "patches")
WAYS = ("auto", *COMPILED)


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parsed(arguments)
    if settings.out:
        check_writable(settings.out, "jaxdw.tpu")
    targets = [platform(name) for name in settings.platform or ("tpu:v5e", "tpu:v6e")]
    layers = settings.layer or list(layers_of("layers"))
    found: dict[str, Any] = {}
    for target in targets:
        if target.missing:
            print(target.missing, file=sys.stderr)
            return 2
        found[target.name] = audited(layers, settings.batch, target)
        show(target, settings.batch, found[target.name])
    if settings.out:
        versions = {name: version(name) for name in ("jax", "libtpu")}
        whole = {
            "schema": "jaxdw.tpu/1",
            "versions": versions,
            "batch": settings.batch,
            "dtype": "float32",
            "platforms": found,
        }
        write_atomically(settings.out, compact_json(whole, depth=3))
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tpus = [name for name in PLATFORMS if name.startswith("tpu:")]
    parser.add_argument("--platform", action="append", choices=tpus)
    parser.add_argument("--layer", action="append", default=[], help="height x width x channels:kernel:stride")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="a JSON file")
    settings = parser.parse_args(arguments)
    try:
        settings.layer = [DepthwiseLayer.parse(text, "--layer") for text in settings.layer]
    except ValueError as error:
        parser.error(str(error))
    return settings


def audited(layers: Sequence[DepthwiseLayer], batch: int, target: Platform) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the compiler's figures by layer and method."""
    jobs = [
        (layer, AuditMethod.parse(name), AuditSubject(layer.geometry(batch))) for layer in layers for name in COMPILED
    ]
    found: dict[str, dict[str, dict[str, Any]]] = {str(layer): {} for layer in layers}
    for (layer, way, subject), compiled in zip(jobs, compile_methods([job[1:] for job in jobs], target)):
        found[str(layer)][way.name] = numbers(finding(compiled, subject, target.backend))
    for layer in layers:
        method = choose(layer.geometry(batch), target.backend)
        found[str(layer)]["auto"] = {"method": method, **found[str(layer)][method]}
    return found


def numbers(found: AuditFinding) -> dict[str, Any]:
    if found.error:
        return {"error": found.error}
    return {
        "optimal_seconds": found.optimal_seconds,
        "estimated_cycles": found.estimated_cycles,
        "temporaries": found.temporaries,
        "narrowest": found.narrowest,
        "kernels": list(found.kernels),
    }


def show(target: Platform, batch: int, rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    table = Table(
        title=f"{target.name}, batch {batch}, float32, {len(rows)} layers",
        caption="A method's estimate over the estimate of auto: geometric mean and least, of optimal_seconds and of "
        "estimated_cycles. Temp.: the most temporaries, over the padded input.",
    )
    for column in ("method", "seconds", "least", "cycles", "least", "narrowest", "temp."):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for way in WAYS:
        good = [row[way] for row in rows.values() if "error" not in row[way]]
        narrowest = " ".join(sorted({each["narrowest"] for each in good}))
        temporaries = f"{max((each['temporaries'] for each in good), default=0):.2f}"
        estimates = (*ratios(rows, way, "optimal_seconds"), *ratios(rows, way, "estimated_cycles"))
        failed = f" ({len(rows) - len(good)} failed)" if len(good) < len(rows) else ""
        table.add_row(way.replace("[precision=highest]", ", highest") + failed, *estimates, narrowest, temporaries)
    Console().print(table)


def ratios(rows: dict[str, dict[str, dict[str, Any]]], way: str, estimate: str) -> tuple[str, str]:
    """Return the geometric mean and the least ratio, over the layers with that estimate for both."""
    pairs = [(row[way].get(estimate), row["auto"].get(estimate)) for row in rows.values()]
    found = [theirs / ours for theirs, ours in pairs if theirs and ours]
    return (f"{geometric_mean(found):.2f}", f"{min(found):.2f}") if found else ("", "")


if __name__ == "__main__":
    sys.exit(main())
