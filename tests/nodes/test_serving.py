"""vLLM, built for the CPU, as units of systemd: on one node, then on two nodes with a cable.

All tests use the same nodes, in order.
"""

import json
import re
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import payloads
from sparkinstall.layout import API_KEY
from sparkinstall.system.read_only import WITH_ENV_FILE
from tests.lab.cabling import PORT_0, Cabling, Plugs, ip
from tests.lab.commands import Completed
from tests.lab.node import Bind, FreshNode
from tests.nodes.fresh import REPOSITORY
from tests.support import vllm_on_cpu
from tests.support.chat_server import example
from tests.support.ray_on_a_node import ADDRESSES

pytestmark = [pytest.mark.layer2, pytest.mark.layer3, pytest.mark.layer5, pytest.mark.network]

CHECKOUT, PACKAGES = "/srv/checkout", "/srv/packages"
PREFIX = "/opt/sparkinstall"
MODEL, REASONER = "/srv/model", "/srv/reasoner"
UNIT = "vllm.service"
# A folder with config.json for each file of another.
FOLDERS = """
for each in "$1"/*.json; do
  to="/srv/kv/$(basename "$each" .json)"
  mkdir -p "$to"
  ln -s "$each" "$to/config.json"
done
"""
PLANS = Path(__file__).parents[1] / "cases/kv-cache"
KEY = "VLLM_API_KEY"
NAMES = {"single": "single-node", "head": "multi-node-head", "worker": "multi-node-worker"}
CHECKOUT_ENV = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
SETTINGS = ("step=serving", "cluster.executor=mp", f"serving.model={MODEL}", "serving.max_model_len=512")
# Seconds for two processes on two busy cores to import PyTorch and connect.
LOAD_SECONDS = 420
# Seconds that the probe waits for a completion, and then for /health.
PATIENCE = 60 + 15
ENV = """\
# Like that of the step `env-files`, without NCCL and CUDA.
set -a
VLLM_HOST_IP="{address}"
VLLM_PORT="29600"
{link}
VIRTUAL_ENV="{prefix}/venv"
SPT_NOENV="1"
set +a
: <<'SYSTEMD'
PATH="{prefix}/venv/bin:/usr/local/bin:/usr/bin:/bin"
SYSTEMD
. "{prefix}/venv/bin/activate"
"""
LINK = "".join(f'{name}_SOCKET_IFNAME="{PORT_0[0]}"\n' for name in ("NCCL", "GLOO", "TP"))
ASK = """
import json, sys, urllib.request
path, body = sys.argv[1], sys.argv[2].encode() or None
asked = urllib.request.Request("http://127.0.0.1:8000" + path, body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(asked, timeout=float(sys.argv[3])).read().decode())
"""

BEGIN = """
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.system.local import LocalSystem
with StateFolder(LocalSystem()).hold("test", silent):
    pass
"""

Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    wires: Cabling
    plugs: Plugs
    head: FreshNode
    worker: FreshNode

    @property
    def nodes(self) -> dict[str, FreshNode]:
        return {"head": self.head, "worker": self.worker}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = {MODEL: vllm_on_cpu.model, REASONER: vllm_on_cpu.reasoning_model}
    models = [Bind(make(tmp_path_factory.mktemp("model")), place) for place, make in made.items()]
    for each in models:
        each.host.chmod(0o755)
    parts = [Bind(vllm_on_cpu.environment(), vllm_on_cpu.PLACE), Bind(REPOSITORY, CHECKOUT), *models]
    parts.append(Bind(vllm_on_cpu.search_library(), PACKAGES))
    with ExitStack() as stack:
        wires = Cabling(direct=True)
        stack.callback(wires.remove)
        plugs = {role: wires.add(role, PORT_0[:1]) for role in ADDRESSES}
        nodes = [stack.enter_context(_node(wires, plugs[role], address, parts)) for role, address in ADDRESSES.items()]
        for node in nodes:
            _prepare(node)
        yield Pair(wires, plugs["worker"], *nodes)


def _node(wires: Cabling, plugs: Plugs, address: str, parts: Sequence[Bind]) -> FreshNode:
    wires.power_on(plugs)
    ip(plugs.netns, "addr", "add", f"{address}/24", "dev", PORT_0[0])
    return FreshNode(netns=plugs.netns, bind=parts)


