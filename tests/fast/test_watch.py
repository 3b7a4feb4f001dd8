"""`sparkinstall watch`: texts of real servers in, readings and what they mean out.

The texts in tests/cases/watch are a vLLM's on a CPU, before and after a load; tests/nodes has the same with a server
that runs.
"""

import errno
import json
import math
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from sparkinstall.cli.watch_view import Watched, view, words
from sparkinstall.cluster.watching import own_sampler
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import Storage
from sparkinstall.facts.gpu import LiveGpu
from sparkinstall.measure import histogram
from sparkinstall.measure.advice import advice, rules
from sparkinstall.measure.metrics_text import Told, told, wanted
from sparkinstall.measure.readings import Readings, Window
from sparkinstall.measure.record import Record
from sparkinstall.measure.rounds import Slo
from sparkinstall.measure.samples import Machine, Sample, Sampler, Source
from sparkinstall.measure.scrape import NotScraped, scrape
from sparkinstall.system import Result
from tests.support.far_nodes import FarNodes
from tests.support.local_server import Endless, listening
from tests.support.machine import OnASpark
from tests.support.nodes import HEAD
from tests.support.rehearsals import command, envelope, environment, in_this_process
from tests.support.sysfs import spark

FIRST = "enp1s0f0np0"
CASES = Path(__file__).parents[1] / "cases/watch"
IDLE, LOAD = (CASES / f"0.18.1-{name}.txt" for name in ("idle", "load"))
SLO = Slo(500, 250)


def cases(name: str) -> list[Any]:
    found = msgspec.yaml.decode((CASES / name).read_bytes())
    return [pytest.param(each, id=each["case"]) for each in found]


def sample(text: str, at: float, **more: Any) -> Sample:
    return Sample("spark-1", at, told=told(text), **more)


def of(at: float, values: dict[str, float] | None = None, **more: Any) -> Sample:
    return Sample("spark-1", at, told=Told(values or {}, **more))


def both(*, window: float = 60) -> Readings:
    """The readings of the two recorded texts, 10 s apart."""
    taken = Window(window)
    taken.take(sample(IDLE.read_text(), 100.0))
    return taken.take(sample(LOAD.read_text(), 110.0))


# --- the text


def test_told_has_the_numbers_of_a_real_server() -> None:
    found = told(LOAD.read_text())
    assert found.models == ("/srv/model",)
    assert found.started == 1.79599011205e9
    assert found.values["prompt_tokens"] == 206320
    assert found.values["generated_tokens"] == 88800
    assert found.values["preemptions"] == 0
    assert (found.histograms["ttft"]["0.02"], found.histograms["ttft"]["+Inf"]) == (1082, 1480)
    assert list(found.histograms["itl"])[:2] == ["0.01", "0.025"]
    assert "drafted_tokens" not in found.values


def test_told_makes_one_of_several_engines() -> None:
    found = told(
        'vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1"} 3\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 0.7\n'
        'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5"} 1\n'
        'vllm:time_to_first_token_seconds_bucket{engine="1",le="0.5"} 4\n'
    )
    assert (found.values["running"], found.values["kv_cache"]) == (5, 0.7)
    assert found.histograms["ttft"] == {"0.5": 5}


@pytest.mark.parametrize(
    "line",
    [
        *("vllm:num_requests_running", "vllm:num_requests_running{} NaN", "\0{", "{} 1", "# x", "# TYPE vllm:x"),
        *('vllm:num_requests_running{a="b} 1', 'vllm:num_requests_running{a="1", ="2"} 1'),
        *("vllm:num_requests_running -Inf", 'vllm:time_to_first_token_seconds_bucket{le="1"} +Inf'),
        *("vllm:num_requests_running 1_0", f"vllm:num_requests_running 1{'0' * 400}"),
        *("vllm:time_to_first_token_seconds_bucket 3", 'vllm:time_to_first_token_seconds_bucket{le="x"} 3'),
    ],
)
def test_told_leaves_what_makes_no_sense(line: str) -> None:
    found = told(f"{line}\nvllm:num_requests_waiting 2 1395066363000\n")
    assert (found.values, found.histograms) == ({"waiting": 2}, {})


