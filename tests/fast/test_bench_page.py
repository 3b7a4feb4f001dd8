"""The page of `bench report` in a real browser: what a person sees of it, by day and by night, wide and narrow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.measure.bench import Benchmark
from sparkinstall.measure.compare import compare
from sparkinstall.measure.report import html
from tests.support.browser import Page, browser

RECORD = Path(__file__).parents[1] / "cases/bench/vllm-0.18.1-cpu.json"
WIDE, NARROW = 1280, 400

LOOKED_AT = """
(() => {
  const shown = [], wrong = [];
  for (const each of document.querySelectorAll("details")) each.open = true;
  const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = text => rgb(text).map(each => each / 255)
    .map(each => each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
  const page = light(getComputedStyle(document.documentElement).backgroundColor);
  const contrast = colour => (Math.max(page, light(colour)) + 0.05) / (Math.min(page, light(colour)) + 0.05);
  const say = (what, of) => wrong.push(`${what}: ${of.outerHTML.slice(0, 120)}`);
  const within = (inner, outer, by = 0.5) => inner.left >= outer.left - by && inner.right <= outer.right + by
    && inner.top >= outer.top - by && inner.bottom <= outer.bottom + by;
  const apart = (one, two) => one.right <= two.left || two.right <= one.left || one.bottom <= two.top
    || two.bottom <= one.top;
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) wrong.push("the page is too wide");
  for (const each of document.querySelectorAll("h1, h2, h3, p, li, summary, figcaption, th, td, .names, svg text")) {
    const style = getComputedStyle(each), box = each.getBoundingClientRect();
    if (!each.textContent.trim()) continue;
    if (contrast(each.closest("svg") ? style.fill : style.color) < 4.5) say("too pale", each);
    if (!box.width || !box.height || style.visibility !== "visible" || style.opacity !== "1") say("not visible", each);
    // A table scrolls, a cell does not.
    if (!each.closest("svg") && each.scrollWidth > each.clientWidth + 1) say("cut off", each);
  }
  for (const plot of document.querySelectorAll("figure > svg")) {
    const outer = plot.getBoundingClientRect(), words = [...plot.querySelectorAll("text")];
    const boxes = words.map(each => each.getBoundingClientRect());
    words.forEach((each, at) => {
      if (!within(boxes[at], outer)) say("outside of its plot", each);
      if (boxes.some((other, to) => to > at && !apart(boxes[at], other))) say("over other words", each);
      if (boxes[at].height < 8) say("too small", each);
    });
    let points = 0;
    for (const each of plot.querySelectorAll("circle, polyline")) {
      each.scrollIntoView({block: "nearest", inline: "nearest"});
      const box = each.getBoundingClientRect();
      if (!within(box, plot.getBoundingClientRect(), 5)) say("outside of its plot", each);
      if (contrast(getComputedStyle(each).stroke === "none" ? getComputedStyle(each).fill
        : getComputedStyle(each).stroke) < 3) say("too pale", each);
      if (each.tagName !== "circle" || each.getAttribute("fill") === "none") continue;
      const top = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
      if (!top || !["circle", "polyline"].includes(top.tagName)) say("covered", each); else points += 1;
    }
    shown.push({title: plot.getAttribute("aria-label"), points, wide: outer.width, high: outer.height});
  }
  return {shown, wrong};
})()
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as started:
        yield started


@pytest.fixture
def record() -> Benchmark:
    return msgspec.json.decode(RECORD.read_bytes(), type=Benchmark)


def written(tmp_path: Path, *records: tuple[str, Benchmark]) -> Path:
    (first, base), *others = records
    compared = [compare(base, each, (first, name)) for name, each in others]
    (file := tmp_path / "page.html").write_text(html(records, compared))
    return file


def seen(page: Page, file: Path, width: int = WIDE, *, dark: bool = False) -> dict[str, Any]:
    page.show(file, width, dark=dark)
    found: dict[str, Any] = page.value(LOOKED_AT)
    return found


