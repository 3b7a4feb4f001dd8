"""A server on the loopback with the interfaces of vLLM that a benchmark uses: it counts what it has made, and can be
slow at first, merge tokens into chunks, refuse, hang, or end after some requests."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from typing import Any


@dataclass
class CompletionServer:
    """What it does.

    first: seconds to the first token of the first requests, `cold` of them; later: of the others. each: seconds of a
    token. chunk: tokens in one. refuses: status by number of the request, from 0. dies_after: it ends with that
    request. hangs_at: that request gets no answer. short: tokens that are missing. for_others: tokens it makes besides.
    tokenizes: what it answers to a text to be tokenized; None of it: it has no such interface. moved: where a path is
    said to be now. paths: those that were asked for.
    """

    first: float = 0.0
    cold: int = 0
    later: float = 0.0
    each: float = 0.0
    chunk: int = 1
    context: int = 8192
    key: str = ""
    refuses: dict[int, int] = field(default_factory=dict)
    dies_after: int | None = None
    hangs_at: int | None = None
    short: int = 0
    for_others: int = 0
    caching: bool = True
    drafts: bool = False
    tokenizes: Callable[[str], dict[str, Any] | None] = lambda text: {"tokens": list(text.encode())}
    moved: dict[str, str] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    url: str = ""
    prompts: list[list[int]] = field(default_factory=list)
    made: int = 0
    read: int = 0
    hits: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    """Set when it no longer listens."""

    def cached(self, prompt: list[int]) -> int:
        """Tokens of a prompt that were sent before: all, or blocks of 16 at its beginning."""
        if prompt in self.prompts:
            return len(prompt)
        return max((_common(prompt, each) // 16 * 16 for each in self.prompts), default=0)

    def metrics(self) -> str:
        drafts = self.made // 2
        lines = [
            f'vllm:cache_config_info{{enable_prefix_caching="{self.caching}",engine="0"}} 1.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self.made}',
            f'vllm:prompt_tokens_total{{engine="0"}} {self.read}',
            f'vllm:prefix_cache_queries_total{{engine="0"}} {self.read}',
            f'vllm:prefix_cache_hits_total{{engine="0"}} {self.hits}',
        ]
        if self.drafts:
            lines += [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts}',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {drafts * 2}',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {drafts}',
            ]
        return "\n".join(lines) + "\n"


def _common(one: list[int], other: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


@contextmanager
def completing(server: CompletionServer) -> Iterator[CompletionServer]:
    """Serve at `server.url` during the context, or until it ends itself."""

    class Handler(_Handler):
        of = server

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def end() -> None:
        server.ended.wait()
        listener.shutdown()
        listener.server_close()
        server.closed.set()

    ender = threading.Thread(target=end)
    ender.start()
    try:
        yield server
    finally:
        server.ended.set()
        ender.join()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    of: CompletionServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        of = self.of
        of.paths.append(self.path)
        if self.path in of.moved:
            self._whole(302, "", of.moved[self.path] + self.path)
        elif of.key and self.path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {of.key}":
            self._whole(401, '{"error":"Unauthorized"}')
        elif self.path == "/v1/models":
            self._whole(200, json.dumps({"data": [{"id": "tiny", "root": "/srv/tiny", "max_model_len": of.context}]}))
        elif self.path == "/version":
            self._whole(200, '{"version": "0.18.1"}')
        elif self.path == "/metrics":
            self._whole(200, of.metrics())
        elif self.path == "/tokenize":
            found = of.tokenizes(body["prompt"])
            self._whole(404 if found is None else 200, json.dumps(found))
        else:
            self._complete(body)

    def _complete(self, body: dict[str, Any]) -> None:
        of, number = self.of, len(self.of.prompts)
        if of.caching:
            of.hits += of.cached(body["prompt"])
        of.prompts.append(body["prompt"])
        if number in of.refuses:
            self._whole(of.refuses[number], "no")
            return
        if number == of.hangs_at:
            of.ended.wait(600)
        if of.dies_after is not None and number >= of.dies_after:
            of.ended.set()
            of.closed.wait(600)
            self.close_connection = True
            return
        of.read += len(body["prompt"])
        with suppress(OSError):
            self._stream(body, of.first if number < of.cold else of.later)

    def _stream(self, body: dict[str, Any], first: float) -> None:
        of, wanted = self.of, body["max_tokens"] - self.of.short
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(first)
        for at in range(0, wanted, of.chunk):
            time.sleep(of.each * of.chunk if at else 0)
            self._event({"choices": [{"text": "x"}]})
        of.made += wanted + of.for_others
        self._event({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": wanted}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, what: object) -> None:
        self.wfile.write(f"data: {json.dumps(what)}\n\n".encode())
        self.wfile.flush()

    def _whole(self, status: int, text: str, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(text)))
        # A connection that stays open would outlive the server.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())
