"""An HTTPS server of a few files, for clients that know its token and its certificate.

Not ssh: the nodes need none between each other, only from the terminal. Certificate and token are new for each server;
the clients have both over ssh from there.
"""

import hashlib
import hmac
import re
import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from socketserver import TCPServer
from typing import BinaryIO
from urllib.parse import unquote

from sparkinstall.errors import Problem, storage_errors
from sparkinstall.system import failure_of, processes
from sparkinstall.system.workshop import Workshop

DONE = "/done"
"""What a client asks for when it has all that it wants, or gives up."""

_SILENCE = 60.0
_PIECE = 1 << 20


class CopyFailed(Problem):
    """A copy from another node failed, or its files are not the announced ones."""


class FileServer(ThreadingHTTPServer):
    """Serves `contents`: the path in an URL -> the content, or the real path of a file.

    `fingerprint`: the certificate's sha256. `sent`: bytes to all clients. `done`: how many of them said that they are.
    """

    daemon_threads = True

    def __init__(self, address: str, certificate: Path, token: str, contents: Mapping[str, bytes | Path]) -> None:
        super().__init__((address, 0), _Request)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        # The handshake belongs to the thread of the client, not to the one that accepts the next.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()
        self.expected, self.contents = f"Bearer {token}", contents
        self.sent = self.done = self.busy = 0
        self.last_seen = time.monotonic()
        self.guard = threading.Lock()

    def server_bind(self) -> None:
        """Bind without asking a name server for the name of the address, which takes long where none answers."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def wait(self, clients: int, patience: float) -> None:
        """Return when so many clients are done, or none was connected for `patience` seconds."""
        while self.done < clients and (self.busy or time.monotonic() - self.last_seen < patience):
            processes.refuse_if_stopped()
            time.sleep(0.05)

    def count(self, *, sent: int = 0, done: int = 0, busy: int = 0) -> None:
        """Add to the numbers of these names."""
        with self.guard:
            self.sent, self.done, self.busy = self.sent + sent, self.done + done, self.busy + busy
            self.last_seen = time.monotonic()

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: the client reports the failure."""


class _Request(BaseHTTPRequestHandler):
    server: FileServer
    timeout = _SILENCE

    def do_GET(self) -> None:
        """Answer with a file, or the rest of it from the byte that the client names."""
        if not hmac.compare_digest(self.headers.get("Authorization", ""), self.server.expected):
            self._answer(403)
            return
        self.server.count(busy=1)
        try:
            self._give(unquote(self.path))
        finally:
            self.server.count(busy=-1)

    def _give(self, path: str) -> None:
        content = self.server.contents.get(path)
        if path == DONE:
            self._answer(204)
            self.server.count(done=1)
        elif content is None:
            self._answer(404)
        else:
            with BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
                self._send(file)

    def _send(self, file: BinaryIO) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        size, start = file.seek(0, 2), int(asked[1]) if asked else 0
        # A client that has it all, or more than there is, gets it again.
        start = start if start < size else 0
        self._answer(206 if start else 200, f"bytes {start}-{size - 1}/{size}" if start else "", size - start)
        file.seek(start)
        shutil.copyfileobj(file, self.wfile, _PIECE)
        self.server.count(sent=size - start)

    def _answer(self, status: int, content_range: str = "", length: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing: stderr is read by the terminal."""


@contextmanager
def serving(address: str, token: str, contents: Mapping[str, bytes | Path]) -> Iterator[FileServer]:
    """Serve at this address only, at a port that the kernel chooses.

    Raises:
        CopyFailed: this node does not have the address, or no certificate can be made.
    """
    with storage_errors("making a certificate"), tempfile.TemporaryDirectory() as folder:
        certificate = _certificate(Path(folder))
        try:
            server = FileServer(address, certificate, token, contents)
        except OSError as error:
            raise CopyFailed(f"nothing can be offered at {address}: {error.strerror}") from error
    with server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def _certificate(folder: Path) -> Path:
    """Make a certificate, and its key beside it."""
    file = folder / "own.pem"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", str(folder / "own.key"))
    argv = ("openssl", "req", "-x509", *key, "-subj", "/CN=sparkinstall", "-days", "1", "-out", str(file))
    made = Workshop(folder).run(*argv, timeout=30)
    if not made.ok:
        raise failure_of(made, "no certificate can be made", error=CopyFailed)
    return file
