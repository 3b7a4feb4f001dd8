"""Errors for users: what failed, why, and what to do. Also the exit codes."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

from sparkinstall import causes


class Exit(IntEnum):
    """Exit codes of every verb (docs/exit-codes.md)."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    DRIFT = 3
    PREFLIGHT = 4
    SOME_NODES = 5
    INTERRUPTED = 130

    @property
    def word(self) -> str:
        """The name in the JSON output."""
        return self.name.lower().replace("_", "-")


# With those that turn the direction of a text around: what follows would look like something else.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONG_WORD = re.compile(r"\S{300,}")
_LONGEST = 3000


def visible(text: str) -> str:
    """Return a text in which control characters, which a terminal would obey, are visible."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def brief(text: str) -> str:
    """Shorten names, values and texts of any length, so that they can be shown: their begin and end remain.

    Control characters, which a terminal would obey, become visible.
    """
    text = visible(text)
    text = _LONG_WORD.sub(lambda word: f"{word[0][:150]}[...]{word[0][-50:]}", text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} [...] {text[-400:]}"


class Problem(Exception):
    """An error that the user can act on. `code` is stable and part of the JSON output. No text in it is long.

    `kind`: that of the recognised cause of a program's failure.
    """

    code = "failed"
    kind: causes.Kind | None = None
    exit_code = Exit.FAILED

    def __init__(
        self, message: str, *, cause: str = "", hint: str = "", log: str = "", output: Sequence[str] = ()
    ) -> None:
        super().__init__(brief(message))
        self.message, self.cause, self.hint, self.log = *map(brief, (message, cause, hint)), log
        self.output = tuple(map(brief, output))


class BadConfig(Problem):
    """The config file, an option or a stack is invalid."""

    code = "config"
    exit_code = Exit.USAGE


class NotThere(Problem):
    """This node or rehearsal was never set up."""

    code = "not-there"
    exit_code = Exit.DRIFT


class BadUsage(Problem):
    """The command line is invalid."""

    code = "usage"
    exit_code = Exit.USAGE


class PreflightFailed(Problem):
    """The node is not ready; nothing was changed."""

    code = "preflight"
    exit_code = Exit.PREFLIGHT


class Busy(Problem):
    """Another run holds the lock of this node, writes the same bundle, or uses the cache."""

    code = "busy"


class Storage(Problem):
    """A disk is full, read-only, or not writable for this user."""

    code = "storage"


class CommandFailed(Problem):
    """A program exited with an error, or could not be run."""

    code = "command"


class Blocked(Problem):
    """A resource found something that it must not overwrite."""

    code = "blocked"


class BadBundle(Problem):
    """A bundle is damaged, or is not for this node or this tool."""

    code = "bundle"


class NeedsRoot(Problem):
    """The check needs root, and sudo needs a password but cannot ask for it."""

    code = "sudo"


class Unreachable(Problem):
    """Another node cannot be reached over ssh, or the connection was lost."""

    code = "unreachable"


class JournalDamaged(Problem):
    """The journal cannot be read, so nothing can be changed or undone."""

    code = "journal"


class StateDamaged(Problem):
    """A file or folder of the state is not what sparkinstall left there."""

    code = "state"


class Interrupted(Problem):
    """Ctrl-C or TERM."""

    code = "interrupted"
    exit_code = Exit.INTERRUPTED


_STORAGE = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again: it resumes"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, then run the same command again"),
    errno.EROFS: ("the file system is read-only", "mount it writable, then run the same command again"),
    errno.EACCES: ("permission denied", "run as a user who may use sudo, or choose a folder of your own"),
    errno.EPERM: ("not permitted", "run as a user who may use sudo, or choose a folder of your own"),
    errno.EFBIG: ("the file would be larger than you may write", "`ulimit -f` shows the limit; raise it"),
    errno.EMFILE: ("too many open files", "raise the limit: `ulimit -n 1024`"),
    errno.EIO: ("the disk reports an I/O error", "see `dmesg`: the disk may be failing"),
}


def storage_problem(error: OSError, doing: str, hint: str = "") -> Storage:
    """Turn an OSError into a `Storage` problem.

    Args:
        doing: the action ("writing /etc/x").
        hint: what to do whatever the cause, such as to name another file.
    """
    why, usual = _storage_cause(error)
    named = _named(error)
    where = f" ({named})" if named and named not in doing else ""
    return Storage(f"{doing} failed: {why}{where}", hint=hint or usual)


def _named(error: OSError) -> str:
    # Of two names the second is the one that was to be created.
    path = error.filename2 or error.filename
    return path if isinstance(path, str) else ""


def _storage_cause(error: OSError) -> tuple[str, str]:
    why, hint = _STORAGE.get(error.errno or 0, (error.strerror or str(error), ""))
    path = _named(error)
    if error.errno == errno.ENOSPC and path and causes.no_inode_left(path):
        why, hint = "no inode is left on the disk", f"{causes.DELETE}, {causes.AGAIN}"
    elif error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() == 0:
        hint = "root itself may not do that: see `lsattr`, the mount options, and the rights of this container"
    return why, hint


@contextmanager
def storage_errors(doing: str, but: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Turn an OSError within the context into a `Storage` problem; `but` passes through."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise storage_problem(error, doing) from error
