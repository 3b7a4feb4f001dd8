"""Download files, resuming after an interruption, and hash them. Callers compare the hash before use."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkinstall import causes
from sparkinstall.errors import CommandFailed, Storage, storage_problem

if TYPE_CHECKING:
    import requests

# Small, because a partly received chunk is lost when the connection closes.
_CHUNK = 1 << 16
_TIMEOUT = (15, 60)
_SYSTEM_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_TOO_MANY, _SERVER_ERROR = 429, 500


class NotDownloaded(CommandFailed):
    """A file could not be downloaded from `url`. `again`: whether it may come at another attempt."""

    url = ""
    again = False


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch(
    url: str, into: Path, on_bytes: Callable[[int, int], None], *, authorization: str = "", fingerprint: str = ""
) -> Path:
    """Download `url` to `into`, which appears only when it is complete; resume a partial download.

    Args:
        on_bytes: called with (bytes so far, total bytes or 0).
        authorization: the header of that name; without it, a login of ~/.netrc.
        fingerprint: the sha256 of the only certificate to trust, whatever it says; the system's are trusted if omitted.

    Raises:
        NotDownloaded: the server cannot be reached, refuses, or closes the connection early.
        Storage: the file cannot be written.
    """
    import requests

    if into.is_file():
        return into
    part = into.with_name(into.name + ".part")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with _locked(into), requests.Session() as session:
            session.auth = sign(authorization) if authorization else None
            session.verify = certificates()
            if fingerprint:
                _pin(session, fingerprint)
            if not into.exists():
                with session.get(url, stream=True, timeout=_TIMEOUT, headers=_headers(part)) as response:
                    if not _is_complete(response, part):
                        response.raise_for_status()
                        _receive(response, part, on_bytes)
                part.replace(into)
    except (requests.RequestException, ConnectionError) as error:
        raise _not_downloaded(url, error) from error
    except OSError as error:
        raise storage_problem(error, f"downloading to {into}") from error
    return into


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


def sign(authorization: str) -> "Callable[[requests.PreparedRequest], requests.PreparedRequest]":
    """Return the login of a session that sends this header and no other: "" sends none, whatever ~/.netrc has."""

    def add(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        if authorization:
            request.headers["Authorization"] = authorization
        return request

    return add


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
    cause = str(error).split("(Caused by")[-1].strip(" )")[:200]
    failure = NotDownloaded(f"{url} could not be downloaded", cause=cause, hint=hint)
    failure.url, failure.kind = url, kind
    failure.again = kind == "network" or status == _TOO_MANY or status >= _SERVER_ERROR
    return failure


@contextmanager
def _locked(into: Path) -> Iterator[None]:
    """Lock the download: of two runs that share a cache, the second waits and finds the file."""
    handle = into.with_name(f".{into.name}.lock")
    for each in (into, into.with_name(into.name + ".part"), handle):
        if os.path.lexists(each) and not each.is_file():
            raise Storage(f"{each} is not a file, but downloads go there", hint=f"delete it: `rm -r {each}`")
    with open(handle, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _headers(part: Path) -> dict[str, str]:
    # A compressed transfer would contain other bytes than those whose hash is known.
    plain = {"Accept-Encoding": "identity"}
    return {**plain, "Range": f"bytes={part.stat().st_size}-"} if part.exists() else plain


def _is_complete(response: "requests.Response", part: Path) -> bool:
    """Return whether a killed run had already received everything: the server then answers 416."""
    if response.status_code != 416:
        return False
    if response.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
        return True
    part.unlink()
    return False


def _receive(response: "requests.Response", part: Path, on_bytes: Callable[[int, int], None]) -> None:
    size = part.stat().st_size if part.exists() else 0
    resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {size}-")
    if response.status_code == 206 and not resumed:
        raise ConnectionError("the server sent another range than the requested one")
    done = size if resumed else 0
    total = done + int(response.headers.get("Content-Length", 0))
    with open(part, "ab" if resumed else "wb") as out:
        for chunk in response.iter_content(_CHUNK):
            out.write(chunk)
            done += len(chunk)
            on_bytes(done, total)
    if total and done < total:
        raise ConnectionError(f"the connection closed after {done} of {total} bytes")
