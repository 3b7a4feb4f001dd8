"""Locks of folders between runs."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.system.locks import folder_locked


def test_locked_folder_is_waited_for(tmp_path: Path) -> None:
    folder, events = tmp_path / "new/folder", []

    def second() -> None:
        with folder_locked(folder):
            events.append("second")

    with folder_locked(folder):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        events.append("first")
    other.join(300)
    assert events == ["first", "second"]
    assert list(folder.iterdir()) == [], "nothing is left"


def test_folder_that_cannot_be_created_is_not_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with folder_locked(tmp_path / "file/folder"):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_folder_that_comes_and_goes_while_it_is_looked_at_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other runs create and remove it: one that is missing at this moment is none that may not be opened."""
    folder, left = tmp_path / "folder", [0, 0, 0]

    def changed(look: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Any, *args: Any, **keywords: Any) -> Any:
            if path == folder and left:
                left.pop()
                (folder.rmdir if folder in tmp_path.iterdir() else folder.mkdir)()
            return look(path, *args, **keywords)

        return change

    for name in ("open", "stat", "access"):
        monkeypatch.setattr(os, name, changed(getattr(os, name)))
    with folder_locked(folder) as handle:
        assert not left
        assert handle is not None and os.path.samestat(os.fstat(handle), os.stat(folder))
