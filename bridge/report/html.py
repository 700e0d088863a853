"""The diagnosis as one HTML file that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from bridge._implementations import is_exact
from bridge.case import Case
from bridge.console import printable
from bridge.diagnosis import Comparison, Diagnosis, Verdict
from bridge.diagnosis.attribution import Attribution
from bridge.diagnosis.elimination import Elimination
from bridge.environment import environment
from bridge.report import pictures
from bridge.report.answer import LIBRARY, answer, fix
from bridge.report.differences import Difference, bit_classes, differences
from bridge.report.orders import pictures as drawn_orders
from bridge.report.terminal import describe
from bridge.requirements import versions

#: How many pairs of classes get pictures, and how many channels of each a map.
_PAIRS, _CHANNELS = 4, 5

#: The class of colours of each verdict, and the sign that stands before it.
_TONES = {
    Verdict.IDENTICAL: ("identical", "="),
    Verdict.EXPLAINED: ("explained", "✓"),
    Verdict.ROUNDING: ("rounding", "≈"),
    Verdict.PRECISION: ("warn", "!"),
    Verdict.CONVENTION: ("fail", "≠"),
    Verdict.BUG: ("fail", "✗"),
    Verdict.NONFINITE: ("fail", "∞"),
    Verdict.INCONCLUSIVE: ("unknown", "?"),
}


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
    elimination: Elimination | None = None,
    compiler: Sequence[str] = (),
    written: datetime.datetime | None = None,
) -> str:
    """Return the whole report as a page.

    Args:
      diagnosis: what to show.
      command: the shell command that repeats it.
      attribution: shares of the difference, for the waterfall.
      elimination: the changes that remove the difference, for the remedy.
      compiler: what is wrong with JAX's compiler here, in sentences.
      written: the date of the report. Default: now.

    Returns:
      A document that asks for no other file.
    """
    classes = bit_classes(diagnosis)
    names = diagnosis.names
    references = [names[0]] + [name for name in names[1:] if is_exact(name)]
    return template("page.html.jinja").render(
        case=describe(diagnosis.case),
        verdict=diagnosis.verdict,
        meaning=diagnosis.verdict.meaning,
        fix=_fix(diagnosis, elimination),
        code="\n\n".join(f"# {LIBRARY[each.framework]}\n{each.code}" for each in diagnosis.remedies),
        calls=diagnosis.calls.values(),
        sentences=answer(diagnosis),
        compiler=compiler,
        findings=_findings(diagnosis),
        waterfall=attribution and pictures.waterfall(attribution),
        unit=attribution and attribution.unit,
        elimination=elimination,
        tables=[(a, [(b, diagnosis.between(a, b)) for b in names if b != a]) for a in references],
        comparisons=diagnosis.comparisons,
        integer_tests={test.implementation: test for test in diagnosis.integer_tests},
        graph=pictures.graph(diagnosis, classes),
        classes=classes,
        letters={name: each.letter for each in classes for name in each.names},
        pictured=[_pictured(each) for each in differences(diagnosis, pairs=_PAIRS, channels=_CHANNELS)],
        class_pairs=len(classes) * (len(classes) - 1) // 2,
        orders=drawn_orders(diagnosis.orders),
        settings=_settings(diagnosis.case),
        environment=environment(),
        command=command,
        **heading(written),
    )


def heading(written: datetime.datetime | None = None) -> dict[str, str]:
    """Return the date and the versions that stand at the head of a page."""
    moment = written or datetime.datetime.now(datetime.UTC)
    return {"date": f"{moment:%Y-%m-%d %H:%M %Z}".rstrip(), "version": versions()}


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """Return a template with its own filters beside those of all pages."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: type(value)(printable(value)) if isinstance(value, str) else value,
    )
    templates.filters |= {"tone": tone, "symbol": symbol, "contents": _contents, "breakable": _breakable, **filters}
    templates.globals["ramp"] = pictures.ramp_css()
    return templates.get_template(name)


def tone(verdict: Verdict | str) -> str:
    """Return the class of a verdict's colours: "identical", "explained", "rounding", "warn", "unknown" or "fail"."""
    return _TONES[Verdict(verdict)][0]


def symbol(verdict: Verdict | str) -> str:
    """Return the sign that stands before a verdict, so that its colour is not needed."""
    return _TONES[Verdict(verdict)][1]


def _contents(page: str) -> list[tuple[str, str]]:
    """Return (id, heading) of each section of a page."""
    found = re.findall(r'<h2 id="([\w-]+)-title">(.*?)</h2>', page)
    return [(anchor, markupsafe.Markup(title)) for anchor, title in found]


def _fix(diagnosis: Diagnosis, elimination: Elimination | None) -> str:
    """Return the fix of the diagnosis, or where no lines keep the windows, the least change that was verified."""
    if diagnosis.remedies or elimination is None or elimination.best is None:
        return fix(diagnosis)
    return elimination.sentences()[0]


def _breakable(name: str) -> markupsafe.Markup:
    """Return a name that may break after its dots, underscores, commas and colons, and before its brackets."""
    return markupsafe.Markup(re.sub(r"([._,:])|(\[)", r"\1<wbr>\2", str(markupsafe.escape(name))))


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
