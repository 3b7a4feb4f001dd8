"""A server on the loopback whose answers can be cut, with or without support for ranges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.support.local_server import listening


@dataclass
class CutServer:
    """Sends `content`, at most `cut` bytes per answer (0: all), or the error `status`; supports ranges only if `ranges`
    is true. `held`: after the cut it keeps the connection until that is set."""

    content: bytes
    cut: int = 0
    ranges: bool = True
    shifted: int = 0
    status: int = 0
    held: threading.Event | None = None
    url: str = ""
    asked: list[str | None] = field(default_factory=list)


@contextmanager
def served(server: CutServer) -> Iterator[CutServer]:
    """Serve at `server.url` during the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, server)

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as url:
        server.url = f"{url}/file.tar.gz"
        yield server


def _answer(to: BaseHTTPRequestHandler, server: CutServer) -> None:
    wanted, size = to.headers.get("Range"), len(server.content)
    server.asked.append(wanted)
    if server.status:
        to.send_error(server.status)
        return
    start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
    if start >= size > 0:
        to.send_response(416)
        to.send_header("Content-Range", f"bytes */{size}")
        to.send_header("Content-Length", "0")
        to.end_headers()
        return
    start += server.shifted if start else 0
    to.send_response(206 if start else 200)
    if start:
        to.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
    to.send_header("Content-Length", str(size - start))
    to.end_headers()
    to.wfile.write(server.content[start : start + server.cut if server.cut else size])
    if server.held:
        to.wfile.flush()
        server.held.wait(600)
