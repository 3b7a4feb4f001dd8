"""A hub of models on the loopback: it speaks the API of the real one, can be slow, cut answers, refuse, and lie."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.local_server import listening

COMMIT = "c0ffee" * 6 + "c0de"
LARGE = 1000
"""A file with more bytes has a sha256 on the hub, like one that git keeps elsewhere."""
_PIECE, _LARGE_PIECE = 1 << 14, 1 << 20


@lru_cache(maxsize=32)
def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@lru_cache(maxsize=32)
def digest(content: bytes) -> str:
    """The name of the blob of a file with this content."""
    return hashlib.sha256(content).hexdigest() if len(content) > LARGE else git_sha1(content)


@dataclass(frozen=True)
class Request:
    """What was asked: at the hub itself or at its store, which is another host."""

    method: str
    host: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class ModelHub:
    """One model, with its files; `others`: names of models with the same files.

    sent: what is sent in place of a file's content; cut: at most so many bytes per answer (0: all); pause: seconds
    between two pieces of 16 KiB; stops_at: bytes of an answer after which it waits until `goes_on` is set; refuses:
    status and X-Error-Code of the API, of files; answer: that of the API, instead of the list; stored: large files are
    at another host.
    """

    model: str
    files: dict[str, bytes]
    others: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    sent: dict[str, bytes] = field(default_factory=dict)
    cut: int = 0
    pause: float = 0.0
    stops_at: int = 0
    goes_on: Event = field(default_factory=Event)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    answer: bytes | None = None
    stored: bool = True
    url: str = ""
    requests: list[Request] = field(default_factory=list)

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def listing(self) -> dict[str, Any]:
        """The API's answer."""
        return {"id": self.model, "sha": COMMIT, "siblings": [self._sibling(path) for path in self.files]}

    def _sibling(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 134}
        return entry

    def tree(self) -> list[dict[str, Any]]:
        """The same as the real client asks for it."""
        return [self._leaf(path) for path in self.files]

    def _leaf(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        leaf: dict[str, Any] = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
        if len(content) > LARGE:
            leaf["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 134}
        return leaf

    def downloads(self) -> list[Request]:
        """The requests that got a part of a file."""
        return [
            each for each in self.requests if each.method == "GET" and "/api/" not in each.path and self._is_end(each)
        ]

    def _is_end(self, request: Request) -> bool:
        return not self._is_elsewhere(request.path, request.host)

    def _is_elsewhere(self, path: str, host: str) -> bool:
        return self.stored and host == "127.0.0.1" and len(self.files.get(_named(path), b"")) > LARGE


def _named(path: str) -> str:
    return unquote(path).partition(f"/resolve/{COMMIT}/")[2]


@contextmanager
def served(hub: ModelHub) -> Iterator[ModelHub]:
    """Serve at `hub.url` during the context."""

    class Handler(_Handler):
        of = hub

    with listening(Handler) as url:
        hub.url = url
        yield hub


class _Handler(BaseHTTPRequestHandler):
    of: ModelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, host = self.path.partition("?")[0], self.headers["Host"].partition(":")[0]
        asked = Request(self.command, host, path, self.headers["Range"], self.headers["Authorization"])
        self.of.requests.append(asked)
        kind = "api" if path.startswith("/api/") else "file"
        if host == "127.0.0.1" and kind in self.of.refuses:
            self._refuse(*self.of.refuses[kind])
        elif host == "127.0.0.1" and self.of.token and asked.authorization != f"Bearer {self.of.token}":
            self._refuse(401, "")
        elif kind == "api":
            self._api(path)
        else:
            self._file(path, host)

    def _refuse(self, status: int, reason: str) -> None:
        self._answer(status, b"no", {"X-Error-Code": reason} if reason else {})

    def _api(self, path: str) -> None:
        found = re.fullmatch(r"/api/models/(.+)/(revision|tree)/([^/]+)", path)
        if not found or found[1] not in (self.of.model, *self.of.others):
            self._refuse(404, "RepoNotFound")
        elif unquote(found[3]) not in (*self.of.revisions, COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            answer: object = self.of.listing() if found[2] == "revision" else self.of.tree()
            content = json.dumps(answer).encode() if self.of.answer is None else self.of.answer
            self._answer(200, content, {"Content-Type": "application/json"})

    def _file(self, path: str, host: str) -> None:
        name = _named(path)
        models = (self.of.model, *self.of.others)
        if not any(path.startswith(f"/{each}/resolve/") for each in models) or name not in self.of.files:
            self._refuse(404, "EntryNotFound")
            return
        whole, known = self.of.files[name], self.of.sent.get(name, self.of.files[name])
        headers = {"ETag": f'"{digest(whole)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(whole) > LARGE:
            headers |= {"X-Linked-ETag": f'"{digest(whole)}"', "X-Linked-Size": str(len(whole))}
        if self.of.stored and host == "127.0.0.1" and len(whole) > LARGE:
            # Another name of the same machine is another host, as the store of the real hub is.
            self._answer(
                302, b"", {**headers, "Location": f"http://localhost:{self.of.port}{self.path}?Signature=geheim"}
            )
            return
        self._content(known, headers)

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start and start >= len(content):
            self._answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        if self.headers["Range"]:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if self.headers["Range"] else 200, content[start:], headers, self.of.cut)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], cut: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        shown = content[:cut] if cut else content
        try:
            piece = _PIECE if self.of.pause or self.of.stops_at else _LARGE_PIECE
            for at in range(0, len(shown), piece):
                if 0 < self.of.stops_at <= at:
                    self.of.goes_on.wait(600)
                self.wfile.write(shown[at : at + piece])
                time.sleep(self.of.pause)
        except OSError:
            pass
        self.close_connection = len(shown) < len(content)
