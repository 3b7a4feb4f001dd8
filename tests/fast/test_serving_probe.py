"""The probes of the API: their verdicts and time limits, with a small server that speaks vLLM's protocol.

tests/nodes/test_serving.py runs them with a real vLLM.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sparkinstall import stacks
from sparkinstall.config import Layer, build
from sparkinstall.core import checks
from sparkinstall.events import silent
from sparkinstall.fixes import REASONING
from sparkinstall.node import Node
from sparkinstall.probes import Finding, serving, streams, vllm_client
from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader
from tests.support.local_server import free_port
from tests.support.nodes import HEAD

Findings = dict[str, Finding]
QWEN = "Qwen/Qwen3.5-35B-A3B"
OPENED, CLOSED, PLAIN = "assistant\n<think>\n", "<think>\n\n</think>\n\n", "assistant\n"
PARSER = {"serving.arguments": ["--reasoning-parser", "qwen3"]}


@dataclass
class Api:
    """The answers of the server. `hangs`: paths without an answer; `counts`: tokens counted for each generated one."""

    deltas: tuple[Mapping[str, str], ...] = ({"role": "assistant", "content": ""}, {"content": "1, "}, {"content": "2"})
    prompt: str = PLAIN
    finish: str = "stop"
    ends: bool = True
    hangs: tuple[str, ...] = ()
    refuses: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    root: str = QWEN
    key: str = ""
    cache: str = "vllm:kv_cache_usage_perc"
    counts: float = 1.0
    made: int = 0
    asked: list[str] = field(default_factory=list)

    def metrics(self) -> str:
        counted = f'vllm:generation_tokens_total{{engine="0",model_name="m"}} {self.made * self.counts}\n'
        return (
            f'# HELP x y\n{counted}vllm:generation_tokens_created{{engine="0"}} 1.7e+09\n{self.cache}{{e="0"}} 0.25\n'
        )

    def events(self, most: int) -> Iterator[str]:
        yield _event({"choices": [{"delta": {"role": "assistant"}}], "prompt_token_ids": [1, 2, 3]})
        for each in self.deltas:
            self.made += 1
            yield _event({"choices": [{"delta": each, "finish_reason": None}]})
        yield _event({"choices": [{"delta": {}, "finish_reason": self.finish}]})
        yield _event({"choices": [], "usage": {"completion_tokens": min(most, len(self.deltas))}})
        if self.ends:
            yield "data: [DONE]\n\n"


def _event(what: object) -> str:
    return f"data: {json.dumps(what)}\n\n"


class Answers(BaseHTTPRequestHandler):
    api: Api

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, asked: Mapping[str, Any]) -> None:
        self.api.asked.append(self.path)
        if self.path in self.api.hangs:
            time.sleep(600)
        status, words = self.refusal() or (200, self.words(asked))
        self.send_response(status)
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            for each in words:
                self.wfile.write(each.encode())

    def refusal(self) -> tuple[int, Iterable[str]] | None:
        key = self.api.key
        if key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {key}":
            return 401, ['{"error": "Unauthorized"}']
        refused = self.api.refuses.get(self.path)
        return (refused[0], [refused[1]]) if refused else None

    def words(self, asked: Mapping[str, Any]) -> Iterable[str]:
        api, tokens = self.api, int(asked.get("max_tokens", 0))
        if asked.get("stream"):
            return api.events(tokens)
        api.made += tokens
        models = {"data": [{"id": "m", "root": api.root} if api.root else {"id": "m"}]}
        answers = {"/v1/models": models, "/detokenize": {"prompt": api.prompt}}
        done = {"usage": {"completion_tokens": tokens}}
        return [api.metrics() if self.path == "/metrics" else json.dumps(answers.get(self.path, done))]

    def log_message(self, *words: object) -> None:
        del words


@contextmanager
def answering(port: int, api: Api) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", port), type("Of", (Answers,), {"api": api})) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A prefix with a Python and the files of vLLM that the probes read."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    vllm = tmp_path / "venv/lib/python3.12/site-packages/vllm"
    for name, text in {
        "entrypoints/openai/protocol.py": "class DeltaMessage:\n    content: str\n    reasoning: str\n",
        "reasoning/__init__.py": '_THEM = {"deepseek_r1": ("a",), "qwen3": ("a",), "nemotron_v3": ("a",)}\n',
    }.items():
        (vllm / name).parent.mkdir(parents=True, exist_ok=True)
        (vllm / name).write_text(text)
    return tmp_path


def node_of(prefix: Path, role: str = "single", **settings: Any) -> Node:
    values = {
        "prefix": str(prefix),
        "serving.model": QWEN,
        "serving.port": free_port(),
        "cluster.role": role,
        **settings,
    }
    config = build([Layer("test", values)])[0]
    return Node(config, stacks.load(config.stack), "x86_64", "x86_64", False, False, str(prefix), prefix / "cache")


def look(node: Node, root: str = "/", only: str = "") -> Findings:
    """Run the probes as `verify` does: one after the other, with one reader."""
    on = LocalReader(root)
    asked = [probe for probe in serving.probes(node) if only in ("", probe.name)]
    return {each.name: each for each in checks.look(asked, on, silent)}


def found(prefix: Path, api: Api, only: str = "", **settings: Any) -> Findings:
    node = node_of(prefix, **settings)
    with answering(node.config.serving.port, api):
        return look(node, only=only)


def test_serving_probes_belong_to_the_head_only(prefix: Path) -> None:
    assert list(serving.probes(node_of(prefix, "worker"))) == []
    assert len(list(serving.probes(node_of(prefix, "head")))) == 3


def test_serving_probes_in_a_rehearsal_are_skipped(prefix: Path) -> None:
    assert {each.verdict for each in look(node_of(prefix), str(prefix)).values()} == {"skip"}


def test_serving_probes_with_a_good_api_pass_with_few_requests(prefix: Path) -> None:
    api = Api()
    findings = found(prefix, api)
    assert [each.verdict for each in findings.values()] == ["pass"] * 3, findings
    assert findings["serving"].found.startswith("4 tokens of m in ")
    says = r"no reasoning in this model's stream; first token after \d+\.\d+ s"
    assert re.match(says, findings["serving-stream"].found), findings["serving-stream"]
    grew = "vllm:generation_tokens_total grew by 7 tokens, of which the probes made 7; 25% of the KV cache is in use"
    assert findings["serving-metrics"].found == grew
    stream = ["/v1/chat/completions", "/detokenize"]
    assert api.asked == ["/metrics", "/v1/models", "/v1/completions", *stream, "/metrics"]


class TestWithoutACompletion:
    def finding(self, findings: Findings) -> Finding:
        """The finding of `serving`; the other probes are skipped."""
        for name in ("serving-stream", "serving-metrics"):
            assert (findings[name].verdict, findings[name].found) == ("skip", "no completion came: see `serving`")
        return findings["serving"]

    def test_serving_without_a_server_fails_with_the_unit(self, prefix: Path) -> None:
        node = node_of(prefix)
        finding = self.finding(look(node))
        assert finding.verdict == "fail"
        assert f"nothing answers at 127.0.0.1:{node.config.serving.port}; vllm.service is" in finding.found

    @pytest.mark.parametrize(
        ("restarts", "verdict", "words"),
        [(0, "warn", "it was started 0 s ago and is still loading"), (3, "fail", "systemd has started it 4 times")],
    )
    def test_serving_with_a_restarting_service_fails(
        self, prefix: Path, restarts: int, verdict: str, words: str
    ) -> None:
        class WithSystemd(LocalReader):
            def ask(self, *argv: str, **how: Any) -> Result:
                now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6)
                shown = {"ActiveState": "active", "NRestarts": restarts, "ExecMainStartTimestampMonotonic": now}
                asked = argv[-1].removeprefix("--property=").split(",")
                lines = "".join(f"{name}={value}\n" for name, value in shown.items() if name in asked)
                return Result(argv, 0, lines, "") if argv[0] == "systemctl" else super().ask(*argv, **how)

        finding = serving.not_up(node_of(prefix), WithSystemd())
        assert (finding.verdict, words in finding.found) == (verdict, True), finding
        assert restarts == 0 or finding.hint == "`sparkinstall diagnose --unit vllm`"

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics"])
    def test_serving_with_a_hanging_api_fails_in_time(
        self, prefix: Path, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vllm_client, "PATIENCE", 1)
        api = Api(hangs=(path,))
        finding = self.finding(found(prefix, api))
        assert (finding.verdict, finding.found) == ("fail", "no completion within 1 s, although /health returns 200")
        # A client that is late may not have come to this path.
        assert api.asked.count(path) <= 1, "the other probes do not wait again"

    def test_serving_with_an_error_shows_it(self, prefix: Path) -> None:
        finding = self.finding(found(prefix, Api(refuses={"/v1/completions": (500, "EngineDeadError")})))
        assert (finding.verdict, finding.found) == ("fail", "HTTP 500: EngineDeadError")

    def test_serving_without_the_right_api_key_fails(self, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(vllm_client.KEY, raising=False)
        asks = self.finding(found(prefix, Api(key="sesame")))
        assert (asks.verdict, asks.found) == ("fail", "it asks for a key (HTTP 401)")
        assert f"export {vllm_client.KEY}" in asks.hint
        monkeypatch.setenv(vllm_client.KEY, "simsim")
        refuses = self.finding(found(prefix, Api(key="sesame")))
        assert (refuses.verdict, refuses.found) == ("fail", f"the API rejects the key in {vllm_client.KEY}")
        monkeypatch.setenv(vllm_client.KEY, "sesame")
        assert {each.verdict for each in found(prefix, Api(key="sesame")).values()} == {"pass"}


def test_serving_of_a_model_without_completions_uses_chat(prefix: Path) -> None:
    assert found(prefix, Api(refuses={"/v1/completions": (404, "not for this model")}))["serving"].verdict == "pass"


def test_serving_of_another_model_fails(prefix: Path) -> None:
    finding = found(prefix, Api(root="/models/other"))["serving"]
    assert (finding.verdict, finding.found, finding.expected) == ("fail", "it serves /models/other", QWEN)
    assert found(prefix, Api(root=""))["serving"].verdict == "pass", "a server that does not name its model passes"


REASONED = ({"reasoning": "hm"}, {"content": "4"})
RAW = ({"content": "<th"}, {"content": "ink>hm</think>4"})
ALL_REASONING = ({"reasoning": "1, "}, {"reasoning": "2"})
STREAMS: dict[str, tuple[Api, dict[str, Any], str, str]] = {
    "in its field": (Api(REASONED), PARSER, "pass", "reasoning in delta.reasoning, the answer in delta.content;"),
    "unfinished reasoning": (Api(ALL_REASONING, OPENED, "length"), PARSER, "pass", "reasoning in delta.reasoning;"),
    "a model without reasoning": (Api(), PARSER, "pass", "no reasoning in this model's stream;"),
    "by itself": (Api(REASONED), {}, "pass", "reasoning in delta.reasoning, the answer in delta.content;"),
    "raw": (Api(RAW), {}, "warn", "raw <think> in delta.content: clients show reasoning as the answer;"),
    "only its end": (Api(({"content": "hm</think>4"},), OPENED), {}, "warn", "raw </think> in delta.content: "),
    "unmarked": (Api(finish="length", prompt=OPENED), {}, "warn", "reasoning is in delta.content, unmarked: "),
    "reasoning off": (Api(prompt=CLOSED), {}, "pass", "no reasoning in this model's stream;"),
    "raw with a parser": (
        Api(RAW),
        PARSER,
        "fail",
        "raw <think> in delta.content despite --reasoning-parser qwen3;",
    ),
    "unmarked with a parser": (Api(prompt=OPENED), PARSER, "fail", "reasoning is in delta.content despite "),
    "the answer in it too": (
        Api(ALL_REASONING),
        PARSER,
        "warn",
        "the whole answer is in delta.reasoning, and nothing in ",
    ),
    "reasoning off, and cut off": (
        Api(ALL_REASONING, CLOSED, "length"),
        PARSER,
        "warn",
        "the whole answer is in ",
    ),
    "a field of another version": (
        Api(({"reasoning_content": "hm"}, {"content": "4"})),
        PARSER,
        "fail",
        "reasoning is in delta.reasoning_content, which the installed vLLM does not send;",
    ),
    "kept by the parser": (
        Api(RAW, OPENED),
        {"serving.arguments": ["--reasoning_parser=minimax_m2_append_think"]},
        "pass",
        "reasoning in delta.content, marked, as --reasoning-parser minimax_m2_append_think has it;",
    ),
    "nothing": (Api(()), {}, "warn", "an empty stream"),
    "interrupted": (Api(ends=False), {}, "fail", "the stream was interrupted"),
    "no chat": (
        Api(refuses={"/v1/chat/completions": (400, "default chat template is no longer allowed")}),
        {},
        "skip",
        "this model has no chat template: nobody can chat with it",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_serving_stream_follows_the_place_of_the_reasoning(prefix: Path, name: str) -> None:
    api, settings, verdict, says = STREAMS[name]
    finding = found(prefix, api, "serving-stream", **settings)["serving-stream"]
    assert (finding.verdict, finding.found[: len(says)]) == (verdict, says)
    assert bool(finding.hint) == (verdict in ("warn", "fail"))


def test_serving_stream_hint_names_the_parser_of_the_model(prefix: Path) -> None:
    hint = found(prefix, Api(RAW))["serving-stream"].hint
    assert hint.startswith("add `--reasoning-parser`, `qwen3` to `serving.arguments`")
    unknown = found(prefix, Api(RAW, root="/models/mine"), **{"serving.model": "/models/mine"})["serving-stream"].hint
    assert unknown.startswith("add `--reasoning-parser`, `NAME` to")


def test_serving_stream_that_hangs_fails_in_time(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also of what does not hang.
    monkeypatch.setattr(vllm_client, "PATIENCE", 5)
    findings = found(prefix, Api(hangs=("/v1/chat/completions",)))
    assert findings["serving"].verdict == "pass"
    late = findings["serving-stream"]
    assert (late.verdict, late.found) == ("fail", "no end of a stream within 5 s, although /health returns 200")


@pytest.mark.parametrize(
    ("api", "settings", "verdict", "says"),
    [
        (Api(cache="vllm:gpu_cache_usage_perc"), {}, "pass", "25% of the KV cache is in use"),
        (Api(counts=2), {}, "pass", "grew by 14 tokens, of which the probes made 7"),
        (Api(counts=0), {}, "fail", "grew by 0 tokens, of which the probes made 7"),
        (Api(cache="vllm:cache"), {}, "warn", "but there is no vllm:kv_cache_usage_perc"),
        (Api(refuses={"/metrics": (404, "")}), {}, "warn", "/metrics does not answer: 404"),
        (
            Api(refuses={"/metrics": (200, "python_info 1\n")}),
            {},
            "warn",
            "/metrics has no vllm:generation_tokens_total",
        ),
        (
            Api(refuses={"/metrics": (200, "python_info 1\n")}),
            {"serving.arguments": ["--disable-log-stats"]},
            "warn",
            "no vllm:generation_tokens_total",
        ),
    ],
)
def test_serving_metrics_follow_the_counters(
    prefix: Path, api: Api, settings: dict[str, Any], verdict: str, says: str
) -> None:
    finding = found(prefix, api, **settings)["serving-metrics"]
    assert finding.verdict == verdict
    assert says in finding.found


def test_serving_metrics_alone_count_the_completion(prefix: Path) -> None:
    assert (
        "grew by 4 tokens, of which the probes made 4"
        in found(prefix, Api(), "serving-metrics")["serving-metrics"].found
    )


@pytest.mark.parametrize(
    ("names", "parser"),
    [
        ("Qwen/Qwen3.5-122B-A10B-FP8", "qwen3"),
        ("/models/NVIDIA-Nemotron-3-Nano-30B-A3B", "nemotron_v3"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "deepseek_r1"),
        ("meta-llama/Llama-3.1-8B", None),
    ],
)
def test_fitting_parser_follows_the_model_name(names: str, parser: str | None) -> None:
    assert streams.fitting(names, ("deepseek_r1", "qwen3", "nemotron_v3")) == parser


@pytest.mark.parametrize(
    ("arguments", "parser"),
    [
        ((), None),
        (("--reasoning-parser", "qwen3", "--port", "1"), "qwen3"),
        (("--reasoning_parser=glm45",), "glm45"),
        (("--reasoning-parser", "qwen3", "--reasoning-parser=glm45"), "glm45"),
        (("--reasoning-parser",), None),
    ],
)
def test_parser_of_arguments_is_the_last_one(arguments: tuple[str, ...], parser: str | None) -> None:
    assert streams.parser_of(arguments) == parser


def test_client_of_the_docs_separates_reasoning_and_answer() -> None:
    text = Path(__file__).parents[2].joinpath("docs/troubleshooting.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    client: dict[str, Any] = {}
    exec(code, client)
    assert client["parts"]({"reasoning": "hm"}) == client["parts"]({"reasoning_content": "hm"}) == ("hm", "")
    assert client["parts"]({"reasoning": None, "content": "4"}) == ("", "4")
    assert client["split"]("<think>hm</think>4") == client["split"]("hm</think>4") == ("hm", "4")
    assert client["split"]("4") == ("", "4")


def test_serving_stream_proves_fix_8() -> None:
    assert {probe.name: probe.fix for probe in serving.probes(HEAD)}["serving-stream"] == REASONING
