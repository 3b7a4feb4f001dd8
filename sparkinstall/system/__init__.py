"""Reading and changing a node are two types, so that a check that writes is a type error."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict, Unpack

from msgspec import Struct

from sparkinstall.causes import cause_of, program_of
from sparkinstall.errors import CommandFailed, Problem

_TAIL = 12


KIND_WORDS = {"file": "a file", "dir": "a folder", "link": "a link", "other": "a pipe, a socket or a device"}


class Entry(Struct, frozen=True):
    """What is at a path. `size` in bytes, `mode` the permission bits, `mtime_ns` since the epoch."""

    kind: Literal["file", "dir", "link", "other"]
    mode: int
    size: int
    mtime_ns: int
    uid: int
    gid: int
    target: str = ""

    @property
    def words(self) -> str:
        """What it is, for a message."""
        return KIND_WORDS[self.kind]


class Result(Struct, frozen=True):
    """The result of a program. `code` 127: not found; 124: timed out."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def last_line(self) -> str:
        """The last line of stderr, where programs say why they failed; "" if there is none."""
        return next((line.strip() for line in reversed(self.err.splitlines()) if line.strip()), "")


class Undo(Struct, frozen=True, forbid_unknown_fields=True):
    """How to undo one change: the state of `subject` before and after it.

    `kind` names the undo function (`undoes`); `before` and `after` are plain JSON values. `after` distinguishes our
    change from later changes by others.
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
    """For `check()` and probes. Paths are absolute node paths."""

    @property
    def rehearsal(self) -> bool:
        """Whether the root is not /: this machine is then not the node."""

    def real(self, path: str) -> str:
        """Return the path on this machine."""

    def inside(self, path: str) -> str:
        """Return the real path of `path`, for a writer.

        Raises:
            Blocked: in a rehearsal, a link above it leads out of the rehearsal's folder.
        """

    def entry(self, path: str) -> Entry | None:
        """Return what is at `path`, without following links, or None."""

    def read(self, path: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    def names(self, path: str) -> tuple[str, ...]:
        """Return the sorted names in a folder, or ()."""

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        """Run a program that only reads, whatever its exit code.

        Args:
            timeout: seconds.
            env: replaces this process's environment.
            root: use sudo unless this process is root.
            stdin: what it reads there. A secret is nowhere else visible to others.

        Raises:
            MayChange: the command is not on the list of read-only commands (system/read_only.py).
        """


class RunOptions(TypedDict, total=False):
    """How to run a program that may change the node.

    `env`: added to this process's environment. `root`: use sudo unless this process is root. `timeout`: seconds, after
    which it is killed (exit code 124). `watch`: called with each line.
    """

    env: Mapping[str, str]
    root: bool
    timeout: float
    watch: Callable[[str], None]


class System(Reader, Protocol):
    """For `apply()` and undo functions. The journaling System records each change before making it."""

    @property
    def sudo(self) -> tuple[str, ...]:
        """Prefix of a command that needs root; empty if this process is root."""

    @property
    def log(self) -> str:
        """The path of the log that has the whole output of programs; "": none."""
        return ""

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Replace a file atomically; the journaling System creates missing folders."""

    def link(self, path: str, target: str) -> None:
        """Create or replace the symbolic link `path` atomically; the journaling System creates missing folders."""

    def remove(self, path: str) -> None:
        """Remove a file or link, if it exists, and the temporary file of a killed write."""

    def make_dir(self, path: str, mode: int = 0o755) -> None:
        """Create a folder owned by the current user; the journaling System creates missing parents."""

    def remove_dir(self, path: str) -> bool:
        """Remove a folder if it is empty; return whether it is gone."""

    def claim(self, path: str) -> None:
        """Create a folder that is ours with all its future contents.

        Raises:
            Blocked: something that is not ours is in its place.
        """

    def switch(self, path: str, folder: str) -> None:
        """Make `path` a link to the claimed folder `folder`, by one rename; the journaling System claims `path`.

        A folder of ours at `path` is moved to `folder`.former before.

        Raises:
            Blocked: something that is not ours is in its place.
        """

    def clear(self, path: str) -> None:
        """Remove a claimed folder, or one within it, with its contents."""

    def restore_meta(self, path: str, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        """Set mode, owner and modification time of a file or folder."""

    def promise(self, undo: Undo) -> None:
        """Journal how to undo the next `run`."""

    def try_run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        """Run a program that may change the node; `out` has its stdout and stderr."""

    def run(self, *argv: str, **how: Unpack[RunOptions]) -> Result:
        """Like `try_run`, for a program that must succeed.

        Raises:
            CommandFailed: it failed; has the last lines and the log's path.
        """
        result = self.try_run(*argv, **how)
        if not result.ok:
            raise failure_of(result, log=self.log)
        return result

    def warn(self, text: str) -> None:
        """Tell the user something although the step goes on."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report the progress of this step."""


def failure_of(
    result: Result,
    message: str = "",
    *,
    hint: str = "read the log, fix the cause, and run the same command again: it continues from here",
    log: str = "",
    places: Iterable[str] = (),
    error: type[Problem] = CommandFailed,
) -> Problem:
    """Return the error of a program that failed, with the cause that was observed (causes.py).

    Args:
        message: what failed; the program and its exit code if omitted.
        hint: what to do if no cause was recognised.
        places: folders of this machine in which the program writes.
        error: the class of the error.
    """
    said = f"{result.out}\n{result.err}"
    lines = [line for line in said.splitlines() if line.strip()]
    cause = cause_of(result.argv, result.code, said, places)
    message = message or f"`{program_of(result.argv)}` ended with code {result.code}"
    if cause and cause.kind == "sudo":
        message = message.replace(f"ended with code {result.code}", "was not run")
    failure = error(message, hint=hint, log=log, output=lines[-_TAIL:])
    if cause:
        failure.cause, failure.hint, failure.kind = cause.why, cause.hint, cause.kind
    return failure


UndoFunction = Callable[[Sequence[Undo], System], Undone]
UNDO_FUNCTIONS: dict[str, UndoFunction] = {}
"""Undo functions by kind, each registered beside its resource. They get their records, oldest first."""


RESTORED_FIRST: dict[str, Callable[[str], str]] = {}
"""By kind, the file or folder of a subject that must be restored before it; a path ends with / for a folder."""


def undoes(kind: str, after: Callable[[str], str] | None = None) -> Callable[[UndoFunction], UndoFunction]:
    """Register the function that undoes the changes of `kind`; `after` as in `RESTORED_FIRST`."""

    def register(function: UndoFunction) -> UndoFunction:
        UNDO_FUNCTIONS[kind] = function
        if after:
            RESTORED_FIRST[kind] = after
        return function

    return register
