"""`jaxdw audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from bridge.case import DTYPES
from bridge.cli.cases import GeometryOptions
from bridge.cli.options import JsonOption
from bridge.cli.output import check_outputs, console, summarise
from bridge.cli.parse import parse_names
from bridge.files import write_atomically


def audit(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHOD...",
            help="A method of jaxdw, as taps or 'grouped[precision=highest]'; or auto; or your own JAX function of x "
            "and kernel as package.module:function. Default: all methods for the platform.",
        ),
    ] = None,
    *,
    on: Annotated[
        str, typer.Option("--platform", help="cpu, tpu:v5e, cuda:h100 and others; it need not be there.")
    ] = "cpu",
    layer: GeometryOptions,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float32",
    gradient: Annotated[
        bool, typer.Option("--gradient", help="Compile the gradients by input and kernel (and bias) instead.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="Precision for lax: default, high or highest, where METHOD names none.")
    ] = "default",
    json: JsonOption = None,
) -> None:
    """Compile each method for a platform that need not be there, and show what the compiler made of it.

    Nothing is run. Exit code 2: arguments are unusable, a named METHOD could not be compiled, or none could.
    """
    from bridge.audit import AuditSubject, platform
    from bridge.audit import audit as run_audit
    from bridge.report.audit import print_audit
    from bridge.report.audit_schema import AuditReport

    check_outputs("jaxdw.audit", json=json)
    if missing := platform(on).missing:
        raise ValueError(missing)
    subject = AuditSubject(layer.geometry(), dtype, layer.bias, gradient, precision)
    report = AuditReport.of(run_audit(parse_names(methods), subject, on))
    print_audit(report, console())
    if json is not None:
        write_atomically(json, report.to_json())
    failed = [each for each in report.findings if each.error]
    summarise(f"{len(report.findings) - len(failed)} of {len(report.findings)} methods were compiled for {on}")
    raise typer.Exit(2 if failed and (methods or len(failed) == len(report.findings)) else 0)