@given(st.text(st.sampled_from('ab="{},\\ \t\n+-.1eNInfle_#\u2028\r'), max_size=60))
def test_told_never_fails_and_loses_no_other_line(rest: str) -> None:
    found = told(f"vllm:time_to_first_token_seconds_bucket{rest}\nvllm:num_requests_waiting 2\n")
    assert found.values == {"waiting": 2}
    assert all(not math.isnan(float(bound)) for bound in found.histograms.get("ttft", {}))


def test_told_is_what_the_library_reads_of_the_whole_text() -> None:
    """Families with their HELP and TYPE, `_created` and all; ours asks for single lines."""
    text = LOAD.read_text()
    names = {each.name for each in wanted(text)}
    whole = [each for family in text_string_to_metric_families(text) for each in family.samples if each.name in names]
    assert list(wanted(text)) == whole and len(whole) > 70


def test_told_keeps_infinity_of_a_bound_and_takes_none_for_a_value() -> None:
    """JSON has no infinity: with it a record of `watch` could not be replayed."""
    found = told('vllm:time_to_first_token_seconds_bucket{le="+Inf"} 7\nvllm:kv_cache_usage_perc +Inf\n')
    assert (found.histograms["ttft"], found.values) == ({"+Inf": 7}, {})


def test_told_reads_names_with_quotes_and_braces() -> None:
    (name,) = told(r'vllm:num_requests_running{model_name="a \"b\" } c\\d"} 1').models
    assert name == r'a "b" } c\d'


def test_told_takes_the_older_names() -> None:
    found = told("vllm:gpu_cache_usage_perc 0.3\nvllm:gpu_prefix_cache_hits_total 4\n")
    assert found.values == {"kv_cache": 0.3, "prefix_hits": 4}


# --- percentiles


@pytest.mark.parametrize("case", cases("percentiles.yaml"))
def test_percentile_follows_the_buckets(case: dict[str, Any]) -> None:
    grown = histogram.grown(case["before"], case["after"])
    assert grown is not None
    found = histogram.latency(grown).p95
    assert words(found, 0.25) == case["words"]
    assert (found.compared(0.25) if found else "none") == case["compared"]


def test_grown_tells_a_reset_by_any_bucket() -> None:
    assert histogram.grown({"0.1": 5, "+Inf": 9}, {"0.1": 4, "+Inf": 12}) is None


# --- the window


def test_readings_of_a_real_load() -> None:
    found = both()
    assert (found.seconds, found.rate_seconds, found.lacking, found.note) == (10, 10, (), "")
    assert (found.prefill, found.decode, found.preemptions) == (20632, 8880, 0)
    assert found.ttft and found.ttft.p50 and found.ttft.p50.value == pytest.approx(0.01 + 0.01 * (740 - 243) / 839)
    assert (words(found.ttft.p95), words(found.ttft.p99)) == ("51 ms", "111 ms")
    assert found.ttft.tail == pytest.approx(7.0, abs=0.1)
    assert found.e2e and words(found.e2e.p50) == "< 300 ms" and found.e2e.tail is None
    assert (found.prefix_hits, found.speculates, found.acceptance) == (0, False, None)


def test_first_sample_has_no_rates() -> None:
    found = Window(60).take(sample(LOAD.read_text(), 100.0))
    assert (found.seconds, found.prefill, found.decode, found.running) == (0, None, None, 0)
    assert found.ttft and found.ttft.count == 0 and found.ttft.p50 is None


def test_prefill_does_not_count_tokens_from_the_cache() -> None:
    window = Window(60)
    window.take(of(0, {"prompt_tokens": 100, "cached_tokens": 0, "prefix_queries": 0, "prefix_hits": 0}))
    found = window.take(of(2, {"prompt_tokens": 300, "cached_tokens": 150, "prefix_queries": 200, "prefix_hits": 150}))
    assert (found.prefill, found.prefix_hits) == (25, 0.75)


