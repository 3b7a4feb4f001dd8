"""Trees that the lab builds once and keeps below the user's cache folder; several processes may use it at once."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Descriptors and not files: they stay open until the process ends.
_in_use: dict[Path, int] = {}


def folder() -> Path:
    """The lab's folder below the user's cache folder; created if it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    home = Path(base) / "sparkinstall" / "tests"
    home.mkdir(parents=True, exist_ok=True)
    return home


@functools.cache
def own_name(name: str) -> str:
    """The first of `name`, `name-2` and so on that no other process has; this one has it until it ends."""
    for number in itertools.count(1):
        own = name if number == 1 else f"{name}-{number}"
        lock = os.open(folder() / f"{own}.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return own
        except BlockingIOError:
            os.close(lock)
    raise AssertionError("there is always another number")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes, and other threads, wait for."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def abandoned(place: Path) -> int | None:
    """The lock of a folder that no process holds; None if one does, or if it has just removed the folder."""
    with suppress(FileNotFoundError):
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        os.close(lock)
    return None


@contextmanager
def temporary(kind: str) -> Iterator[Path]:
    """A folder of this process, removed at the end. Before, those of killed processes are: each is locked itself."""
    with locked(folder() / f"{kind}.lock"):
        for left in folder().glob(f"{kind}-*"):
            if (lock := abandoned(left)) is not None:
                shutil.rmtree(left)
                os.close(lock)
        made = Path(tempfile.mkdtemp(dir=folder(), prefix=f"{kind}-"))
        lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield made
    finally:
        shutil.rmtree(made)
        os.close(lock)


def kept(kind: str, recipe: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The tree that `build` creates, once per recipe; no process removes it while this one lives."""
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    tree = folder() / f"{kind}-{digest}"
    if tree in _in_use:
        return tree
    lock = os.open(_lock_of(tree), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        _ensure(tree, lock, build)
    except BaseException:
        os.close(lock)
        raise
    _in_use[tree] = lock
    return tree


def _ensure(tree: Path, lock: int, build: Callable[[Path], None]) -> None:
    """Build the tree if it is missing, and keep the lock shared."""
    fcntl.flock(lock, fcntl.LOCK_SH)
    while not tree.is_dir():
        # flock releases the lock before it waits for the other kind, so another process may have built or
        # removed the tree meanwhile: check each time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            _build(tree, build)
            _forget_others(tree)
        fcntl.flock(lock, fcntl.LOCK_SH)


def _build(tree: Path, build: Callable[[Path], None]) -> None:
    half_done = tree.with_name(f"{tree.name}.building")
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(mode=0o755)
    try:
        build(half_done)
        half_done.rename(tree)
    finally:
        shutil.rmtree(half_done, ignore_errors=True)


def _forget_others(current: Path) -> None:
    """Remove trees of older recipes, except those that another process uses."""
    for tree in folder().glob(f"{current.name.rpartition('-')[0]}-*"):
        if tree == current or not tree.is_dir():
            continue
        with suppress(BlockingIOError), _lock_of(tree).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(tree)


def _lock_of(tree: Path) -> Path:
    # Never removed: a lock file that is unlinked and created again is two locks.
    return tree.with_name(f"{tree.name.removesuffix('.building')}.lock")
