"""Why a program failed, from what was observed: its exit code, its own words, and the space left where it writes."""

import os
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from msgspec import Struct

Kind = Literal[
    "full", "read-only", "sudo", "systemd", "missing", "certificate", "server", "damaged", "key", "cache", "network",
    "limit", "busy", "permission",
    "killed", "late",
]  # fmt: skip


class Cause(Struct, frozen=True):
    """`why` states what was observed, and `hint` what to do about it."""

    kind: Kind
    why: str
    hint: str


class _Failure(NamedTuple):
    argv: Sequence[str]
    code: int
    lines: list[str]
    places: Sequence[str]

    @property
    def program(self) -> str:
        return program_of(self.argv)

    @property
    def by_sudo(self) -> bool:
        return self.argv[:1] == ("sudo",)

    def line_with(self, words: str) -> str:
        """The last line in which the program says `words` (a pattern), or ""."""
        return next((line[-300:] for line in reversed(self.lines) if re.search(words, line)), "")


AGAIN = "then run the same command again"
DELETE = "delete files (`df -i` counts them)"
BOOTED = "/run/systemd/system"
"""The folder that exists where systemd is PID 1 (sd_booted(3))."""

# Patterns are text: re compiles one when it is first used, and a run in which nothing fails uses none.
_ROOM = 64 * 1024
_WRAPPERS = ("sudo", "env", "timeout", "unshare", "nsenter", "setsid", "nice")
_OPTION = r"(?s)-.*|\w+=.*|[\d.]+[smhd]?"
_WITH_VALUE = ("-u", "-g", "-C")
_PATH = r"(?<![\w./])/[\w.@+/-]+"
# The kernel also counts watches of files so.
_FULL = r"(?i)^(?!.*watch).*(No space left on device|Disk quota exceeded|have enough free space)"
_READ_ONLY = r"(?i)Read-only file system"
_DENIED = r"(?i)Permission denied|Operation not permitted|Access denied"
_BUSY = r"(?i)Could not get lock|locked by another process"
_NO_SYSTEMD = r"not been booted with systemd|Failed to connect to .*bus\b|(systemctl|systemd-run): (command )?not found"
_NOT_FOUND = r"^sudo: .*: command not found$|^sudo: '?[\w./-]+'?: No such file"
_REFUSED = (
    r"^sudo: .*(password|terminal|tty\b|authentic|allowed|permitted|account|privileges|sudoers|setuid|uid 0)"
    r"|^Sorry, user .* (not allowed|may not)|is not (allowed to|in the sudoers)|may not run sudo|afraid I can't do that"
)
_ASKS = r"password|terminal|tty\b|authentication is required"
_FETCHING = ("apt-get", "uv", "pip", "git", "curl", "wget")
_NOT_TRUSTED = r"(?i)certificate|\bis not valid yet \(invalid for|\bis expired \(invalid since"
_STATUS = r"(?!407)[45]\d\d"
_SERVER_REFUSED = (
    r"(?i)"
    rf"(?:HTTP (?:status (?:client|server) error \(|error )|returned error: |ERROR |Failed to fetch \S+ +)({_STATUS})\b"
    rf"|(?<![\d.])({_STATUS}) (?:(?:Client|Server) Error\b| *[A-Z][a-z][\w ]*\[IP:)"
    r"|repository .*not found|Authentication failed for|could not read Username"
)
_DAMAGED = (
    r"(?i)"
    r"Hash mismatch for|Hash Sum mismatch|File has unexpected size|DO NOT MATCH THE HASHES|early EOF|index-pack failed"
)
_NO_KEY = r"NO_PUBKEY|EXPKEYSIG|KEYEXPIRED|REVKEYSIG|is not signed\b"
_NO_CACHE = r"Failed to initialize cache at `([^`]+)`"
_IN_THE_WAY = r"File exists|Not a directory|Is a directory"
_LIMITED = r"(?i)Cannot allocate memory|memory exhausted|Too many open files|fork\b.*Resource temporarily unavailable"
_NO_NETWORK = (
    r"(?i)"
    # sudo warns of a hostname without an address, and goes on.
    r"^(?!sudo: ).*(Could not (resolve|connect)|Temporary failure|Name or service not known|Network is unreachable"
    r"|No route to host|Connection (refused|reset|timed out|closed)|Unable to connect|unable to access|dns error"
    r"|error sending request|timed out|407.*(proxy|CONNECT)|proxy authorization)"
)