def test_usage_of_the_cache_has_average_and_peak_of_the_window() -> None:
    window = Window(10)
    for at, share in enumerate([0.99, 0.1, 0.5, 0.3]):
        found = window.take(of(at * 5, {"kv_cache": share}))
    assert found.kv_cache and (found.kv_cache.now, found.kv_cache.peak) == (0.3, 0.5)
    assert found.kv_cache.average == pytest.approx(0.3)


def test_window_forgets_what_is_older() -> None:
    window = Window(10)
    for at in range(0, 60, 2):
        found = window.take(of(at, {"generated_tokens": at * 10}))
    assert (found.seconds, found.rate_seconds, found.decode) == (10, 2, 10)


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ({"started": 1.0}, {"started": 2.0}, "the server was restarted"),
        ({"values": {"generated_tokens": 9}}, {"values": {"generated_tokens": 8}}, "its counters were reset"),
        ({"values": {"generated_tokens": 9}}, {"values": {}}, "its counters were reset"),
        (
            {"histograms": {"ttft": {"+Inf": 9}}, "started": 1.0},
            {"histograms": {"ttft": {"+Inf": 0}}, "started": 2.0},
            "the server was restarted",
        ),
        ({"values": {"running": 9}}, {"values": {"running": 1}}, ""),
    ],
)
def test_window_begins_anew_when_the_server_does(before: Any, after: Any, note: str) -> None:
    window = Window(60)
    for at, each in enumerate((before, before, after)):
        found = window.take(Sample("n", at * 2.0, told=Told(**each)))
    assert (found.note, found.seconds) == (note, 0 if note else 4)


def test_window_lasts_through_a_scrape_that_failed() -> None:
    window = Window(60)
    window.take(of(0, {"generated_tokens": 0}))
    late = window.take(Sample("n", 2, trouble="/metrics has not answered within 5 s"))
    assert (late.trouble, late.decode, late.ttft) == ("/metrics has not answered within 5 s", None, None)
    found = window.take(of(4, {"generated_tokens": 40}))
    assert (found.trouble, found.decode, found.seconds) == ("", 10, 4)


def test_lacking_metrics_are_named_and_not_zero() -> None:
    text = "".join(
        line for line in LOAD.read_text().splitlines(True) if "inter_token" not in line and "cached" not in line
    )
    found = Window(60).take(sample(text, 0))
    assert found.lacking == ("vllm:prompt_tokens_cached_total", "vllm:inter_token_latency_seconds")
    assert found.itl is None


def test_nothing_moves_while_requests_run() -> None:
    window = Window(60)
    for at in range(0, 70, 5):
        found = window.take(of(at, {"running": 1, "waiting": 0, "generated_tokens": 7, "kv_cache": 0.1}))
    assert found.still_seconds == 65
    assert [each.name for each in advice(found, SLO)] == ["no-token"]
    moved = window.take(of(70, {"running": 1, "waiting": 0, "generated_tokens": 8, "kv_cache": 0.1}))
    assert moved.still_seconds == 0


def test_link_errors_are_those_of_the_window() -> None:
    window = Window(60)
    for at, count in ((0, 7), (2, 7), (4, 9)):
        machine = Machine(1 << 40, 1 << 39, link_errors={"a rx_errors": count, "a tx_errors": 1})
        found = window.take(Sample("n", at, trouble=None, machine=machine))
    assert found.link_errors == {"a rx_errors": 2}


# --- what they mean


@pytest.mark.parametrize("case", cases("advice.yaml"))
def test_advice_follows_the_readings(case: dict[str, Any]) -> None:
    given = {"node": "n", "at": 0, "seconds": 60, "rate_seconds": 2, **case["readings"]}
    readings = msgspec.convert(given, Readings)
    assert [each.name for each in advice(readings, SLO)] == case["advice"]


