"""Locks of folders that several runs use at the same time, of whatever node. The end of a process frees its locks."""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparkinstall.errors import Busy
from sparkinstall.system import processes


@contextmanager
def folder_locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int | None]:
    """Wait until no other run has locked the folder, which is created, and lock it in this context.

    Yields what is locked; None: it cannot be opened.
    """
    while True:
        is_made = _is_made(path)
        with _folder(path) as handle:
            if handle is not None:
                wait_for_lock(handle, how)
            if not is_made or _is_at(handle, path):
                yield handle
                return
        # The run that had locked it has removed it: create it again.


def wait_for_lock(handle: int, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file or folder as soon as no other run has locked it. Closing it frees it."""
    while not _is_locked(handle, how):
        processes.refuse_if_stopped()
        time.sleep(0.05)


def is_folder_locked(path: Path) -> bool:
    """Return whether another run has locked the folder, which may be missing."""
    with _folder(path) as handle:
        return handle is not None and not _is_locked(handle)


@contextmanager
def cache_in_use(cache: Path) -> Iterator[None]:
    """Keep `cache prune`, of whatever node, from removing what this context brings to the cache or takes from it."""
    with folder_locked(cache, fcntl.LOCK_SH) as handle:
        try:
            yield
        finally:
            # A run that brought nothing leaves no folder, unless another one is using it.
            with suppress(OSError):
                if handle is None or _is_locked(handle):
                    cache.rmdir()


@contextmanager
def cache_unused(cache: Path) -> Iterator[None]:
    """Keep others from using the cache in this context.

    Raises:
        Busy: it is in use.
    """
    with _folder(cache) as handle:
        if handle is not None and not _is_locked(handle):
            raise Busy(f"another run is using {cache}", hint="wait until it has ended, then run this again")
        yield


def _is_made(path: Path) -> bool:
    """Create a folder; whether it can be. Whoever writes there says why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        # A file, or a folder that another run has removed at this moment.
        with suppress(FileNotFoundError):
            return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError:
        return False
    return True


def _is_at(handle: int | None, path: Path) -> bool:
    """Whether a folder is still where it was opened. None: whether it may not be opened."""
    try:
        if handle is None:
            # One that was missing may be there again, or gone again.
            os.close(_opened(path))
            return False
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
    except OSError:
        return handle is None


@contextmanager
def _folder(path: Path) -> Iterator[int | None]:
    """Open a folder to lock it: that leaves no file behind, and the folder may be read-only. None: it cannot be."""
    try:
        handle = _opened(path)
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_locked(handle: int, how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True
