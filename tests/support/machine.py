"""A folder as a real machine, not as a rehearsal."""

from collections.abc import Mapping
from pathlib import Path

from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader


class Machine(LocalReader):
    """Reads files below the folder; runs the programs of this machine."""

    @property
    def rehearsal(self) -> bool:
        return False

    def real(self, path: str) -> str:
        return self.root + path


class OnASpark(Machine):
    """A tree, and the output of each installed program; other programs are missing."""

    def __init__(self, root: Path, programs: Mapping[str, str]) -> None:
        super().__init__(str(root))
        self.programs = programs

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, root, stdin
        installed = argv[0] in self.programs
        return Result(argv, 0 if installed else 127, self.programs.get(argv[0], ""), "")
