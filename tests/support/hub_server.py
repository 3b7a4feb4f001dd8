"""A hub on the loopback: the list of a model's files and ranges of them, as Hugging Face's hub sends them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.support.local_server import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Has one model, `name`, with the files of `folder`.

    Attributes:
        status: the error that every request gets; 0: none.
        token: a request must have it, if it is not "".
        ranges: whether ranges are answered, and not whole files.
        cut: bytes after which an answer with a file's content ends; 0: it does not.
        storage: files are redirected to that address.
    """

    folder: Path
    name: str = "org/model"
    status: int = 0
    token: str = ""
    ranges: bool = True
    cut: int = 0
    storage: str = ""
    info: bytes = b""
    url: str = ""
    asked: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    sent: int = 0


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve at `hub.url` during the context."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                _answer(self, hub)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as url:
        hub.url = url
        yield hub


def _answer(to: BaseHTTPRequestHandler, hub: Hub) -> None:
    hub.asked.append(to.path)
    hub.logins.append(to.headers.get("Authorization") or "")
    if hub.status:
        to.send_error(hub.status)
    elif hub.token and hub.logins[-1] != f"Bearer {hub.token}":
        to.send_error(401)
    elif to.path == f"/api/models/{hub.name}/revision/main":
        siblings = [{"rfilename": each.name} for each in hub.folder.iterdir()]
        _send(to, hub.info or json.dumps({"sha": COMMIT, "siblings": siblings, "private": False}).encode())
    elif found := re.fullmatch(rf"/{hub.name}/resolve/{COMMIT}/([\w.-]+)", to.path):
        _file(to, hub, hub.folder / found[1])
    else:
        to.send_error(404)


def _send(to: BaseHTTPRequestHandler, content: bytes) -> None:
    to.send_response(200)
    to.send_header("Content-Length", str(len(content)))
    to.end_headers()
    to.wfile.write(content)


def _file(to: BaseHTTPRequestHandler, hub: Hub, path: Path) -> None:
    if hub.storage:
        to.send_response(302)
        to.send_header("Location", hub.storage + to.path)
        to.send_header("Content-Length", "0")
        to.end_headers()
        return
    if not path.is_file():
        to.send_error(404)
        return
    size, begin, end = path.stat().st_size, 0, path.stat().st_size - 1
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", to.headers.get("Range") or "") if hub.ranges else None
    if wanted:
        begin, end = int(wanted[1]), min(int(wanted[2]), end)
    to.send_response(206 if wanted else 200)
    if wanted:
        to.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
    to.send_header("Content-Length", str(end + 1 - begin))
    to.end_headers()
    _content(to, hub, path, begin, end + 1 - begin)


def _content(to: BaseHTTPRequestHandler, hub: Hub, path: Path, begin: int, left: int) -> None:
    left = min(left, hub.cut) if hub.cut else left
    with open(path, "rb") as file:
        file.seek(begin)
        while left > 0 and (data := file.read(min(left, 1 << 16))):
            to.wfile.write(data)
            hub.sent += len(data)
            left -= len(data)
    if hub.cut:
        to.close_connection = True
