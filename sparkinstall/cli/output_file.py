"""The file that `--output` names: chosen before the work begins, and written at its end."""

import errno
import os
import sys
from pathlib import Path

from sparkinstall.cli.run_command import confirm
from sparkinstall.errors import BadUsage, Storage, storage_problem
from sparkinstall.given import absolute
from sparkinstall.system.local import replace_file


def choose(named: Path, ending: str, *, agreed: bool) -> Path:
    """Return the path of the file; an existing one is replaced only if the user agrees. `ending`: that of its name.

    Raises:
        BadUsage: the path cannot be a file, or exists and there is no terminal to ask on.
        Interrupted: the answer is no.
        Storage: this user may not write to the folder.
    """
    if str(named) == "-":
        raise BadUsage("--output - is not a file", hint=_name_it(ending))
    path = absolute(named, "--output")
    if not path.parent.is_dir():
        raise BadUsage(f"there is no folder {path.parent}", hint=f"create it first: mkdir -p {path.parent}")
    if os.path.lexists(path) and not path.is_file():
        raise BadUsage(f"{path} is not a file", hint=_name_it(ending))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, ending, PermissionError(errno.EACCES, "Permission denied"))
    if os.path.lexists(path):
        _agree_to_replace(path, ending, agreed)
    return path


def write(path: Path, ending: str, data: bytes, mode: int = 0o644) -> None:
    """Write the whole file or nothing.

    Raises:
        Storage: it cannot be written.
    """
    try:
        replace_file(str(path), data, mode)
    except OSError as error:
        raise _unwritable(path, ending, error) from error


def _agree_to_replace(path: Path, ending: str, agreed: bool) -> None:
    if not (agreed or sys.stdin.isatty()):
        way_out = f"add `--yes` to replace it, or name another file: `--output FILE{ending}`"
        raise BadUsage(f"{path} already exists", hint=way_out)
    confirm(f"{path} already exists. Replace it?", agreed=agreed, default=False)


def _name_it(ending: str) -> str:
    return f"name the file itself: `--output FILE{ending}`"


def _unwritable(path: Path, ending: str, error: OSError) -> Storage:
    # Without the error's file name: it is that of the temporary file.
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space, or choose another disk" if full else "choose a folder that you can write to"
    hint += f": `--output FILE{ending}`"
    return storage_problem(OSError(error.errno, error.strerror), f"writing {path}", hint)
