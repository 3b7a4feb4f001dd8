"""The file that a bundle is written to until it is whole."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sparkinstall.errors import BadUsage, Busy, storage_errors, storage_problem
from sparkinstall.payloads.bundle_archive import MANIFEST
from sparkinstall.system.local import sync_folder

_ANOTHER = "name another file: `--output FILE.tar`"


@contextmanager
def begun(to: Path) -> Iterator[BinaryIO]:
    """Yield a file beside `to`, which takes its place if the context ends well, and is deleted if it does not.

    What a killed run left there is written over.

    Raises:
        Busy: another run is writing the same bundle.
        BadUsage: something else is in the place of that file.
        Storage: it cannot be written.
    """
    part = to.with_name(f"{to.name}.part")
    with _locked(part, to) as out:
        try:
            os.ftruncate(out.fileno(), 0)
            yield out
            with storage_errors(f"writing {part}"):
                out.flush()
                os.fsync(out.fileno())
                part.replace(to)
                sync_folder(str(to.parent))
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(part: Path, to: Path) -> Iterator[BinaryIO]:
    # Neither a link nor a pipe in this place may lead the bundle elsewhere, or make it wait.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(part, flags, 0o666)
    except OSError as error:
        raise storage_problem(error, f"creating {part}", _ANOTHER) from error
    with open(handle, "wb") as out:
        _require_ours(out, part)
        if not _is_alone(out, part):
            raise Busy(f"another run is writing {to}", hint=f"wait until it ends, or {_ANOTHER}")
        yield out


def _require_ours(out: BinaryIO, part: Path) -> None:
    """Refuse to write over what no run left."""
    is_file = stat.S_ISREG(os.fstat(out.fileno()).st_mode)
    beginning = MANIFEST.encode()
    if not is_file or os.pread(out.fileno(), len(beginning), 0) not in (b"", beginning):
        raise BadUsage(f"{part} exists, and no bundle that was begun is in it", hint=f"move it away, or {_ANOTHER}")


def _is_alone(out: BinaryIO, part: Path) -> bool:
    """Lock the file; whether no other run had it, or has finished it meanwhile."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    try:
        return os.path.samestat(os.fstat(out.fileno()), os.stat(part))
    except FileNotFoundError:
        return False
