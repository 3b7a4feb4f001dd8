"""Looking at a node and touching it: two types, so that a check that writes is a type error."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct


class Entry(Struct, frozen=True):
    """What is at a path. `size` in bytes, `mode` the permission bits, `mtime_ns` since the epoch."""

    kind: Literal["file", "dir", "link", "other"]
    mode: int
    size: int
    mtime_ns: int
    uid: int
    gid: int
    target: str = ""


class Result(Struct, frozen=True):
    """What a program answered. `code` 127: not found; 124: it ran past its time limit."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0


class Undo(Struct, frozen=True, forbid_unknown_fields=True):
    """How to take one touch back: what `subject` was before, and what we left there.

    `kind` names the undo function (`undoes`); `before` and `after` are
    plain JSON values. `after` tells our own work from what somebody else changed since.
    """

    kind: str
    subject: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


class Undone(Struct, frozen=True):
    """The result of undoing one change. `kept` and `failed` stay in the journal; `note` says why."""

    subject: str
    outcome: Literal["restored", "removed", "nothing", "kept", "failed"]
    note: str = ""


class Reader(Protocol):
    """What `check()` and probes get. Paths are the node's own, absolute."""

    @property
    def rehearsal(self) -> bool:
        """True beneath a root other than /: the machine around it is not the node."""

    def real(self, path: str) -> str:
        """The path as a program on this machine must be given it."""

    def entry(self, path: str) -> Entry | None:
        """What is at `path` itself (links are not followed), or None."""

    def read(self, path: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    def names(self, path: str) -> tuple[str, ...]:
        """The sorted names in a folder; empty where there is none."""

    def ask(self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False) -> Result:
        """Run a program that only reads, whatever its exit code.

        Args:
            timeout: seconds.
            env: the whole environment of the program instead of this process's.
            root: escalate with sudo where we are not root.

        Raises:
            MayChange: the command is not on the list of read-only commands (system/read_only.py).
        """


class System(Reader, Protocol):
    """What `apply()` and undo functions get. The journaling System records each change before it makes it."""

    @property
    def sudo(self) -> tuple[str, ...]:
        """The words before a command that needs root; none where this process has it."""

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Replace a file atomically; the journaling System makes missing folders."""

    def link(self, path: str, target: str) -> None:
        """Make or replace the symbolic link `path`, atomically; the journaling System makes missing folders."""

    def remove(self, path: str) -> None:
        """Remove a file or link, if there is one, and what a killed write left beside it."""

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        """Make a folder, owned by the user who runs this; the journaling System makes missing parents."""

    def remove_dir(self, path: str) -> bool:
        """Remove a folder if it is empty; return whether it is gone."""

    def claim(self, path: str) -> None:
        """Make a folder that is ours with all that will ever be in it.

        Raises:
            Blocked: something that is not ours is already there.
        """

    def clear(self, path: str) -> None:
        """Remove a claimed folder, or one within it, with all that is in it."""

    def restore_meta(self, path: str, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        """Set mode, owner and modification time of a file or folder."""

    def promise(self, undo: Undo) -> None:
        """Journal how to undo what the next `run` does."""

    def try_run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        root: bool = False,
        timeout: float | None = None,
        watch: Callable[[str], None] = ...,
    ) -> Result:
        """Run a program that may change the node; `out` has its stdout and stderr.

        Args:
            env: variables on top of this process's environment.
            cwd: a real path.
            root: escalate with sudo where we are not root.
            timeout: seconds, after which it is killed (exit code 124).
            watch: is given each line.
        """

    def run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        root: bool = False,
        watch: Callable[[str], None] = ...,
    ) -> Result:
        """The same as `try_run` for a program that has to succeed.

        Raises:
            CommandFailed: it ended with an error; carries the last lines and the log's path.
        """

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report how far this step has come."""


UndoFunction = Callable[[Sequence[Undo], System], Undone]
UNDO_FUNCTIONS: dict[str, UndoFunction] = {}
"""By kind of undo. Each stands beside the resource that promises that kind, and is given its records, oldest first."""


def undoes(kind: str) -> Callable[[UndoFunction], UndoFunction]:
    """Register the function that undoes the changes of `kind`."""

    def register(function: UndoFunction) -> UndoFunction:
        UNDO_FUNCTIONS[kind] = function
        return function

    return register
