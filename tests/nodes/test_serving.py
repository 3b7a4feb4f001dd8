"""vLLM, built for the CPU, as a unit of systemd on one node.

All tests use the same node, in order.
"""

import json
import re
import shlex
import signal
import time
from bisect import bisect_left
from collections.abc import Iterator
from statistics import quantiles
from typing import Any

import pytest

from sparkinstall import payloads
from sparkinstall.layout import API_KEY
from sparkinstall.system.read_only import WITH_ENV_FILE
from tests.lab.commands import Completed
from tests.lab.node import FreshNode
from tests.nodes.fresh import CACHE, COMMAND, REPOSITORY
from tests.nodes.serving import (
    AGREED,
    CHECKOUT,
    CHECKOUT_ENV,
    KEY,
    LIFE,
    LIVELY,
    LOAD_SECONDS,
    MODEL,
    PREFIX,
    REASONER,
    UNIT,
    UNWATCHED,
    Found,
    ask,
    assert_no_service_is_left,
    assert_others_skip,
    findings,
    installed_node,
    journal,
    life_says,
    life_state,
    main_pid,
    program,
    reasoning_settings,
    run_step,
    serving_finding,
    set_up_life,
    state,
    until_it_serves,
)
from tests.support import vllm_on_cpu
from tests.support.chat_server import example
from tests.support.ray_on_a_node import ADDRESSES
from tests.support.waiting import until

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer5, pytest.mark.network]

# A folder with config.json for each file of another.
FOLDERS = """
for each in "$1"/*.json; do
  to="/srv/kv/$(basename "$each" .json)"
  mkdir -p "$to"
  ln -s "$each" "$to/config.json"
done
"""
PLANS = REPOSITORY / "tests" / "cases/kv-cache"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshNode]:
    with installed_node(tmp_path_factory.mktemp("serving")) as installed:
        yield installed


def test_serving_without_a_server_fails_and_skips_the_others(node: FreshNode) -> None:
    found = findings(node, "single")
    assert found["serving"]["verdict"] == "fail"
    assert found["serving"]["found"] == f"nothing answers at 127.0.0.1:8000; {UNIT} is inactive"
    assert_others_skip(found)


BROKEN = "/srv/broken"


def _command(*words: str) -> tuple[list[str], dict[str, str]]:
    """A command line of sparkinstall on the node, and its variables: there is no hub."""
    return [COMMAND, *words], {"HF_ENDPOINT": "http://127.0.0.1:9"}


def _sparkinstall(node: FreshNode, *words: str, check: bool = True) -> Completed:
    argv, env = _command(*words)
    return node.run(*argv, user="spark", env=env, timeout=LOAD_SECONDS, check=check)


def _told(node: FreshNode) -> dict[str, Any]:
    """What `serve status` says."""
    return dict(json.loads(_sparkinstall(node, "serve", "status", "--json", check=False).stdout)["data"])


@pytest.fixture(scope="module")
def served(node: FreshNode) -> str:
    """What `serve` says of the node that `./install.sh` has set up."""
    return _sparkinstall(node, "serve", MODEL, *AGREED, *UNWATCHED).stdout


def _set_up(node: FreshNode, *settings: str) -> None:
    report = run_step(node, "converge", "single", *settings)
    assert report["outcome"] == "changed", report


@pytest.mark.usefixtures("served")
def test_single_node_serves_and_streams(node: FreshNode) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "ignore_eos": True}
    output = ask(node, "/v1/chat/completions", stream=True, **asked)
    *events, end = [line.removeprefix("data: ") for line in output.splitlines() if line]
    assert end == "[DONE]"
    (*earlier, last) = [json.loads(event)["choices"][0] for event in events]
    assert last["finish_reason"] == "length", last
    # A busy vLLM puts several tokens into one event, and never all of them.
    assert sum(bool(each["delta"].get("content")) for each in earlier) > 1, output


@pytest.mark.usefixtures("served")
def test_fit_plans_the_cache_that_the_log_of_the_server_has(node: FreshNode) -> None:
    first, second = (_planned_cache(node, sequences) for sequences in (1, 2))
    # vLLM keeps one block for itself.
    block = 2 * first - second
    sequences = (1 << 30) // block / ((second - first) // block)
    log = journal(node, 4000)
    said = re.findall(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log)
    assert said and set(said) == {("1,024", f"{sequences:.2f}")}