def test_advice_has_a_case_for_each_rule() -> None:
    named = {name for param in cases("advice.yaml") for name in param.values[0]["advice"]}
    assert named == {rule.name for rule in rules()}


def test_conditions_have_their_limit() -> None:
    said = {rule.name: rule.condition for rule in rules()}
    assert said["kv-near-full"] == "90% or more are in use"
    assert "1400 MHz and 30 W" in said["clock-low"]


# --- the scrape


class Silent(BaseHTTPRequestHandler):
    """Sends a byte now and then, for ever."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"#")
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


class Refusing(BaseHTTPRequestHandler):
    status = 503

    def do_GET(self) -> None:
        self.send_error(self.status)

    def log_message(self, *_: object) -> None:
        pass


def test_scrape_that_never_ends_has_a_time_limit() -> None:
    with listening(Silent) as url, pytest.raises(NotScraped, match=r"/metrics has not answered within 0\.5 s"):
        scrape(url, seconds=0.5)


def test_scrape_reads_no_more_than_its_most() -> None:
    with listening(Endless) as url, pytest.raises(NotScraped, match="/metrics has more than 8 MiB"):
        scrape(url, seconds=300)


class Locked(Refusing):
    status = 401


def test_scrape_tells_a_missing_key_from_a_wrong_one() -> None:
    with listening(Locked) as url:
        for key, said in (("", "asks for a key"), ("wrong", "rejects the key"), ("\u00e9\n", "a header cannot have")):
            with pytest.raises(NotScraped, match=said):
                scrape(url, key)


def test_scrape_names_a_server_that_refuses_and_one_that_is_not_there() -> None:
    with listening(Refusing) as url, pytest.raises(NotScraped, match="/metrics answers HTTP 503"):
        scrape(url)
    with pytest.raises(NotScraped, match="nothing listens at this address"):
        scrape(url)


# --- the verb


@dataclass
class Texts:
    """What /metrics answers, one after the other; the last one for ever. "": the server is away."""

    texts: list[str]
    asked: list[str | None] = field(default_factory=list)


@contextmanager
def serving(*texts: str) -> Iterator[tuple[Texts, str]]:
    state = Texts(list(texts))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.headers.get("Authorization"))
            text = state.texts.pop(0) if len(state.texts) > 1 else state.texts[0]
            self.send_response(200 if text else 500)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as url:
        yield state, url


def test_watch_once_prints_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of-mine")
    with serving(IDLE.read_text(), LOAD.read_text()) as (state, url):
        run = in_this_process("watch", "--once", "--interval", "0.2", "--url", url)
    assert run.returncode == 0, run.stderr
    rows = {line.split()[0]: line.split() for line in run.stdout.splitlines() if line.strip()}
    assert rows["TTFT"][:9] == ["TTFT", "16", "ms", "51", "ms", "111", "ms", "7.0", "1,480"]
    assert "/srv/model" in run.stdout and "no speculative decoding" in run.stdout
    assert state.asked == ["Bearer of-mine"] * 2


def test_watch_json_once_is_one_envelope() -> None:
    with serving(IDLE.read_text(), LOAD.read_text()) as (_, url):
        (node,) = envelope(in_this_process("watch", "--once", "--json", "--interval", "0.2", "--url", url))["data"][
            "nodes"
        ]
    assert (node["models"], node["ttft"]["count"], node["advice"]) == (["/srv/model"], 1480, [])
    assert node["itl"]["p50"] == {"low": 0.0, "high": 0.01, "value": None}


def test_watch_once_fails_where_nothing_answers() -> None:
    with serving("") as (_, url):
        run = in_this_process("watch", "--once", "--json", "--interval", "0.2", "--url", url)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "no-metrics")
    assert error["message"].endswith("/metrics answers HTTP 500")


def test_watch_of_this_node_sends_the_key_of_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "key").write_text("sesame-sesame-sesame\n")
    with serving(LOAD.read_text()) as (state, url):
        settings = {"model": "/srv/tiny", "port": int(url.rpartition(":")[2]), "key_file": f"{tmp_path}/key"}
        (tmp_path / "config.yaml").write_text(json.dumps({"serving": settings}))
        words = ("watch", "--once", "--interval", "0.2", "--config", tmp_path / "config.yaml")
        in_this_process(*words)
        (tmp_path / "other").write_text("another-key-of-mine\n")
        in_this_process(*words, "--key-file", tmp_path / "other")
        sampler = own_sampler(open_session(Target(config=tmp_path / "config.yaml")))
        assert sampler.take().trouble == ""
    assert state.asked == ["Bearer sesame-sesame-sesame"] * 2 + ["Bearer another-key-of-mine"] * 2 + state.asked[:1]


def test_watch_of_a_locked_api_says_how_to_name_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with listening(Locked) as url:
        run = in_this_process("watch", "--once", "--json", "--interval", "0.2", "--url", url)
    (error,) = envelope(run)["errors"]
    assert (run.returncode, "--key-file FILE" in error["hint"]) == (1, True)
    assert error["message"].endswith("/metrics asks for a key (HTTP 401)")


def test_watch_shows_names_of_a_server_without_obeying_them(tmp_path: Path) -> None:
    """The name of a model is anybody's text, and so is a record."""
    hostile = LOAD.read_text().replace("/srv/model", "/srv/\x1b[31m\x1b]0;title\x07[bold red]x[/nothing]")
    record = tmp_path / "night.jsonl"
    with serving(hostile) as (_, url):
        run = in_this_process("watch", "--once", "--interval", "0.2", "--url", url, "--record", record)
    assert r"/srv/\x1b[31m\x1b]0;title\x07[bold red]x[/nothing]" in run.stdout
    lines = [json.loads(each) for each in record.read_text().splitlines()]
    lines[-1] |= {"node": "spark\x1b[2J", "trouble": "hung\x1b[5m"}
    record.write_text("".join(json.dumps(each) + "\n" for each in lines))
    for option in ((), ("--once",)):
        again = in_this_process("watch", "--replay", record, *option)
        assert r"spark\x1b[2J" in again.stdout and r"hung\x1b[5m" in again.stdout
        assert "\x1b" not in run.stdout + again.stdout + again.stderr


