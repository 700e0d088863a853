"""The diagnosis as one HTML file that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from bridge._implementations import is_exact
from bridge.case import Case
from bridge.console import printable
from bridge.diagnosis import Comparison, Diagnosis, Verdict
from bridge.diagnosis.attribution import Attribution
from bridge.environment import environment
from bridge.report import pictures
from bridge.report.answer import answer
from bridge.report.differences import Difference, bit_classes, differences
from bridge.report.terminal import describe

#: How many pairs of classes get pictures, and how many channels of each a map.
_PAIRS, _CHANNELS = 4, 5

_WARNS = (Verdict.PRECISION, Verdict.INCONCLUSIVE)


@dataclasses.dataclass(frozen=True)
class GroupedFinding:
    """A verdict with its name, cause, fix and place, and all pairs or integer tests that it was found in."""

    verdict: Verdict
    name: str
    cause: str
    fix: str
    place: str
    found_in: list[str]


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A pair with its pictures."""

    difference: Difference
    heatmaps: list[pictures.Heatmap]
    charts: list[pictures.Chart]


def to_html(
    diagnosis: Diagnosis,
    *,
    command: str,
    attribution: Attribution | None = None,
    orders: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    compiler: Sequence[str] = (),
) -> str:
    """Return the whole report as a page.

    Args:
      diagnosis: what to show.
      command: the shell command that repeats it.
      attribution: shares of the difference, for the waterfall.
      orders: for the names of implementations with one order, each distinct tree as (caption, `<svg>` element).
      compiler: what is wrong with JAX's compiler here, in sentences.

    Returns:
      A document that asks for no other file, and looks the same whenever it is written from the same diagnosis on
      the same machine.
    """
    classes = bit_classes(diagnosis)
    names = diagnosis.names
    references = [names[0]] + [name for name in names[1:] if is_exact(name)]
    return template("page.html.jinja", breakable=_breakable).render(
        case=describe(diagnosis.case),
        verdict=diagnosis.verdict,
        meaning=diagnosis.verdict.meaning,
        sentences=answer(diagnosis),
        compiler=compiler,
        findings=_findings(diagnosis),
        waterfall=attribution and pictures.waterfall(attribution),
        unit=attribution and attribution.unit,
        tables=[(a, [(b, diagnosis.between(a, b)) for b in names if b != a]) for a in references],
        comparisons=diagnosis.comparisons,
        integer_tests=diagnosis.integer_tests,
        graph=pictures.graph(diagnosis, classes),
        classes=classes,
        letters={name: each.letter for each in classes for name in each.names},
        pictured=[_pictured(each) for each in differences(diagnosis, pairs=_PAIRS, channels=_CHANNELS)],
        class_pairs=len(classes) * (len(classes) - 1) // 2,
        orders=orders or {},
        settings=_settings(diagnosis.case),
        environment=environment(),
        command=command,
    )


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Return a template; all have the filter `tone` and the colours of the maps, `ramp`."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    templates.filters |= {"tone": tone, **filters}
    templates.globals["ramp"] = pictures.ramp_css()
    return templates.get_template(name)


def tone(verdict: Verdict | str) -> str:
    """Return the colour of a verdict: "pass", "warn" or "fail"."""
    verdict = Verdict(verdict)
    return "pass" if verdict.passes else "warn" if verdict in _WARNS else "fail"


def _breakable(name: str) -> markupsafe.Markup:
    """Return a name that may break after its dots, underscores and commas, and before its brackets."""
    return markupsafe.Markup(re.sub(r"([._,])|(\[)", r"\1<wbr>\2", str(markupsafe.escape(name))))


def _pictured(each: Difference) -> Pictured:
    charts = [pictures.ulp_chart(each.ulp), pictures.ratio_chart(each.ratio)]
    if len(each.by_channel) > 1:
        charts.append(pictures.channel_chart(each.by_channel))
    return Pictured(each, [pictures.heatmap(one, each.scale or 1.0) for one in each.maps], charts)


def _findings(diagnosis: Diagnosis) -> list[GroupedFinding]:
    """Return what was found, weakest verdict first; equal verdict, name, cause, fix and place are one finding."""
    found: dict[tuple[Verdict, str, str, str, str], GroupedFinding] = {}

    def add(verdict: Verdict, c: Comparison, where: str) -> None:
        key = (verdict, c.name, c.cause, c.fix, c.place)
        found.setdefault(key, GroupedFinding(*key, [])).found_in.append(where)

    for c in diagnosis.comparisons:
        if c.verdict is not Verdict.IDENTICAL:
            add(c.verdict, c, f"{c.a} and {c.b}")
    for test in diagnosis.integer_tests:
        if not test.passed:
            add(test.verdict, test.comparison, f"{test.implementation} on small integers")
    return sorted(found.values(), key=lambda finding: -finding.verdict.rank())


def _settings(case: Case) -> dict[str, str]:
    """Return the case, row by row."""
    g = case.geometry
    return {
        "input": f"{g.x_shape}, channels last",
        "kernel": str(g.kernel_shape),
        "bias": "none" if case.bias is None else str(case.bias.shape),
        "output": str(g.output_shape),
        "dtype": case.dtype.name,
        "strides": str(g.strides),
        "padding": f"{g.padding} of {g.padding_mode}",
        "kernel dilation": str(g.kernel_dilation),
        "input dilation": str(g.input_dilation),
        "products per output": str(g.taps),
    }
