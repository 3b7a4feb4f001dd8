"""Downloads and builds in a folder of the cache, which is no part of the node's state and may be deleted."""

import os
import shutil
from pathlib import Path

from sparkinstall.system import Result, processes


class Workshop:
    """A folder of the cache. It stands apart from `System`: nothing that is done in it is journaled or undone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *argv: str, timeout: float) -> Result:
        """Run a program that writes below the folder alone; `timeout` in seconds. git asks for no password."""
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
        code, out, err = processes.answer(argv, environment, timeout)
        return Result(argv, code, out.decode(errors="replace"), err.decode(errors="replace"))

    def new_folder(self, name: str) -> Path:
        """Make `name` empty, whatever a killed run left in it."""
        self.remove(name)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def remove(self, name: str) -> None:
        """Remove a folder with all that is in it, if there is one."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