def test_watch_record_is_replayed_to_the_same_view(tmp_path: Path) -> None:
    record, words = tmp_path / "night.jsonl", ("watch", "--once", "--interval", "0.2")
    with serving(IDLE.read_text(), LOAD.read_text()) as (_, url):
        seen = in_this_process(*words, "--url", url, "--record", record)
        again = in_this_process(*words, "--url", url, "--record", record)
    assert seen.returncode == 0, seen.stderr
    assert in_this_process("watch", "--once", "--replay", record).stdout == seen.stdout
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
    with record.open("a") as file:
        # As a run leaves it that was killed in the middle of a line.
        file.write('{"node": "sp')
    assert in_this_process("watch", "--once", "--replay", record).stdout == seen.stdout
    lines = in_this_process("watch", "--replay", record, "--json").stdout.splitlines()
    data = [json.loads(each)["data"] for each in lines]
    assert [len(each.get("nodes", ())) for each in data] == [1, 1, 0]
    assert data[-1] == {"samples": 2}


@pytest.mark.parametrize("width", [60, 80, 110, 123, 124, 160])
def test_view_cuts_no_number_on_a_terminal_of_this_width(width: int) -> None:
    watched = Watched(60.0, Slo())
    for at, text in ((10.0, IDLE), (20.0, LOAD)):
        seen = watched.take(Sample("spark-1", at, told=told(text.read_text())))
    out = Console(width=width)
    with out.capture() as captured:
        out.print(view(seen, Slo(), width))
    rows = [line.split() for line in captured.get().splitlines()]
    (heading,) = (row for row in rows if row[:1] == ["p50"])
    assert heading[:5] == ["p50", "p95", "p99", "p99/p50", "count"]
    (ttft,) = (row for row in rows if row[:1] == ["TTFT"])
    assert ttft[:9] == ["TTFT", "16", "ms", "51", "ms", "111", "ms", "7.0", "1,480"]
    assert ("decode" in ttft) is (width >= 124), "beside each other where both fit"


