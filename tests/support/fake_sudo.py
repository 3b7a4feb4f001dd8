"""A sudo of ours on the PATH, for tests without an ordinary user: it runs the command, or says why it does not."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sparkinstall.system import local
from sparkinstall.system.local import LocalSystem


class AsAnotherUser(LocalSystem):
    """This machine as an ordinary user sees it: what needs root runs through the sudo on the PATH."""

    sudo = ("sudo", "-n")


def fake_sudo(folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: str = "") -> None:
    """Put a `sudo` first on the PATH; it prints `refusal` instead of running the command if that is given."""
    folder.mkdir()
    (folder / "refusal").write_text(f"{refusal}\n")
    does = f"cat {folder}/refusal >&2; exit 1" if refusal else 'shift; exec "$@"'
    (folder / "sudo").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def among_files_of_root(change: Callable[[LocalSystem, str], object], folder: str) -> None:
    """Make a change in `folder` as a user who may write nothing there, but may use sudo."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("symlink", "mkdir", "chmod"):
            patch.setattr(os, name, denied)
        patch.setattr(Path, "unlink", denied)
        patch.setattr(local, "replace_file", denied)
        change(AsAnotherUser(), folder)
