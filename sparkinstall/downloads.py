"""Download files, resuming after an interruption, and hash them. Callers compare a hash that is not `Known` before."""

import fcntl
import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from sparkinstall import causes
from sparkinstall.errors import CommandFailed, Interrupted, Storage, storage_problem

if TYPE_CHECKING:
    import requests

_Each = TypeVar("_Each")
_Result = TypeVar("_Result")
_AT_ONCE = 4
# Seconds: between two looks at whether the run was interrupted, and how long what has begun may take to end.
_LOOK, _AFTER_AN_INTERRUPT, _AFTER_A_FAILURE = 0.1, 0.8, 10.0
# Small, because a partly received chunk is lost when the connection closes.
_CHUNK = 1 << 16
_TIMEOUT = (15, 60)
_SYSTEM_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_TOO_MANY, _SERVER_ERROR = 429, 500
_LONGEST_REASON = 200
# The last error within one of requests: its words, perhaps after a number.
_WRAPPED = re.compile(r""".*Error\((?:-?\d+, )?(["'])(.+?)\1\)""")
_NOISE = re.compile(r"^HTTPS?Connection(?:Pool)?\(.*?\): |\[Errno -?\d+\] ")


class NotDownloaded(CommandFailed):
    """A file could not be downloaded from `url`. `again`: whether it may come at another attempt.

    `status`: that of the server's answer, or 0. `reason`: its header X-Error-Code.
    """

    url = ""
    again = False
    status = 0
    reason = ""


class Known(Struct, frozen=True):
    """What is known of a file before it arrives: its size in bytes, its hash in hex, and how that is computed.

    `part`: where it arrives, on the disk of its place. `lock`: the file that whoever downloads it has locked.
    """

    size: int
    digest: str
    hasher: "Callable[[], hashlib._Hash]"
    part: Path
    lock: Path


def _nothing() -> None:
    """Do nothing."""


def in_parallel(
    work: Callable[[_Each], _Result],
    items: Iterable[_Each],
    stop: Callable[[], None] = _nothing,
    wanted: Callable[[], None] = _nothing,
    at_once: int = _AT_ONCE,
) -> list[_Result]:
    """Do the work for all items, a few at once, and return what it gives for each; the first failure ends all.

    Args:
        stop: called after a failure or an interrupt, so that what has begun ends too.
        wanted: called now and then; raises if the run was interrupted.
    """
    waiting = deque(enumerate(items))
    results: dict[int, _Result] = {}
    ended: SimpleQueue[tuple[int, _Result] | BaseException] = SimpleQueue()
    count = len(waiting)

    def work_off() -> None:
        with suppress(IndexError):
            while True:
                at, item = waiting.popleft()
                try:
                    ended.put((at, work(item)))
                except BaseException as error:
                    ended.put(error)

    # A thread that waits for a server which sends nothing cannot be ended: it must not keep the process.
    threads = [Thread(target=work_off, daemon=True) for _ in range(min(at_once, count))]
    try:
        for thread in threads:
            thread.start()
        while len(results) < count:
            wanted()
            with suppress(Empty):
                found = ended.get(timeout=_LOOK)
                if isinstance(found, BaseException):
                    raise found
                results[found[0]] = found[1]
    except BaseException as error:
        waiting.clear()
        stop()
        _wait_for(threads, _AFTER_A_FAILURE if _is_failure(error) else _AFTER_AN_INTERRUPT)
        raise
    return [results[at] for at in range(count)]


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, Interrupted)


def _wait_for(threads: Sequence[Thread], seconds: float) -> None:
    until = time.monotonic() + seconds
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, until - time.monotonic()))


