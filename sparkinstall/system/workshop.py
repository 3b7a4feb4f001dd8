"""Downloads and builds in a cache folder, which is not part of the node's state and may be deleted."""

import os
import shutil
from pathlib import Path

from sparkinstall.system import Result, processes


class Workshop:
    """A cache folder. Not a `System`: nothing in it is journaled or undone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *argv: str, timeout: float) -> Result:
        """Run a program that writes only below the folder; `timeout` in seconds. git does not ask for passwords."""
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
        code, out, err = processes.answer(argv, environment, timeout)
        return Result(argv, code, out.decode(errors="replace"), err.decode(errors="replace"))

    def new_folder(self, name: str) -> Path:
        """Create `name` as an empty folder, deleting what a killed run left."""
        self.remove(name)
        (self.folder / name).mkdir(parents=True)
        return self.folder / name

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