def _planned_cache(node: FreshNode, sequences: int) -> int:
    """Bytes of the cache for so many sequences; the second time from what was kept of the first answer."""
    words = ("fit", MODEL, "--context", "1024", "--sequences", str(sequences), "--memory", "20GiB", "--json")
    data = json.loads(_sparkinstall(node, *words).stdout)["data"]
    assert (data["asked"], data["memory"]["kv_cache"]["basis"]) == (True, "planned"), data
    return int(data["memory"]["kv_cache"]["value"])


@pytest.mark.usefixtures("served")
def test_payload_gives_the_recorded_plans(node: FreshNode) -> None:
    """All models in one process: fast tests hold these plans to the logs of real engines."""
    records = json.loads((PLANS / f"{vllm_on_cpu.VERSION}.json").read_text())["records"]
    node.run("sh", "-c", FOLDERS, "sh", f"{CHECKOUT}/tests/cases/kv-cache/models")
    questions = [{**_of(each), "folder": f"/srv/kv/{each['model']}"} for each in records]
    program = ("python", "-P", "-c", payloads.source("vllm_kv_cache"), json.dumps(questions))
    env = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    started = ("bash", "-c", WITH_ENV_FILE, "bash", f"{PREFIX}/env/single-node.env", *program)
    said = node.run(*started, user="spark", env=env, timeout=600).stdout
    answers = json.loads(said.splitlines()[-1])["answers"]
    assert [each.get("plan") for each in answers] == [each.get("plan") for each in records]
    assert [bool(each.get("error")) for each in answers] == [bool(each.get("error")) for each in records]


def _of(record: dict[str, Any]) -> dict[str, Any]:
    return {"words": record["words"], "nodes": record["nodes"]}


def test_serve_ends_with_a_line_for_a_shell_that_is_answered(node: FreshNode, served: str) -> None:
    assert re.search(rf"^✓ {MODEL} answers in [\d m]+ s, first token after \d+\.\d\d s\.$", served, re.MULTILINE), (
        served
    )
    program, url, *rest = shlex.split(served.splitlines()[-1])
    assert (program, url) == ("curl", "http://127.0.0.1:8000/v1/chat/completions")
    output = json.loads(ask(node, "/v1/chat/completions", **json.loads(rest[-1]), max_tokens=4))
    assert output["choices"][0]["message"]["role"] == "assistant"


def test_question_is_answered_after_install_sh_and_one_command(node: FreshNode, served: str) -> None:
    assert "sparkinstall ask 'What is a GB10?'" in served
    assert _told(node)["serving"]["versions"]["vllm"] == f"{vllm_on_cpu.VERSION}+cpu"
    answer = _sparkinstall(node, "ask", "What is a GB10?", "--max-tokens", "8", "--json")
    data = json.loads(answer.stdout)["data"]
    assert (data["model"], data["finish_reason"] in ("length", "stop")) == (MODEL, True), data


