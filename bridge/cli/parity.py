"""`jaxdw parity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bridge.accumulation import MOST_TAPS, check_taps
from bridge.cli.cases import CaseOptions, allow_depth
from bridge.cli.options import FailOnOption, HtmlOption, JsonOption, MaxTapsOption
from bridge.cli.output import check_outputs, command_line, compiler_faults, console, exit_code, show
from bridge.cli.parse import parse_names
from bridge.diagnosis import parity as run_parity
from bridge.diagnosis.attribution import attribute as run_attribution
from bridge.diagnosis.attribution import most_different
from bridge.diagnosis.elimination import eliminate
from bridge.diagnosis.runs import CaseRuns
from bridge.files import write_atomically
from bridge.progress import log
from bridge.report import Report
from bridge.report.attribution import print_attribution, print_elimination
from bridge.report.bundle import check_new_folder, save_bundle
from bridge.report.html import to_html

#: The implementations that are compared by default with --transposed.
TRANSPOSED = ("torch.conv_transpose2d", "torch.conv2d", "jax.grouped", "jax.transpose", "jax.taps", "numpy.exact")


def parity(
    *,
    given: CaseOptions,
    implementations: Annotated[
        list[str] | None,
        typer.Option(
            help="Implementations to compare, separated by commas; the first is the reference. Your own function is "
            "module:function; alone it is compared with torch.conv2d. `jaxdw doctor` lists all others. Settings stand "
            "in brackets: jax.grouped[precision=tpu-default] rounds its operands as a TPU does."
        ),
    ] = None,
    max_taps: MaxTapsOption = MOST_TAPS,
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Compare the gradients by the input instead of the outputs.")
    ] = False,
    explain: Annotated[
        bool | None,
        typer.Option(
            "--explain/--no-explain",
            help="Reveal each accumulation order and replay it, to prove EXPLAINED. Default: if the output is small.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = None,
    html: HtmlOption = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Save inputs, outputs, environment and hashes in a new folder, for `replay`.")
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Take the implementation that differs most from the first: your own function, else one of another "
            "framework. Show which settings make up the difference, and what removes it. Takes about a minute.",
        ),
    ] = False,
    fail_on: FailOnOption = None,
) -> None:
    """Compare implementations of one depthwise convolution, and say what the difference is.

    Without arguments: the question's own case. The verdict decides the exit code:

    0 ROUNDING or stronger; 1 CONVENTION, BUG or NONFINITE; 3 PRECISION; 4 INCONCLUSIVE; 2 unusable arguments or files.
    """
    if gradient and (attribute or html is not None or bundle is not None):
        raise ValueError("`--gradient` goes with `--json`, not with `--attribute`, `--html` or `--bundle`")
    check_outputs("jaxdw.parity", json=json, html=html)
    if bundle is not None:
        check_new_folder(bundle)
    case = given.case()
    if explain:
        check_taps("--explain", case.geometry, max_taps)
    elif explain is None and case.geometry.taps > MOST_TAPS:
        log.warning("more than %d taps: no accumulation order is revealed without --explain --max-taps", MOST_TAPS)
    allow_depth(case.geometry.taps)
    dy = None
    if gradient:
        rng = np.random.default_rng(given.seed + 1)
        dy = np.asarray(rng.standard_normal(case.geometry.output_shape)).astype(case.dtype)
    diagnosis = run_parity(
        case,
        parse_names(implementations) or (TRANSPOSED if given.transposed else None),
        explain=explain,
        quantity="dx" if gradient else "y",
        dy=dy,
    )
    compiler = compiler_faults(diagnosis.names)
    show(diagnosis, compiler)
    attribution = elimination = None
    pair = most_different(diagnosis) if attribute else None
    if pair is not None:
        runs = CaseRuns(case)
        outputs = diagnosis.outputs[pair[0]], diagnosis.outputs[pair[1]]
        attribution = run_attribution(case, *pair, outputs=outputs, runs=runs)
        print_attribution(attribution, console())
        elimination = eliminate(case, *pair, runs=runs)
        print_elimination(elimination, console())
    if json is not None:
        write_atomically(json, Report.of(diagnosis, attribution, elimination, compiler).to_json())
    if html is not None:
        page = to_html(
            diagnosis,
            command=command_line(),
            attribution=attribution,
            elimination=elimination,
            compiler=compiler,
        )
        write_atomically(html, page)
    if bundle is not None:
        save_bundle(diagnosis, bundle)
    raise typer.Exit(exit_code(diagnosis.verdict, fail_on))
