"""`bench compare` and `bench report`, with records that a real vLLM gave (tests/cases/bench), and changed ones."""

import errno
import html
import io
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from sparkinstall.cli import bench as cli
from sparkinstall.cli import output_file
from sparkinstall.measure import plots
from sparkinstall.measure.bench import Benchmark
from sparkinstall.measure.compare import Change, circumstances, compare
from sparkinstall.measure.report import number, percent
from sparkinstall.measure.results import LevelResult, Note, Request, ScenarioResult, percentiles
from tests.support.rehearsals import envelope, in_this_process

CASES = Path(__file__).parents[1] / "cases/bench"
RECORD = CASES / "vllm-0.18.1-cpu.json"


@pytest.fixture
def record() -> Benchmark:
    return msgspec.json.decode(RECORD.read_bytes(), type=Benchmark)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, Benchmark], str]:
    def write(name: str, of: Benchmark) -> str:
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(of))
        return str(tmp_path / f"{name}.json")

    return write


def level(of: Benchmark, *, factor: float = 1.0, seed: int = 0, count: int = 32) -> Benchmark:
    """The record with one level of drawn times, that are longer by a factor."""
    drawn, (first, *_) = random.Random(seed), of.levels
    requests = [slower(Request(100, 9, 100.0, 300.0, []), factor * drawn.gauss(1, 0.05)) for _ in range(count)]
    speed = 9000 / (sum(each.total for each in requests) / count)
    return replace(of, scenarios=(), levels=(replace(first, raw=requests, notes=(), tokens_per_second=speed),))


def slower(of: Request, factor: float) -> Request:
    return replace(of, ttft=of.ttft * factor, total=of.total * factor)


def changes(base: Benchmark, other: Benchmark) -> dict[str, Change]:
    return {each.metric: each for each in compare(base, other, ("a", "b")).changes}


# --- noise


def test_two_draws_of_the_same_times_differ_by_noise(record: Benchmark) -> None:
    for seed in range(1, 8):
        found = changes(level(record), level(record, seed=seed))
        assert {each.verdict for each in found.values()} == {"noise"}, found


