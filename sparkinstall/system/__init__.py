"""Looking at a node and touching it: two types, so that a check that writes is a type error."""

from collections.abc import Callable, Mapping
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

    `kind` names the undo function (journal/undo.py); `before` and `after` are
    plain JSON values. `after` tells our own work from what somebody else changed since.
    """

    kind: str
    subject: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]


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
        """Ask a program something; it must not change the node. Never raises for what it answers.

        Args:
            timeout: seconds.
            env: the whole environment of the program instead of this process's.
            root: escalate with sudo where we are not root.
        """


class System(Reader, Protocol):
    """What `apply()` gets: every touch is journaled before it happens."""

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Replace a file atomically; missing folders are made."""

    def remove(self, path: str) -> None:
        """Remove a file or link; there is none: fine."""

    def link(self, path: str, target: str) -> None:
        """Make `path` a symbolic link to `target`, atomically."""

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        """Make a folder and its missing parents; owned by the user who runs this."""

    def claim(self, path: str) -> None:
        """Make a folder that is ours with all that will ever be in it.

        Raises:
            Blocked: something that is not ours is already there.
        """

    def clear(self, path: str) -> None:
        """Remove a claimed folder, or one within it, with all that is in it."""

    def promise(self, undo: Undo) -> None:
        """Journal how to undo what the next `run` does."""

    def run(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        root: bool = False,
        watch: Callable[[str], None] = ...,
    ) -> Result:
        """Run a program, its output to the log and to whoever watches.

        Args:
            env: variables on top of this process's environment.
            cwd: a real path.
            root: escalate with sudo where we are not root.
            watch: is given each line.

        Raises:
            CommandFailed: it ended with an error; carries the last lines and the log's path.
        """

    def progress(self, done: int, total: int, unit: str) -> None:
        """Tell whoever watches how far this step has come."""
