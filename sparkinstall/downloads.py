"""Downloads that are resumed after a cut and used only once their hash is known to be right."""

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparkinstall.errors import CommandFailed, storage_problem

if TYPE_CHECKING:
    import requests

# Small: what has arrived of a piece is lost when the connection breaks off within it.
_CHUNK = 1 << 16
_TIMEOUT = (15, 60)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch(url: str, into: Path, on_bytes: Callable[[int, int], None]) -> Path:
    """`url` as the file `into`, which appears only when it is whole; a former part is gone on with.

    Args:
        on_bytes: is told (bytes so far, bytes in all or 0).

    Raises:
        CommandFailed: the server cannot be reached, refuses, or breaks off.
        Storage: it cannot be written.
    """
    import requests

    if into.exists():
        return into
    part = into.with_name(into.name + ".part")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with _alone(into):
            if not into.exists():
                with requests.get(url, stream=True, timeout=_TIMEOUT, headers=_headers(part)) as answer:
                    if not _is_whole(answer, part):
                        answer.raise_for_status()
                        _receive(answer, part, on_bytes)
                part.replace(into)
    except requests.RequestException as error:
        raise _unreachable(url, error) from error
    except OSError as error:
        raise storage_problem(error, f"downloading to {into}") from error
    return into


@contextmanager
def _alone(into: Path) -> Iterator[None]:
    """Two runs for two nodes share a cache: the second one waits, and finds the file there."""
    with open(into.with_name(f".{into.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _headers(part: Path) -> dict[str, str]:
    # A server that packs the file on the way would send other bytes than those whose hash is known.
    plain = {"Accept-Encoding": "identity"}
    return {**plain, "Range": f"bytes={part.stat().st_size}-"} if part.exists() else plain


def _is_whole(answer: "requests.Response", part: Path) -> bool:
    """Whether all had arrived already when a former run was killed: a server has nothing after the end."""
    if answer.status_code != 416:
        return False
    if answer.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
        return True
    part.unlink()
    return False


def _receive(answer: "requests.Response", part: Path, on_bytes: Callable[[int, int], None]) -> None:
    import requests

    there = part.stat().st_size if part.exists() else 0
    resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {there}-")
    if answer.status_code == 206 and not resumed:
        raise requests.ConnectionError("it sends another part than the one that was asked for")
    done = there if resumed else 0
    total = done + int(answer.headers.get("Content-Length", 0))
    with open(part, "ab" if resumed else "wb") as out:
        for chunk in answer.iter_content(_CHUNK):
            out.write(chunk)
            done += len(chunk)
            on_bytes(done, total)
    if total and done < total:
        raise requests.ConnectionError(f"it broke off after {done} of {total} bytes")


def _unreachable(url: str, error: Exception) -> CommandFailed:
    return CommandFailed(
        f"{url} could not be downloaded",
        cause=str(error).split("(Caused by")[-1].strip(" )")[:200],
        hint="check the network and run the same command again; the download resumes where it stopped",
    )
