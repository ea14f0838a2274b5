"""The report as people see it: in a browser, on a phone, on a desk, in the dark and on paper."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest

from hsat.report import write_report

pytestmark = pytest.mark.chromium
LONG = "a_model_whose_name_is_long_and_has_no_space_where_it_could_break_" * 2
MODELS = ("HiDisc", "<script>document.title='broken'</script>", LONG)

# What sticks out of the page to the right, unless a box of its own scrolls it.
OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 0.5 && !e.closest('.scroll') && !e.closest('details:not([open])');
}).map(e => e.tagName + '.' + e.className)"""

# Contrast of every piece of text against the nearest background that is not transparent (WCAG 2).
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = text => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const behind = e => { if (!e) return [255, 255, 255]; const c = rgba(getComputedStyle(e).backgroundColor);
    return c[3] === 255 ? c.slice(0, 3) : over(c, behind(e.parentElement)); };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.endsWith('svg');
    const ink = light(rgba(svg ? style.fill : style.color)), paper = light(behind(e));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) found.push(e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + ratio.toFixed(2));
  }
  return found; })()"""


@pytest.fixture(scope="module")
def page(made_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    made_run(folder / "run", models=MODELS)
    return write_report([folder / "run"], folder / "report.html", title="A & B <i>")


def test_it_opens_from_the_disk_without_complaints_or_network(chromium, page):
    chromium.open(page, width=1200)
    assert chromium.complaints() == []
    assert chromium.value("document.title") == "A & B <i>"
    assert chromium.value("document.compatMode") == "CSS1Compat"
    assert chromium.value("document.scripts.length") == 0


def test_the_browser_would_report_a_script_and_a_picture_from_the_network(chromium, page, tmp_path):
    bad = page.read_text().replace("<main>", "<main><script>x</script><img src='http://127.0.0.1:9/a.png' alt=''>")
    (tmp_path / "bad.html").write_text(bad)
    chromium.open(tmp_path / "bad.html", width=1200)
    assert any("Content Security Policy" in text for text in chromium.complaints())


def test_the_figures_are_there(chromium, page):
    chromium.open(page, width=1200)
    count = "document.querySelectorAll('{}').length"
    assert chromium.value(count.format("#numbers-1 svg.chart")) == 3 + 2 * len(MODELS)  # three levels, two maps each
    assert chromium.value(count.format("#training svg.chart")) == 2
    assert chromium.value(count.format("table.confusion")) == 2 * len(MODELS)
    assert chromium.value(count.format(".gallery img")) == 3 * 3 * len(MODELS)
    drawn = "[...document.querySelectorAll('svg.chart')].every(e => e.getBoundingClientRect().height > 100)"
    assert chromium.value(drawn)
    assert chromium.value("[...document.images].every(e => e.complete && e.naturalWidth === 12)")
    lines = "[...document.querySelectorAll('#numbers-1 g.{} path')].filter(e => e.getTotalLength() > 50).length"
    assert chromium.value(lines.format("line")) == chromium.value(lines.format("noise")) == 3 * len(MODELS)
    assert chromium.value(lines.format("band")) == 3 * len(MODELS)


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_overflows(chromium, page, width):
    chromium.open(page, width=width)
    assert chromium.value("innerWidth") == width
    assert chromium.value("document.documentElement.scrollWidth") <= width
    assert chromium.value(OVERFLOW) == []
    chromium.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert chromium.value("document.documentElement.scrollWidth") <= width
    assert chromium.value(OVERFLOW) == []


def test_wide_tables_scroll_in_their_own_box(chromium, page):
    chromium.open(page, width=390)
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert chromium.value(wide) >= 3
    assert chromium.value("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)")


# Boxes that scroll sideways, and whether a reader is told so.
HINTS = """[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).map(e => [
  e.scrollWidth > e.clientWidth, getComputedStyle(e, '::before').visibility === 'visible'])"""


@pytest.mark.parametrize("width", [390, 768, 1280, 1920])
def test_a_hint_stands_where_tables_scroll_and_nowhere_else(chromium, page, width):
    chromium.open(page, width=width)
    deadline = time.monotonic() + 10
    while True:  # hints come with the first frame that is drawn, which may be later than the page itself
        hints = chromium.value(HINTS)
        right = bool(hints) and all(scrolls == told for scrolls, told in hints)
        if right or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert right, hints
    if width == 390:
        assert any(told for _, told in hints)


def test_two_models_fit_on_a_phone_and_three_levels_on_a_wide_screen(chromium, made_run, tmp_path):
    made_run(tmp_path / "run", models=("HiDisc", "HSAT"))
    path = write_report([tmp_path / "run"], tmp_path / "report.html")
    chromium.open(path, width=390)
    assert not any(scrolls for scrolls, _ in chromium.value(HINTS)[:3])
    tops = "[...document.querySelectorAll('#numbers-1 > .levels')[0].children].map(e => e.getBoundingClientRect().top)"
    assert len(set(chromium.value(tops))) == 3
    chromium.open(path, width=1920)
    assert len(set(chromium.value(tops))) == 1


def test_names_at_the_ends_of_lines_do_not_overlap(chromium, made_run, tmp_path):
    made_run(tmp_path / "run", models=("HiDisc", "HSAT"))
    path = write_report([tmp_path / "run"], tmp_path / "report.html")
    for width in (390, 1280):
        chromium.open(path, width=width)
        overlapping = chromium.value("""[...document.querySelectorAll('#numbers-1 svg.chart')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
          return boxes.flatMap(([a, one], i) => boxes.slice(0, i).filter(([, two]) =>
            one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 3 && two.top < one.bottom - 3
          ).map(([b]) => a + ' over ' + b)); })""")
        assert overlapping == []
        inside = (
            "[...document.querySelectorAll('svg.chart text')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        )
        assert chromium.value(f"{inside}.length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background(chromium, page, dark):
    chromium.open(page, width=1200, dark=dark)
    body = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert (body == "rgb(255, 255, 255)") != dark
    assert chromium.value(CONTRAST) == []


def test_it_is_readable_without_seeing_it(chromium, page):
    chromium.open(page, width=1200)
    levels = chromium.value("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert chromium.value("[...document.images].every(e => e.alt.length > 8)")
    assert chromium.value("[...document.querySelectorAll('svg.chart')].every(e => e.getAttribute('aria-label'))")
    assert chromium.value("[...document.querySelectorAll('th')].every(e => e.scope)")
    assert chromium.value("[...document.querySelectorAll('a[href^=\"#\"]')].every(e => document.querySelector(e.hash))")
    assert chromium.value("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == chromium.value(
        "document.querySelectorAll('[id]').length"
    )


def test_it_prints_on_white_with_everything_open(chromium, page):
    chromium.open(page, width=794, dark=True, media="print")
    assert chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    hidden = "[...document.querySelectorAll('details table, details dl')].filter(e => !e.checkVisibility())"
    assert chromium.value(f"{hidden}.length") == 0
    pdf = chromium.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
