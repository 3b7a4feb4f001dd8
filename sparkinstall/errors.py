"""What a user is told when something goes wrong: what happened, why, and what to do."""

import errno
from collections.abc import Sequence
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every verb (docs/exit-codes.md)."""

    GOOD = 0
    FAILED = 1
    USAGE = 2
    DRIFT = 3
    PREFLIGHT = 4
    SOME_NODES = 5
    INTERRUPTED = 130


class Problem(Exception):
    """Something a person can act on. `code` is stable and part of the JSON output."""

    code = "failed"
    exit_code = Exit.FAILED

    def __init__(
        self, message: str, *, cause: str = "", hint: str = "", log: str = "", output: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message, self.cause, self.hint, self.log, self.output = message, cause, hint, log, tuple(output)


class BadConfig(Problem):
    """The config file, an option or a stack cannot be used as it is written."""

    code = "config"
    exit_code = Exit.USAGE


class NotThere(Problem):
    """There is nothing to look at: this node or rehearsal was never set up."""

    code = "not-there"
    exit_code = Exit.DRIFT


class BadUsage(Problem):
    """The command line asks for something that cannot be."""

    code = "usage"
    exit_code = Exit.USAGE


class PreflightFailed(Problem):
    """The node is not ready; nothing was changed."""

    code = "preflight"
    exit_code = Exit.PREFLIGHT


class Busy(Problem):
    """Another run holds the node."""

    code = "busy"


class Storage(Problem):
    """A disk is full, read-only, or not ours to write to."""

    code = "storage"


class CommandFailed(Problem):
    """A program that a step ran ended with an error."""

    code = "command"


class Blocked(Problem):
    """A resource found something in its way that it will not overwrite."""

    code = "blocked"


class NeedsRoot(Problem):
    """Only root can tell, and sudo asks for a password that nobody was there to give."""

    code = "sudo"


class Unreachable(Problem):
    """Another node cannot be reached over ssh, or the connection was lost."""

    code = "unreachable"


class JournalDamaged(Problem):
    """The journal cannot be read, so nothing may be changed or undone."""

    code = "journal"


class Interrupted(Problem):
    """Ctrl-C or TERM."""

    code = "interrupted"
    exit_code = Exit.INTERRUPTED


_STORAGE = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again: it goes on"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, then run the same command again"),
    errno.EROFS: (
        "the file system is read-only",
        "mount it writable, or choose another place with `prefix:` in the config",
    ),
    errno.EACCES: ("permission denied", "run as a user who may use sudo, or choose a place of your own"),
    errno.EPERM: ("not permitted", "run as a user who may use sudo, or choose a place of your own"),
    errno.EIO: ("the disk answers with an error", "look at `dmesg`: the disk may be failing"),
}


def storage_problem(error: OSError, doing: str) -> Storage:
    """Put an operating-system error into words; `doing` is what was being done ("writing /etc/x")."""
    why, hint = _STORAGE.get(error.errno or 0, (error.strerror or str(error), ""))
    path = error.filename if isinstance(error.filename, str) else ""
    where = f" ({path})" if path and path not in doing else ""
    return Storage(f"{doing} failed: {why}{where}", hint=hint)
