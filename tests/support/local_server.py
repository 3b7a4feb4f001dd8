"""A server on this machine for the time of a test."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_kept: list[socket.socket] = []


def free_port() -> int:
    """A port of the loopback at which nothing listens. Nobody else gets it before the end of this process.

    A server that allows to reuse an address, as Python's do, can listen there.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _kept.append(kept)
    return int(kept.getsockname()[1])


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer with the handler at a free port; its address without a path."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        # A client that waits for an answer does not keep the test from ending.
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Endless(BaseHTTPRequestHandler):
    """Sends what has no end."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"x" * 65536)

    def log_message(self, *_: object) -> None:
        pass
