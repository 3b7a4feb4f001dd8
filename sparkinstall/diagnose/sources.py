"""The logs that can be diagnosed: files, stdin, and what the journal has of a unit."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from sparkinstall.diagnose.encodings import BLOCK, is_packed, text_of
from sparkinstall.errors import BadUsage, CommandFailed, NeedsRoot, storage_errors
from sparkinstall.given import absolute
from sparkinstall.system import processes
from sparkinstall.system.local import LocalReader

_PAUSE = 0.2
"""Seconds between two looks at a file that may grow."""

# systemd's message ids (sd-messages.h): unit starting, unit started, unit restart scheduled.
_STARTING, _STARTED = "7d4958e842da4a758f6c1cdc7b36dcc5", "39f53479d3a045ac8e11786248231fbf"
_AGAIN = "5eb03494b6584870a536b337290809b3"
_MARKS = 12
"""How many of these entries are read: more than two starts have."""
_HIDDEN = ("not seeing messages from", "insufficient permissions")
"""What journalctl prints if this user may not read all entries."""


class Log(Struct, frozen=True):
    """A log to read: its display name and an iterator over its blocks."""

    name: str
    pieces: Callable[[], Iterator[bytes]]


def file_log(name: str, follow: bool = False) -> Log:
    """Return the log in a file, also a packed one; `-` is stdin. With `follow` reading continues as the file grows.

    Raises:
        BadUsage: the file cannot be read.
    """
    if name == "-":
        return Log("stdin", lambda: text_of("stdin", _stdin()))
    path = absolute(name, "the log")
    if path.is_dir():
        raise BadUsage(f"{name} is a folder", hint="name one or more files: `sparkinstall diagnose DIR/*.log`")
    if _is_endless(path):
        raise BadUsage(f"{name} is a device", hint="name a file, a named pipe, or `-` for stdin")
    try:
        packed = _begins_packed(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadUsage(f"no such file: {name}", hint="`-` reads stdin; `--unit NAME` reads the journal") from error
    except PermissionError as error:
        raise BadUsage(f"you may not read {name}", hint=f"sudo cat {name} | sparkinstall diagnose -") from error
    source = _growing if follow and not packed else _whole
    return Log(name, lambda: text_of(name, source(path)))


def _is_endless(path: Path) -> bool:
    """Whether a path is a device, except a terminal and /dev/null."""
    try:
        mode, same = path.stat().st_mode, os.path.samefile(path, os.devnull)
    except OSError:
        return False
    return stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not same and not _is_terminal(path))


def _is_terminal(path: Path) -> bool:
    return os.path.realpath(path).startswith(("/dev/pts/", "/dev/tty"))


def _begins_packed(path: Path) -> bool:
    if not stat.S_ISREG(path.stat().st_mode):
        # What is read of a pipe is gone.
        return False
    with path.open("rb") as file:
        return is_packed(file.read(16))


def unit_log(unit: str, follow: bool = False, boot: bool = False) -> Log:
    """Return the journal of a unit, systemd's messages about it and the kernel's, since its last start or the `boot`.

    Raises:
        BadUsage: there is no such unit.
        NeedsRoot: this user may not read the journal.
    """
    unit = unit if "." in unit else f"{unit}.service"
    known = LocalReader().ask("systemctl", "show", "--property=LoadState", "--value", "--", unit)
    if known.ok and known.out.strip() == "not-found":
        raise BadUsage(
            f"no such unit: {unit}",
            hint="sparkinstall's units are vllm, ray-head and ray-worker; `systemctl list-units` lists all units",
        )
    sudo = _sudo_prefix()
    start = start_to_read_from(_marks(unit, sudo))
    since = () if boot or start is None else (f"--since=@{start // 10**6}.{start % 10**6:06}",)
    return Log(unit, lambda: _journal(unit, sudo, since, follow))


def start_to_read_from(marks: Sequence[tuple[str, int]]) -> int | None:
    """Return when the unit's last start start, from systemd's message ids and their times in microseconds.

    If systemd restarted the unit, the reason is in the run before: return the beginning of that one.
    """
    last = _last_start(marks)
    if last and marks[last - 1][0] == _AGAIN:
        before = _last_start(marks[:last])
        last = last if before is None else before
    return None if last is None else marks[last][1]


def _last_start(marks: Sequence[tuple[str, int]]) -> int | None:
    """Return the index of the first entry of the last start: some types of units have one, others two."""
    last = max((at for at, (mark, _) in enumerate(marks) if mark != _AGAIN), default=None)
    if last and marks[last][0] == _STARTED and marks[last - 1][0] == _STARTING:
        return last - 1
    return last


def _whole(path: Path) -> Iterator[bytes]:
    with storage_errors(f"reading {path}"), path.open("rb", buffering=0) as file:
        while data := file.read(BLOCK):
            yield data


def _stdin() -> Iterator[bytes]:
    try:
        while data := os.read(sys.stdin.fileno(), BLOCK):
            yield data
    except OSError as error:
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise BadUsage(f"stdin cannot be read: {why}", hint="name a file, or pipe the log in") from error


def _growing(path: Path) -> Iterator[bytes]:
    """Yield the file's content, then what is appended, also after the file was replaced. Never ends."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb", buffering=0))
        while True:
            data = file.read(BLOCK)
            yield data
            if data:
                continue
            time.sleep(_PAUSE)
            if _was_replaced(path, file.fileno(), file.tell()):
                stack.close()
                file = stack.enter_context(path.open("rb", buffering=0))