def test_a_difference_beyond_the_spread_is_told_with_its_direction(record: Benchmark) -> None:
    found = changes(level(record), level(record, factor=1.2, seed=1))
    assert {name: each.verdict for name, each in found.items()} == dict.fromkeys(
        ("TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "E2E p50", "E2E p95", "throughput"), "worse"
    )
    assert all(each.low <= each.change <= each.high for each in found.values())
    assert found["throughput"].change == pytest.approx(1 / 1.2 - 1, abs=0.02)
    assert {each.verdict for each in changes(level(record, factor=1.2, seed=1), level(record)).values()} == {"better"}


def test_less_than_two_percent_is_noise_however_small_the_spread(record: Benchmark) -> None:
    exact = replace(level(record).levels[0], raw=[Request(100, 9, 100.0, 300.0, [])] * 32)
    base = replace(record, scenarios=(), levels=(exact,))
    other = replace(base, levels=(replace(exact, raw=[slower(each, 1.015) for each in exact.raw]),))
    assert changes(base, other)["TTFT p50"].verdict == "noise"
    other = replace(base, levels=(replace(exact, raw=[slower(each, 1.03) for each in exact.raw]),))
    assert changes(base, other)["TTFT p50"].verdict == "worse"


def test_three_requests_tell_only_large_differences(record: Benchmark) -> None:
    def three(*ttft: float) -> Benchmark:
        raw = [Request(100, 9, each, 3 * each, []) for each in ttft]
        return replace(record, levels=(), scenarios=(replace(record.scenarios[1], raw=raw, notes=(), tokens=9),))

    assert changes(three(100, 101, 102), three(106, 107, 108))["TTFT p50"].verdict == "noise"
    assert changes(three(100, 101, 102), three(126, 127, 128))["TTFT p50"].verdict == "worse"
    assert changes(three(100, 101, 140), three(126, 127, 128))["TTFT p50"].verdict == "noise"


def test_numbers_are_those_of_all_requests_and_the_intervals_those_of_drawn_ones(record: Benchmark) -> None:
    one = level(record)
    found, raw = changes(one, one), one.levels[0].raw
    for metric, values in (("TTFT", [each.ttft for each in raw]), ("E2E", [each.total for each in raw])):
        told = percentiles(values)
        assert told and (found[f"{metric} p50"].base, found[f"{metric} p95"].other) == (told.p50, told.p95)
    assert all(each.low < 0 < each.high for each in found.values()), "each record has draws of its own"


def test_a_comparison_is_the_same_each_time(record: Benchmark) -> None:
    assert compare(record, level(record, seed=3), ("a", "b")) == compare(record, level(record, seed=3), ("a", "b"))


# --- what is not comparable


def test_what_is_not_to_be_used_is_left_out(record: Benchmark) -> None:
    wrong = replace(record.scenarios[0], notes=(Note("error", "others were served"),))
    found = compare(replace(record, scenarios=(wrong, *record.scenarios[1:])), record, ("a", "b"))
    assert found.left_out == (f"{wrong.name}: not to be used in a",)
    assert wrong.name not in {each.name for each in found.changes}
    found = compare(replace(record, levels=()), record, ("a", "b"))
    assert found.left_out == tuple(f"{each.name}: only in b" for each in record.levels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda of: replace(of, served=replace(of.served, root="/models/other")), "model: tiny / other"),
        (lambda of: replace(of, options=replace(of.options, cached=True)), "prompts: new / sent before"),
        (lambda of: replace(of, prompts=2), "texts of the prompts: 1 / 2"),
    ],
)
def test_compare_refuses_other_work_and_says_what_differs(
    change: Callable[[Benchmark], Benchmark], said: str, record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    words = ("bench", "compare", written("a", record), written("b", change(record)), "--json")
    run = in_this_process(*words)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["message"], error["cause"]) == (2, "b is not comparable with a", said)
    assert in_this_process(*words, "--anyway").returncode == 0


