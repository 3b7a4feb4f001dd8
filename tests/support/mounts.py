"""Small and read-only file systems for tests: needs root; where that is not to be had, the test is skipped, and fails
in CI."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def need_root() -> None:
    """Skip the test without root, with the reason; fail it in CI."""
    if os.geteuid() == 0:
        return
    reason = "mounting a small disk needs root"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must run this")
    pytest.skip(reason)


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (as mount takes it) at the folder `at`, which is made."""
    need_root()
    at.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def resize(at: Path, size: str) -> None:
    """Give a small disk another size, with all that is on it."""
    _mount("-o", f"remount,size={size}", str(at))


@contextmanager
def read_only(at: Path) -> Iterator[Path]:
    """The folder `at`, for the time being read-only, even to root."""
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
