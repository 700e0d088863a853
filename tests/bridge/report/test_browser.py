"""The HTML report in a real browser: headless Chromium, offline."""

import shutil

import pytest

from bridge.diagnosis import Verdict
from bridge.report.html import to_html, tone
from tests.bridge.report import planted

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on the PATH")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESKTOP, PHONE = (1280, 900), (390, 844)
KINDS = {"question": planted.question, "ordered": planted.ordered, **planted.KINDS}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in KINDS.items():
        text = to_html(make(request.config.option.seed), command="jaxdw parity", attribution=planted.Shares())
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


def show(browser, files, kind, size=DESKTOP, scheme="light"):
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    browser.get((files / f"{kind}.html").as_uri())


def luminance(colour):
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    channels = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_without_an_error_or_a_request(browser, files, kind):
    browser.get_log("performance")
    show(browser, files, kind)
    assert browser.get_log("browser") == []
    requested = [e["message"] for e in browser.get_log("performance") if "Network.requestWillBeSent" in e["message"]]
    assert all('"url":"file:///' in message or '"url":"data:' in message for message in requested)
    assert browser.title.split(":")[0] == browser.find_element("css selector", "h1").text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pictures_have_a_size_and_nothing_is_wider_than_the_page(browser, files, kind, size):
    show(browser, files, kind, size)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg, svg image')].map(e => { const b = e.getBoundingClientRect();"
        " return [b.width, b.height]; })"
    )
    assert boxes and all(width > 0 and height > 0 for width, height in boxes)
    page, window = browser.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth];")
    assert page <= window <= size[0]
    clipped = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert clipped == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identical"])
def test_heatmap_images_decode(browser, files, kind):
    show(browser, files, kind)
    script = (
        "const done = arguments[0]; Promise.all([...document.querySelectorAll('svg image')].map(async e => {"
        " const i = new Image(); i.src = e.href.baseVal; await i.decode(); return i.naturalWidth * i.naturalHeight; }))"
        ".then(done, error => done(String(error)))"
    )
    sizes = browser.execute_async_script(script)
    assert isinstance(sizes, list) and sizes and all(sizes)


@pytest.mark.parametrize("kind", ["question", "tap"])
def test_the_first_column_stays_in_place_and_every_other_column_can_be_seen_on_a_phone(browser, files, kind):
    show(browser, files, kind, PHONE)
    places = browser.execute_script(
        "return [...document.querySelectorAll('.scroll:has(> table)')].map(scroll => {"
        " scroll.closest('details')?.setAttribute('open', '');"
        " scroll.scrollLeft = scroll.scrollWidth; const box = scroll.getBoundingClientRect();"
        " const cells = scroll.querySelector('tbody tr').cells;"
        " const [first, last] = [cells[0], cells[cells.length - 1]].map(e => e.getBoundingClientRect());"
        " return [first.left - box.left, last.right - box.right, last.left - first.right]; })"
    )
    assert places
    for first, last, between in places:
        assert abs(first) <= 1 and last <= 1 and between >= -1


def test_text_is_copied_by_its_button_and_can_be_selected_without_it(browser, files):
    show(browser, files, "question")
    code = browser.find_element("id", "command-text")
    browser.find_element("css selector", "button[data-copies=command-text]").click()
    script = "const done = arguments[0]; navigator.clipboard.readText().then(done, () => done(String(getSelection())))"
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    assert browser.execute_async_script(script).strip() == code.text.strip()
    assert code.value_of_css_property("user-select") in ("auto", "text")


def test_text_of_charts_is_large_enough_on_a_phone(browser, files):
    show(browser, files, "question", PHONE)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('.chart text')].filter(e => e.getClientRects().length)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
    )
    assert heights and min(heights) >= 10.5


def column(browser, table, number):
    """The cells' texts, their sort values, and the directions that the heads announce."""
    script = (
        "const [table, k] = arguments, cells = [...table.tBodies[0].rows].map(row => row.cells[k]);"
        " return [cells.map(c => c.textContent), cells.map(c => c.dataset.sort),"
        " [...table.tHead.rows[0].cells].map(c => c.ariaSort)];"
    )
    return browser.execute_script(script, table, number)


@pytest.mark.parametrize("key", [None, "\ue007", " "], ids=["click", "enter", "space"])
def test_tables_sort_by_click_and_by_key(browser, files, key):
    show(browser, files, "question")
    for table in browser.find_elements("css selector", "table.sortable"):
        browser.execute_script("arguments[0].closest('details')?.setAttribute('open', '')", table)
        for number, button in enumerate(table.find_elements("css selector", "thead button")):
            numeric = button.get_attribute("data-kind") != "text"
            first = "descending" if numeric else "ascending"
            for direction in (first, {"ascending": "descending", "descending": "ascending"}[first]):
                button.send_keys(key) if key else button.click()
                texts, values, announced = column(browser, table, number)
                assert announced == [direction if n == number else None for n in range(len(announced))]
                values = [float(v) for v in values] if numeric else texts
                assert values == sorted(values, reverse=direction == "descending")
        if key:
            break


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["question", "tap"])
def test_text_stands_out_in_light_and_dark(browser, files, kind, scheme):
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5 at least."""
    show(browser, files, kind, scheme=scheme)
    page = browser.find_element("css selector", "body").value_of_css_property("background-color")
    assert (luminance(page) > 0.5) == (scheme == "light")
    badges = "".join(f'<span class="badge {tone(verdict)}">{verdict}</span>' for verdict in Verdict)
    browser.execute_script("document.querySelector('main').insertAdjacentHTML('beforeend', arguments[0])", badges)
    texts = browser.execute_script(
        "const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        " if (!c.startsWith('rgba(0, 0, 0, 0')) return c; } };"
        " const texts = 'h1, h2, h3, p, td, th, button, summary, figcaption, pre, svg text, .badge';"
        " return [...document.querySelectorAll(texts)]"
        ".map(e => [e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color, ground(e), e.outerHTML])"
    )
    poor = [(colour, ground, html) for colour, ground, html in texts if contrast(colour, ground) < 4.5]
    assert poor == []


def test_paper_shows_what_the_screen_folds_away(browser, files):
    show(browser, files, "question", scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page = browser.find_element("css selector", "body").value_of_css_property("background-color")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    opened = browser.execute_script("return [...document.querySelectorAll('details')].map(d => d.open)")
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    closed = browser.execute_script("return [...document.querySelectorAll('details')].map(d => d.open)")
    assert luminance(page) == pytest.approx(1.0, abs=1e-9) and all(opened) and not all(closed)
