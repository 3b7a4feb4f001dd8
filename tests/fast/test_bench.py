"""`sparkinstall bench`: what its numbers are made of, and what ends it, with a small server and a small load generator.

tests/nodes/test_serving.py measures a real vLLM with vLLM's own benchmark.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from sparkinstall.cli import bench as cli
from sparkinstall.measure import results, rounds
from sparkinstall.measure.bench import Benchmark, read_record
from sparkinstall.measure.circumstances import ceiling_of, listener
from sparkinstall.measure.results import Context, Power, Raw, level_result, percentiles, scenario_result
from sparkinstall.measure.rounds import BenchOptions, Round, Scenario, Slo, planned
from sparkinstall.payloads import bench_prompts
from tests.support import vllm_on_cpu
from tests.support.completion_server import CompletionServer, completing
from tests.support.machine import OnASpark
from tests.support.rehearsals import command, envelope, environment, in_this_process
from tests.support.waiting import until

LOAD = Path(__file__).parents[1] / "support/load"
RECORD = Path(__file__).parents[1] / "cases/bench/vllm-0.18.1-cpu.json"
GENERATED = "vllm:generation_tokens_total"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The options that all runs have: a rehearsal, a Python with the load generator, and a file."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={LOAD} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return "--root", str(tmp_path), "--python", str(python), "--output", str(tmp_path / "out.json")


def run(server: CompletionServer, asked: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
    with completing(server):
        return in_this_process("bench", *words, *asked, "--url", server.url, "--json", "--yes")


def recorded(asked: Sequence[str]) -> Benchmark:
    return msgspec.json.decode(Path(asked[-1]).read_bytes(), type=Benchmark)


def raw(*requests: tuple[float, Sequence[float]], tokens: int, **more: Any) -> Raw:
    """A round of whole answers: seconds to the first token, and between chunks."""
    count = len(requests)
    lists = {
        "input_lens": [100] * count,
        "output_lens": [tokens] * count,
        "ttfts": [ttft for ttft, _ in requests],
        "itls": [itl for _, itl in requests],
        "errors": [""] * count,
    }
    counters = {"before": {GENERATED: 0.0}, "after": {GENERATED: float(tokens * count)}}
    whole = {"duration": 2.0, "completed": count, "failed": 0, "began": 10.0, "ended": 12.0}
    return Raw(**{**lists, **counters, **whole, **more})


def round_of(count: int, tokens: int, **more: Any) -> Round:
    return Round("100/8 prose", 100, tokens, "prose", count, 1, 0, **more)


# --- what is sent


def test_rounds_have_a_warm_up_each_and_no_prompt_twice() -> None:
    found, left = planned(BenchOptions(), 8192)
    assert left == []
    assert [each.measured for each in found] == [False, True] * 9
    used = [n for each in found for n in range(each.first_prompt, each.first_prompt + each.requests)]
    assert len(used) == len(set(used))
    alone = [each for each in found if each.measured and each.alone]
    assert [(each.prompt_tokens, each.tokens) for each in alone] == [
        (58, 2), (1834, 32), (7234, 32), (1834, 108), (7234, 124),
    ]  # fmt: skip
    assert {each.requests for each in alone} == {3}
    several = [(each.concurrency, each.requests) for each in found if each.measured and not each.alone]
    assert several == [(1, 16), (2, 16), (4, 32), (8, 64)]


def test_cached_rounds_send_the_same_prompts_as_their_warm_up() -> None:
    found, _ = planned(BenchOptions(cached=True), 8192)
    for warm, measured in zip(found[::2], found[1::2], strict=True):
        assert (warm.first_prompt, warm.requests) == (measured.first_prompt, measured.requests)


def test_rounds_at_a_depth_share_the_beginning_of_their_prompts_and_nothing_else() -> None:
    found, left = planned(
        BenchOptions(scenarios=tuple(rounds.scenarios_of("100/8@0,512,9000")), concurrency=(2,)), 8192
    )
    assert [each.name for each in left] == ["100/8@9000"]
    depths = [(each.prompt_tokens, each.depth, each.measured) for each in found]
    assert depths == [(100, 0, False), (100, 0, True), (612, 512, False), (612, 512, True)] * 1 + [
        (612, 512, False), (612, 512, True),
    ]  # fmt: skip
    assert [each.name for each in found[2::2]] == ["100/8@512 prose, warm-up", "2 at once prose, warm-up"]
    own = [n for each in found for n in range(each.first_prompt, each.first_prompt + each.requests)]
    shared = [each.shared for each in found if each.depth]
    assert shared[0] == shared[1] != shared[2] == shared[3] and not set(shared) & set(own)
    assert len(own) == len(set(own))


def test_what_is_longer_than_the_served_context_is_left_out_and_said() -> None:
    found, left = planned(BenchOptions(), 2000)
    assert {each.prompt_tokens for each in found} == {58, 1834}
    assert [each.name for each in left] == ["7234/32", "7234/124"]
    assert left[0].why == "it takes 7266 tokens, and 2000 are served: `--max-model-len` of the server"
    # Several at once: what fits.
    found, left = planned(BenchOptions(), 128)
    assert {each.prompt_tokens for each in found if not each.alone} == {58}
    assert planned(BenchOptions(), 32)[0] == []


def test_prompts_are_the_same_for_the_same_name_and_differ_within_the_shortest_block() -> None:
    for kind in ("prose", "code"):
        first = bench_prompts.text(kind, "7-1", 2000)
        assert first == bench_prompts.text(kind, "7-1", 2000) and len(first) >= 2000
        # The shortest block of a cache has 16 tokens, and a token may be a single character.
        names = [bench_prompts.name_of(seed, number) for seed in (1795991783, 1795991784) for number in range(500)]
        assert len({bench_prompts.text(kind, name, 100)[:16] for name in names}) == 1000
    compile(bench_prompts.text("code", "1-1", 3000).partition("\n")[2], "code", "exec")


# --- from the times of requests to numbers


def test_percentiles_are_those_of_numpy() -> None:
    # numpy.percentile(range(1, 12), [50, 90, 95, 99])
    assert percentiles([float(each) for each in range(11, 0, -1)]) == results.Percentiles(6.0, 10.0, 10.5, 10.9, 11)
    assert percentiles([]) is None


def test_rates_are_of_tokens_not_of_chunks() -> None:
    """Nine tokens in three chunks: after the first there are eight more in 0.8 s."""
    found = scenario_result(raw((0.5, [0.4, 0.4]), tokens=9), round_of(1, 9), Context())
    assert (found.ttft, found.total, found.prefill, found.decode) == ([500.0], [1300.0], [200.0], [10.0])
    (note,) = found.notes
    assert note.text.startswith("9 tokens arrived in 3 chunks")


def test_of_two_tokens_no_rate_is_made() -> None:
    assert scenario_result(raw((0.5, [0.1]), tokens=2), round_of(1, 2), Context()).decode is None


def test_an_answer_with_other_counts_than_asked_for_is_not_measured() -> None:
    found = scenario_result(
        raw((0.5, [0.1] * 7), (0.5, [0.1] * 7), tokens=8, output_lens=[8, 5]), round_of(2, 8), Context()
    )
    assert (found.completed, found.failed, len(found.ttft)) == (1, 1, 1)
    assert found.errors == ["by the server's `usage` it has 5 tokens of the 8 that were asked for"]
    assert found.notes[0].weight == "error"


def test_a_request_that_failed_is_counted_once_and_in_no_latency() -> None:
    answers = raw((0.5, [0.1] * 7), (0.0, []), tokens=8, output_lens=[8, 0], errors=["", "Service Unavailable"])
    found = level_result(answers, round_of(2, 8, alone=False), Context(Slo(ttft=600.0)))
    assert (found.requests, found.completed, found.failed, found.good, found.met) == (2, 1, 1, 1, False)
    assert found.ttft and (found.ttft.p50, found.ttft.count) == (500.0, 1)
    assert found.tokens_per_second == 4.0


def test_tokens_that_the_server_made_for_others_are_an_error() -> None:
    """Also those of a request that was sent twice: one answer was for nobody."""
    answers = raw((0.5, [0.1] * 7), tokens=8, after={GENERATED: 16.0})
    found = scenario_result(answers, round_of(1, 8), Context())
    assert found.others == 8
    assert [each.weight for each in found.notes] == ["error"]
    few = scenario_result(replace(answers, after={GENERATED: 9.0}), round_of(1, 8), Context())
    assert [each.weight for each in few.notes] == ["note"]


def test_counters_that_begin_again_are_an_error() -> None:
    answers = raw((0.5, [0.1] * 7), tokens=8, before={GENERATED: 100.0}, after={GENERATED: 8.0})
    (note,) = scenario_result(answers, round_of(1, 8), Context()).notes
    assert note.weight == "error" and note.text.startswith("the server was started again meanwhile")


def test_more_than_the_bandwidth_allows_is_an_error_without_speculative_decoding() -> None:
    answers = raw((0.5, [0.01] * 8), tokens=9)
    (note,) = scenario_result(answers, round_of(1, 9), Context(ceiling=50.0)).notes
    assert note.weight == "error" and "100.0 decoded tokens a second are more than the 50.0" in note.text
    assert scenario_result(answers, round_of(1, 9), Context(ceiling=120.0)).notes == ()
    names = ("drafts", "draft_tokens", "accepted_tokens")
    drafted = {f"vllm:spec_decode_num_{name}_total": value for name, value in zip(names, (4.0, 8.0, 4.0), strict=True)}
    found = scenario_result(replace(answers, after={GENERATED: 9.0, **drafted}), round_of(1, 9), Context(ceiling=50.0))
    assert found.notes == ()
    assert found.speculation and (found.speculation.acceptance, found.speculation.length) == (0.5, 2.0)


def test_server_is_the_process_of_the_unit_where_ss_is_missing(tmp_path: Path) -> None:
    (tmp_path / "proc/42").mkdir(parents=True)
    (tmp_path / "proc/42/cmdline").write_bytes(b"python\0vllm\0serve\0")
    without = OnASpark(tmp_path, {"systemctl": "MainPID=42\n"})
    found = listener(without, 8000, 8000)
    assert found is not None and (found.pid, found.argv) == (42, ["python", "vllm", "serve"])
    assert listener(without, 8001, 8000) is None and listener(without, 8000, None) is None
    # It is installed, and knows of nobody at that port.
    assert listener(OnASpark(tmp_path, {"systemctl": "MainPID=42\n", "ss": ""}), 8000, 8000) is None


def test_ceiling_is_that_of_fit_on_a_spark(tmp_path: Path) -> None:
    model = vllm_on_cpu.model(tmp_path / "tiny")
    (tmp_path / "sys/bus/pci/devices/0").mkdir(parents=True)
    for name, value in (("vendor", "0x10de"), ("device", "0x2e12")):
        (tmp_path / "sys/bus/pci/devices/0" / name).write_text(value)
    spark = OnASpark(tmp_path, {})
    read = (model / "model.safetensors").stat().st_size
    ceiling, why = ceiling_of(spark, str(model), {})
    # The embeddings are looked up, not read whole; the head has the same.
    assert ceiling and 0.9 < ceiling * read / 273e9 < 1.1, (ceiling, why)
    assert ceiling_of(spark, str(model), {"--speculative-config": "{}"}) == (
        None, "speculative decoding makes several tokens of one pass",
    )  # fmt: skip
    assert ceiling_of(spark, "org/none", {})[1] == "the files of org/none are not on this machine"
    assert ceiling_of(OnASpark(tmp_path / "tiny", {}), str(model), {})[1].startswith("this machine is not a Spark")


def test_tokens_from_the_prefix_cache_are_an_error_unless_they_were_meant() -> None:
    cached = {"vllm:prefix_cache_queries_total": 100.0, "vllm:prefix_cache_hits_total": 96.0}
    answers = raw((0.5, [0.1] * 7), tokens=8, after={GENERATED: 8.0, **cached})
    found = scenario_result(answers, round_of(1, 8), Context())
    assert found.prefill is None
    assert [each.weight for each in found.notes] == ["error"]
    assert scenario_result(answers, round_of(1, 8), Context(cached=True)).notes == ()
    cold = replace(answers, after={GENERATED: 8.0, **cached, "vllm:prefix_cache_hits_total": 0.0})
    (note,) = scenario_result(cold, round_of(1, 8), Context(cached=True, prefix_cache=False)).notes
    assert note.text.endswith("had none of them: it is off")


def test_prefill_at_a_depth_is_of_the_tokens_that_were_computed() -> None:
    deep = round_of(2, 8, depth=80)

    def counted(hits: float) -> dict[str, float]:
        return {GENERATED: 16.0, "vllm:prefix_cache_queries_total": 200.0, "vllm:prefix_cache_hits_total": hits}

    answers = raw((0.5, [0.1] * 7), (0.25, [0.1] * 7), tokens=8, after=counted(160.0))
    found = scenario_result(answers, deep, Context())
    assert (found.depth, found.prefill, found.notes) == (80, [40.0, 80.0], ())
    off = scenario_result(replace(answers, after=counted(0.0)), deep, Context(prefix_cache=False))
    assert off.prefill == [200.0, 400.0]
    assert [each.text for each in off.notes] == [
        "0 tokens a request are all that the prefix cache had of the 80 before the prompt: it is off"
    ]
    more = scenario_result(replace(answers, after=counted(190.0)), deep, Context())
    assert more.prefill is None and [each.weight for each in more.notes] == ["error"]
    unknown = scenario_result(replace(answers, after={GENERATED: 16.0}), deep, Context())
    assert unknown.prefill is None and "the server does not tell" in unknown.notes[0].text


def test_objective_is_two_comparisons_of_percentiles() -> None:
    answers = raw(*((0.1 * at, [0.01] * 7) for at in range(1, 11)), tokens=8)
    found = level_result(answers, round_of(10, 8, alone=False), Context(Slo(ttft=500.0, itl=20.0)))
    assert (found.good, found.met) == (5, False)
    assert found.why == "p95 TTFT 955 ms > 500 ms, p95 ITL 10 ms ≤ 20 ms"
    assert level_result(answers, round_of(10, 8, alone=False), Context(Slo(ttft=600.0, percentile=50))).met is True


def test_power_is_of_the_time_of_the_round() -> None:
    found = level_result(raw((0.5, [0.1] * 7), tokens=8), round_of(1, 8, alone=False), Context(power=Power(40.0, 2)))
    # 8 tokens in 2 s with 40 W: 80 J, so 10 MJ for a million.
    assert (found.per_watt, found.energy) == (0.1, 2.7778)
    assert level_result(raw((0.5, []), tokens=8), round_of(1, 8, alone=False), Context()).energy is None


# --- a whole run


def test_bench_measures_and_records(asked: tuple[str, ...]) -> None:
    server = CompletionServer(later=0.02, each=0.002)
    found = run(server, asked, "40/8", "60/2", "--concurrency", "2", "--requests", "4", "--slo", "ttft=3600s,itl=3600s")
    assert found.returncode == 0, found.stdout
    record = recorded(asked)
    assert msgspec.json.decode(msgspec.json.encode(envelope(found)["data"]["record"]), type=Benchmark) == record
    assert (record.complete, record.wrong, record.served.vllm, record.served.prefix_cache) == (True, [], "0.18.1", True)
    assert [each.name for each in record.scenarios] == ["40/8 prose", "60/2 prose"]
    first, (level,) = record.scenarios[0], record.levels
    assert (first.completed, len(first.ttft), first.others, {each.tokens for each in first.raw}) == (3, 3, 0, {8})
    assert min(first.ttft) >= 20 and len(first.decode or ()) == 3
    assert all(total - ttft > 0 for ttft, total in zip(first.ttft, first.total, strict=True))
    assert (level.concurrency, level.completed, level.good, level.met) == (2, 4, 4, True)
    # A warm-up each: 1 + 3 twice, then 2 + 4; no prompt twice, each as long as asked for.
    assert [len(each) for each in server.prompts] == [40] * 4 + [60] * 4 + [60] * 6
    assert len({tuple(each) for each in server.prompts}) == 14
    assert record.served.process and record.served.process.pid == os.getpid()
    assert record.before and record.before.memory.total > 0
    assert level.power.watts is None and level.power.why


def test_bench_shows_tables_and_what_is_to_be_known(asked: tuple[str, ...]) -> None:
    with completing(CompletionServer(context=70)) as server:
        words = ("bench", "40/8", "1834/32", *asked, "--url", server.url, "--concurrency", "1", "--yes")
        found = in_this_process(*words)
    assert found.returncode == 0, found.stderr
    assert "tiny vLLM 0.18.1, prefix cache on, new prompts" in found.stdout
    assert "left out: 1834/32: it takes 1866 tokens, and 70 are served" in found.stdout
    assert "* of fewer than 100 values: about the slowest one" in found.stdout
    assert "4/4 1 at once prose" in found.stderr


def test_bench_does_not_measure_a_cold_start(asked: tuple[str, ...]) -> None:
    """The first request compiles: it is the warm-up, and in no number."""
    found = run(CompletionServer(first=5, cold=1), asked, "40/8", "--concurrency", "none")
    assert found.returncode == 0
    (scenario,) = recorded(asked).scenarios
    assert max(scenario.ttft) < 5000


def test_bench_with_cached_prompts_says_how_many_the_cache_had(asked: tuple[str, ...]) -> None:
    assert run(CompletionServer(), asked, "40/8", "--concurrency", "none", "--cached").returncode == 0
    (scenario,) = recorded(asked).scenarios
    assert scenario.cache == results.Cache(120, 120) and scenario.prefill is None
    off = CompletionServer(caching=False)
    assert run(off, asked, "40/8", "--concurrency", "none", "--cached").returncode == 0
    assert "the prefix cache had none of them: it is off" in recorded(asked).scenarios[0].notes[0].text


def test_bench_at_depths_measures_new_prompts_after_a_cached_beginning(asked: tuple[str, ...]) -> None:
    server = CompletionServer()
    assert run(server, asked, "40/8@0,160", "--concurrency", "none").returncode == 0
    flat, deep = recorded(asked).scenarios
    assert (flat.name, flat.prompt_tokens, flat.cache) == ("40/8 prose", 40, results.Cache(120, 0))
    assert (deep.name, deep.prompt_tokens, deep.cache) == ("40/8@160 prose", 200, results.Cache(600, 480))
    assert deep.prefill and not [each for each in deep.notes if "cache" in each.text]
    assert len({tuple(each[:160]) for each in server.prompts[4:]}) == 1
    assert len({tuple(each[160:]) for each in server.prompts}) == 5, "those without a depth have nothing there"
    error = error_of(run(CompletionServer(), asked, "40/8@160", "--cached"), 2)
    assert "would be in the prefix cache" in error["message"]


def test_bench_names_speculative_decoding_with_its_acceptance(asked: tuple[str, ...]) -> None:
    with completing(CompletionServer(drafts=True)) as server:
        found = in_this_process("bench", "40/8", *asked, "--url", server.url, "--concurrency", "none", "--yes")
    assert "speculative decoding, 50% accepted, 2.0 tokens a step" in found.stdout


# --- what ends it


def error_of(found: subprocess.CompletedProcess[str], code: int = 1) -> dict[str, Any]:
    assert found.returncode == code, found.stdout
    (error,) = envelope(found)["errors"]
    return dict(error)


def test_bench_sends_nothing_again_to_a_server_that_has_ended(asked: tuple[str, ...]) -> None:
    """Of 40/8 all four are answered; then the server dies: what was measured stays, marked as a part."""
    server = CompletionServer(dies_after=5)
    error = error_of(run(server, asked, "40/8", "60/8", "80/8", "--concurrency", "none"))
    assert error["code"] == "bench"
    assert error["message"].startswith("the server has ended in the round `60/8 prose`: nothing answers at")
    assert len(server.prompts) <= 6
    record = recorded(asked)
    assert [each.name for each in record.scenarios] == ["40/8 prose", "60/8 prose"]
    assert (record.complete, record.scenarios[1].completed) == (False, 0)
    assert record.why.startswith("the server has ended")


def test_bench_marks_a_round_in_which_a_request_failed_and_goes_on(asked: tuple[str, ...]) -> None:
    server = CompletionServer(refuses={2: 503})
    error = error_of(run(server, asked, "40/8", "60/8", "--concurrency", "none"))
    assert error["message"] == "a number is not to be used"
    assert "40/8 prose: 1 of 3 requests failed, and none was sent again: Service Unavailable" in error["cause"]
    record = recorded(asked)
    assert [each.completed for each in record.scenarios] == [2, 3]
    assert len(server.prompts) == 8


def test_bench_stops_a_round_that_hangs(asked: tuple[str, ...]) -> None:
    error = error_of(run(CompletionServer(hangs_at=2), asked, "40/8", "--concurrency", "none", "--limit", "2"))
    assert "it has not ended within 2 s" in error["message"]


def test_bench_without_a_server_says_so(asked: tuple[str, ...]) -> None:
    error = error_of(in_this_process("bench", *asked, "--url", "http://127.0.0.1:9", "--json", "--yes"))
    assert (error["code"], error["message"]) == ("no-answer", "nothing answers at http://127.0.0.1:9")
    assert not Path(asked[-1]).exists()


def test_bench_with_an_unknown_scenario_says_so_before_it_asks_a_server(asked: tuple[str, ...]) -> None:
    error = error_of(in_this_process("bench", "long", *asked, "--url", "http://127.0.0.1:9", "--json", "--yes"), 2)
    assert error["message"] == "'long' is no scenario"


def test_bench_with_a_key(asked: tuple[str, ...], tmp_path: Path) -> None:
    error = error_of(run(CompletionServer(key="k"), asked, "40/8"))
    assert "asks for a key (401)" in error["message"]
    (tmp_path / "key").write_text("k\n")
    words = ("40/8", "--concurrency", "none", "--key-file", str(tmp_path / "key"))
    assert run(CompletionServer(key="k"), asked, *words).returncode == 0
    assert '"k"' not in Path(asked[-1]).read_text()


def test_bench_without_the_tool_says_what_is_missing(asked: tuple[str, ...], tmp_path: Path) -> None:
    without = [each for each in asked if each != "--python" and not each.endswith("/python")]
    error = error_of(run(CompletionServer(), without, "40/8"), code=2)
    assert error["message"].startswith("there is no `vllm bench serve` in ")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    error = error_of(run(CompletionServer(), asked, "40/8"), code=2)
    assert error["message"] == f"{tmp_path}/python cannot load `vllm bench serve`: it has no module vllm"
    assert error["hint"].startswith("name the Python of an environment with vLLM") and not error["output"]


@pytest.mark.parametrize(
    ("answer", "message", "cause"),
    [
        (None, "has no /tokenize (404)", ""),
        ({"count": 1}, "the server does not answer like vLLM", "missing required field `tokens`"),
        ({"tokens": [1]}, "no request of the round `40/8 prose, warm-up` was answered", "makes 1 tokens of 20480"),
    ],
)
def test_bench_refuses_a_server_that_does_not_count_like_vllm(
    answer: dict[str, Any] | None, message: str, cause: str, asked: tuple[str, ...]
) -> None:
    error = error_of(run(CompletionServer(tokenizes=lambda _: answer), asked, "40/8"))
    assert message in error["message"] and cause in error["cause"]


def test_bench_sends_the_key_to_no_other_server(asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame-sesame-sesame")
    with completing(CompletionServer()) as other:
        server = CompletionServer(moved={"/metrics": other.url})
        assert run(server, asked, "40/8", "--concurrency", "none").returncode == 0
        assert server.paths.count("/metrics") > 1 and other.paths == []
    assert recorded(asked).scenarios[0].others is None


def test_answer_without_a_first_token_is_no_answer() -> None:
    whole, broken = results.requests_of(raw((0.0, [0.1]), tokens=2), round_of(1, 2))
    assert whole == [] and "none arrived" in broken[0]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_tables_of_a_record_fit_into_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_record(RECORD)
    out = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(cli, "console", lambda: out)
    cli.show_benchmark(record, "x.json")
    lines = cast(io.StringIO, out.file).getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.startswith(("1 prose", "2 prose"))]
    assert len(rows) == 2 and all(each[2].replace(",", "").replace(".", "").isdigit() for each in rows)
    assert any(line.split()[:1] == ["ITL"] for line in lines) == (width < 160)


def test_bench_keeps_what_was_measured_before_an_interrupt(asked: tuple[str, ...]) -> None:
    with completing(CompletionServer(hangs_at=6)) as server:
        argv = command("bench", "40/8", "60/8", *asked, "--url", server.url, "--concurrency", "none", "--yes")
        process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        until(lambda: len(server.prompts) == 7, during=process)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert "(a part: see above)" in said
    record = recorded(asked)
    assert (record.complete, record.why, [each.name for each in record.scenarios]) == (
        False, "interrupted", ["40/8 prose"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("1834",), ("0/5",), ("1/0",), ("--slo", "ttft=500"), ("--slo", "ttft=1s,ttft=2s"), ("--concurrency", "0"),
        ("--text", "verse"), ("--slo", "ttft=1s", "--slo-percentile", "42"), ("9000000/1",),
    ],
)  # fmt: skip
def test_bench_refuses_what_it_cannot_measure(words: tuple[str, ...], asked: tuple[str, ...]) -> None:
    error = error_of(in_this_process("bench", *words, *asked, "--json", "--yes"), code=2)
    assert error["code"] == "usage" and error["hint"]


def test_scenarios_of_the_field_and_objectives_are_read() -> None:
    assert tuple(scenario for each in rounds.FIELD for scenario in rounds.scenarios_of(each.name)) == rounds.FIELD
    assert rounds.scenarios_of("1834/32") == [Scenario(1834, 32)]
    assert rounds.scenarios_of("2048/32@0,512") == [Scenario(2048, 32), Scenario(2048, 32, 512)]
    assert [each.name for each in rounds.scenarios_of("2048/32@0,512")] == ["2048/32", "2048/32@512"]
    assert rounds.slo_of("ttft=0.5s,itl=250ms", 95) == Slo(500.0, 250.0, 95)


def test_load_generator_prints_nothing_among_the_results(asked: tuple[str, ...]) -> None:
    assert json.loads(run(CompletionServer(), asked, "40/8", "--concurrency", "none").stdout)["errors"] == []