def test_compare_refuses_records_without_a_common_result(
    record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    one, two = replace(record, levels=()), replace(record, scenarios=())
    run = in_this_process("bench", "compare", written("a", one), written("b", two), "--json")
    assert envelope(run)["errors"][0]["message"] == "a and b have no result in common"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "is no record of `bench`"),
        ("none", "is no record of `bench`"),
        ('{"format": 99}', "has format 99, and this sparkinstall knows 1"),
        (re.sub(r'"ttft": ([\d.])', r'"ttft": -\1', RECORD.read_text()), "is damaged: "),
        (re.sub(r'"total": [\d.]+', '"total": 0', RECORD.read_text()), "is damaged: "),
        (re.sub(r'"p50": [\d.]+', '"p50": 1e308', RECORD.read_text()), "is damaged: "),
    ],
)
def test_compare_refuses_what_is_no_record(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    run = in_this_process("bench", "compare", str(RECORD), str(tmp_path / "x.json"), "--json")
    assert run.returncode == 2 and said in envelope(run)["errors"][0]["message"]
    missing = in_this_process("bench", "compare", str(RECORD), str(tmp_path / "none.json"), "--json")
    assert "cannot be read" in envelope(missing)["errors"][0]["message"]
    assert in_this_process("bench", "compare", str(RECORD), "--json").returncode == 2
    assert in_this_process("bench", "compare", str(RECORD), str(RECORD), "--json").returncode == 2


# --- what differs around them


def test_circumstances_name_what_was_not_the_same(record: Benchmark) -> None:
    served = record.served
    assert served.process and record.host and record.before
    env = {**served.process.env, "NCCL_DEBUG": "INFO", "INVOCATION_ID": "other"}
    process = replace(served.process, argv=[*served.process.argv, "--async-scheduling"], env=env, pid=1)
    memory = replace(record.before.memory, free_blocks={4: 1000, 32768: 0})
    other = replace(
        record,
        served=replace(served, process=process, vllm="0.29.0", versions={"vllm": "0.29.0"}),
        host=replace(record.host, kho="kho=off"),
        before=replace(record.before, memory=memory, uptime=5.0),
    )
    base = replace(record, before=replace(record.before, memory=replace(memory, free_blocks={32768: 65536})))
    found = {each.what: (each.base, each.other) for each in circumstances(base, other)}
    assert found["vLLM"] == (served.vllm, "0.29.0")
    assert found["command line"][1].endswith("--async-scheduling")
    assert found["variable NCCL_DEBUG"] == ("", "INFO") and "variable INVOCATION_ID" not in found
    assert found["kho"] == ("", "kho=off")
    assert found["free blocks of 32 MiB and more"] == ("some", "none")
    assert "package vllm" in found
    assert list(circumstances(record, record)) == []


def test_compare_shows_what_is_worse_and_ends_with_3_if_asked(
    record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    words = ("bench", "compare", written("old", level(record)), written("new", level(record, factor=1.5, seed=1)))
    run = in_this_process(*words)
    assert run.returncode == 0 and "new against old" in run.stdout and "worse" in run.stdout
    assert "0 of 7 numbers differ by no more than noise" in run.stdout
    assert in_this_process(*words, "--detailed-exitcode").returncode == 3
    same = (words[0], words[1], words[2], written("same", level(record, seed=2)))
    assert in_this_process(*same, "--detailed-exitcode").returncode == 0


@pytest.mark.parametrize("width", [60, 80, 160])
def test_table_of_changes_fits_into_the_terminal(
    width: int, record: Benchmark, written: Callable[[str, Benchmark], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(cli, "console", lambda: out)
    base, other = level(record), level(record, factor=1.5, seed=1)
    assert in_this_process("bench", "compare", written("old", base), written("new", other)).returncode == 0
    lines = [line.split() for line in cast(io.StringIO, out.file).getvalue().splitlines()]
    found = changes(base, other)
    assert len(found) == 7
    for each in found.values():
        (row,) = [line for line in lines if each.metric in " ".join(line)]
        assert {number(each.base), number(each.other), percent(each.change), each.verdict} <= set(row)
        interval = [percent(each.low), "...", percent(each.high)]
        below = lines[lines.index(row) + 1]
        assert below == interval if width < 160 else " ".join(interval) in " ".join(row)


# --- the page


class Page(HTMLParser):
    """Collects what a browser would load, and whether all that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.closed_wrong: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            self.closed_wrong.append(tag)


def report(tmp_path: Path, *records: str, ending: str = "html") -> str:
    file = tmp_path / f"page.{ending}"
    run = in_this_process("bench", "report", *records, "--output", str(file), "--yes")
    assert run.returncode == 0, run.stderr
    return file.read_text()


def test_report_is_one_page_that_loads_nothing(
    tmp_path: Path, record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    page, text = Page(), report(tmp_path, str(RECORD), written("other", record))
    page.feed(text)
    assert (page.loads, page.open, page.closed_wrong) == ([], [], [])
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?://(?!127\.0\.0\.1)|@import|url\(", text)
    assert "other against vllm-0.18.1-cpu" in text
    for each in (*record.scenarios, *record.levels):
        assert each.name in text
    assert record.served.process
    assert html.escape(" ".join(record.served.process.argv[-2:])) in text


def test_plots_of_the_report_show_each_value_within_the_drawing(tmp_path: Path, record: Benchmark) -> None:
    drawings = re.findall(r"<svg viewBox.*?</svg>", report(tmp_path, str(RECORD)), re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        circles = tree.findall(".//circle")
        assert circles
        for each in circles:
            assert plots.LEFT <= float(each.attrib["cx"]) <= plots.WIDTH - plots.RIGHT
            assert plots.TOP <= float(each.attrib["cy"]) <= plots.HEIGHT - plots.BOTTOM
        points = [pair for line in tree.findall(".//polyline") for pair in line.attrib["points"].split()]
        marks = {(each.attrib["cx"], each.attrib["cy"]) for each in circles}
        assert {tuple(pair.split(",")) for pair in points} <= marks
    # Three runs and their median of each scenario.
    first = ElementTree.fromstring(drawings[0])
    assert len(first.findall(".//circle")) == 4 * len(record.scenarios)
    throughput = next(each for each in plots.plots([("a", record)]) if each.title.startswith("Throughput"))
    (line,) = throughput.series
    assert [each.text for each in line.line] == [
        f"a, {each.concurrency} {each.text}: {each.tokens_per_second:,.4g}" for each in record.levels
    ]
    highest = max(record.levels, key=lambda each: each.tokens_per_second)
    assert min(line.line, key=lambda each: each.y).text.startswith(f"a, {highest.concurrency} ")


def test_report_shows_hostile_names_as_text(
    tmp_path: Path, record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    name = "<script>alert(1)</script>|`x` \x1b[31m\u202e ![x](http://192.0.2.1/x.png)"
    file = written("a", replace(record, served=replace(record.served, model=name), complete=False, why="interrupted"))
    text = report(tmp_path, file)
    assert "<script>" not in text and html.escape(name).split("|")[0] in text
    assert "only a part: interrupted" in text
    plain = report(tmp_path, file, ending="md")
    assert "<script>" not in plain and r"\`x\` \\x1b\[31m\\u202e !\[x\](http" in plain
    assert not re.search("[\x1b\u202e]", text + plain)


def test_compare_shows_the_names_of_files_without_obeying_them(
    record: Benchmark, written: Callable[[str, Benchmark], str]
) -> None:
    run = in_this_process("bench", "compare", str(RECORD), written("a\x1b[31m[b]", record))
    assert run.stdout.startswith(r"a\x1b[31m[b] against ") and "\x1b" not in run.stdout


def test_report_as_markdown_has_tables_of_equal_width(tmp_path: Path, record: Benchmark) -> None:
    lines = report(tmp_path, str(RECORD), ending="md").splitlines()
    tables: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    for table in filter(None, tables):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table}) == 1, table
    assert any(line.startswith(f"| {record.scenarios[0].name} |") for line in lines)


def test_report_of_a_record_without_results_has_no_plot() -> None:
    empty: Any = msgspec.json.decode(RECORD.read_bytes(), type=Benchmark)
    assert plots.plots([("a", replace(empty, scenarios=(), levels=()))]) == []


def test_report_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output_file, "replace_file", full)
    (error,) = envelope(in_this_process("bench", "report", str(RECORD), "-o", tmp_path / "x.html", "--json"))["errors"]
    assert error["message"].endswith("the disk is full") and error["hint"].startswith("free some space, or choose")


def test_report_refuses_another_ending(tmp_path: Path) -> None:
    run = in_this_process("bench", "report", str(RECORD), "--output", str(tmp_path / "x.pdf"), "--json")
    assert run.returncode == 2 and "neither .html nor .md" in envelope(run)["errors"][0]["message"]


def test_recorded_results_are_those_of_their_requests(record: Benchmark) -> None:
    """The case is a whole real run: what is shown follows from the single requests."""
    for each in record.scenarios:
        assert isinstance(each, ScenarioResult)
        assert each.ttft == [request.ttft for request in each.raw]
        assert {request.tokens for request in each.raw} == {each.tokens}
    for found in record.levels:
        assert isinstance(found, LevelResult) and found.ttft
        assert found.completed == len(found.raw) == found.ttft.count
        assert min(r.ttft for r in found.raw) <= found.ttft.p50 <= found.ttft.p95 <= max(r.ttft for r in found.raw)