def _prepare(node: FreshNode) -> None:
    node.run("install", "-d", "-o", "spark", "-g", "spark", PREFIX)
    node.run("mkdir", "-p", f"{PREFIX}/env", user="spark")
    node.run("mkdir", f"/etc/systemd/system/{UNIT}.d")
    node.write(f"/etc/systemd/system/{UNIT}.d/cpu.conf", vllm_on_cpu.DROP_IN)
    # An environment without a journal would count as one whose journal is lost.
    env = {"PYTHONPATH": CHECKOUT, "PYTHONDONTWRITEBYTECODE": "1"}
    node.run(f"{PREFIX}/venv/bin/python", "-c", BEGIN, user="spark", env=env)


def _write_env(node: FreshNode, role: str) -> None:
    address, link = ("127.0.0.1", "") if role == "single" else (ADDRESSES[role], LINK)
    text = ENV.format(address=address, link=link, prefix=PREFIX)
    node.write(f"{PREFIX}/env/{NAMES[role]}.env", text, user="spark")


def _run_step(node: FreshNode, verb: str, role: str, *settings: str, key: str = "") -> Any:
    env = {**CHECKOUT_ENV, **({KEY: key} if key else {})}
    output = node.run(*_program(verb, role, *settings), user="spark", env=env, cwd=CHECKOUT, timeout=600)
    return json.loads(output.stdout.splitlines()[-1])


def _program(verb: str, role: str, *settings: str) -> tuple[str, ...]:
    python = f"{PREFIX}/venv/bin/python"
    return (python, "-m", "tests.support.ray_on_a_node", verb, role, *SETTINGS, *settings)


def _set_up(node: FreshNode, role: str, *settings: str) -> None:
    _write_env(node, role)
    report = _run_step(node, "converge", role, *settings)
    assert report["outcome"] == "changed", report


def _findings(node: FreshNode, role: str, *settings: str, key: str = "") -> Found:
    """The findings of the API's probes; another one must find that vLLM takes all that these tests start it with."""
    found = dict(_run_step(node, "probe", role, *settings, key=key))
    before = found.pop("vllm-arguments")
    assert before["verdict"] == "pass", before
    return found


def _serving_finding(node: FreshNode, role: str) -> dict[str, Any]:
    return dict(_findings(node, role)["serving"])


def _until_it_serves(node: FreshNode, role: str, *settings: str, key: str = "") -> Found:
    """Wait until the probe passes; while vLLM loads it may only warn, and the others are skipped."""
    deadline = time.monotonic() + LOAD_SECONDS
    while (found := _findings(node, role, *settings, key=key))["serving"]["verdict"] != "pass":
        assert found["serving"]["verdict"] == "warn", (found, _journal(node))
        assert time.monotonic() < deadline, (found, _journal(node))
        _assert_others_skip(found)
        time.sleep(2)
    return found


def _assert_others_skip(found: Found) -> None:
    others = [each for name, each in found.items() if name != "serving"]
    assert [each["found"] for each in others] == ["no completion came: see `serving`"] * 2
    assert [each["verdict"] for each in others] == ["skip"] * 2


def _journal(node: FreshNode, lines: int = 400) -> str:
    return node.run("journalctl", "-u", UNIT, "-o", "cat", "--no-pager", "-n", str(lines)).stdout


def _ask(node: FreshNode, path: str, within: float = 60, **body: Any) -> str:
    given = json.dumps({"model": MODEL, **body}) if body else ""
    return node.run("python3", "-I", "-c", ASK, path, given, str(within), timeout=within + 30).stdout


def _state(node: FreshNode) -> list[str]:
    return node.run("systemctl", "show", "--value", "-p", "ActiveState", "-p", "UnitFileState", UNIT).stdout.split()


def _main_pid(node: FreshNode) -> str:
    return node.run("systemctl", "show", "-P", "MainPID", UNIT).stdout.strip()


def _completion(node: FreshNode) -> str:
    """The model's completion of a few words, without sampling."""
    output = json.loads(_ask(node, "/v1/completions", prompt="One, two,", max_tokens=6, temperature=0))
    assert output["usage"]["completion_tokens"] == 6
    return str(output["choices"][0]["text"])


def test_serving_without_a_server_fails_and_skips_the_others(pair: Pair) -> None:
    found = _findings(pair.head, "single")
    assert found["serving"]["verdict"] == "fail"
    assert found["serving"]["found"] == f"nothing answers at 127.0.0.1:8000; {UNIT} is inactive"
    _assert_others_skip(found)


# This is no Spark, and the test has set it up itself.
NOT_HERE = ("machine", "arch", "os", "driver", "memory", "disk", "cuda", "prefix")
AGREED = ("--yes", *(word for name in NOT_HERE for word in ("--ignore", name)))
UNWATCHED = ("--set", "serving.life.enabled=false")
BROKEN = "/srv/broken"