@contextmanager
def kept_when_interrupted() -> Iterator[None]:
    """Say of an interrupt in this context that what has come of a download is kept."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        hint = "run the same command again: it continues there, also in the middle of a file"
        raise Interrupted("interrupted while downloading; what has come is kept", hint=hint) from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch(
    url: str,
    into: Path,
    on_bytes: Callable[[int, int], None],
    *,
    authorization: str | None = None,
    fingerprint: str = "",
    known: Known | None = None,
) -> Path:
    """Download `url` to `into`, which appears only when it is complete; resume a partial download.

    Args:
        on_bytes: called with (bytes so far, total bytes or 0).
        authorization: the header of that name, which no other host gets; None: a login of ~/.netrc.
        fingerprint: the sha256 of the only certificate to trust, whatever it says; the system's are trusted if omitted.
        known: what the file must be; what is not is removed.

    Raises:
        NotDownloaded: the server cannot be reached, refuses, closes the connection early, or sends another file.
        Storage: the file cannot be written.
    """
    if into.is_file():
        return into
    part = known.part if known else into.with_name(into.name + ".part")
    lock = known.lock if known else into.with_name(f".{into.name}.lock")
    try:
        for folder in (into.parent, part.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(into, part, lock, on_bytes), _session(url, authorization, fingerprint) as session:
            if not into.exists():
                _Arrival(url, part, on_bytes, known).bring(session)
                part.replace(into)
    except OSError as error:
        raise storage_problem(error, f"downloading to {into}") from error
    return into


def page(url: str, most: int, *, authorization: str | None = None) -> bytes:
    """Return what a server answers, which is short.

    Args:
        most: the largest number of bytes.
        authorization: as in `fetch`.

    Raises:
        NotDownloaded: as `fetch`, or the answer is too large.
    """
    with _session(url, authorization) as session, session.get(url, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        if url.startswith("https:") and not response.url.startswith("https:"):
            raise _not_accepted(url, "the server redirects to an address without TLS")
        content = bytearray()
        for chunk in response.iter_content(_CHUNK):
            content += chunk
            if len(content) > most:
                raise _not_accepted(url, f"the answer has more than {most} bytes")
    return bytes(content)


@contextmanager
def _session(url: str, authorization: str | None, fingerprint: str = "") -> "Iterator[requests.Session]":
    """Yield a session; what goes wrong with the server in this context is `NotDownloaded`."""
    import requests

    try:
        with requests.Session() as session:
            if authorization is not None:
                _log_in(session, authorization)
            session.verify = certificates()
            if fingerprint:
                _pin(session, fingerprint)
            yield session
    except (requests.RequestException, ConnectionError) as error:
        raise _not_downloaded(url, error) from error


def certificates() -> str | bool:
    """Return the system's certificates unless a variable of requests names others: those of a proxy are there."""
    chosen = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return chosen or (_SYSTEM_CERTIFICATES if os.path.exists(_SYSTEM_CERTIFICATES) else True)


def _pin(session: "requests.Session", fingerprint: str) -> None:
    """Trust one certificate and no other. Its dates do not count: the clocks of two nodes may differ."""
    adapter: Any = session.get_adapter("https://")
    adapter.init_poolmanager(1, 1, assert_fingerprint=fingerprint)
    # Nor do the proxies and logins that this user has for other servers.
    session.verify = session.trust_env = False


def _log_in(session: "requests.Session", authorization: str) -> None:
    """Send this header to the host that is asked, and no login to another one that it redirects to."""

    # Its method is replaced, and another one of it has no types.
    changed: Any = session

    def at_redirect(request: "requests.PreparedRequest", response: "requests.Response") -> None:
        if changed.should_strip_auth(response.request.url, request.url):
            request.headers.pop("Authorization", None)

    # Otherwise requests looks for a login of the other host in ~/.netrc.
    session.auth, changed.rebuild_auth = sign(authorization), at_redirect


