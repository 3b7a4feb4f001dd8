"""A folder that is taken for a machine of its own, and not for a rehearsal of one."""

from collections.abc import Mapping
from pathlib import Path

from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader


class Machine(LocalReader):
    """Reads beneath the folder; what it asks programs, this machine answers."""

    @property
    def rehearsal(self) -> bool:
        return False

    def real(self, path: str) -> str:
        return self.root + path


class OnASpark(Machine):
    """A tree, and programs that answer what a case says; those that it does not name are not installed."""

    def __init__(self, root: Path, programs: Mapping[str, str]) -> None:
        super().__init__(str(root))
        self.programs = programs

    def ask(self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False) -> Result:
        del timeout, env, root
        there = argv[0] in self.programs
        return Result(argv, 0 if there else 127, self.programs.get(argv[0], ""), "")
