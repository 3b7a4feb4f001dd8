"""What the user names: files and folders of this machine, and the home folder. Nothing here waits or reads for ever."""

import errno
import io
import os
import pwd
import select
import stat
import sys
import time
from pathlib import Path

from sparkinstall.errors import BadUsage, Problem
from sparkinstall.schema import show

PATIENCE = 10.0
"""Seconds until a pipe must have been written."""


def absolute(path: str | Path, option: str, error: type[Problem] = BadUsage, *, hidden: bool = False) -> Path:
    """Return the absolute path of a file or folder that `option` names; it may be missing.

    Args:
        hidden: it may also be in a folder that this user must not enter.

    Raises:
        error: the path cannot be used: an unknown user, a folder that is gone, a circle of links, too long a name.
    """
    text = str(path)
    try:
        if text.startswith("~"):
            text = str(home()) + text[1:] if text[1:2] in ("", "/") else os.path.expanduser(text)
            if text.startswith("~"):
                raise ValueError(f"there is no user {show(text[1:].partition('/')[0])}")
        whole = os.path.join("" if text.startswith("/") else _current_folder(), text)
        os.stat(whole)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as found:
        # What is given for a token's file may be the token itself.
        shown = "" if option == "--token-file" else f" {path}"
        if hidden and isinstance(found, PermissionError):
            return Path(whole)
        why = getattr(found, "strerror", None) or found
        raise error(f"{option}{shown} cannot be used: {why}", hint="name another path") from found
    return Path(whole)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise ValueError("it is a relative path, and the folder that you are in is gone") from error


def user() -> str:
    """Return the user's name, or number if no name is known."""
    entry = _passwd()
    return entry.pw_name if entry else str(os.geteuid())


def _passwd() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.geteuid())
    except KeyError:
        return None


def home() -> Path:
    """Return the user's home folder.

    Raises:
        BadUsage: there is none.
    """
    entry = _passwd()
    found = os.environ.get("HOME") or (entry.pw_dir if entry else "")
    if not found.startswith("/"):
        why = f"HOME is {show(found)}" if found else f"HOME is not set, and /etc/passwd has no user {os.geteuid()}"
        raise BadUsage(f"you have no home folder: {why}", hint="set it to a folder of yours: `export HOME=/...`")
    return Path(found)


def lasts(path: str) -> bool:
    """Whether a later run can read the file again: not a pipe, a terminal, or a file that was deleted."""
    return path == os.devnull or os.path.isfile(os.path.realpath(path))


def read(path: str | Path, most: int) -> bytes:
    """Return the content of a file, or its first `most` + 1 bytes, which tell that it is too large.

    Raises:
        OSError: it cannot be read, or is a pipe into which nothing is written.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        return _read(handle, most, PATIENCE)
    finally:
        os.close(handle)


def read_stdin(most: int, seconds: float) -> bytes:
    """Return what stdin contains, as `read` does.

    Raises:
        OSError: stdin is closed, or nothing comes.
    """
    try:
        handle = sys.stdin.fileno()
    except io.UnsupportedOperation:
        return sys.stdin.buffer.read(most + 1)
    return _read(handle, most, seconds)


def _read(handle: int, most: int, seconds: float) -> bytes:
    content, until, ready = b"", time.monotonic() + seconds, select.poll()
    ready.register(handle, select.POLLIN)
    while len(content) <= most:
        if not ready.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, f"it has no end within {seconds:g} seconds")
        try:
            data = os.read(handle, most + 1 - len(content))
        except BlockingIOError:
            continue
        if not data:
            break
        content += data
    return content