def sign(authorization: str) -> "Callable[[requests.PreparedRequest], requests.PreparedRequest]":
    """Return the login of a session that sends this header and no other: "" sends none, whatever ~/.netrc has."""

    def add(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        if authorization:
            request.headers["Authorization"] = authorization
        return request

    return add


def reason_of(error: BaseException) -> str:
    """Return the words of an error of requests that say the reason, without the objects that it wraps."""
    text = str(error).rsplit("(Caused by ", 1)[-1]
    if match := _WRAPPED.match(text):
        text = match[2]
    return _NOISE.sub("", text)[:_LONGEST_REASON]


def _not_downloaded(url: str, error: OSError) -> NotDownloaded:
    import requests

    kind: causes.Kind = "network"
    hint = "check the network and run the same command again; the download resumes where it stopped"
    status = 0
    if isinstance(error, requests.HTTPError) and error.response is not None:
        kind, status = "server", error.response.status_code
        hint = "the server answered, so the network works: check the address, or run the same command again later"
    elif isinstance(error, requests.exceptions.SSLError):
        kind = "certificate"
        proxy = "behind a proxy, add its certificate to the system's (`sudo update-ca-certificates`)"
        hint = f"check the clock (`date`); {proxy}; then run the same command again"
    elif isinstance(error, ValueError):
        kind, hint = "server", "correct the address, then run the same command again"
    cause = reason_of(error)
    failure = NotDownloaded(f"{url} could not be downloaded", cause=cause, hint=hint)
    failure.url, failure.kind, failure.status = url, kind, status
    if isinstance(error, requests.HTTPError) and error.response is not None:
        failure.reason = error.response.headers.get("X-Error-Code", "")
    failure.again = kind == "network" or status == _TOO_MANY or status >= _SERVER_ERROR
    return failure


def _not_accepted(url: str, why: str) -> NotDownloaded:
    """Return the error of an answer that is not what it must be."""
    hint = "run the same command again; if the error remains, the server has another file than it announces"
    failure = NotDownloaded(f"{url} was not accepted", cause=why, hint=hint)
    failure.url, failure.kind = url, "damaged"
    return failure


@contextmanager
def _locked(into: Path, part: Path, lock: Path, on_bytes: Callable[[int, int], None]) -> Iterator[None]:
    """Lock the download: of two runs that share a cache, the second waits and finds the file."""
    for each in (into, part, lock):
        if os.path.lexists(each) and not each.is_file():
            raise Storage(f"{each} is not a file, but downloads go there", hint=f"delete it: `rm -r {each}`")
    with open(lock, "wb") as handle:
        while not _has_locked(handle.fileno()):
            # Whoever wants to stop this thread does so there.
            on_bytes(0, 0)
            time.sleep(0.05)
        yield


def _has_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Arrival(Struct, frozen=True):
    """A download from `url` into `part`."""

    url: str
    part: Path
    on_bytes: Callable[[int, int], None]
    known: Known | None

    def bring(self, session: "requests.Session") -> None:
        """Complete `part`, and compare it with what is known."""
        hasher = self.known.hasher() if self.known else None
        if not self._ask(session, hasher) and hasher:
            self._read_into(hasher)
        if self.known and hasher and hasher.hexdigest() != self.known.digest:
            self.part.unlink()
            found = f"expected {hasher.name} {self.known.digest}, found {hasher.hexdigest()}"
            raise _not_accepted(self.url, found)

    def _ask(self, session: "requests.Session", hasher: "hashlib._Hash | None") -> bool:
        """Ask the server for what is missing; return whether anything was received."""
        if self.known and self._size() > self.known.size:
            self.part.unlink()
        if self.known and self.part.exists() and self._size() == self.known.size:
            return False
        with session.get(self.url, stream=True, timeout=_TIMEOUT, headers=self._headers()) as response:
            if self._is_complete(response):
                return False
            response.raise_for_status()
            self._receive(response, hasher)
        return True

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _read_into(self, hasher: "hashlib._Hash") -> None:
        with open(self.part, "rb") as file:
            while content := file.read(1 << 20):
                hasher.update(content)

    def _headers(self) -> dict[str, str]:
        # A compressed transfer would contain other bytes than those whose hash is known.
        plain = {"Accept-Encoding": "identity"}
        return {**plain, "Range": f"bytes={self._size()}-"} if self.part.exists() else plain

    def _is_complete(self, response: "requests.Response") -> bool:
        """Return whether a killed run had already received everything: the server then answers 416."""
        if response.status_code != 416:
            return False
        if self.part.exists() and response.headers.get("Content-Range") == f"bytes */{self._size()}":
            return True
        self.part.unlink(missing_ok=True)
        return False

    def _receive(self, response: "requests.Response", hasher: "hashlib._Hash | None") -> None:
        size = self._size()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
        if response.status_code == 206 and not resumed:
            raise ConnectionError("the server sent another range than the requested one")
        done = size if resumed else 0
        total = done + int(response.headers.get("Content-Length", 0))
        if self.known:
            if "Content-Length" in response.headers and total != self.known.size:
                raise _not_accepted(self.url, f"it has {total} bytes instead of {self.known.size}")
            total = self.known.size
        if hasher and resumed:
            self._read_into(hasher)
        with open(self.part, "ab" if resumed else "wb") as out:
            for chunk in response.iter_content(_CHUNK):
                done += len(chunk)
                if self.known and done > total:
                    raise _not_accepted(self.url, f"it has more than {total} bytes")
                out.write(chunk)
                if hasher:
                    hasher.update(chunk)
                self.on_bytes(done, total)
            if self.known:
                # It gets its name only when it would survive a loss of power.
                out.flush()
                os.fsync(out.fileno())
        if total and done < total:
            raise ConnectionError(f"the connection closed after {done} of {total} bytes")
