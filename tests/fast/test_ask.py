"""`sparkinstall ask`: an answer while it is made, with a small server that speaks vLLM's protocol.

tests/nodes/test_serving.py asks a real vLLM.
"""

import fcntl
import json
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sparkinstall.core import ask as core_ask
from sparkinstall.core.reasoning import Piece, Separator
from tests.support.chat_server import ChatServer, chatting, example
from tests.support.local_server import Endless, listening
from tests.support.rehearsals import command, envelope, environment, in_this_process

REASONED: Sequence[Mapping[str, Any]] = (
    {"reasoning": "hm, "},
    {"reasoning": "six"},
    {"content": "4"},
    {"content": "2"},
)
OPENED, CLOSED = "assistant\n<think>\n", "<think>\n\n</think>\n\n"


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return "--root", str(tmp_path)


def texts(*deltas: str) -> tuple[dict[str, str], ...]:
    return tuple({"content": each} for each in deltas)


def asked(server: ChatServer, rehearsal: tuple[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    with chatting(server):
        return in_this_process("ask", "How much?", *rehearsal, "--url", server.url, *more)


def data_of(server: ChatServer, rehearsal: tuple[str, str], *more: str) -> dict[str, Any]:
    run = asked(server, rehearsal, "--json", *more)
    assert run.returncode == 0, run.stdout
    return dict(envelope(run)["data"])


def error_of(server: ChatServer, rehearsal: tuple[str, str], *more: str, code: int = 1) -> dict[str, Any]:
    run = asked(server, rehearsal, "--json", *more)
    assert run.returncode == code, run.stdout
    (error,) = envelope(run)["errors"]
    return dict(error)


# --- the answer


def test_ask_prints_the_content_alone_without_a_terminal(rehearsal: tuple[str, str]) -> None:
    run = asked(ChatServer(REASONED), rehearsal)
    assert (run.returncode, run.stdout, run.stderr) == (0, "42\n", "")


def test_ask_prints_the_reasoning_on_stderr_if_it_is_wanted(rehearsal: tuple[str, str]) -> None:
    run = asked(ChatServer(REASONED), rehearsal, "--reasoning")
    assert (run.stdout, run.stderr) == ("42\n", "hm, six\n")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_ask_json_has_both_and_the_counts(name: str, rehearsal: tuple[str, str]) -> None:
    server = ChatServer(({name: "hm, six"}, {"content": "42"}))
    found = data_of(server, rehearsal)
    assert (found["content"], found["reasoning"], found["finish_reason"]) == ("42", "hm, six", "stop")
    assert (found["model"], found["prompt_tokens"], found["completion_tokens"]) == ("tiny", 7, 2)
    assert 0 <= found["first_token_seconds"] <= found["seconds"]


def test_ask_sends_what_it_was_given(rehearsal: tuple[str, str]) -> None:
    server = ChatServer(names=("tiny", "other"))
    data_of(server, rehearsal, "--system", "Be brief.", "--max-tokens", "5", "--model", "other")
    assert server.question["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How much?"},
    ]
    assert (server.question["model"], server.question["max_tokens"], server.question["stream"]) == ("other", 5, True)


def test_ask_takes_the_address_with_and_without_v1(rehearsal: tuple[str, str]) -> None:
    with chatting(ChatServer()) as server:
        for url in (server.url + "/v1", server.url + "/", server.url.removeprefix("http://")):
            assert in_this_process("ask", "x", *rehearsal, "--url", url).stdout == "42\n"


@pytest.mark.parametrize(
    ("prompt", "deltas", "reasoning", "content"),
    [
        ("assistant\n", texts("<think>\nhm", "</think>\n\n42"), "hm", "42"),
        ("assistant\n", texts("\n<", "th", "ink>h", "m</th", "ink>", "\n\n4", "2"), "hm", "42"),
        ("assistant\n", texts("<seed:think>hm</seed:think>42"), "hm", "42"),
        (OPENED, texts("hm", "</think>", "42"), "hm", "42"),
        (OPENED, texts("<think>hm", "</think>", "42"), "hm", "42"),
        (OPENED, texts("hm"), "hm", ""),
        (CLOSED, texts("The tag ", "</think>", " ends it."), "", "The tag </think> ends it."),
        ("assistant\n", texts("A `<think>` and a `</think>`."), "", "A `<think>` and a `</think>`."),
        ("assistant\n", texts("<"), "", "<"),
        ("assistant\n", texts("<div>"), "", "<div>"),
        # A server that does not tell its prompt.
        (None, texts("hm", "</think>", "42"), "hm", "42"),
        (None, texts("42"), "", "42"),
        (None, texts("<think>hm</think>42"), "hm", "42"),
    ],
)
def test_ask_separates_reasoning_in_the_content(
    prompt: str | None, deltas: Sequence[dict[str, str]], reasoning: str, content: str, rehearsal: tuple[str, str]
) -> None:
    found = data_of(ChatServer(deltas, prompt), rehearsal)
    assert (found["reasoning"], found["content"]) == (reasoning, content)
    plain = asked(ChatServer(deltas, prompt), rehearsal)
    assert plain.stdout == (f"{content}\n" if content else "")


def test_ask_leaves_what_the_servers_parser_has_separated(rehearsal: tuple[str, str]) -> None:
    server = ChatServer(({"reasoning": "hm"}, *texts("Write ", "</think>", " there.")), OPENED)
    assert data_of(server, rehearsal)["content"] == "Write </think> there."
    assert "/detokenize" not in [path for path, _ in server.asked]


def test_separator_is_the_same_however_the_text_is_split() -> None:
    drawn = random.Random(7)
    whole = "\n<think>\nWhat < is </thin a </ tag?\n</think>\n\nIt is <think>, </think>.\n"
    for _ in range(300):
        cuts = sorted(drawn.sample(range(len(whole)), drawn.randrange(12)))
        parts = [whole[one:other] for one, other in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        assert joined(parts) == {"reasoning": "What < is </thin a </ tag?\n", "content": "It is <think>, </think>.\n"}


def joined(parts: Sequence[str]) -> dict[str, str]:
    said: dict[str, str] = {}
    separator = Separator(opened=False)
    for piece in pieces_of(separator, parts):
        said[piece.kind] = said.get(piece.kind, "") + piece.text
    return said


def pieces_of(separator: Separator, parts: Sequence[str]) -> Iterator[Piece]:
    for part in parts:
        yield from separator.feed(part)
    yield from separator.end()


def test_ask_says_why_there_is_no_answer(rehearsal: tuple[str, str]) -> None:
    run = asked(ChatServer(({"reasoning": "hm"},), finish="length"), rehearsal)
    assert (run.returncode, run.stdout) == (0, "")
    assert "the model has only reasoned, and not answered; it ends at the limit of tokens" in run.stderr


# --- errors


def test_ask_without_a_server_says_so(rehearsal: tuple[str, str]) -> None:
    with chatting(ChatServer()) as gone:
        pass
    run = in_this_process("ask", "x", *rehearsal, "--url", gone.url, "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"], error["message"]) == (1, "no-answer", f"nothing answers at {gone.url}")
    assert error["cause"] == "Failed to establish a new connection: Connection refused"


def test_ask_of_a_host_that_does_not_exist_says_so(rehearsal: tuple[str, str]) -> None:
    run = in_this_process("ask", "x", *rehearsal, "--url", "http://nowhere.invalid:8000", "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["message"]) == (1, "nothing answers at http://nowhere.invalid:8000")
    assert error["cause"].startswith("Failed to resolve 'nowhere.invalid' (")
    assert error["hint"].startswith("check the address")


def test_ask_without_a_served_model_names_the_verb_that_serves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with chatting(ChatServer()) as gone:
        port = gone.url.rpartition(":")[2]
    (tmp_path / "config.yaml").write_text(json.dumps({"serving": {"port": int(port)}}))
    (error,) = envelope(in_this_process("ask", "x", "--config", tmp_path / "config.yaml", "--json"))["errors"]
    assert error["hint"] == "serve a model first: `sparkinstall serve RECIPE|MODEL`"


def config_of(folder: Path, url: str, **serving: str) -> tuple[str, str]:
    """The options for this machine as a node with this server."""
    values = {"model": "/srv/tiny", "port": int(url.rpartition(":")[2]), **serving}
    (folder / "config.yaml").write_text(json.dumps({"serving": values}))
    return "--config", str(folder / "config.yaml")


def test_ask_of_this_node_takes_address_model_and_key_from_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "key").write_text("sesame-sesame-sesame\n")
    with chatting(ChatServer(names=("other", "/srv/tiny"), key="sesame-sesame-sesame")) as server:
        run = in_this_process("ask", "x", *config_of(tmp_path, server.url, key_file=f"{tmp_path}/key"), "--json")
        assert envelope(run)["data"]["model"] == "/srv/tiny", run.stdout
        server.key = "sesame-of-another-day"
        (error,) = envelope(in_this_process("ask", "x", "--config", f"{tmp_path}/config.yaml", "--json"))["errors"]
    assert error["message"].endswith(f" rejects the key in {tmp_path}/key (401)")
    assert error["hint"] == "it was changed since the last start: `sudo systemctl restart vllm`"


def test_ask_of_this_node_says_what_its_unit_does(tmp_path: Path) -> None:
    with chatting(ChatServer()) as gone:
        options = config_of(tmp_path, gone.url)
    (error,) = envelope(in_this_process("ask", "x", *options, "--json"))["errors"]
    assert error["message"].startswith(f"nothing answers at {gone.url.removeprefix('http://')}; vllm.service is ")
    assert "journalctl -u vllm" in error["hint"]


def test_ask_in_a_rehearsal_wants_an_address(rehearsal: tuple[str, str]) -> None:
    run = in_this_process("ask", "x", *rehearsal, "--json")
    assert (run.returncode, envelope(run)["errors"][0]["message"]) == (2, "a rehearsal starts no services")


def test_ask_of_an_unknown_model_names_those_that_are_served(rehearsal: tuple[str, str]) -> None:
    error = error_of(ChatServer(names=("tiny", "qwen3")), rehearsal, "--model", "tinny")
    assert error["message"] == "the server has no model 'tinny' (404)"
    assert (error["cause"], error["hint"]) == ("it serves tiny, qwen3", "did you mean `tiny`?")


def test_ask_with_the_key_from_a_file_or_the_environment(
    rehearsal: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("sesame-sesame\n")
    assert data_of(ChatServer(key="sesame-sesame"), rehearsal, "--key-file", str(file))["content"] == "42"
    monkeypatch.setenv("VLLM_API_KEY", "from-the-shell")
    assert data_of(ChatServer(key="from-the-shell"), rehearsal)["content"] == "42"
    error = error_of(ChatServer(key="another"), rehearsal)
    assert error["message"].endswith(" rejects the key in VLLM_API_KEY (401)")
    assert "from-the-shell" not in str(error)


def test_ask_without_the_key_says_how_to_give_it(rehearsal: tuple[str, str]) -> None:
    error = error_of(ChatServer(key="another"), rehearsal)
    assert error["message"].endswith(" asks for a key (401)")
    assert "--key-file FILE" in error["hint"]


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"k\xc3\xa9y", b"a\nb", b"x" * 5000])
def test_ask_with_a_file_without_a_key_is_refused(content: bytes, rehearsal: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    error = error_of(ChatServer(), rehearsal, "--key-file", str(file), code=2)
    assert error["message"] == f"{file} contains no key"


@pytest.mark.parametrize(
    ("path", "refusal", "message", "cause"),
    [
        ("/v1/models", (503, ""), "the server is not ready (503)", ""),
        ("/v1/models", (404, "<html>"), "has no API for a chat (404)", "<html>"),
        ("/v1/models", (200, "<html>"), "the server does not answer like vLLM", "JSON is malformed"),
        ("/v1/models", (200, '{"data": []}'), "serves no model", ""),
        (
            "/v1/chat/completions",
            (400, '{"error": {"message": "maximum context length is 512 tokens", "code": 400}}'),
            "the server refuses the question (400)",
            "maximum context length is 512 tokens",
        ),
        (
            "/v1/chat/completions",
            (500, '{"object": "error", "message": "EngineCore died"}'),
            "the server failed at the question (500)",
            "EngineCore died",
        ),
        ("/v1/chat/completions", (404, '{"detail": "Not Found"}'), "has no API for a chat (404)", "Not Found"),
    ],
)
def test_ask_explains_a_refusal(
    path: str, refusal: tuple[int, str], message: str, cause: str, rehearsal: tuple[str, str]
) -> None:
    error = error_of(ChatServer(refuses={path: refusal}), rehearsal)
    assert message in error["message"]
    assert cause in error["cause"]


class Closing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def test_ask_names_the_reason_of_a_connection_that_ends(rehearsal: tuple[str, str]) -> None:
    with listening(Closing) as url:
        run = in_this_process("ask", "x", *rehearsal, "--url", url, "--json")
    (error,) = envelope(run)["errors"]
    assert error["cause"] == "Remote end closed connection without response"


class Silent(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        threading.Event().wait(30)

    def log_message(self, *_: object) -> None:
        pass


def test_ask_waits_for_minutes_only_for_an_answer(rehearsal: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs has not even a list of its models."""
    monkeypatch.setattr(core_ask, "_SHORT", (5, 0.2))
    with listening(Silent) as url:
        run = in_this_process("ask", "x", *rehearsal, "--url", url, "--json")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["message"]) == (1, "nothing has come for 0.2 s")


def test_ask_shows_what_came_before_a_stream_was_cut(rehearsal: tuple[str, str]) -> None:
    run = asked(ChatServer(texts("It is ", "4"), finish=None), rehearsal)
    assert (run.returncode, run.stdout) == (1, "It is 4\n")
    assert "the stream was cut after 7 characters" in run.stderr
    cut = asked(ChatServer(texts("It is ", "4"), finish=None), rehearsal, "--json")
    assert envelope(cut)["data"]["content"] == "It is 4"


def test_ask_shows_an_error_in_the_middle_of_a_stream(rehearsal: tuple[str, str]) -> None:
    deltas = ({"content": "It"}, {"error": {"message": "EngineCore encountered an issue", "code": 500}})
    error = error_of(ChatServer(deltas), rehearsal)
    assert error["message"] == "the server interrupted its answer"
    assert error["cause"] == "EngineCore encountered an issue"


@pytest.mark.parametrize(
    ("status", "message"),
    [(200, "the server sends more than 4 MiB"), (500, "the server failed at /v1/models (500)")],
)
def test_ask_reads_no_answer_without_an_end(
    status: int, message: str, rehearsal: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endless, "status", status)
    with listening(Endless) as url:
        run = in_this_process("ask", "x", *rehearsal, "--url", url, "--json")
    (error,) = envelope(run)["errors"]
    assert error["message"] == message
    assert len(error["cause"]) < 2100


def test_ask_takes_lines_however_they_are_cut_and_no_endless_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        def __init__(self, data: bytes, size: int) -> None:
            pieces = [data[at : at + size] for at in range(0, len(data), size)]
            self.raw = SimpleNamespace(read1=lambda _: pieces.pop(0) if pieces else b"")

    stream = b'data: {"choices": []}\n\n: said\ndata: {"choices": [{"finish_reason": "stop"}]}\r\n\ndata: [DONE]\n'
    for size in (1, 2, 7, 1000):
        found = list(core_ask.events(cast(Any, Response(stream, size))))
        assert [len(each.choices) for each in found] == [0, 1]
    monkeypatch.setattr(core_ask, "_LONGEST_EVENT", 1000)
    with pytest.raises(core_ask.NoAnswer, match="has no end"):
        list(core_ask.events(cast(Any, Response(b"data: " + b"x" * 2000, 100))))


def test_ask_without_a_usable_detokenize_answers_all_the_same(rehearsal: tuple[str, str]) -> None:
    server = ChatServer(texts("hm</think>", "42"), refuses={"/detokenize": (200, "<html>")})
    data = data_of(server, rehearsal)
    assert (data["reasoning"], data["content"]) == ("hm", "42")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://me:secret@x", "http://a b", "x:y:z"])
def test_ask_refuses_what_is_no_address(url: str, rehearsal: tuple[str, str]) -> None:
    run = in_this_process("ask", "x", *rehearsal, "--url", url, "--json")
    assert run.returncode == 2, run.stdout
    assert "secret" not in run.stdout


def test_ask_is_interrupted_with_what_had_come(rehearsal: tuple[str, str]) -> None:
    waits = threading.Event()
    with chatting(ChatServer(texts("It is "), waits=waits)) as server:
        argv = command("ask", "x", *rehearsal, "--url", server.url)
        with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(6) == b"It is ", "it is shown while the server still works"
            process.send_signal(signal.SIGINT)
            rest, said = process.communicate(timeout=300)
        waits.set()
    assert (process.returncode, rest) == (130, b"\n")
    assert b"interrupted; nothing was changed" in said and b"Traceback" not in said


# --- input and terminal


def ask_process(server: ChatServer, rehearsal: tuple[str, str], prompt: str, stdin: bytes) -> tuple[int, bytes]:
    with chatting(server):
        argv = command("ask", prompt, *rehearsal, "--url", server.url)
        run = subprocess.run(argv, env=environment(), input=stdin, capture_output=True, timeout=300)
        return run.returncode, run.stdout + run.stderr


def test_ask_reads_the_question_from_stdin(rehearsal: tuple[str, str]) -> None:
    server = ChatServer()
    assert ask_process(server, rehearsal, "-", "Wie viel, ö?\n".encode()) == (0, b"42\n")
    assert server.question["messages"] == [{"role": "user", "content": "Wie viel, ö?\n"}]
    code, said = ask_process(server, rehearsal, "-", b" \n")
    assert code == 2 and b"stdin has no question" in said


def test_ask_on_a_terminal_shows_dim_reasoning_and_no_control_characters(rehearsal: tuple[str, str]) -> None:
    deltas = ({"reasoning": "hm, six"}, *texts("\n\n4\x1b[2J", "2"))
    drawn = on_a_terminal(ChatServer(deltas), rehearsal)
    assert drawn == "\x1b[2mhm, six\x1b[0m\n\n4\\x1b[2J2\n"


def test_ask_on_a_terminal_says_what_turned_out_to_be_reasoning(rehearsal: tuple[str, str]) -> None:
    drawn = on_a_terminal(ChatServer(texts("hm, six", "</think>42"), prompt=None), rehearsal)
    assert drawn == "hm, six\n\n\x1b[2m(above: its reasoning)\x1b[0m\n\n42\n"


def test_ask_sends_no_control_characters_to_a_terminal_that_is_only_stderr(rehearsal: tuple[str, str]) -> None:
    ours, theirs = pty.openpty()
    with chatting(ChatServer(({"reasoning": "hm\x1b[2J"}, {"content": "4\x1b2"}))) as server:
        argv = command("ask", "x", *rehearsal, "--url", server.url, "--reasoning")
        run = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, stderr=theirs, timeout=300)
    os.close(theirs)
    drawn = os.read(ours, 65536)
    os.close(ours)
    assert (run.stdout, drawn.replace(b"\r\n", b"\n")) == (b"4\x1b2\n", b"hm\\x1b[2J\n")


def on_a_terminal(server: ChatServer, rehearsal: tuple[str, str]) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    env = {name: value for name, value in environment(TERM="xterm-256color").items() if name != "NO_COLOR"}
    with chatting(server):
        argv = command("ask", "x", *rehearsal, "--url", server.url)
        with subprocess.Popen(argv, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            drawn = b""
            while True:
                try:
                    drawn += os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
    os.close(ours)
    assert process.returncode == 0, drawn
    return drawn.decode().replace("\r\n", "\n")


# --- the example of docs/api.md

# The requests of the package's client, and the attributes of its events.
OPENAI = """
import json, urllib.request
from types import SimpleNamespace

class OpenAI:
    def __init__(self, base_url, api_key):
        self.url, self.key = base_url, api_key
        self.models = SimpleNamespace(list=self.list)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def ask(self, path, body=None):
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers))

    def list(self):
        return json.load(self.ask("/models"), object_hook=lambda of: SimpleNamespace(**of))

    def create(self, **body):
        for line in self.ask("/chat/completions", body):
            data = line.partition(b"data: ")[2].strip()
            if data and data != b"[DONE]":
                event = json.loads(data)
                for choice in event["choices"]:
                    choice["delta"] = SimpleNamespace(**{"content": None, **choice["delta"]})
                yield SimpleNamespace(choices=[SimpleNamespace(**each) for each in event["choices"]])
"""


def test_example_of_the_docs_streams_reasoning_apart_from_content(tmp_path: Path) -> None:
    (tmp_path / "openai.py").write_text(OPENAI)
    (tmp_path / "example.py").write_text(example())
    with chatting(ChatServer(REASONED, key="sesame-sesame")) as server:
        env = environment(PYTHONPATH=str(tmp_path), SERVER=server.url, VLLM_API_KEY="sesame-sesame")
        argv = [sys.executable, str(tmp_path / "example.py"), "How", "much?"]
        run = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "42\n", "hm, six")
    assert server.question["messages"] == [{"role": "user", "content": "How much?"}]


def test_example_of_the_docs_has_twenty_lines() -> None:
    assert len(example().strip().splitlines()) <= 20