def _was_replaced(path: Path, handle: int, at: int) -> bool:
    try:
        current = path.stat()
    except FileNotFoundError:
        return False
    return current.st_ino != os.fstat(handle).st_ino or current.st_size < at


def _marks(unit: str, sudo: Sequence[str]) -> list[tuple[str, int]]:
    """Return systemd's entries about the unit's starts since the boot: message id and time in microseconds."""
    wanted = (f"UNIT={unit}", *(f"MESSAGE_ID={each}" for each in (_STARTING, _STARTED, _AGAIN)))
    form = ("--no-pager", "--boot", "--output=json", "--output-fields=MESSAGE_ID", f"--lines={_MARKS}")
    answer = LocalReader().ask(*sudo, "journalctl", *form, *wanted)
    if any(words in answer.err for words in _HIDDEN):
        raise NeedsRoot(
            "you may not read the system journal",
            cause="it is readable by root and the group adm, and sudo needs a password",
            hint="`sudo -v`, then repeat the command; or permanently: `sudo usermod -aG adm $USER`, and log in again",
        )
    entries = [json.loads(line) for line in answer.out.splitlines() if line.startswith("{")]
    return [(str(each["MESSAGE_ID"]), int(each["__REALTIME_TIMESTAMP"])) for each in entries]


def _journal(unit: str, sudo: Sequence[str], since: Sequence[str], follow: bool) -> Iterator[bytes]:
    following = ("--follow", "--lines=all") if follow else ()
    plain = ("journalctl", "--quiet", "--no-pager", "--boot", "--output=short-iso", *since, *following)
    matches = (f"_SYSTEMD_UNIT={unit}", "+", f"UNIT={unit}", "+", "_TRANSPORT=kernel")
    argv = (*sudo, *plain, *matches)
    process = processes.start(argv, os.environ, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if process is None or process.stdout is None:
        raise CommandFailed("journalctl not found", hint="pass the log as a file, or through a pipe with `-`")
    try:
        while data := os.read(process.stdout.fileno(), BLOCK):
            yield data
        if process.wait():
            raise CommandFailed(f"`{' '.join(argv)}` failed", hint="run it by hand to see why")
    finally:
        processes.kill_group(process.pid)
        process.wait()
        processes.ended(process)


def _sudo_prefix() -> tuple[str, ...]:
    """Return the sudo prefix for journalctl, if sudo needs no password: a plain user sees only some entries."""
    reader = LocalReader()
    return reader.sudo if reader.sudo and reader.ask(*reader.sudo, "true").ok else ()
