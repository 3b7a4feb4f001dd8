"""Locks of folders between runs."""

import threading
import time
from pathlib import Path

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