def many(record: Benchmark) -> Benchmark:
    """As much as a page gets: five scenarios and four levels, of two texts, with large numbers."""
    names = ("58/2", "1834/32", "7234/32", "1834/108", "7234/124")
    scenarios = [
        replace(record.scenarios[-1], name=f"{name} {text}", decode=[1_234_567.0, 20_000.0, 30_000.0], text=text)
        for text in ("prose", "code")
        for name in names
    ]
    levels = [
        replace(record.levels[0], name=f"{at} at once {text}", concurrency=at, text=text, tokens_per_second=at * 1000)
        for text in ("prose", "code")
        for at in (1, 2, 4, 1024)
    ]
    return replace(record, scenarios=scenarios, levels=levels)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_page_is_legible(page: Page, record: Benchmark, tmp_path: Path, width: int, dark: bool) -> None:
    file = written(tmp_path, ("before", record), ("after-an-update-of-the-driver", many(record)), ("third", record))
    found = seen(page, file, width, dark=dark)
    assert found["wrong"] == []
    assert len(found["shown"]) == 7
    for plot in found["shown"]:
        assert plot["points"] and plot["wide"] > 300 and plot["high"] > 150, plot
    assert (page.asked, page.said) == ([file.as_uri()], [])
    assert page.value("matchMedia('(prefers-color-scheme: dark)').matches") is dark


def test_page_of_one_record_shows_each_result(page: Page, record: Benchmark, tmp_path: Path) -> None:
    found = seen(page, written(tmp_path, ("a", record)))
    points = {each["title"]: each["points"] for each in found["shown"]}
    assert points["Throughput, generated tokens a second"] == len(record.levels)
    assert points["Time to first token, one at a time, ms"] == len(record.scenarios)
    assert points["Whole request (E2E), ms"] == 3 * len(record.levels)
    # What a pointer on a point says.
    told = page.value("[...document.querySelectorAll('circle > title')].map(each => each.textContent)")
    assert f"a, 2 prose: {record.levels[1].tokens_per_second:,.4g}" in told


def test_lines_join_the_levels_of_one_text_only(page: Page, record: Benchmark, tmp_path: Path) -> None:
    assert seen(page, written(tmp_path, ("a", many(record))))["wrong"] == []
    count = "document.querySelector('[aria-label^=Throughput]').querySelectorAll('polyline')"
    assert page.value(f"[...{count}].map(each => each.points.length)") == [4, 4]
    # Many categories have a row of their own, and nothing is behind an edge.
    wide = "[...document.querySelectorAll('figure')].map(each => each.scrollWidth <= each.clientWidth)"
    assert set(page.value(wide)) == {True}


def test_page_without_a_common_result_says_so_instead_of_an_empty_table(
    page: Page, record: Benchmark, tmp_path: Path
) -> None:
    file = written(tmp_path, ("a", replace(record, levels=())), ("b", replace(record, scenarios=())))
    assert seen(page, file)["wrong"] == []
    assert page.value("[...document.querySelectorAll('table')].every(each => each.tBodies[0].rows.length > 0)") is True
    assert page.value("document.body.innerText.includes('no result is in both and to be used')") is True


def test_warnings_are_open_and_notes_are_one_click_away(page: Page, record: Benchmark, tmp_path: Path) -> None:
    page.show(written(tmp_path, ("a", record)), WIDE)
    visible = "[...document.querySelectorAll('li')].filter(each => each.checkVisibility()).map(each => each.className)"
    assert set(page.value(visible)) == {"warning"}
    assert page.value("[...document.querySelectorAll('summary')].map(each => each.innerText)") == [
        "4 warnings",
        "8 notes",
    ]
    page.value("document.querySelectorAll('summary')[1].click()")
    assert set(page.value(visible)) == {"warning", "note"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("svg text { font-size: 40px }", "over other words"),
        ("svg text { transform: translateX(-60px) }", "outside of its plot"),
        (".c0 { color: #fafafa }", "too pale"),
        ("figure { display: none }", "not visible"),
        ("td { max-width: 2em; overflow: hidden }", "cut off"),
        ("figure { position: relative } figure::after { content: ''; position: absolute; inset: 0 }", "covered"),
        ("body { min-width: 3000px }", "the page is too wide"),
    ],
)
def test_what_is_not_legible_is_named(page: Page, record: Benchmark, tmp_path: Path, change: str, named: str) -> None:
    file = written(tmp_path, ("a", record))
    file.write_text(file.read_text().replace("</style>", f"{change}</style>"))
    assert any(each.startswith(named) for each in seen(page, file)["wrong"])


def test_what_is_asked_and_said_is_noticed(page: Page, record: Benchmark, tmp_path: Path) -> None:
    file = written(tmp_path, ("a", record))
    more = "<img src='http://127.0.0.1:9/x.png'><script>console.log('a'); none()</script>"
    file.write_text(file.read_text().replace("</body>", f"{more}</body>"))
    page.show(file, WIDE)
    assert page.asked == [file.as_uri(), "http://127.0.0.1:9/x.png"]
    assert any("none is not defined" in each for each in page.said) and len(page.said) >= 2
