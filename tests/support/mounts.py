"""Small and read-only file systems for tests. They need root: without it the test is skipped, or fails in CI."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def need_root() -> None:
    """Without root, skip the test with the reason, or fail it in CI."""
    if os.geteuid() == 0:
        return
    reason = "mounting a small disk needs root"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must run this")
    pytest.skip(reason)


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (in mount's syntax) at the folder `at`, which is created."""
    need_root()
    at.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def resize(at: Path, size: str) -> None:
    """Change the size of a small disk and keep its files."""
    _mount("-o", f"remount,size={size}", str(at))


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with open(path, "wb") as out:
        try:
            while True:
                os.write(out.fileno(), b"x" * 512)
        except OSError:
            pass


@contextmanager
def read_only(at: Path) -> Iterator[Path]:
    """The folder `at`, read-only even for root during the context."""
    need_root()
    _mount("--bind", str(at), str(at))
    try:
        _mount("-o", "remount,bind,ro", str(at))
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def _mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"mount {' '.join(options)}: {done.stderr.strip()}")