def _command(*words: str) -> tuple[list[str], dict[str, str]]:
    """A command line of sparkinstall on the node, and its variables: there is no hub."""
    env = {"PYTHONPATH": f"{CHECKOUT}:{PACKAGES}", "PYTHONDONTWRITEBYTECODE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return [f"{PREFIX}/venv/bin/python", "-m", "sparkinstall", *words], env


def _sparkinstall(node: FreshNode, *words: str, check: bool = True) -> Completed:
    argv, env = _command(*words)
    return node.run(*argv, user="spark", env=env, cwd=CHECKOUT, timeout=LOAD_SECONDS, check=check)


def _told(node: FreshNode) -> dict[str, Any]:
    """What `serve status` says."""
    return dict(json.loads(_sparkinstall(node, "serve", "status", "--json", check=False).stdout)["data"])


@pytest.fixture(scope="module")
def served(pair: Pair) -> str:
    """What `all --serve` says of a single node."""
    _write_env(pair.head, "single")
    # What installs is not here: the other steps are tests/nodes/test_fresh_node.py's.
    steps = ("--only", "model", "--only", "serving", "--only", "life")
    return _sparkinstall(pair.head, "all", "--serve", MODEL, *steps, *AGREED, *UNWATCHED).stdout


@pytest.fixture(scope="module")
def alone(pair: Pair) -> str:
    """The completion of a single node."""
    _set_up(pair.head, "single")
    _until_it_serves(pair.head, "single")
    return _completion(pair.head)


def test_single_node_serves_and_streams(pair: Pair, alone: str) -> None:
    assert alone
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "ignore_eos": True}
    output = _ask(pair.head, "/v1/chat/completions", stream=True, **asked)
    events = [line.removeprefix("data: ") for line in output.splitlines() if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    assert last["choices"][0]["finish_reason"] == "length", last
    assert len(events) > 5


def test_fit_plans_the_cache_that_the_log_of_the_server_has(pair: Pair, alone: str) -> None:
    assert alone
    first, second = (_planned_cache(pair.head, sequences) for sequences in (1, 2))
    # vLLM keeps one block for itself.
    block = 2 * first - second
    sequences = (1 << 30) // block / ((second - first) // block)
    log = _journal(pair.head, 4000)
    said = re.findall(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", log)
    assert said and set(said) == {("512", f"{sequences:.2f}")}


def _planned_cache(node: FreshNode, sequences: int) -> int:
    """Bytes of the cache for so many sequences; the second time from what was kept of the first answer."""
    words = ("fit", MODEL, "--context", "512", "--sequences", str(sequences), "--memory", "20GiB", "--json")
    program = (f"{PREFIX}/venv/bin/python", "-m", "sparkinstall", *words)
    run = node.run(*program, user="spark", env=CHECKOUT_ENV, timeout=600)
    data = json.loads(run.stdout)["data"]
    assert (data["asked"], data["memory"]["kv_cache"]["basis"]) == (True, "planned"), data
    return int(data["memory"]["kv_cache"]["value"])


def test_payload_gives_the_recorded_plans(pair: Pair) -> None:
    """All models in one process: fast tests hold these plans to the logs of real engines."""
    records = json.loads((PLANS / f"{vllm_on_cpu.VERSION}.json").read_text())["records"]
    pair.head.run("sh", "-c", FOLDERS, "sh", f"{CHECKOUT}/tests/cases/kv-cache/models")
    questions = [{**_of(each), "folder": f"/srv/kv/{each['model']}"} for each in records]
    program = ("python", "-P", "-c", payloads.source("vllm_kv_cache"), json.dumps(questions))
    env = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    started = ("bash", "-c", WITH_ENV_FILE, "bash", f"{PREFIX}/env/single-node.env", *program)
    said = pair.head.run(*started, user="spark", env=env, timeout=600).stdout
    answers = json.loads(said.splitlines()[-1])["answers"]
    assert [each.get("plan") for each in answers] == [each.get("plan") for each in records]
    assert [bool(each.get("error")) for each in answers] == [bool(each.get("error")) for each in records]


def _of(record: dict[str, Any]) -> dict[str, Any]:
    return {"words": record["words"], "nodes": record["nodes"]}


def test_serve_ends_with_a_line_for_a_shell_that_is_answered(pair: Pair, served: str) -> None:
    assert re.search(rf"^✓ {MODEL} answers in [\d m]+ s, first token after \d+\.\d\d s\.$", served, re.MULTILINE), (
        served
    )
    program, url, *rest = shlex.split(served.splitlines()[-1])
    assert (program, url) == ("curl", "http://127.0.0.1:8000/v1/chat/completions")
    output = json.loads(_ask(pair.head, "/v1/chat/completions", **json.loads(rest[-1]), max_tokens=4))
    assert output["choices"][0]["message"]["role"] == "assistant"


def test_question_is_answered_after_all_serve(pair: Pair, served: str) -> None:
    assert "sparkinstall ask 'What is a GB10?'" in served
    answer = _sparkinstall(pair.head, "ask", "What is a GB10?", "--max-tokens", "8", "--json")
    data = json.loads(answer.stdout)["data"]
    assert (data["model"], data["finish_reason"] in ("length", "stop")) == (MODEL, True), data


def test_serve_records_what_runs(pair: Pair, served: str) -> None:
    del served
    told = _told(pair.head)
    record = told["serving"]
    assert (told["model"], told["active"], told["starts"], told["current"]) == (MODEL, "active", 0, True)
    assert record["server"]["pid"] == int(_main_pid(pair.head))
    assert record["server"]["argv"][2:8] == ["serve", MODEL, "--host", "127.0.0.1", "--port", "8000"]
    assert "--max-model-len 1024" in " ".join(record["server"]["argv"]), "the model allows no more"
    assert record["server"]["env"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert record["engine"]["pid"] != record["server"]["pid"]
    assert {"vllm", "torch"} <= set(record["versions"])
    assert record["memory"]["free_blocks"]
    assert [each["name"] for each in record["phases"]][:2] == ["start", "weights"]
    assert record["seconds"] > record["phases"][0]["seconds"] > 10
    again = _sparkinstall(pair.head, "serve", MODEL, *AGREED, *UNWATCHED).stdout
    assert f"✓ {MODEL} answers.\n" in again
    assert f"✓ {MODEL} answers.\n" in _sparkinstall(pair.head, "serve", "wait").stdout
    assert _told(pair.head)["serving"] == record


def test_bench_measures_what_is_served_with_vllms_own_tool(pair: Pair, served: str) -> None:
    """One process of it, for all rounds; its counts are those of the server."""
    del served
    told = _told(pair.head)["serving"]
    words = ("bench", "58/2", "600/32", "1834/32", "--concurrency", "2", "--requests", "4", "--text", "code")
    slo = ("--slo", "ttft=60s,itl=30s")
    run = _sparkinstall(pair.head, *words, *slo, "--output", "/home/spark/bench.json", "--json")
    record = json.loads(run.stdout)["data"]["record"]
    assert record == json.loads(pair.head.read("/home/spark/bench.json"))
    assert (record["complete"], [each["name"] for each in record["left_out"]]) == (True, ["1834/32"])
    results: list[dict[str, Any]] = [*record["scenarios"], *record["levels"]]
    short, long, several = results
    assert [(each["completed"], each["failed"], each["others"]) for each in results] == [
        (3, 0, 0), (3, 0, 0), (4, 0, 0),
    ]  # fmt: skip
    requests = [(each["prompt_tokens"], each["tokens"]) for each in (*short["raw"], *long["raw"], *several["raw"])]
    assert requests == [(58, 2)] * 3 + [(600, 32)] * 7
    assert all(0 < first < total for first, total in zip(long["ttft"], long["total"], strict=True))
    assert (several["concurrency"], several["good"], several["met"]) == (2, 4, True)
    assert [each["cache"] for each in (long, several)] == [{"queries": 1800, "hits": 0}, {"queries": 2400, "hits": 0}]
    ran = record["served"]
    assert (ran["process"], ran["engine"], ran["versions"]) == (told["server"], told["engine"], told["versions"])
    assert (ran["vllm"], ran["context"], ran["prefix_cache"]) == (vllm_on_cpu.VERSION, 1024, True)
    assert (ran["invocation"], ran["ready"]) == (told["invocation"], told["seconds"])
    # vLLM itself is no other process.
    assert not {each["pid"] for each in record["busy"]} & {ran["process"]["pid"], ran["engine"]["pid"]}


def test_serve_of_an_incomplete_snapshot_without_a_hub_names_its_files_and_changes_nothing(
    pair: Pair, served: str
) -> None:
    del served
    node, place, commit = pair.head, "/home/spark/.cache/huggingface/hub/models--org--half", "c" * 40
    node.run("mkdir", "-p", f"{place}/refs", f"{place}/snapshots/{commit}", user="spark")
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    for name, text in {
        "refs/main": commit,
        f"snapshots/{commit}/config.json": "{}",
        f"snapshots/{commit}/one.safetensors": "1",
        f"snapshots/{commit}/model.safetensors.index.json": index,
    }.items():
        node.write(f"{place}/{name}", text, user="spark")
    before = _main_pid(node)
    failed = _sparkinstall(node, "serve", "org/half", *AGREED, check=False)
    assert failed.returncode == 1
    assert f"download what org/half at {commit[:12]} lacks: two.safetensors" in failed.stdout
    assert f"{MODEL} is served, as before" in failed.stderr
    assert "still missing: two.safetensors" in failed.stderr
    assert (_main_pid(node), _told(node)["model"]) == (before, MODEL)


def test_serve_of_a_model_that_vllm_does_not_load_is_explained_and_undone(pair: Pair, served: str) -> None:
    del served
    node = pair.head
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


def test_serve_that_is_interrupted_leaves_what_was_before(pair: Pair, served: str) -> None:
    del served
    argv, env = _command("serve", REASONER, *AGREED)
    process = pair.head.popen(*argv, user="spark", env=env, cwd=CHECKOUT)
    assert process.stderr is not None
    for line in process.stderr:
        if "start: begins" in line:
            break
    # Twice, as people do.
    pair.head.signal(process, signal.SIGTERM)
    pair.head.signal(process, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"✗ interrupted; {MODEL} is started again, as before" in said
    assert (_told(pair.head)["model"], _state(pair.head)) == (MODEL, ["active", "enabled"])


def test_serve_stop_frees_the_port_and_a_start_that_takes_too_long_ends(pair: Pair, served: str) -> None:
    del served
    node = pair.head
    _sparkinstall(node, "serve", "stop")
    assert _state(node) == ["inactive", "disabled"]
    taken = node.popen("python3", "-m", "http.server", "8000", "--bind", "127.0.0.1")
    try:
        node.run("sh", "-c", "until ss -Hltn | grep -q :8000; do sleep 0.1; done", timeout=20)
        refused = _sparkinstall(node, "serve", MODEL, *AGREED, check=False)
    finally:
        node.signal(taken, signal.SIGKILL)
        taken.communicate()
    assert (refused.returncode, "port 8000 is in use" in refused.stdout) == (4, True), refused
    late = _sparkinstall(node, "serve", "restart", *AGREED, "--limit", "2", check=False)
    assert late.returncode == 1
    assert "vLLM has not answered within 2 s, in the phase `start`; vLLM is stopped" in late.stderr
    assert _state(node) == ["inactive", "disabled"]


def _reasoning_settings(*arguments: str) -> tuple[str, str]:
    """Settings for the reasoning model with these arguments of vLLM."""
    return f"serving.model={REASONER}", f"serving.arguments={json.dumps(arguments)}"


HUB_TOKEN, HUB_TOKEN_FILE = "hf_a-token-of-this-test-0123456789", "/etc/hub-token"


@pytest.fixture(scope="module")
def opened(pair: Pair) -> tuple[str, ...]:
    """The settings of an API that a network may use, with the reasoning model and a token for the hub."""
    pair.head.write(HUB_TOKEN_FILE, f"{HUB_TOKEN}\n", mode="0600")
    named = (f"hub.token_file={HUB_TOKEN_FILE}", "hub.offline=false", "serving.allow=192.0.2.0/24")
    settings = (*_reasoning_settings("--reasoning-parser", "qwen3"), *named)
    _set_up(pair.head, "single", *settings)
    _until_it_serves(pair.head, "single", *settings)
    return settings


def test_serving_with_the_parser_has_the_reasoning_field_and_the_key(pair: Pair, opened: tuple[str, ...]) -> None:
    found = _findings(pair.head, "single", *opened)
    assert [each["verdict"] for each in found.values()] == ["pass"] * 3, found
    says = "reasoning in delta.reasoning, the answer in delta.content; first token after "
    assert found["serving-stream"]["found"].startswith(says)
    assert "grew by 16 tokens, of which the probes made 16; 0% of the KV cache" in found["serving-metrics"]["found"]
    wrong = _findings(pair.head, "single", *opened, key="simsim")
    assert (wrong["serving"]["verdict"], wrong["serving"]["found"]) == ("fail", f"the API rejects the key in {KEY}")
    _assert_others_skip(wrong)


def test_no_secret_is_where_others_could_read_it(pair: Pair, opened: tuple[str, ...]) -> None:
    node, secrets = pair.head, (pair.head.read(API_KEY).strip(), HUB_TOKEN)
    assert node.run("stat", "-c", "%a %U", API_KEY, HUB_TOKEN_FILE).stdout.split("\n")[:2] == ["600 root"] * 2
    probing = node.popen(*_program("probe", "single", *opened), user="spark", env=CHECKOUT_ENV, cwd=CHECKOUT)
    seen = ""
    while probing.poll() is None:
        seen += node.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>&-; true").stdout
        time.sleep(0.2)
    said = probing.communicate()
    assert probing.returncode == 0, said
    assert f"HF_TOKEN_PATH=/run/credentials/{UNIT}/hf-token" in seen and "VLLM::EngineCore" in seen
    # All that is on the disk or in memory as a file, but for the two files and the credentials of the unit.
    kept = f"-path {PREFIX}/venv -prune -o -path /srv -prune -o"
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


def test_no_route_answers_without_the_key(pair: Pair, opened: tuple[str, ...]) -> None:
    del opened
    key = pair.head.read(API_KEY)
    # By the node's own address and by that which the network uses.
    for address in ("127.0.0.1", ADDRESSES["head"]):
        output = pair.head.run("python3", "-I", f"{CHECKOUT}/tests/support/routes.py", address, input=key, timeout=600)
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
    assert key.strip() not in pair.head.run("journalctl", "--no-pager", "-a", "-o", "json").stdout


def _is_refusal(statuses: list[int]) -> bool:
    """400: what is no HTTP; 403: a websocket that was not accepted."""
    return bool(statuses) and set(statuses) <= {400, 401, 403}


def test_ask_and_the_example_of_the_docs_show_reasoning_apart_from_the_answer(
    pair: Pair, opened: tuple[str, ...]
) -> None:
    node, python = pair.head, f"{PREFIX}/venv/bin/python"
    lines = [each.removeprefix("serving.").replace("=", ": ", 1) for each in opened if each.startswith("serving.")]
    node.write("/home/spark/config.yaml", "serving: {" + ", ".join(lines) + "}\n", user="spark")
    ask = (python, "-m", "sparkinstall", "ask", "How much?", "--config", "/home/spark/config.yaml")
    spoken = node.run(*ask, "--reasoning", user="spark", env=CHECKOUT_ENV)
    assert (spoken.stdout, spoken.stderr) == (f"{vllm_on_cpu.ANSWER}\n", f"{vllm_on_cpu.REASONING}\n")
    data = json.loads(node.run(*ask, "--json", user="spark", env=CHECKOUT_ENV).stdout)["data"]
    said = (data["model"], data["content"], data["reasoning"], data["finish_reason"])
    assert said == (REASONER, vllm_on_cpu.ANSWER, vllm_on_cpu.REASONING, "stop")
    unknown = node.run(*ask, "--model", "other", user="spark", env=CHECKOUT_ENV, check=False)
    assert unknown.returncode == 1 and f"it serves {REASONER}" in unknown.stderr
    node.write("/home/spark/example.py", example(), user="spark")
    env = {KEY: node.read(API_KEY).strip()}
    shown = node.run(python, "/home/spark/example.py", user="spark", env=env)
    assert (shown.stdout, shown.stderr) == (f"{vllm_on_cpu.ANSWER}\n", vllm_on_cpu.REASONING)


@pytest.fixture(scope="module")
def unparsed(pair: Pair) -> Found:
    """The findings for the reasoning model without a parser."""
    _set_up(pair.head, "single", *_reasoning_settings())
    return _until_it_serves(pair.head, "single", *_reasoning_settings())


def test_serving_stream_without_the_parser_warns_of_raw_reasoning(unparsed: Found) -> None:
    stream = unparsed["serving-stream"]
    assert stream["verdict"] == "warn"
    assert stream["found"].startswith("raw <think> in delta.content: clients show reasoning as the answer; ")
    assert stream["hint"].startswith("add `--reasoning-parser`, `NAME` to `serving.arguments`")


def test_serving_of_another_model_fails(pair: Pair, unparsed: Found) -> None:
    del unparsed
    found = _serving_finding(pair.head, "single")
    assert (found["verdict"], found["found"], found["expected"]) == ("fail", f"it serves {REASONER}", MODEL)


def test_serving_with_a_stopped_engine_fails_despite_health(pair: Pair, unparsed: Found) -> None:
    del unparsed
    signal = ("pkill", "--full", "VLLM::EngineCore", "--signal")
    pair.head.run(*signal, "STOP")
    try:
        began = time.monotonic()
        found = _findings(pair.head, "single", *_reasoning_settings())
        took = time.monotonic() - began
    finally:
        pair.head.run(*signal, "CONT")
    assert found["serving"]["found"] == "no completion within 60 s, although /health returns 200"
    assert found["serving"]["verdict"] == "fail"
    _assert_others_skip(found)
    assert took < PATIENCE + 45
    assert _findings(pair.head, "single", *_reasoning_settings())["serving"]["verdict"] == "pass"


LIFE = "vllm-life.service"
EVIDENCE = "/var/lib/vllm-life/evidence"
# Of seconds, where a Spark waits for minutes.
SHORT = {"every": 1, "still": 10, "probe_every": 6, "probe": 6, "start": 1200}
LIVELY = tuple(f"serving.life.{name}_seconds={seconds}" for name, seconds in SHORT.items())


def _set_up_life(node: FreshNode, role: str, *settings: str) -> None:
    report = _run_step(node, "converge", role, *settings, *LIVELY, "step=life")
    assert report["outcome"] in ("changed", "unchanged"), report


def _life_says(node: FreshNode, words: str, since: float, within: float = 120) -> str:
    """Wait until the proof of life has said this in systemd's journal since a time; return the last such line."""
    deadline = time.monotonic() + within
    while True:
        said = node.run("journalctl", "-u", LIFE, "-o", "cat", "--no-pager", f"--since=@{since:.0f}").stdout
        if found := [line for line in said.splitlines() if words in line]:
            return str(found[-1])
        assert time.monotonic() < deadline, (words, said, _journal(node))
        time.sleep(1)


def _life_state(node: FreshNode) -> dict[str, Any]:
    # A service that has just started has noted nothing yet.
    node.run("sh", "-c", "timeout 30 sh -c 'until [ -e /run/vllm-life/state.json ]; do sleep 0.2; done'")
    return dict(json.loads(node.read("/run/vllm-life/state.json")))


# A server that reads a prompt in parts of 64 tokens, two of which fill a block of its cache.
IN_SMALL_PARTS = (
    *_reasoning_settings(
        *("--chat-template", f"{REASONER}/opening.jinja", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")
    ),
    "serving.max_model_len=1024",
)


def test_life_restarts_a_stopped_engine_and_keeps_evidence(pair: Pair, unparsed: Found) -> None:
    del unparsed
    node, settings = pair.head, _reasoning_settings()
    _set_up_life(node, "single", *settings)
    before, since = _main_pid(node), time.time()
    node.run("pkill", "--full", "VLLM::EngineCore", "--signal", "STOP")
    assert "no request runs, no token has come for" in _life_says(node, "vllm.service is wedged: ", since)
    place = _life_says(node, "evidence of the wedge is in ", since).rpartition(" ")[2]
    _life_says(node, "vllm.service was restarted; 2 of 3 restarts of this hour are left", since)
    assert _main_pid(node) != before
    _until_it_serves(node, "single", *settings)
    _life_says(node, "vllm.service generates again", since)
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
    (wedge,) = _life_state(node)["wedges"]
    assert (wedge["evidence"], wedge["action"]) == (place, "restarted")
    assert _run_step(node, "plan", "single", *settings, *LIVELY, "step=life")["outcome"] == "unchanged"
    # Other tests wait longer on purpose.
    node.run("systemctl", "stop", LIFE)


def test_serving_stream_with_reasoning_opened_by_the_chat_template_warns(pair: Pair) -> None:
    _set_up(pair.head, "single", *IN_SMALL_PARTS)
    stream = _until_it_serves(pair.head, "single", *IN_SMALL_PARTS)["serving-stream"]
    assert stream["verdict"] == "warn"
    says = "reasoning is in delta.content, unmarked: the chat template opens it; first token after "
    assert stream["found"].startswith(says)


def test_two_nodes_give_the_completion_of_one(pair: Pair, alone: str) -> None:
    for role, node in pair.nodes.items():
        _set_up(node, role)
    _until_it_serves(pair.head, "head")
    assert [_state(node) for node in pair.nodes.values()] == [["active", "enabled"]] * 2
    assert _completion(pair.head) == alone
    assert _findings(pair.worker, "worker") == {}, "a worker has no API"
    assert "TP rank 1" in _journal(pair.worker)


def test_serving_with_the_link_down_fails_despite_health(pair: Pair) -> None:
    pair.wires.pull(pair.plugs, PORT_0[:1])
    try:
        began = time.monotonic()
        found = _serving_finding(pair.head, "head")
        took = time.monotonic() - began
        _ask(pair.head, "/health", within=5)
    finally:
        pair.wires.insert(pair.plugs, PORT_0[:1])
    assert found["verdict"] == "fail"
    assert found["found"] == "no completion within 60 s, although /health returns 200"
    assert "`sparkinstall verify --only peers`" in found["hint"]
    assert took < PATIENCE + 45


def test_serving_after_the_cable_is_inserted_passes_without_a_restart(pair: Pair) -> None:
    before = _main_pid(pair.head)
    until = time.monotonic() + 240
    while (found := _serving_finding(pair.head, "head"))["verdict"] != "pass":
        assert time.monotonic() < until, (found, _journal(pair.head))
    assert _main_pid(pair.head) == before


def _until_it_completes(node: FreshNode) -> None:
    deadline = time.monotonic() + LOAD_SECONDS
    given = json.dumps({"model": MODEL, "prompt": "One, two,", "max_tokens": 1})
    ask = ("python3", "-I", "-c", ASK, "/v1/completions", given, "10")
    while node.run(*ask, check=False, timeout=40).returncode:
        assert time.monotonic() < deadline, (_journal(node), node.run("journalctl", "-u", LIFE, "-n", "40").stdout)
        time.sleep(2)


def test_life_with_a_full_disk_restarts_both_ranks_when_the_workers_is_stopped(pair: Pair) -> None:
    before, since = [_main_pid(node) for node in pair.nodes.values()], time.time()
    pair.head.run("mount", "-t", "tmpfs", "-o", "size=16k,mode=755", "full", "/var/lib/vllm-life")
    pair.head.run("sh", "-c", "cat /dev/zero > /var/lib/vllm-life/zeros || true")
    _set_up_life(pair.head, "head", "serving.life.restarts_per_hour=20")
    _life_says(pair.head, "watching vllm.service", since)
    pair.worker.run("pkill", "--full", "VLLM::Worker", "--signal", "STOP")
    _life_says(
        pair.head, "the evidence could not be saved: No space left on device (/var/lib/vllm-life/evidence)", since
    )
    _life_says(pair.head, "vllm.service was restarted; ", since)
    _until_it_serves(pair.head, "head")
    for node, pid in zip(pair.nodes.values(), before, strict=True):
        assert _main_pid(node) != pid
    of_the_worker = _journal(pair.worker, 2000)
    assert "sparkinstall: vLLM on the head 192.0.2.1 has ended" in of_the_worker
    assert re.search(r"sparkinstall: until then VLLM::Worker\S* \(pid \d+\) was T \(stopped\)", of_the_worker)
    assert _run_step(pair.worker, "plan", "worker")["outcome"] == "unchanged"
    wedge = _life_state(pair.head)["wedges"][-1]
    assert wedge["trouble"] == "the evidence could not be saved: No space left on device"
    pair.head.run("umount", "--lazy", "/var/lib/vllm-life")
    pair.head.run("systemctl", "restart", LIFE)


def test_life_restarts_a_pair_whose_link_passes_one_way_only(pair: Pair) -> None:
    _set_up_life(pair.head, "head", "serving.life.restarts_per_hour=20")
    before = _main_pid(pair.head)
    rule = f"type filter hook input priority 0\niifname {PORT_0[0]} drop"
    pair.worker.run("/usr/sbin/nft", "-f", "-", input=f"table inet oneway {{\nchain in {{\n{rule}\n}}\n}}\n")
    try:
        count = len(_life_state(pair.head)["wedges"])
        deadline = time.monotonic() + 240
        while not [each for each in _life_state(pair.head)["wedges"][count:] if each["action"]]:
            assert time.monotonic() < deadline, _life_state(pair.head)
            time.sleep(1)
    finally:
        pair.worker.run("/usr/sbin/nft", "delete", "table", "inet", "oneway")
    wedge = _life_state(pair.head)["wedges"][-1]
    assert wedge["action"] == "restarted"
    sockets = pair.head.read(f"{wedge['evidence']}/sockets.txt")
    assert re.search(r"192\.0\.2\.2\]?:\d+ .*VLLM::Worker", sockets), sockets
    _until_it_completes(pair.head)
    assert _main_pid(pair.head) != before


def test_pair_whose_worker_is_killed_answers_again(pair: Pair) -> None:
    pair.worker.run("pkill", "--full", "VLLM::Worker", "--signal", "KILL")
    _until_it_completes(pair.head)


def test_uninstall_removes_vllm(pair: Pair) -> None:
    for role, node in pair.nodes.items():
        left = [each for each in _run_step(node, "uninstall", role) if each["outcome"] in ("kept", "failed")]
        assert left == []
        shown = node.run("systemctl", "show", "-P", "LoadState", "-P", "ActiveState", UNIT).stdout.split()
        assert shown[1] == "inactive"
        assert node.run("pgrep", "-f", "vllm", check=False).stdout == ""
        assert node.run("ls", PREFIX).stdout.split() == ["env", "venv"]
        assert node.run("test", "-e", API_KEY, check=False).returncode == 1
    for path in ("/var/lib/vllm-life", "/run/vllm-life", "/usr/local/lib/vllm-life.py"):
        assert pair.head.run("ls", path, check=False).returncode != 0, path