def test_serve_records_what_runs(node: FreshNode, served: str) -> None:
    del served
    told = _told(node)
    record = told["serving"]
    assert (told["model"], told["active"], told["starts"], told["current"]) == (MODEL, "active", 0, True)
    assert record["server"]["pid"] == int(main_pid(node))
    assert record["server"]["argv"][2:8] == ["serve", MODEL, "--host", "127.0.0.1", "--port", "8000"]
    assert "--max-model-len 1024" in " ".join(record["server"]["argv"]), "the model allows no more"
    assert record["server"]["env"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert record["engine"]["pid"] != record["server"]["pid"]
    assert {"vllm", "torch"} <= set(record["versions"])
    assert record["memory"]["free_blocks"]
    assert [each["name"] for each in record["phases"]][:2] == ["start", "weights"]
    assert record["seconds"] > record["phases"][0]["seconds"] > 0
    again = _sparkinstall(node, "serve", MODEL, *AGREED, *UNWATCHED).stdout
    assert f"✓ {MODEL} answers.\n" in again
    assert f"✓ {MODEL} answers.\n" in _sparkinstall(node, "serve", "wait").stdout
    assert _told(node)["serving"] == record


def test_bench_measures_what_is_served_with_vllms_own_tool(node: FreshNode, served: str) -> None:
    """One process of it, for all rounds; its counts are those of the server."""
    del served
    told = _told(node)["serving"]
    # A block of the cache has 128 tokens here.
    scenarios = ("58/2", "600/32", "1834/32", "64/8@512")
    words = ("bench", *scenarios, "--concurrency", "2", "--requests", "4", "--text", "code")
    slo = ("--slo", "ttft=3600s,itl=3600s")
    run = _sparkinstall(node, *words, *slo, "--output", "/home/spark/bench.json", "--json")
    record = json.loads(run.stdout)["data"]["record"]
    assert record == json.loads(node.read("/home/spark/bench.json"))
    assert (record["complete"], [each["name"] for each in record["left_out"]]) == (True, ["1834/32"])
    results: list[dict[str, Any]] = [*record["scenarios"], *record["levels"]]
    short, long, deep, several = results
    assert [(each["completed"], each["failed"], each["others"]) for each in results] == [
        (3, 0, 0), (3, 0, 0), (3, 0, 0), (4, 0, 0),
    ]  # fmt: skip
    assert (deep["name"], deep["prompt_tokens"]) == ("64/8@512 code", 576)
    assert (deep["cache"], len(deep["prefill"])) == ({"queries": 1728, "hits": 1536}, 3)
    assert not [each for each in deep["notes"] if "cache" in each["text"]]
    requests = [(each["prompt_tokens"], each["tokens"]) for each in (*short["raw"], *long["raw"], *several["raw"])]
    assert requests == [(58, 2)] * 3 + [(600, 32)] * 7
    # A server that is late sends many tokens in one piece; not in every request.
    assert min(long["ttft"]) > 0 and sum(long["ttft"]) < sum(long["total"])
    assert (several["concurrency"], several["good"], several["met"]) == (2, 4, True)
    assert [each["cache"] for each in (long, several)] == [{"queries": 1800, "hits": 0}, {"queries": 2400, "hits": 0}]
    ran = record["served"]
    assert (ran["process"], ran["engine"], ran["versions"]) == (told["server"], told["engine"], told["versions"])
    assert (ran["vllm"], ran["context"], ran["prefix_cache"]) == (vllm_on_cpu.VERSION, 1024, True)
    assert (ran["invocation"], ran["ready"]) == (told["invocation"], told["seconds"])
    # vLLM itself is no other process.
    assert not {each["pid"] for each in record["busy"]} & {ran["process"]["pid"], ran["engine"]["pid"]}


def test_bench_of_cached_prompts_finds_them_in_the_cache_of_vllm(node: FreshNode, served: str) -> None:
    del served
    words = ("bench", "600/8", "--cached", "--concurrency", "2", "--requests", "2", "--text", "prose")
    said = _sparkinstall(node, *words, "--output", "/home/spark/cached.json", "--json")
    record = json.loads(said.stdout)["data"]["record"]
    found = [*record["scenarios"], *record["levels"]]
    # Of 600 tokens the whole blocks.
    assert [each["cache"] for each in found] == [{"queries": 1800, "hits": 1536}, {"queries": 1200, "hits": 1024}]
    assert found[0]["prefill"] is None and record["served"]["prefix_cache"] is True
    assert not [note for each in found for note in each["notes"] if note["weight"] == "error"]


WATCHED = """
cd "$HOME" && rm -f watch.jsonl || exit 1
"$@" --record watch.jsonl --interval 1 >/dev/null 2>watch.err &
while kill -0 $! && [ "$(cat watch.jsonl 2>/dev/null | wc -l)" -lt 3 ]; do sleep 0.2; done
python3 -I {checkout}/tests/support/streamed_load.py http://127.0.0.1:8000 {model} {requests} {tokens}
sleep 2
kill $! && wait $! || {{ cat watch.err >&2; exit 1; }}
"""


def test_watch_tells_the_latencies_that_a_client_measures(node: FreshNode, served: str) -> None:
    """Within one bucket of vLLM's histograms; a client on a busy machine is later, and measures again."""
    del served
    for _ in range(_MEASUREMENTS):
        apart = _buckets_apart(node)
        if set(apart.values()) <= {-1, 0, 1}:
            return
    pytest.fail(f"more than a bucket apart each time, at last {apart}")


_MEASUREMENTS = 6


def _buckets_apart(node: FreshNode) -> dict[tuple[str, int], int]:
    """By how many buckets a client's percentiles are above those of `watch`, by latency and percentile."""
    requests, tokens = 120, 16
    script = WATCHED.format(checkout=CHECKOUT, model=MODEL, requests=requests, tokens=tokens)
    argv, env = _command("watch")
    run = node.run("sh", "-c", script, "sh", *argv, user="spark", env=env, timeout=LOAD_SECONDS)
    measured: dict[str, list[float]] = json.loads(run.stdout)
    replayed = _sparkinstall(node, "watch", "--replay", "/home/spark/watch.jsonl", "--once", "--json")
    (seen,) = json.loads(replayed.stdout)["data"]["nodes"]
    counts = {name: seen[name]["count"] for name in measured}
    assert counts == {"ttft": requests, "itl": requests * (tokens - 1), "e2e": requests}
    assert (seen["models"], seen["lacking"], seen["trouble"]) == ([MODEL], [], "")
    first = json.loads(node.read("/home/spark/watch.jsonl").splitlines()[1])
    apart = {}
    for name, seconds in measured.items():
        bounds = [float(each) for each in first["told"]["histograms"][name]]
        for share in (50, 95):
            found = quantiles(seconds, n=100, method="inclusive")[share - 1]
            apart[name, share] = bisect_left(bounds, found) - bisect_left(bounds, seen[name][f"p{share}"]["high"])
    return apart


def test_serve_of_an_incomplete_snapshot_without_a_hub_names_its_files_and_changes_nothing(
    node: FreshNode, served: str
) -> None:
    del served
    place, commit = "/home/spark/.cache/huggingface/hub/models--org--half", "c" * 40
    node.run("mkdir", "-p", f"{place}/refs", f"{place}/snapshots/{commit}", user="spark")
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    for name, text in {
        "refs/main": commit,
        f"snapshots/{commit}/config.json": "{}",
        f"snapshots/{commit}/one.safetensors": "1",
        f"snapshots/{commit}/model.safetensors.index.json": index,
    }.items():
        node.write(f"{place}/{name}", text, user="spark")
    before = main_pid(node)
    failed = _sparkinstall(node, "serve", "org/half", *AGREED, check=False)
    assert failed.returncode == 1
    assert f"download what org/half at {commit[:12]} lacks: two.safetensors" in failed.stdout
    assert f"{MODEL} is served, as before" in failed.stderr
    assert "still missing: two.safetensors" in failed.stderr
    assert (main_pid(node), _told(node)["model"]) == (before, MODEL)


def test_serve_of_a_model_that_vllm_does_not_load_is_explained_and_undone(node: FreshNode, served: str) -> None:
    del served
    node.run("cp", "-r", MODEL, BROKEN)
    node.run("truncate", "-s", "300000", f"{BROKEN}/model.safetensors")
    refused = _sparkinstall(node, "serve", BROKEN, *AGREED, check=False)
    assert refused.returncode == 4
    assert "model.safetensors is truncated" in refused.stdout
    failed = _sparkinstall(node, "serve", BROKEN, *AGREED, "--ignore", "model-files", check=False)
    assert failed.returncode == 1
    assert "vLLM has ended before it answered, in the phase `weights`" in failed.stderr
    assert f"{MODEL} is started again, as before" in failed.stderr
    assert "damaged or truncated" in failed.stderr, "the cause from its log"
    told = _told(node)
    assert (told["model"], told["active"]) == (MODEL, "active")
    assert f"vllm serve {MODEL} " in node.read(f"/etc/systemd/system/{UNIT}")


def test_serve_that_is_interrupted_leaves_what_was_before(node: FreshNode, served: str) -> None:
    del served
    argv, env = _command("serve", REASONER, *AGREED)
    process = node.popen(*argv, user="spark", env=env)
    assert process.stderr is not None
    for line in process.stderr:
        if "start: begins" in line:
            break
    # Twice, as people do.
    node.signal(process, signal.SIGTERM)
    node.signal(process, signal.SIGTERM)
    _, said = process.communicate(timeout=LOAD_SECONDS)
    assert process.returncode == 130, said
    assert f"✗ interrupted; {MODEL} is started again, as before" in said
    assert (_told(node)["model"], state(node)) == (MODEL, ["active", "enabled"])


def test_serve_stop_frees_the_port_and_a_start_that_takes_too_long_ends(node: FreshNode, served: str) -> None:
    del served
    _sparkinstall(node, "serve", "stop")
    assert state(node) == ["inactive", "disabled"]
    taken = node.popen("python3", "-m", "http.server", "8000", "--bind", "127.0.0.1")
    try:
        node.run("sh", "-c", "until ss -Hltn | grep -q :8000; do sleep 0.1; done")
        refused = _sparkinstall(node, "serve", MODEL, *AGREED, check=False)
    finally:
        node.signal(taken, signal.SIGKILL)
        taken.communicate()
    assert (refused.returncode, "port 8000 is in use" in refused.stdout) == (4, True), refused
    late = _sparkinstall(node, "serve", "restart", *AGREED, "--limit", "2", check=False)
    assert late.returncode == 1
    assert "vLLM has not answered within 2 s, in the phase `start`; vLLM is stopped" in late.stderr
    assert state(node) == ["inactive", "disabled"]


# Starts that fail. Before each of them no vLLM runs, and the settings name the model.


def _state_left(node: FreshNode) -> tuple[Any, ...]:
    """What a failed start must leave as it was: settings, unit, processes and ports."""
    processes = node.run("pgrep", "-fa", "vllm serve|VLLM::", check=False).stdout
    ports = node.run("sh", "-c", "ss -Hltn | grep -c :8000 || true").stdout.strip()
    unit = node.read(f"/etc/systemd/system/{UNIT}")
    return _told(node)["model"], state(node), processes, ports, unit


@pytest.fixture
def stopped(node: FreshNode, served: str) -> Iterator[FreshNode]:
    """The node without a running vLLM; after the test all must be as before."""
    del served
    _sparkinstall(node, "serve", "stop")
    before = _state_left(node)
    assert before[:4] == (MODEL, ["inactive", "disabled"], "", "0")
    yield node
    assert _state_left(node) == before, journal(node, 40)


def _copy_of_the_model(node: FreshNode, name: str) -> str:
    place = f"/srv/{name}"
    node.run("cp", "-r", MODEL, place)
    return place


def test_serve_without_config_json_and_with_an_unknown_parser_is_refused_before_a_start(stopped: FreshNode) -> None:
    place = _copy_of_the_model(stopped, "without-config")
    stopped.run("rm", f"{place}/config.json")
    refused = _sparkinstall(stopped, "serve", place, *AGREED, check=False)
    assert (refused.returncode, f"{place} lacks config.json" in refused.stdout) == (4, True), refused
    words = ("--set", "serving.arguments=[--tool-call-parser, hermess]")
    refused = _sparkinstall(stopped, "serve", MODEL, *words, *AGREED, check=False)
    assert (refused.returncode, "did you mean `hermes`?" in refused.stdout) == (4, True), refused


def test_serve_of_an_architecture_that_vllm_does_not_know_is_explained_and_undone(stopped: FreshNode) -> None:
    place = _copy_of_the_model(stopped, "unknown-architecture")
    config = json.loads(stopped.read(f"{place}/config.json"))
    stopped.write(f"{place}/config.json", json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    failed = _sparkinstall(stopped, "serve", place, *AGREED, check=False)
    assert failed.returncode == 1
    assert "vLLM has ended before it answered" in failed.stderr
    assert "NoSuchForCausalLM" in failed.stderr, failed.stderr


def test_serve_whose_engine_is_killed_while_it_starts_ends_at_once(stopped: FreshNode) -> None:
    """As the kernel does when no memory is left."""
    argv, env = _command("serve", MODEL, *AGREED)
    process = stopped.popen(*argv, user="spark", env=env)
    # As soon as it is there: what `serve` says of a phase may come when a small model already answers. The brackets are
    # there so that the shell itself has not that name.
    stopped.run("sh", "-c", "until pkill -KILL --full VLLM::[E]ngineCor; do sleep 0.05; done", timeout=LOAD_SECONDS)
    _, said = process.communicate(timeout=LOAD_SECONDS)
    assert process.returncode == 1, said
    assert "vLLM has ended before it answered, in the phase" in said


HUB_TOKEN, HUB_TOKEN_FILE = "hf_a-token-of-this-test-0123456789", "/etc/hub-token"


@pytest.fixture(scope="module")
def opened(node: FreshNode) -> tuple[str, ...]:
    """The settings of an API that a network may use, with the reasoning model and a token for the hub."""
    node.write(HUB_TOKEN_FILE, f"{HUB_TOKEN}\n", mode="0600")
    named = (f"hub.token_file={HUB_TOKEN_FILE}", "hub.offline=false", "serving.allow=192.0.2.0/24")
    settings = (*reasoning_settings("--reasoning-parser", "qwen3"), *named)
    # The other steps are up to date.
    steps = ("--only", "model", "--only", "serving", "--only", "life", *AGREED, *UNWATCHED)
    more = [word for each in ("serving.max_model_len=512", *settings[1:]) for word in ("--set", each)]
    assert f"✓ {REASONER} answers in " in _sparkinstall(node, "all", "--serve", REASONER, *steps, *more).stdout
    return settings


def test_serving_with_the_parser_has_the_reasoning_field_and_the_key(node: FreshNode, opened: tuple[str, ...]) -> None:
    found = findings(node, "single", *opened)
    assert [each["verdict"] for each in found.values()] == ["pass"] * 3, found
    says = "reasoning in delta.reasoning, the answer in delta.content; first token after "
    assert found["serving-stream"]["found"].startswith(says)
    assert "grew by 16 tokens, of which the probes made 16; 0% of the KV cache" in found["serving-metrics"]["found"]
    wrong = findings(node, "single", *opened, key="simsim")
    assert (wrong["serving"]["verdict"], wrong["serving"]["found"]) == ("fail", f"the API rejects the key in {KEY}")
    assert_others_skip(wrong)


def test_no_secret_is_where_others_could_read_it(node: FreshNode, opened: tuple[str, ...]) -> None:
    secrets = (node.read(API_KEY).strip(), HUB_TOKEN)
    assert node.run("stat", "-c", "%a %U", API_KEY, HUB_TOKEN_FILE).stdout.split("\n")[:2] == ["600 root"] * 2
    probing = node.popen(*program("probe", "single", *opened), user="spark", env=CHECKOUT_ENV, cwd=CHECKOUT)
    seen = ""
    while probing.poll() is None:
        seen += node.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>&-; true").stdout
        time.sleep(0.2)
    said = probing.communicate()
    assert probing.returncode == 0, said
    assert f"HF_TOKEN_PATH=/run/credentials/{UNIT}/hf-token" in seen and "VLLM::EngineCore" in seen
    # All that is on the disk or in memory as a file, but for the two files and the credentials of the unit.
    kept = f"-path {PREFIX}/venvs -prune -o -path {CACHE} -prune -o -path /srv -prune -o"
    find = f"find /etc /run/systemd /run/log /tmp /var /home /root {PREFIX} {kept} -type f -print0"
    texts = {
        "processes": seen,
        "unit": node.run("sh", "-c", f"systemctl cat {UNIT}; systemctl show {UNIT}").stdout,
        "journal": node.run("journalctl", "--no-pager", "-a", "-o", "json").stdout,
    }
    for secret in secrets:
        assert [name for name, text in texts.items() if secret in text] == []
        files = node.run("sh", "-c", f"{find} | xargs -0 grep -lFe {secret} -- 2>&-; true").stdout.split()
        assert files == [HUB_TOKEN_FILE if secret == HUB_TOKEN else API_KEY]
    assert node.run("cat", f"/run/credentials/{UNIT}/hf-token").stdout.strip() == HUB_TOKEN


def test_no_route_answers_without_the_key(node: FreshNode, opened: tuple[str, ...]) -> None:
    del opened
    key = node.read(API_KEY)
    # By the node's own address and by that which the network uses.
    for address in ("127.0.0.1", ADDRESSES["head"]):
        output = node.run("python3", "-I", f"{CHECKOUT}/tests/support/routes.py", address, input=key, timeout=600)
        tried = json.loads(output.stdout)
        routes = tried["routes"]
        assert {"POST /v1/chat/completions", "POST /invocations", "POST /tokenize"} <= set(routes["none"])
        assert len(routes["none"]) > 50, routes["none"]
        for name in ("none", "wrong"):
            answered = {each: status for each, status in routes[name].items() if status != 401}
            assert answered == {}, name
        refused = {each: status for each, status in routes["right"].items() if status in (401, 403)}
        assert refused == {}
        assert [routes["right"][f"GET {path}"] for path in ("/metrics", "/health", "/v1/models")] == [200] * 3
        strange = tried["strange"]
        for name in ("right", "odd case", "spaces", "HTTP/1.0"):
            assert strange.pop(name) == [200], name
        assert strange.pop("kept connection") == [200, 401]
        assert strange.pop("pipelined") == [401, 401, 200]
        assert {name for name, statuses in strange.items() if not _is_refusal(statuses)} == set(), strange
    # One of them has the key in its address.
    assert key.strip() not in node.run("journalctl", "--no-pager", "-a", "-o", "json").stdout


def _is_refusal(statuses: list[int]) -> bool:
    """400: what is no HTTP; 403: a websocket that was not accepted."""
    return bool(statuses) and set(statuses) <= {400, 401, 403}


def test_ask_and_the_example_of_the_docs_show_reasoning_apart_from_the_answer(
    node: FreshNode, opened: tuple[str, ...]
) -> None:
    lines = [each.removeprefix("serving.").replace("=", ": ", 1) for each in opened if each.startswith("serving.")]
    node.write("/home/spark/config.yaml", "serving: {" + ", ".join(lines) + "}\n", user="spark")
    ask = (COMMAND, "ask", "How much?", "--config", "/home/spark/config.yaml")
    spoken = node.run(*ask, "--reasoning", user="spark")
    assert (spoken.stdout, spoken.stderr) == (f"{vllm_on_cpu.ANSWER}\n", f"{vllm_on_cpu.REASONING}\n")
    data = json.loads(node.run(*ask, "--json", user="spark").stdout)["data"]
    said = (data["model"], data["content"], data["reasoning"], data["finish_reason"])
    assert said == (REASONER, vllm_on_cpu.ANSWER, vllm_on_cpu.REASONING, "stop")
    watch = (COMMAND, "watch", "--once", "--config", "/home/spark/config.yaml", "--json")
    (seen,) = json.loads(node.run(*watch, user="spark").stdout)["data"]["nodes"]
    assert (seen["trouble"], seen["models"]) == ("", [REASONER])
    unknown = node.run(*ask, "--model", "other", user="spark", check=False)
    assert unknown.returncode == 1 and f"it serves {REASONER}" in unknown.stderr
    node.write("/home/spark/example.py", example(), user="spark")
    env = {KEY: node.read(API_KEY).strip()}
    shown = node.run(f"{PREFIX}/venv/bin/python", "/home/spark/example.py", user="spark", env=env)
    assert (shown.stdout, shown.stderr) == (f"{vllm_on_cpu.ANSWER}\n", vllm_on_cpu.REASONING)


def test_stranger_who_has_the_port_gets_no_key(node: FreshNode, opened: tuple[str, ...]) -> None:
    del opened
    server = ("systemd-run", "--quiet", "--unit", "stranger", "--uid", "nobody", "python3", "-um", "http.server")
    node.run(*server, "--bind", "127.0.0.1", "8123")
    try:
        until(lambda: node.run("ss", "-Hltn", "sport = :8123").stdout)
        node.write(
            "/home/spark/other.yaml", f"serving: {{model: {REASONER}, port: 8123, allow: 192.0.2.0/24}}\n", user="spark"
        )
        run = node.run(COMMAND, "ask", "x", "--config", "/home/spark/other.yaml", user="spark", check=False)
        assert run.returncode == 1 and "a program of nobody listens at 127.0.0.1:8123" in run.stderr, run
        assert "GET" not in node.run("journalctl", "-u", "stranger", "-o", "cat").stdout
    finally:
        node.run("systemctl", "stop", "stranger", check=False)


@pytest.fixture(scope="module")
def unparsed(node: FreshNode) -> Found:
    """The findings for the reasoning model without a parser."""
    _set_up(node, *reasoning_settings())
    return until_it_serves(node, "single", *reasoning_settings())


def test_serving_stream_without_the_parser_warns_of_raw_reasoning(unparsed: Found) -> None:
    stream = unparsed["serving-stream"]
    assert stream["verdict"] == "warn"
    assert stream["found"].startswith("raw <think> in delta.content: clients show reasoning as the answer; ")
    assert stream["hint"].startswith("add `--reasoning-parser`, `NAME` to `serving.arguments`")


def test_serving_of_another_model_fails(node: FreshNode, unparsed: Found) -> None:
    del unparsed
    found = serving_finding(node, "single")
    assert (found["verdict"], found["found"], found["expected"]) == ("fail", f"it serves {REASONER}", MODEL)


def test_serving_with_a_stopped_engine_fails_despite_health(node: FreshNode, unparsed: Found) -> None:
    del unparsed
    signal = ("pkill", "--full", "VLLM::EngineCore", "--signal")
    node.run(*signal, "STOP")
    try:
        found = findings(node, "single", *reasoning_settings())
    finally:
        node.run(*signal, "CONT")
    assert found["serving"]["found"] == "no completion within 60 s, although /health returns 200"
    assert found["serving"]["verdict"] == "fail"
    assert_others_skip(found)
    assert findings(node, "single", *reasoning_settings())["serving"]["verdict"] == "pass"


# A server that reads a prompt in parts of 64 tokens, two of which fill a block of its cache.
IN_SMALL_PARTS = (
    *reasoning_settings(
        *("--chat-template", f"{REASONER}/opening.jinja", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    ),
    "serving.max_model_len=1024",
)


def test_life_restarts_a_stopped_engine_and_keeps_evidence(node: FreshNode, unparsed: Found) -> None:
    del unparsed
    settings = reasoning_settings()
    set_up_life(node, "single", *settings)
    before, since = main_pid(node), time.time()
    node.run("pkill", "--full", "VLLM::EngineCore", "--signal", "STOP")
    assert "no request runs, no token has come for" in life_says(node, "vllm.service is wedged: ", since)
    place = life_says(node, "evidence of the wedge is in ", since).rpartition(" ")[2]
    life_says(node, "vllm.service was restarted; 2 of 3 restarts of this hour are left", since)
    assert main_pid(node) != before
    until_it_serves(node, "single", *settings)
    life_says(node, "vllm.service generates again", since)
    names = node.run("ls", place).stdout.split()
    wanted = {
        "why.txt",
        "metrics-at-last-sign.txt",
        "metrics-last.txt",
        "processes.txt",
        "vllm.service.log",
        "sockets.txt",
    }
    assert wanted <= set(names), names
    assert "State:\tT (stopped)" in node.read(f"{place}/processes.txt")
    assert "vllm:generation_tokens_total" in node.read(f"{place}/metrics-at-last-sign.txt")
    assert "Application startup complete" in node.read(f"{place}/vllm.service.log")
    (wedge,) = life_state(node)["wedges"]
    assert (wedge["evidence"], wedge["action"]) == (place, "restarted")
    assert run_step(node, "plan", "single", *settings, *LIVELY, "step=life")["outcome"] == "unchanged"
    # Other tests wait longer on purpose.
    node.run("systemctl", "stop", LIFE)


def test_serving_stream_with_reasoning_opened_by_the_chat_template_warns(node: FreshNode) -> None:
    _set_up(node, *IN_SMALL_PARTS)
    stream = until_it_serves(node, "single", *IN_SMALL_PARTS)["serving-stream"]
    assert stream["verdict"] == "warn"
    says = "reasoning is in delta.content, unmarked: the chat template opens it; first token after "
    assert stream["found"].startswith(says)


def test_uninstall_removes_vllm_and_all_that_was_installed(node: FreshNode) -> None:
    done = json.loads(_sparkinstall(node, "uninstall", "--yes", "--json").stdout)
    assert done["exit_code"] == 0, done
    assert_no_service_is_left(node)
    assert node.run("ls", PREFIX, check=False).returncode != 0
