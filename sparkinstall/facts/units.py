"""Properties and journal of a systemd unit, and what its owner added to it."""

import re
import shlex
from collections.abc import Iterator

from sparkinstall.facts.env_file import assignments
from sparkinstall.system import Reader

_SETTING = re.compile(r"\s*(Environment|EnvironmentFile)\s*=(.*)")
_FOR_ALL = 0o004


def show(on: Reader, unit: str, *properties: str) -> dict[str, str]:
    """Return the properties of a unit; "" for unknown ones."""
    answer = on.ask("systemctl", "show", unit, f"--property={','.join(properties)}")
    found = dict(line.split("=", 1) for line in answer.out.splitlines() if "=" in line)
    return {each: found.get(each, "") for each in properties}


def journal(on: Reader, *which: str, timeout: float = 30) -> str:
    """Return journalctl's output for the entries that `which` selects, or "".

    Reads as root if sudo needs no password, else what this user may read: members of `adm` may read all.
    """
    command = ("journalctl", *which, "-q", "--no-pager")
    answer = on.ask(*command, timeout=timeout, root=True)
    return answer.out if answer.ok else on.ask(*command, timeout=timeout).out


def own_variables(on: Reader, folder: str) -> list[str]:
    """Return the names of the variables that the files in a unit's drop-in folder set, such as `systemctl edit` writes.

    A file of variables that not everyone may read is left closed: it holds secrets.
    """
    found = (f"{folder}/{name}" for name in on.names(folder) if name.endswith(".conf"))
    return sorted({name for path in found if _is_open(on, path) for name in _set_by(on, path)})


def _set_by(on: Reader, path: str) -> Iterator[str]:
    text = (on.read(path) or b"").decode(errors="replace").replace("\\\n", " ")
    for kind, value in filter(None, (match and match.groups() for match in map(_SETTING.match, text.splitlines()))):
        if kind == "Environment":
            yield from (word.partition("=")[0] for word in _words(value) if "=" in word)
        elif _is_open(on, named := value.strip().removeprefix("-")):
            yield from assignments(on.read(named) or b"")


def _words(value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError:
        return value.split()


def _is_open(on: Reader, path: str) -> bool:
    entry = on.entry(path) if path.startswith("/") else None
    return entry is not None and entry.kind == "file" and bool(entry.mode & _FOR_ALL)
