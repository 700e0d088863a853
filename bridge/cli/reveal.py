"""`jaxdw reveal`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from bridge._implementations import implementation, is_exact
from bridge.accumulation import MOST_TAPS, check_taps
from bridge.accumulation import reveal as reveal_order
from bridge.cli.cases import CaseOptions, allow_depth
from bridge.cli.options import JsonOption, MaxTapsOption
from bridge.cli.output import check_outputs, console, summarise
from bridge.cli.parse import parse_names
from bridge.diagnosis import DEFAULT
from bridge.files import write_atomically
from bridge.progress import track
from bridge.report.orders import orders_to_json, print_orders
from bridge.report.terminal import describe


def reveal(
    implementations: Annotated[
        list[str] | None,
        typer.Argument(
            help="As `jaxdw doctor` lists them, or your own package.module:function. Default: those of `jaxdw parity`."
        ),
    ] = None,
    *,
    given: CaseOptions,
    every: Annotated[bool, typer.Option("--every", help="Show every class of elements, not the largest two.")] = False,
    max_taps: MaxTapsOption = MOST_TAPS,
    json: JsonOption = None,
) -> None:
    """Show in which order implementations add, whether they fuse multiply and add, and where two orders first diverge.

    Without options: on the question's own case. Exit code 4 if an element is no conventional sum.
    """
    check_outputs("jaxdw.reveal", json=json)
    case = given.case()
    check_taps("reveal", case.geometry, max_taps)
    allow_depth(case.geometry.taps)
    chosen = parse_names(implementations) or [name for name in DEFAULT if not is_exact(name)]
    found = (implementation(name, case) for name in chosen)
    orders = [reveal_order(each, case) for each in track(found, "revealing the accumulation order")]
    console().print(f"[bold]{escape(describe(case))}[/]\n", highlight=False)
    print_orders(orders, console(), every=every)
    whole = sum(order.revealed == 1 for order in orders)
    summarise(f"{whole} of {len(orders)} implementations are conventional sums in every element")
    if json is not None:
        write_atomically(json, orders_to_json(orders, case))
    raise typer.Exit(0 if whole == len(orders) else 4)
