"""Fetch a server's /metrics, within a time limit for the whole of it."""

import http.client
import socket
import ssl
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from sparkinstall.downloads import certificates

SECONDS = 5.0
"""A working server sends it within a few milliseconds."""
MOST_BYTES = 8 << 20
_LOCKED = (401, 403)


class NotScraped(Exception):
    """There are no metrics; the message says why."""


def scrape(url: str, key: str = "", seconds: float = SECONDS) -> str:
    """Return the text of /metrics of the server at `url`.

    Raises:
        NotScraped: there is none within so many seconds.
    """
    link, late = _connection(url, seconds), threading.Event()
    limit: threading.Timer | None = None
    try:
        link.connect()
        # The timeout of a socket is for one read: a server that sends a byte now and then would never reach it. And
        # the connection forgets its socket once the answer has begun.
        limit = threading.Timer(seconds, _cut, (link.sock, late))
        limit.daemon = True
        limit.start()
        link.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = link.getresponse()
        data = answer.read(MOST_BYTES + 1)
    except ValueError as error:
        raise NotScraped("the key has characters that a header cannot have") from error
    except (OSError, http.client.HTTPException) as error:
        raise NotScraped(_why(error, late.is_set(), seconds)) from error
    finally:
        if limit:
            limit.cancel()
        link.close()
    if late.is_set():
        raise NotScraped(_why(TimeoutError(), True, seconds))
    if answer.status in _LOCKED:
        raise NotScraped(f"/metrics {'rejects the key' if key else 'asks for a key'} (HTTP {answer.status})")
    if answer.status != 200:
        raise NotScraped(f"/metrics answers HTTP {answer.status}")
    if len(data) > MOST_BYTES:
        raise NotScraped(f"/metrics has more than {MOST_BYTES >> 20} MiB")
    return data.decode(errors="replace")


def _connection(url: str, seconds: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme != "https":
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
    known = certificates()
    context = ssl.create_default_context(cafile=known if isinstance(known, str) else None)
    return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=seconds, context=context)


def _cut(link: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)


def _why(error: Exception, late: bool, seconds: float) -> str:
    if late or isinstance(error, TimeoutError):
        return f"/metrics has not answered within {seconds:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens at this address"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return f"/metrics does not answer: {said}"