def program_of(argv: Sequence[str]) -> str:
    """Return the name of the program that a command is about, without `sudo`, `env`, `timeout` or a shell around it."""
    words = list(argv)
    while words:
        name = PurePosixPath(words.pop(0)).name
        if name in _WRAPPERS:
            while words and re.fullmatch(_OPTION, words[0]):
                del words[: 2 if words[0] in _WITH_VALUE else 1]
        elif name in ("sh", "bash", "dash") and words and re.fullmatch(r"-\w*c", words[0]):
            # The text comes next, then the name that its author gave it.
            inner = words[2:3] or words[1].split()[:1]
            return PurePosixPath(inner[0]).name if inner else name
        elif re.fullmatch(r"python[\d.]*", name) and words[:2] == ["-m", "pip"]:
            return "pip"
        else:
            return name
    return PurePosixPath(argv[0]).name if argv else ""


def cause_of(argv: Sequence[str], code: int, said: str, places: Iterable[str] = ()) -> Cause | None:
    """Return why a program failed, or None if nothing that was observed tells.

    Args:
        argv: the command, with `sudo` if it was used.
        code: its exit code; 127: not found, 124: too late, negative: killed by that signal.
        said: what it printed, in English.
        places: folders of this machine in which it writes.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    failure = _Failure(tuple(argv), code, lines, tuple(places))
    return next((cause for look in _LOOKS if (cause := look(failure))), None)


def _killed(failure: _Failure) -> Cause | None:
    if failure.code == 124:
        return Cause("late", "it did not end in time and was stopped", f"see its log for where it stopped, {AGAIN}")
    # A shell and sudo add 128 to the number of the signal.
    number = -failure.code if failure.code < 0 else failure.code - 128
    if number not in (signal.SIGKILL, signal.SIGTERM):
        return None
    why = f"it was killed by {signal.Signals(number).name}"
    return Cause("killed", why, f"see `journalctl -k` for a lack of memory, {AGAIN}")


def _full(failure: _Failure) -> Cause | None:
    line, hint = failure.line_with(_FULL), f"free some space, {AGAIN}: it resumes"
    places = (*failure.places, *(path.rstrip("./") for path in re.findall(_PATH, line)))
    for place in places:
        if no_inode_left(place):
            return Cause("full", f"no inode is left on the disk of {place}", f"{DELETE}, {AGAIN}")
        if (disk := _disk_of(place)) and disk.f_blocks and (left := disk.f_bfree * disk.f_frsize) < _ROOM:
            return Cause("full", f"the disk is full: {place} has {left // 1024} KiB left", hint)
    return Cause("full", f"the disk is full: {line}", hint) if line else None


def _disk_of(place: str) -> os.statvfs_result | None:
    """Return the file system that holds a path or would hold it."""
    place = os.path.abspath(place)
    while place != "/" and not os.path.lexists(place):
        place = os.path.dirname(place)
    try:
        return os.statvfs(place)
    except OSError:
        return None


def no_inode_left(place: str) -> bool:
    """Return whether the file system of a path can hold no more files, whatever their size."""
    disk = _disk_of(place)
    return disk is not None and disk.f_files > 0 and disk.f_ffree == 0


def _read_only(failure: _Failure) -> Cause | None:
    line, hint = failure.line_with(_READ_ONLY), f"mount it writable, {AGAIN}"
    for place in failure.places:
        if (disk := _disk_of(place)) and disk.f_flag & os.ST_RDONLY:
            return Cause("read-only", f"the file system of {place} is read-only", hint)
    return Cause("read-only", f"the file system is read-only: {line}", hint) if line else None


def _refused_by_sudo(failure: _Failure) -> Cause | None:
    line = failure.line_with(_REFUSED) if failure.by_sudo else ""
    if not line or failure.line_with(_NOT_FOUND):
        return None
    # sudo's rules are about the word that follows it, which may be `sh` or `env`.
    asked = next((word for word in failure.argv[1:] if not word.startswith("-")), "")
    reason = "" if PurePosixPath(asked).name == failure.program else f" for `{failure.program}`"
    allow = f"let this user run `{asked}` with sudo{reason} (`sudo visudo`)"
    hint = f"{allow}, {AGAIN}"
    if re.search(_ASKS, line):
        hint = f"run `sudo -v` in this terminal, {AGAIN}; or {allow} without a password"
    return Cause("sudo", f"sudo refused it: {line}", hint)


def _no_systemd(failure: _Failure) -> Cause | None:
    line = failure.line_with(_NO_SYSTEMD)
    if not line and not (failure.code == 127 and failure.program in ("systemctl", "systemd-run")):
        return None
    why, hint = "systemd does not answer", f"see `systemctl status`; if that fails too, reboot, {AGAIN}"
    if not os.path.isdir(BOOTED):
        why = f"systemd does not run here ({BOOTED} does not exist)"
        hint = f"boot this machine with systemd as PID 1, {AGAIN}"
    return Cause("systemd", f"{why}: {line}" if line else why, hint)


def _not_installed(failure: _Failure) -> Cause | None:
    if failure.code != 127 and not (failure.by_sudo and failure.line_with(_NOT_FOUND)):
        return None
    return Cause("missing", f"`{failure.program}` was not found", f"install `{failure.program}`, {AGAIN}")


def _in_words(failure: _Failure) -> Cause | None:
    """What only the program itself can tell."""
    if line := failure.line_with(_BUSY):
        hint = f"wait until the other program has ended (often unattended-upgrades), {AGAIN}"
        return Cause("busy", f"another program holds a lock: {line}", hint)
    if failure.program in _FETCHING and (line := failure.line_with(_NOT_TRUSTED)):
        proxy = "behind a proxy, add its certificate to the system's (`sudo update-ca-certificates`)"
        hint = f"check the clock (`date`); {proxy}; {AGAIN}"
        return Cause("certificate", f"what a server sent is not trusted: {line}", hint)
    if failure.program in _FETCHING and (cause := _from_a_server(failure)):
        return cause
    if line := failure.line_with(_LIMITED):
        return Cause("limit", line, f"`free -h` and `ulimit -a` show what there is too little of; change it, {AGAIN}")
    if failure.program in _FETCHING and (line := failure.line_with(_NO_NETWORK)):
        hint = f"check this node's network, name server and proxy, {AGAIN}"
        return Cause("network", f"it could not reach a server: {line}", hint)
    if line := failure.line_with(_DENIED):
        hint = f"check the owner and mode of what it names, and what this user or container may do, {AGAIN}"
        return Cause("permission", line, hint)
    found = re.search(_NO_CACHE, line := failure.line_with(_NO_CACHE))
    if found and failure.line_with(_IN_THE_WAY):
        return Cause(
            "cache", f"{line}: a file is in the way", f"it contains only downloads: `rm -r {found[1]}`, {AGAIN}"
        )
    return None


def _from_a_server(failure: _Failure) -> Cause | None:
    """What a server that was reached refused, or sent."""
    if line := failure.line_with(_NO_KEY):
        hint = f"install the key that the source's vendor publishes, or remove the source from /etc/apt, {AGAIN}"
        return Cause("key", f"the signature of a source cannot be checked: {line}", hint)
    if line := failure.line_with(_DAMAGED):
        clean = "empty its cache (`sudo apt-get clean`), " if failure.program == "apt-get" else ""
        hint = f"it was not used. {clean}check the proxy or mirror between, {AGAIN}; if it remains, report it"
        return Cause("damaged", f"what a server sent is damaged, or not what was asked for: {line}", hint)
    if line := failure.line_with(_SERVER_REFUSED):
        return Cause("server", f"a server refused it: {line}", f"{_about_status(failure, line)}, {AGAIN}")
    return None


def _about_status(failure: _Failure, line: str) -> str:
    found = re.search(_SERVER_REFUSED, line)
    status = (found[1] or found[2] or "") if found else ""
    if status == "429" or status.startswith("5"):
        return "it is busy or down: wait a few minutes"
    if status in ("401", "403"):
        return "check what the proxy or mirror lets this node fetch, and whether it needs a login"
    if failure.program == "apt-get":
        return "its lists are old (`sudo apt-get update`), or the source in /etc/apt is wrong"
    return "check the address, and the index or mirror that this node is to use"


# A refusal comes first, since the program did not run; what is certain before what is only likely.
_LOOKS: tuple[Callable[[_Failure], Cause | None], ...] = (
    _refused_by_sudo, _no_systemd, _not_installed, _full, _read_only, _in_words, _killed,
)  # fmt: skip
