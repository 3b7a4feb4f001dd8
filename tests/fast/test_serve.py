"""`serve`: what it makes settings of, what it checks, and how it follows a start. tests/nodes has a real vLLM."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.cli.serve import whole_lines
from sparkinstall.core import readiness, serve_checks, serve_record
from sparkinstall.core import serve as use
from sparkinstall.core.readiness import Following, NotReady, Phase
from sparkinstall.core.serve_settings import overridden, require_decided, wanted
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadConfig, BadUsage, Interrupted, Problem
from sparkinstall.events import Event, Progressed, StepStarted, silent
from sparkinstall.journal.state_dir import Served
from sparkinstall.models import ModelError
from sparkinstall.models.planned import Answer, Plan, PlannedLayers, Reply
from sparkinstall.node import Node
from sparkinstall.probes import Finding
from sparkinstall.recipes import RecipeError
from sparkinstall.redaction import redact
from sparkinstall.steps.serving import arguments
from sparkinstall.system import Reader, Result, processes
from sparkinstall.system.local import LocalReader
from tests.support.local_server import listening
from tests.support.machine import OnASpark
from tests.support.model_files import LLAMA, TENSORS, write_model
from tests.support.nodes import NODE, node_of
from tests.support.recording import RecordingSystem
from tests.support.rehearsals import envelope, in_this_process

LOG = Path(__file__).parents[1] / "logs/vllm-good-start.log"
RECIPE = {
    "id": "mine",
    "model": "org/model",
    "revision": "a" * 40,
    "memory": 0.825,
    "context": 4096,
    "sequences": 8,
    "tool_parser": "hermes",
    "args": [["--load-format", "fastsafetensors"]],
    "env": {"VLLM_FLOAT32_MATMUL_PRECISION": "high"},
    "loads_from": "0.18.1",
}


PLAN = Plan(
    weights=8_000_000,
    layers=(PlannedLayers("FullAttentionSpec", 786_432, 16, 0, 2),),
    block_size=16, kv_dtype="auto", prefix_caching=True, batched_tokens=8192, context=65536, concurrency=1.0,
    blocks=512, block_bytes=1_572_864, groups=1, step=16, steps=((4096, 1),),
)  # fmt: skip


def recipe_file(folder: Path, **changes: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(json.dumps({**RECIPE, **changes}))
    return str(path)


def session_of(root: Path, served: Served, *settings: str, config: Path | None = None) -> Session:
    (root / "node").mkdir(exist_ok=True)
    return open_session(Target(root=root / "node", served=served, settings=settings, config=config))


# --- what it means


def test_recipe_becomes_settings_of_which_the_service_is_made(tmp_path: Path) -> None:
    session = session_of(tmp_path, wanted(recipe_file(tmp_path)).served)
    serving = session.node.config.serving
    assert (serving.model, serving.revision, serving.recipe) == ("org/model", "a" * 40, "mine")
    assert serving.env == ("VLLM_FLOAT32_MATMUL_PRECISION=high",)
    words = arguments(session.node)
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.82"
    assert words[words.index("--max-model-len") + 1] == "4096"
    assert words[words.index("--revision") + 1] == "a" * 40
    assert words[-7:] == [
        *("--max-num-seqs", "8", "--tool-call-parser", "hermes", "--enable-auto-tool-choice"),
        *("--load-format", "fastsafetensors"),
    ]
    assert "--enforce-eager" not in words, "a recipe was tried with vLLM's own defaults"
    assert session.sources["serving.model"] == "`serve mine`"


def test_own_settings_win_over_the_recipe_and_are_listed(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("serving:\n  memory: '0.50'\n  env: [VLLM_FLOAT32_MATMUL_PRECISION=medium]\n")
    served = wanted(recipe_file(tmp_path)).served
    more = "serving.arguments=[--max-num-seqs, '2', --seed, '7']"
    session = session_of(tmp_path, served, more, config=own)
    words = arguments(session.node)
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.50"
    assert words.count("--max-num-seqs") == 1
    assert words[words.index("--max-num-seqs") + 1] == "2"
    assert words[words.index("--load-format") + 1] == "fastsafetensors", "what is not replaced stays"
    assert session.node.config.serving.env == ("VLLM_FLOAT32_MATMUL_PRECISION=medium",)
    assert {(each.what, each.done) for each in overridden(session, served)} == {
        ("serving.memory 0.82", "overridden"),
        ("--max-num-seqs 8", "overridden"),
        ("VLLM_FLOAT32_MATMUL_PRECISION=high", "overridden"),
    }


def test_what_is_served_is_remembered_until_another_model_is_named(tmp_path: Path) -> None:
    own = ("serving.memory=0.50", "serving.port=9000")
    session = session_of(tmp_path, wanted(recipe_file(tmp_path)).served, *own)
    assert session.node.config.serving.memory == "0.50"
    with session.state.hold("test", silent):
        session.state.remember_options(session.options)
    root = tmp_path / "node"
    assert open_session(Target(root=root)).node.config.serving.recipe == "mine"
    assert open_session(Target(root=root)).node.config.serving.memory == "0.50"
    other = session_of(tmp_path, wanted(str(write_model(tmp_path / "other"))).served)
    assert other.node.config.serving.memory is None, "it was set for the former model"
    assert other.node.config.serving.port == 9000
    assert (other.node.config.serving.model, other.node.config.serving.recipe) == (str(tmp_path / "other"), None)
    by_hand = open_session(Target(root=root, settings=("serving.model=/srv/model",)))
    assert (by_hand.node.config.serving.recipe, by_hand.node.config.serving.arguments) == (None, ())


def test_serve_over_a_model_that_a_former_run_named_serves_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "node"
    root.mkdir()
    first = open_session(Target(root=root, settings=("serving.model=/srv/model", "serving.port=9000")))
    with first.state.hold("test", silent):
        first.state.remember_options(first.options)
    served = wanted(recipe_file(tmp_path)).served
    session = session_of(tmp_path, served)
    require_decided(session, served)
    assert (session.node.config.serving.model, session.node.config.serving.port) == ("org/model", 9000)


def test_serve_against_a_model_in_a_config_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("serving:\n  model: /srv/model\n")
    served = wanted(recipe_file(tmp_path)).served
    with pytest.raises(BadConfig, match=r"`serving.model` is '/srv/model' in .*own.yaml") as error:
        require_decided(session_of(tmp_path, served, config=own), served)
    assert "remove it there" in error.value.hint


def test_folder_of_a_model_gets_no_longer_context_than_it_allows(tmp_path: Path) -> None:
    short = wanted(str(write_model(tmp_path / "m", {**LLAMA, "max_position_embeddings": 1024})))
    assert short.served.settings["serving.max_model_len"] == 1024
    long = wanted(str(write_model(tmp_path / "l", {**LLAMA, "max_position_embeddings": 131072})))
    assert "serving.max_model_len" not in long.served.settings


def test_cache_in_another_place_is_told_to_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert wanted(recipe_file(tmp_path, env={})).served.settings["serving.env"] == [f"HF_HUB_CACHE={tmp_path}/hub"]
    monkeypatch.delenv("HF_HUB_CACHE")
    assert wanted(recipe_file(tmp_path, env={})).served.settings["serving.env"] == []


def test_code_of_the_model_needs_consent_with_the_reason(tmp_path: Path) -> None:
    name = recipe_file(tmp_path, args=[["--trust-remote-code"]])
    with pytest.raises(BadUsage, match="runs code from the repository org/model") as error:
        wanted(name)
    assert "--trust-remote-code" in error.value.hint
    assert "--trust-remote-code" in wanted(name, trusts=True).served.settings["serving.arguments"]
    with pytest.raises(BadUsage, match="does not ask for"):
        wanted(recipe_file(tmp_path), trusts=True)
    # vLLM takes the beginning of an option for the whole.
    for word in ("--trust-rem", "--trust_remote_code=true", "--tr"):
        with pytest.raises(BadUsage, match="runs code from the repository"):
            wanted(recipe_file(tmp_path, args=[[word]]))
    with pytest.raises(BadUsage, match="is for a recipe"):
        wanted(str(write_model(tmp_path / "m")), trusts=True)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("no-such-recipe", RecipeError, "there is no recipe 'no-such-recipe'"),
        ("/no/such/folder", ModelError, "there is no folder /no/such/folder"),
        ("./missing.yaml", RecipeError, "missing.yaml cannot be read"),
    ],
)
def test_unknown_name_is_an_error(name: str, error: type[Problem], says: str) -> None:
    with pytest.raises(error, match=says):
        wanted(name)


def test_folder_that_exists_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    assert wanted("org/model").served.settings["serving.model"] == str(tmp_path / "org" / "model")


# --- what is checked before


def finding(check: str, name: str, on: Reader, node: Node = NODE) -> Finding:
    """The finding of one check for what is to be served."""
    (look,) = [each.look for each in serve_checks.probes(node, wanted(name)) if each.name == check]
    return look(on)


def test_missing_files_of_a_model_are_named(tmp_path: Path) -> None:
    whole, on = write_model(tmp_path / "m", LLAMA, TENSORS, {"x.weight": ("BF16", (2,))}), LocalReader()
    assert finding("model-files", str(whole), on).verdict == "pass"
    (whole / "model-00002-of-00002.safetensors").unlink()
    found = finding("model-files", str(whole), on)
    assert (found.verdict, "lacks model-00002-of-00002.safetensors" in found.found) == ("fail", True)
    (whole / "config.json").rename(whole / "config.old")
    assert "lacks config.json, model-00002" in finding("model-files", str(whole), on).found


@pytest.mark.parametrize(
    ("active", "listeners", "verdict", "says"),
    [
        ("inactive", "", "pass", "8000 is free"),
        (
            "inactive",
            'LISTEN 0 5 127.0.0.1:8000 0.0.0.0:* users:(("python3",pid=77,fd=3))',
            "fail",
            "in use by python3",
        ),
        ("inactive", "LISTEN 0 5 *:8000 *:*", "fail", "port 8000 is in use"),
        ("inactive", "LISTEN 0 5 127.0.0.1:18000 0.0.0.0:*", "pass", "8000 is free"),
        ("active", "LISTEN 0 5 127.0.0.1:8000 0.0.0.0:*", "pass", "is restarted"),
        ("active", 'LISTEN 0 5 127.0.0.1:8000 0.0.0.0:* users:(("vllm",pid=78,fd=3))', "pass", "is restarted"),
        ("active", 'LISTEN 0 5 127.0.0.1:8000 0.0.0.0:* users:(("python3",pid=77,fd=3))', "fail", "in use by python3"),
        ("active", "LISTEN 0 5 127.0.0.1:18000 0.0.0.0:*", "pass", "8000 is free"),
    ],
)
def test_port_in_use_is_found_before_a_model_is_loaded(
    active: str, listeners: str, verdict: str, says: str, tmp_path: Path
) -> None:
    for pid, unit in (("77", "user.slice/session-1.scope"), ("78", "system.slice/vllm.service")):
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cgroup").write_text(f"0::/{unit}\n")
    on = OnASpark(tmp_path, {"systemctl": f"ActiveState={active}\n", "ss": f"{listeners}\n"})
    found = finding("port", recipe_file(tmp_path), on)
    assert (found.verdict, says in found.found) == (verdict, True), found


@pytest.mark.parametrize(
    ("changes", "verdict", "says"),
    [
        ({}, "pass", "mine: vLLM"),
        ({"good_on_gb10_from": "0.28.0"}, "pass", "reported good on a GB10 from vLLM 0.28.0"),
        ({"loads_from": "0.33.0"}, "fail", "it needs vLLM 0.33.0 or newer"),
        ({"loads_from": None}, "warn", "does not say which vLLM"),
        ({"needs_build": "b12x"}, "fail", "it needs a patched build: b12x"),
        ({"expects": ["/x.jinja"]}, "fail", "it takes /x.jinja from its image"),
        ({"nodes": 2, "tensor_parallel": 2}, "fail", "it takes 2 nodes"),
    ],
)
def test_recipe_for_another_node_is_refused(
    changes: Mapping[str, Any], verdict: str, says: str, tmp_path: Path
) -> None:
    found = finding("recipe", recipe_file(tmp_path, **changes), LocalReader())
    assert (found.verdict, says in found.found) == (verdict, True), found
    assert found.verdict == "pass" or found.hint


def spark(folder: Path, available: int, on: Mapping[str, str] | None = None) -> OnASpark:
    """A Spark with so much memory, in KiB."""
    root = folder / "spark"
    for name, text in {
        "proc/meminfo": f"MemTotal: 127600000 kB\nMemAvailable: {available} kB\n",
        "sys/class/dmi/id/product_name": "NVIDIA DGX Spark\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    device = root / "sys/bus/pci/devices/000f:01:00.0"
    device.mkdir(parents=True, exist_ok=True)
    for name, text in {"vendor": "0x10de\n", "device": "0x2e12\n", "class": "0x030200\n"}.items():
        (device / name).write_text(text)
    return OnASpark(root, {"systemctl": "ActiveState=inactive\n", **(on or {})})


def fits(folder: Path, available: int, on: Mapping[str, str] | None = None) -> Finding:
    """Judge a model of 8 MB."""
    return finding("fit", str(write_model(folder / "m")), spark(folder, available, on))


def test_model_that_does_not_fit_is_refused_before_it_is_started(tmp_path: Path) -> None:
    assert fits(tmp_path, 100_000_000).verdict == "pass"
    small = fits(tmp_path, 8_000_000)
    assert (small.verdict, "GB needed, 8.2 GB available" in small.found) == ("fail", True), small
    assert small.hint.startswith("`sparkinstall fit ")
    running = fits(tmp_path, 8_000_000, {"systemctl": "ActiveState=active\n"})
    assert running.verdict == "pass", "what the running vLLM holds becomes free"


class Planning(LocalReader):
    """A Spark whose installed vLLM has this plan for all options; None: it cannot be imported."""

    def __init__(self, on: OnASpark, plan: Plan | None) -> None:
        super().__init__(on.root)
        self.on, self.plan, self.asked = on, plan, 0

    rehearsal = False

    def real(self, path: str) -> str:
        return self.on.real(path)

    def ask(self, *argv: str, **how: Any) -> Result:
        if argv[-1].startswith("[{"):
            self.asked += 1
            reply = Reply("", "0.33.0", "cuda", 1.5, (Answer(self.plan),) * len(json.loads(argv[-1])))
            said = msgspec.json.encode(reply).decode() if self.plan else ""
            return Result(argv, 0 if said else 1, said, "ImportError: no torch\n")
        return self.on.ask(*argv, **how)


@pytest.mark.parametrize(
    ("plan", "verdict", "says"),
    [
        (PLAN, "pass", ", the KV cache as vLLM 0.33.0 plans it"),
        (replace(PLAN, weights=95_000_000_000), "fail", ", the KV cache as vLLM 0.33.0 plans it"),
        (None, "pass", "(estimate: ImportError: no torch)"),
    ],
)
def test_fit_before_a_start_asks_the_installed_vllm(plan: Plan | None, verdict: str, says: str, tmp_path: Path) -> None:
    folder, node = write_model(tmp_path / "m"), replace(NODE, cache=tmp_path / "cache")
    on = Planning(spark(tmp_path, 100_000_000), plan)
    for path in (f"{node.venv}/bin/python", node.env_file):
        (tmp_path / "spark" / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "spark" / path[1:]).touch()
    told: list[str] = []
    (look,) = [each.look for each in serve_checks.probes(node, wanted(str(folder)), told.append) if each.name == "fit"]
    found = look(on)
    assert (found.verdict, found.found.endswith(says)) == (verdict, True), found
    assert on.asked == 1 and told == [f"asking vLLM {node.stack.vllm} how it would plan the KV cache: 10 to 20 seconds"]


def test_fit_without_an_installed_vllm_is_an_estimate(tmp_path: Path) -> None:
    assert fits(tmp_path, 100_000_000).found.endswith("(estimate: vLLM is not installed here)")


def test_agreed_code_of_the_model_may_run_to_plan(tmp_path: Path) -> None:
    name = recipe_file(tmp_path, args=[["--trust-remote-code"]])
    assert wanted(name, trusts=True).options.remote_code
    assert not wanted(recipe_file(tmp_path)).options.remote_code


@pytest.mark.parametrize(
    ("available", "memory", "changed"),
    [(122_000_000, "0.82", False), (90_000_000, "0.67", True), (1_000_000, "0.82", False)],
)
def test_share_of_the_memory_is_no_more_than_is_available(
    available: int, memory: str, changed: bool, tmp_path: Path
) -> None:
    found = serve_checks.within_memory(wanted(recipe_file(tmp_path)), NODE, spark(tmp_path, available))
    assert found.served.settings["serving.memory"] == memory
    assert [each.what for each in found.changes] == (["serving.memory 0.82"] if changed else [])


def test_share_of_the_memory_stays_where_it_is_unknown(tmp_path: Path) -> None:
    found = wanted(recipe_file(tmp_path))
    assert serve_checks.within_memory(found, NODE, OnASpark(tmp_path, {})) == found


# --- how a start is followed


class OnANode(LocalReader):
    """A log that grows by some lines at each look, and the states of the unit in turn."""

    def __init__(self, log: Iterable[str], *states: Mapping[str, str]) -> None:
        super().__init__()
        self.lines, self.states = list(log), list(states or [{}])
        self.shown = 0

    def ask(self, *argv: str, **how: Any) -> Result:
        if argv[0] == "systemctl":
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            now = {"ActiveState": "active", "InvocationID": "one", "NRestarts": "0", "Result": "success", **state}
            return Result(argv, 0, "".join(f"{name}={value}\n" for name, value in now.items()), "")
        if argv[0] == "journalctl":
            self.shown += 15
            said = [f"{1e9 + at:.6f} node vllm[7]: {line}\n" for at, line in enumerate(self.lines[: self.shown])]
            return Result(argv, 0, "".join(said), "")
        return super().ask(*argv, **how)


class VllmApi(BaseHTTPRequestHandler):
    """A server that streams; `words` is what the stream has, `longest` the longest prompt."""

    words, cut, chats, longest, wedged = ("Hel", "lo"), False, True, 5000, False
    asked: list[tuple[str, int]]

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked.get("prompt") or asked["messages"][0]["content"]
        self.asked.append((self.path, len(prompt)))
        if self.path == "/v1/chat/completions" and not self.chats:
            self._send('{"error": "default chat template is no longer allowed"}', 400)
        elif len(prompt) > self.longest:
            self._send('{"error": "too long"}', 400)
        elif not asked.get("stream"):
            self._send("{}")
        else:
            if self.wedged:
                time.sleep(3)
            self._send("".join(self._events("chat" in self.path)))

    def _events(self, chat: bool) -> Iterator[str]:
        for word in self.words:
            yield f"data: {json.dumps({'choices': [{'delta': {'content': word}} if chat else {'text': word}]})}\n\n"
        if not self.cut:
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': len(self.words)}})}\n\n"
            yield "data: [DONE]\n\n"

    def _send(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        with suppress(BrokenPipeError):
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None:
        del words


@contextmanager
def api(folder: Path, **how: Any) -> Iterator[tuple[Node, list[tuple[str, int]]]]:
    """A node whose vLLM is this server, and what it was asked."""
    asked: list[tuple[str, int]] = []
    (folder / "venv/bin").mkdir(parents=True, exist_ok=True)
    python = folder / "venv/bin/python"
    if not python.exists():
        python.symlink_to(sys.executable)
    with listening(type("Of", (VllmApi,), {"asked": asked, **how})) as url:
        node = node_of(folder, prefix=str(folder), serving__model="m", serving__port=int(url.rpartition(":")[2]))
        yield replace(node, rehearsal=False), asked


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "_PAUSE", 0.01)


GOOD = LOG.read_text().splitlines()


def test_start_is_followed_by_phases_until_a_stream_has_ended(tmp_path: Path) -> None:
    events: list[Event] = []
    with api(tmp_path) as (node, asked):
        ready = Following(node, OnANode(GOOD), events.append, 60).until_ready()
    names = ["start", "weights", "profiling", "server", "first answer", "warm-up"]
    assert [phase.name for phase in ready.phases] == names
    assert [event.step for event in events if isinstance(event, StepStarted)] == names
    assert Progressed("weights", 1, 1, "shards") in events
    assert ready.phases[0] == Phase(
        "start", float(GOOD.index(next(line for line in GOOD if "Starting to load" in line)))
    )
    assert (ready.model, ready.tokens, ready.chat) == ("m", 2, True)
    assert [path for path, _ in asked] == ["/v1/chat/completions"] * len(asked)
    assert asked[-1][1] <= 5000 < asked[1][1], "the long prompt is halved until it fits"


def test_phases_of_compilation_and_graphs_are_named(tmp_path: Path) -> None:
    log = [
        "Starting to load model m...",
        "Loading weights took 12.5 seconds",
        "(EngineCore pid=8) INFO Dynamo bytecode transform time: 5.1 s",
        "(EngineCore pid=8) INFO torch.compile takes 25.2 s in total",
        "(EngineCore pid=8) INFO Available KV cache memory: 31.3 GiB",
        "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  57%|#### | 4/7 [00:01<00:01]",
        f"{'9' * 5000}/{'9' * 5000} [a number that Python does not read",
        "init engine (profile, create kv cache, warmup model) took 60 seconds",
        "INFO:     Application startup complete.",
    ]
    events: list[Event] = []
    with api(tmp_path) as (node, _):
        ready = Following(node, OnANode(log), events.append, 60).until_ready()
    names = ["start", "weights", "profiling", "compilation", "profiling", "CUDA graphs", "server"]
    assert [phase.name for phase in ready.phases][:7] == names
    assert Progressed("CUDA graphs", 4, 7, "steps") in events


def test_model_without_a_chat_template_is_asked_for_a_completion(tmp_path: Path) -> None:
    with api(tmp_path, chats=False) as (node, asked):
        ready = Following(node, OnANode(GOOD), silent, 60).until_ready()
    assert (ready.chat, ready.tokens) == (False, 2)
    assert {path for path, _ in asked[1:]} == {"/v1/completions"}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"cut": True}, "the stream was cut before its end"),
        ({"words": ()}, "the stream had no token"),
    ],
)
def test_stream_without_a_whole_answer_is_not_ready(how: Mapping[str, Any], says: str, tmp_path: Path) -> None:
    with api(tmp_path, **how) as (node, _), pytest.raises(NotReady, match="no whole answer has arrived") as error:
        Following(node, OnANode(GOOD), silent, 60).until_ready()
    assert (error.value.cause, bool(error.value.hint)) == (says, True)


def test_server_that_ends_soon_after_its_engine_is_said_to_have_ended(tmp_path: Path) -> None:
    looks_before = len(GOOD) // 15 + 1
    on = OnANode(GOOD, *[{}] * (looks_before + 4), {"ActiveState": "failed", "Result": "signal", "ExecMainStatus": "9"})
    says = "has ended before it answered, in the phase `first answer`"
    with api(tmp_path, cut=True) as (node, _), pytest.raises(NotReady, match=says):
        Following(node, on, silent, 60).until_ready()


def test_server_that_never_answers_ends_at_the_limit(tmp_path: Path) -> None:
    with api(tmp_path, wedged=True) as (node, _), pytest.raises(NotReady, match="has not answered within 1 s"):
        Following(node, OnANode(GOOD), silent, 1).until_ready()


def test_start_that_never_listens_ends_at_the_limit(tmp_path: Path) -> None:
    hanging = GOOD[: GOOD.index(next(line for line in GOOD if "Loading weights took" in line))]
    with pytest.raises(NotReady, match=r"not answered within 0.2 s, in the phase `weights`") as error:
        Following(node_of(tmp_path, serving__port=1), OnANode(hanging), silent, 0.2).until_ready()
    assert "--limit SECONDS" in error.value.hint


@pytest.mark.parametrize(
    "state",
    [
        {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "1"},
        {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code", "ExecMainStatus": "1"},
        {"InvocationID": "two", "NRestarts": "1", "Result": "signal", "ExecMainStatus": "9"},
        {"ActiveState": "inactive"},
    ],
)
def test_unit_that_has_ended_is_told_at_once(state: Mapping[str, str], tmp_path: Path) -> None:
    on = OnANode(["Starting to load model m..."], {}, state)
    with pytest.raises(NotReady, match="has ended before it answered, in the phase `weights`"):
        Following(node_of(tmp_path, serving__port=1), on, silent, 3600).until_ready()


# --- the command line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve", "gpt-oss-20b"), "a rehearsal starts no services"),
        (("serve", "stop"), "a rehearsal starts no services"),
        (("serve", "restart"), "a rehearsal starts no services"),
        (("all", "--serve", "gpt-oss-20b"), "a rehearsal starts no services"),
    ],
)
def test_serve_in_a_rehearsal_is_refused(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    run = in_this_process(*words, "--root", str(tmp_path), "--json")
    assert (run.returncode, envelope(run)["errors"][0]["message"]) == (2, says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt-os-20b", "there is no recipe 'gpt-os-20b'"),
        ("stat", "there is no recipe 'stat'"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("gpt-oss-20b", "vLLM is not installed on this node"),
        ("org/model", "vLLM is not installed on this node"),
    ],
)
def test_serve_on_a_node_without_vllm_names_what_does_not_exist_first(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"prefix: {tmp_path}/prefix\n")
    run = in_this_process("serve", name, "--config", str(tmp_path / "config.yaml"), "--json")
    error = envelope(run)["errors"][0]
    assert error["message"] == says
    assert run.returncode == (3 if "installed" in says else 2)
    assert says[0] == "t" or error["hint"].endswith(f"`sparkinstall all --serve {name}`")


def test_serve_status_without_a_model_says_how_to_serve_one(tmp_path: Path) -> None:
    run = in_this_process("serve", "status", "--root", str(tmp_path), "--json")
    data = envelope(run)["data"]
    assert (run.returncode, data["model"], data["serving"]) == (3, None, None)


def test_record_of_a_process_has_no_secret_of_its_words_and_variables() -> None:
    words = ("vllm", "--api-key", "sk-4711", "--hf-token=4712", "a b", "")
    on = RecordingSystem(
        {"/proc/7/cmdline": "\0".join((*words, "")).encode(), "/proc/7/environ": b"A=b\0MY_TOKEN=4713\0"}
    )
    found = serve_record.process_of(on, 7)
    assert found is not None
    assert tuple(found.argv) == ("vllm", "--api-key", "[hidden]", "--hf-token=[hidden]", "a b")
    assert found.env == {"A": "b", "MY_TOKEN": "[hidden]"}


def test_record_of_a_process_has_no_secret_of_a_login_shell() -> None:
    """The variables of a server that was started by hand are all those of its shell, and a report of them is shared."""
    private = {
        "GITHUB_PAT": "4711", "MY_CRED": "4712", "AWS_ACCESS_KEY_ID": "4713", "DB_PASS": "4714", "COOKIE": "4715",
        "A": "ghp_4716abcdefghijklmnop", "B": "x AKIA4717ABCDEFGHIJKL", "SENTRY_DSN": "4718",
        "C": "xoxb-4719-abcdefghijkl",
        "D": "https://hooks.slack.com/services/T4720/B4720/abc", "SSH_PRIVATE_KEY": "4721",
    }  # fmt: skip
    plain = {"PATH": "/usr/bin", "PWD": "/srv", "VLLM_X": "sk-no", "PYTHONPATH": "a", "COMPASS": "n"}
    pairs = "\0".join(f"{name}={value}" for name, value in {**private, **plain}.items())
    found = serve_record.process_of(RecordingSystem({"/proc/7/cmdline": b"x\0", "/proc/7/environ": pairs.encode()}), 7)
    assert found is not None
    assert not re.search("47[12]", json.dumps(found.env)) and set(found.env) == {*private, *plain}
    assert {name: found.env[name] for name in plain} == plain


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_log_is_passed_on_in_whole_lines_however_it_comes(size: int) -> None:
    log = "\u00fc --api-key sk-4711\n\nlast".encode()
    texts = list(whole_lines(log[at : at + size] for at in range(0, len(log), size)))
    assert "".join(map(redact, texts)) == "\u00fc --api-key [hidden]\n\nlast"


def test_programs_start_again_after_an_interrupt_has_stopped_all() -> None:
    processes.stop_all()
    with pytest.raises(Interrupted):
        LocalReader().ask("true")
    processes.start_again()
    assert LocalReader().ask("true").ok


@pytest.mark.parametrize(
    ("other", "invocation", "says"),
    [
        # Nothing else has happened; this run has started it; another run has, or has named another model.
        (None, "a", "nothing was changed"),
        ((), "b", "vLLM is stopped"),
        (
            ("77", "serving.model=/srv/model"),
            "b",
            "another run has changed what is served since, so nothing is restored",
        ),
        (("77", ""), "b", "another run has changed what is served since, so nothing is restored"),
    ],
)
def test_what_another_run_serves_meanwhile_is_neither_stopped_nor_replaced(
    other: tuple[str, ...] | None, invocation: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = wanted(recipe_file(tmp_path))
    session = session_of(tmp_path, found.served)
    root = Target(root=tmp_path / "node")
    with session.state.hold("test", silent):
        session.state.remember_options(session.options)
    # A folder that no run has made, beside those of the runs.
    session.state.logs("z-kept")
    state = {"InvocationID": "a", "ActiveState": "active", "LoadState": "loaded"}
    stopped: list[str] = []
    monkeypatch.setattr(use, "show", lambda *_: state)
    monkeypatch.setattr(use, "stop_for_now", lambda _, unit: stopped.append(unit))

    def converge(*_: object) -> Any:
        state["InvocationID"] = invocation
        if other is not None:
            session.state.logs(f"20261129-120000-{other[0] if other else os.getpid()}")
        if other and other[1]:
            theirs = open_session(Target(root=root.root, settings=(other[1],)))
            theirs.state.remember_options(theirs.options)
        raise Interrupted("nothing was changed")

    monkeypatch.setattr(use, "converge", converge)
    dialog = use.ServeDialog(cast(Any, None), use.Explained, nullcontext)
    with pytest.raises(Interrupted) as error:
        use.serve(session, root, found, use.ServeOptions(), dialog)
    assert error.value.message.endswith(says)
    assert bool(stopped) == (says == "vLLM is stopped")
    settings = open_session(root).node.config.serving
    assert settings.model == ("/srv/model" if other and other[1] else "org/model")
