"""`jaxdw doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from bridge.cli.output import console, summarise
from bridge.environment import environment
from bridge.progress import log


def doctor(
    cases: Annotated[int, typer.Option(help="Random convolutions in the self-test.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the self-test.", min=0)] = 0,
) -> None:
    """Check this machine: versions and flags, PyTorch's bits in jaxdw, and JAX's compiler. Takes half a minute.

    Exit code 1: some bits differ, or the compiler has a bug that another version does not have.
    """
    from bridge import compiler_probes
    from bridge._implementations import implementations
    from bridge.requirements import untested
    from bridge.selftest import taps_against_torch

    facts = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in (environment() | {"implementations": ", ".join(implementations())}).items():
        facts.add_row(name, escape(value or "none"))
    console().print(facts, highlight=False)
    if line := untested():
        _print("", line)
    result = taps_against_torch(cases, seed)
    told = (
        f"Self-test: jax.taps matches torch.conv2d bit for bit on {result.equal} of {result.elements} elements "
        f"of {cases} random float32 convolutions."
    )
    _print("", told, *(f"  differs: {line}" for line in result.misses))
    multiplied = taps_against_torch(cases, seed, multiplier=2)
    _print(
        f"With a channel multiplier of 2, where no equal bits are promised (docs/why-they-differ.md): on "
        f"{multiplied.equal} of {multiplied.elements} elements."
    )
    outcomes = []
    for number, outcome in enumerate(compiler_probes.examine(compiler_probes.PROBES), start=1):
        log.info("compiler: %d of %d programs", number, len(compiler_probes.PROBES))
        outcomes.append(outcome)
    compiler = compiler_probes.listing(outcomes)
    _print("", *compiler)
    summarise(f"{told} {compiler[0]}")
    raise typer.Exit(1 if result.equal < result.elements or any(map(compiler_probes.avoidable, outcomes)) else 0)


def _print(*lines: str) -> None:
    console().print(*lines, sep="\n", highlight=False, markup=False)
