"""A server on the loopback that speaks vLLM's chat API: it can lock, refuse, cut a stream, and have no parser."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any

from tests.support.local_server import listening
from tests.support.rehearsals import CHECKOUT


@dataclass
class ChatServer:
    """What it answers.

    deltas: of a stream; a dict with `error` is an event of its own. prompt: the end of the model's prompt; None: a
    server that does not tell. finish: None: the stream is cut. refuses: status and body by path. waits: the stream
    stops after the deltas until it is set.
    """

    deltas: Sequence[Mapping[str, Any]] = ({"role": "assistant", "content": ""}, {"content": "4"}, {"content": "2"})
    prompt: str | None = "assistant\n"
    finish: str | None = "stop"
    names: Sequence[str] = ("tiny",)
    key: str = ""
    refuses: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    waits: Event | None = None
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)
    """Path and body of each request."""

    @property
    def question(self) -> dict[str, Any]:
        """The body of the last question."""
        return dict(next(body for path, body in reversed(self.asked) if path == "/v1/chat/completions"))

    def events(self) -> Iterator[str]:
        told = {} if self.prompt is None else {"prompt_token_ids": list(range(40))}
        yield _event({"choices": [{"delta": {"role": "assistant"}}], **told})
        for each in self.deltas:
            yield _event(dict(each) if "error" in each else {"choices": [{"delta": each, "finish_reason": None}]})
        if self.waits:
            self.waits.wait(600)
        if self.finish:
            yield _event({"choices": [{"delta": {}, "finish_reason": self.finish}]})
            yield _event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(self.deltas)}})
            yield "data: [DONE]\n\n"


def _event(what: object) -> str:
    return f"data: {json.dumps(what)}\n\n"


def example() -> str:
    """The program for the package `openai`, as it is printed in the documents."""
    (block,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/api.md").read_text(), re.DOTALL)
    return str(block)


@contextmanager
def chatting(server: ChatServer) -> Iterator[ChatServer]:
    """Serve at `server.url` during the context."""

    class Handler(_Handler):
        of = server

    with listening(Handler) as url:
        server.url = url
        yield server


class _Handler(BaseHTTPRequestHandler):
    of: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        of = self.of
        of.asked.append((self.path, body))
        if self.path in of.refuses:
            self._whole(*of.refuses[self.path])
        elif of.key and self.headers["Authorization"] != f"Bearer {of.key}":
            self._whole(401, '{"error":"Unauthorized"}')
        elif self.path == "/v1/models":
            self._whole(200, json.dumps({"object": "list", "data": [{"id": each} for each in of.names]}))
        elif self.path == "/detokenize":
            self._whole(200, json.dumps({"prompt": of.prompt}))
        elif body["model"] not in of.names:
            error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
            self._whole(404, json.dumps({"error": error}))
        else:
            self._stream()

    def _whole(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _stream(self) -> None:
        """In chunks, as vLLM's server sends it; a stream that is cut has no last one."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):
            for each in self.of.events():
                self._chunk(each.encode())
            if self.of.finish:
                self._chunk(b"")
        self.close_connection = not self.of.finish

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()
