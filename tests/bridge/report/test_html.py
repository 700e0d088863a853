"""The HTML report: whole in itself, well formed, and with the figures of the JSON."""

import dataclasses
import datetime
import html.parser
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bridge.diagnosis import Verdict
from bridge.diagnosis.elimination import Change, Elimination
from bridge.diagnosis.remedy import Remedy
from bridge.report import Report
from bridge.report import html as html_report
from bridge.report.html import symbol, to_html, tone
from bridge.report.orders import pictures
from bridge.report.pictures import ramp_css
from tests.bridge.report import planted

VOID = {"meta", "link", "br", "wbr", "img"}


class Page(html.parser.HTMLParser):
    """The elements of a page, with their text; raises where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        assert len(dict(attributes)) == len(attributes), f"an attribute twice: {tag} {attributes}"
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **wanted):
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in wanted.items())]


def page_of(diagnosis, **options):
    return Page(to_html(diagnosis, command="jaxdw parity --seed 1", **options))


@pytest.fixture(params=list(planted.KINDS))
def diagnosis(request, seed):
    return planted.KINDS[request.param](seed)


def test_nothing_is_asked_of_any_other_file(diagnosis):
    text = to_html(diagnosis, command="jaxdw parity", attribution=planted.Shares())
    for element in Page(text).elements:
        for name in ("src", "href", "srcset", "xlink:href", "action", "data"):
            assert element.get(name, "data:").startswith(("data:", "#")), element
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?:", text)
    assert "default-src 'none'" in Page(text).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_the_verdict_comes_first_with_its_meaning(diagnosis):
    page = page_of(diagnosis)
    headings = [e["text"].strip() for e in page.elements if e["tag"] in ("h1", "h2", "h3")]
    assert headings[0] == diagnosis.verdict and diagnosis.verdict.meaning in page.all("header")[0]["text"]


def test_every_picture_has_words_and_every_header_cell_a_scope(diagnosis):
    page = page_of(diagnosis, attribution=planted.Shares())
    for svg in page.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    ids = [e["id"] for e in page.elements if "id" in e]
    assert len(ids) == len(set(ids))
    assert {e["aria-labelledby"] for e in page.elements if "aria-labelledby" in e} <= set(ids)


def test_the_table_of_all_pairs_has_the_figures_of_the_json(seed):
    diagnosis = planted.question(seed)
    text = to_html(diagnosis, command="jaxdw parity")
    rows = re.findall(r'<tr><th scope="row">((?:[^<]|<wbr>)*)</th><td>((?:[^<]|<wbr>)*)</td>(.*?)</tr>', text, re.S)
    found = [
        (a.replace("<wbr>", ""), b.replace("<wbr>", ""), *re.findall('data-sort="(.*?)"', cells))
        for a, b, cells in rows
        if "data-sort" in cells
    ]
    expected = [
        (c.a, c.b, *map(str, (c.verdict.rank(), c.different, c.max_abs, c.max_ulp, c.max_bound_ratio)))
        for c in Report.of(diagnosis).comparisons
    ]
    assert found == expected


def test_the_same_diagnosis_gives_the_same_page(seed):
    diagnosis = planted.rounding(seed)
    options = {"command": "jaxdw parity", "written": datetime.datetime(2026, 11, 28, 9, 5, tzinfo=datetime.UTC)}
    page = to_html(diagnosis, **options)
    assert page == to_html(diagnosis, **options) and "2026-11-28 09:05 UTC" in page


def test_names_commands_and_causes_are_escaped(seed):
    made = planted.rounding(seed)
    diagnosis = planted.diagnosis_of(made.case.replace(name="<script>"), {"<b>&": made.outputs["up"]})
    page = page_of(diagnosis)
    assert len(page.all("script")) == 1 and not page.all("b&")
    assert "<b>&" in page.all("main")[0]["text"] and "<script>" in page.all("header")[0]["text"]
    hostile = [
        dataclasses.replace(each, implementation=f"<b>&'{each.implementation}") for each in planted.ordered(seed).orders
    ]
    assert len(page_of(dataclasses.replace(diagnosis, orders=hostile)).all("script")) == 1
    assert not page_of(dataclasses.replace(diagnosis, orders=hostile)).all("b&'")
    assert "--seed 1" in page.all("pre", id="command-text")[0]["text"]


def test_a_nan_on_one_side_is_said_and_drawn(seed):
    diagnosis = planted.one_sided_nan(seed)
    assert diagnosis.verdict is Verdict.NONFINITE
    page = page_of(diagnosis)
    assert any("not finite" in e["text"] for e in page.all("figcaption"))
    assert page.all("span", **{"class": "swatch bad"})


def test_the_contents_list_every_section(diagnosis):
    page = page_of(diagnosis)
    links = [e["href"].removeprefix("#") for e in page.all("a")]
    assert links == [e["id"] for e in page.all("section")]


def test_every_verdict_has_a_sign_of_its_own():
    assert len({symbol(verdict) for verdict in Verdict}) == len(Verdict)
    assert len({tone(verdict) for verdict in Verdict if verdict.passes}) == 3


def test_borders_are_folded_into_one_tree_and_the_diverging_addition_has_a_ring(seed):
    (pair,) = pictures(planted.ordered(seed).orders)
    assert [each.names for each in pair.drawings] == ["same", "up"]
    assert all(each.svg.count('class="ring"') == 1 for each in pair.drawings)
    same, up = pair.drawings
    assert "48 more" in same.caption and same.others == []
    assert "47 more" in up.caption and [caption for caption, _ in up.others] == [
        "1 of 336 elements, the first at (0, 0, 0, 0)"
    ]


def test_the_remedy_and_the_command_can_be_copied(seed):
    remedies = [Remedy("jax.windows", "jax", "y = f(x) < 1"), Remedy("torch.windows", "torch", "y = g(x)")]
    page = page_of(dataclasses.replace(planted.rounding(seed), remedies=remedies))
    (code,) = page.all("pre", id="fix-text")
    assert code["text"] == "# JAX\ny = f(x) < 1\n\n# PyTorch\ny = g(x)"
    assert [e["data-copies"] for e in page.all("button") if "data-copies" in e] == ["fix-text", "command-text"]


def test_a_verified_change_is_the_fix_where_no_remedy_keeps_the_windows(seed):
    change = Change("jax.taps", "jax.rows", ("flag",), ("<this>",), 1.0, 1.0)
    elimination = Elimination("jax.taps", "jax.grouped", False, [change], 3, [])
    page = page_of(planted.rounding(seed), elimination=elimination)
    assert "Use jax.rows instead of jax.grouped: write <this>." in page.all("p", **{"class": "fix"})[0]["text"]
    assert page.all("section", id="attribution")


def test_colours_of_maps_stand_out_from_both_pages():
    """WCAG 2.2, success criterion 1.4.11: the least difference has a contrast of 3 with cells of the same bits."""
    least = ramp_css().partition(",")[0].removeprefix("rgb(").rstrip(")").split()

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colour = luminance([int(c) / 255 for c in least])
    style = Path(html_report.__file__).with_name("page.css.jinja").read_text()
    for page in re.findall(r"--page: #(\w+)", style):
        ground = luminance([int(page[k : k + 2], 16) / 255 for k in (0, 2, 4)])
        low, high = sorted((colour, ground))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_what_is_not_given_has_no_section(seed):
    sections = [e["id"] for e in page_of(planted.identical(seed)).all("section")]
    assert sections == ["answer", "comparisons", "bits", "reproduce"]


def test_the_page_describes_its_sections_as_the_documentation_does(seed):
    page = page_of(planted.ordered(seed), attribution=planted.Shares())
    documented = re.findall(r"^- `(\w+)`:", (Path(__file__).parents[3] / "docs/report.md").read_text(), re.M)
    assert [e["id"] for e in page.all("section")] == documented


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2, 9, 3), "kernel_size": (3,)},
        {"shape": (9, 1), "kernel_size": (3,)},
        {"shape": (2, 4, 3, 5, 2), "kernel_size": (2, 3, 3)},
        {"shape": (3, 2, 6, 5, 2)},
        {"shape": (4, 5, 1)},
        {"shape": (1, 200, 5, 2)},
        {"dtype": ml_dtypes.bfloat16},
        {"dtype": np.float16},
        {"dtype": np.float64},
        {"shape": (0, 5, 5, 2)},
    ],
    ids=str,
)
def test_every_rank_shape_and_dtype_has_a_page(options, seed):
    page_of(planted.rounding(seed, **options))


def test_a_layer_of_a_real_model_stays_below_half_a_megabyte(seed):
    text = to_html(planted.rounding(seed, shape=(2, 56, 56, 64)), command="jaxdw parity")
    assert len(text) < 500_000
