"""Options that several commands have; those that describe a convolution are in `bridge.cli.cases`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from bridge.diagnosis import Verdict

MaxTapsOption = Annotated[
    int, typer.Option(help="Taps of the largest window whose accumulation order is revealed.", min=1)
]
JsonOption = Annotated[Path | None, typer.Option(help="Write the report as JSON.")]
HtmlOption = Annotated[Path | None, typer.Option(help="Write the report as one HTML file that opens offline.")]
FailOnOption = Annotated[
    Verdict | None,
    typer.Option(
        help=f"Exit 1 on this verdict or a weaker one: {', '.join(Verdict)}.", metavar="VERDICT", case_sensitive=False
    ),
]


def take_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command for typer: a parameter that is a dataclass is replaced by its fields, which are options."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        each.name: each.annotation for each in signature.parameters.values() if is_dataclass(each.annotation)
    }
    options: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        if each.name not in groups:
            options.append(each)
            continue
        hints = get_type_hints(each.annotation, include_extras=True)
        options += [
            each.replace(name=field.name, default=field.default, annotation=hints[field.name])
            for field in fields(each.annotation)
        ]

    @functools.wraps(command)
    def grouping(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    grouping.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    grouping.__annotations__ = {each.name: each.annotation for each in options}
    return grouping