def test_watch_whose_disk_is_full_says_what_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Record(tmp_path / "night.jsonl") as record, monkeypatch.context() as patched:
        patched.setattr(record, "_file", SimpleNamespace(write=full))
        with pytest.raises(Storage, match="the disk is full") as error:
            record.add(Sample("n", 1.0))
    assert "name another file" in error.value.hint and "resumes" not in error.value.hint


def test_watch_without_a_terminal_prints_a_line_each_and_no_colour(tmp_path: Path) -> None:
    record = tmp_path / "night.jsonl"
    with serving(IDLE.read_text(), LOAD.read_text()) as (_, url):
        in_this_process("watch", "--once", "--interval", "0.2", "--url", url, "--record", record)
    first, second = in_this_process("watch", "--replay", record).stdout.splitlines()
    assert "TTFT -/-/-" in first and "TTFT 16 ms/51 ms/111 ms" in second
    assert "\x1b" not in second


def test_watch_replays_a_server_that_hung_ended_and_came_again() -> None:
    """Samples of a real vLLM: its process was stopped for 9 s, continued, ended, and started again."""
    run = in_this_process("watch", "--replay", CASES / "restart.jsonl", "--json")
    nodes = [json.loads(line)["data"]["nodes"][0] for line in run.stdout.splitlines()[:-1]]
    assert [each["trouble"] for each in nodes] == [
        "", "", "/metrics has not answered within 5 s", "", "nothing listens at this address", "", "", "",
    ]  # fmt: skip
    assert [each["note"] for each in nodes[3:]] == ["", "", *["the server was restarted"] * 3]
    assert [round(each["seconds"]) for each in nodes] == [0, 6, 0, 17, 0, 0, 6, 15]
    # The client counted 318 requests before the restart and 229 after it.
    assert (nodes[3]["e2e"]["count"], nodes[-1]["e2e"]["count"]) == (318, 229)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no record"),
        ("hello\n", "is no record"),
        ('{"sparkinstall_watch": 9}\n', "is a record of version 9"),
        ('{"sparkinstall_watch": 1}\n{"node": 7}\n', "line 2 of"),
        ('{"sparkinstall_watch": 1}\n{"node": "n", "at": 1e308}\n', "its time is none of a clock"),
        ('{"sparkinstall_watch": 1}\n{"node": "n", "at": 1, "told": {"histograms": {"ttft": {"x": 1}}}}\n', "line 2"),
        ('{"sparkinstall_watch": 1}\n', "has no sample"),
        ('{"sparkinstall_watch": 1}\n{"node": "cut', "has no sample"),
    ],
)
def test_watch_refuses_what_is_no_record(content: str, said: str, tmp_path: Path) -> None:
    record = tmp_path / "x.jsonl"
    record.write_text(content)
    run = in_this_process("watch", "--replay", record, "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, said in error["message"]) == (2, True), error


@pytest.mark.parametrize(
    "wrong",
    [
        ("--slo", "ttft=fast"), ("--slo", "ttft=0ms"), ("--slo", "itl=1s,itl=2s"), ("--interval", "0"),
        ("--interval", "nan"), ("--window", "nan"),
        ("--replay", "/nowhere/x"), ("--replay", "x", "--record", "y"),
    ],
)  # fmt: skip
def test_watch_refuses_options_that_make_no_sense(wrong: tuple[str, ...]) -> None:
    assert in_this_process("watch", "--once", "--url", "http://127.0.0.1:9", *wrong).returncode == 2


def test_watch_ends_cleanly_with_ctrl_c() -> None:
    with serving(IDLE.read_text(), LOAD.read_text()) as (_, url):
        argv = command("watch", "--interval", "0.2", "--url", url)
        with subprocess.Popen(
            argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as run:  # fmt: skip
            assert run.stdout
            first = run.stdout.readline()
            run.send_signal(signal.SIGINT)
            rest, errors = run.communicate(timeout=300)
    assert (run.returncode, errors) == (0, "")
    assert "TTFT" in first + rest


# --- the machine


def test_sampler_reads_memory_gpu_and_link(tmp_path: Path) -> None:
    node = spark(tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  127600000 kB\nMemAvailable:  4000000 kB\n")
    smi = {"nvidia-smi": "96, 2411, 3003, 45.10, 62\n"}
    counter = node.root / "sys/class/net" / FIRST / "statistics/rx_crc_errors"
    counter.parent.mkdir(exist_ok=True)
    counter.write_text("7\n")
    sampler, window = Sampler(Source("n", "", on=OnASpark(tmp_path, smi), of=HEAD)), Window(60)
    window.take(sampler.take())
    counter.write_text("9\n")
    found = window.take(sampler.take())
    assert found.machine
    assert (found.trouble, found.machine.memory, found.machine.available) == (None, 127600000 << 10, 4000000 << 10)
    assert found.machine.gpu == LiveGpu(96, 2411, 3003, 45.1, 62)
    assert found.link_errors == {f"{FIRST} rx_crc_errors": 2}
    assert [each.name for each in advice(found, SLO)] == ["memory-low", "link-errors"]


def test_sampler_asks_for_the_gpu_no_more_often_than_needed(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(OnASpark):
        def ask(self, *argv: str, **more: Any) -> Result:
            asked.append(argv[0])
            return super().ask(*argv, **more)

    clock = iter([0.0, 2.0, 9.9, 10.0])
    sampler = Sampler(
        Source("n", "", on=Counting(tmp_path, {"nvidia-smi": "[N/A], 1, 2, [N/A], 3"})), clock=lambda: next(clock)
    )
    gpus = [each.gpu for _ in range(4) if (each := sampler.take().machine)]
    assert (asked, gpus) == (["nvidia-smi"] * 2, [LiveGpu(None, 1, 2, None, 3)] * 4)


# --- several nodes


def test_watch_shows_several_nodes_over_ssh(checkout: tuple[Path, str], tmp_path: Path) -> None:
    far = FarNodes(tmp_path, *checkout)
    for number, host in enumerate(("spark-1", "spark-2"), 1):
        far.add_real(host, f"192.168.100.{number}")
    far.add("spark-3")
    (tmp_path / "spark-3/ssh-says").write_text("ssh: connect to host spark-3 port 22: No route to host\n")
    with serving(IDLE.read_text(), LOAD.read_text()) as (_, url):
        settings = tmp_path / "sparkinstall.yaml"
        settings.write_text(f"serving: {{port: {url.rpartition(':')[2]}, model: m}}\n")
        argv = command("watch", "--once", "--json", "--interval", "0.2", "spark-1", "spark-2", "spark-3")
        env = {**far.environment(), "SPARKINSTALL_CONFIG": str(settings)}
        run = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = {each["node"]: each for each in json.loads(run.stdout)["data"]["nodes"]}
    assert run.returncode == 5, run.stderr
    assert {each["trouble"] for host, each in found.items() if host != "spark-3"} == {""}
    assert found["spark-1"]["models"] == ["/srv/model"] and found["spark-2"]["machine"]["memory"] > 0
    assert found["spark-3"]["trouble"] == "spark-3 does not answer"


@pytest.mark.parametrize(
    "wrong",
    [("--all",), ("spark-1", "--url", "http://127.0.0.1:9"), ("spark-1", "spark-1"), ("--replay", "x", "spark-1")],
)
def test_watch_refuses_nodes_that_make_no_sense(wrong: tuple[str, ...], tmp_path: Path) -> None:
    assert in_this_process("watch", "--once", "--root", tmp_path, *wrong).returncode == 2
