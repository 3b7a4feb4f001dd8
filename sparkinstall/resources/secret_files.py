"""Files whose content is a secret that a unit gets as a credential of systemd: the API's key, the hub's token.

Their content appears in no argument, log, plan, record or error. They are not read to be checked, so that a check needs
no root.
"""

import os
import secrets

from msgspec import Struct

from sparkinstall.resources import Conflict, Drift, NodeOnly, Ok, State
from sparkinstall.system import Entry, Reader, System

MODE = 0o600
_OTHERS = 0o077
_HEX_DIGITS = 32


class NamedSecret(Struct, frozen=True):
    """A file that the user has made, which only its owner may read; it is never changed. `setting` names it."""

    path: str
    setting: str

    @property
    def key(self) -> str:
        return f"secret:{self.path}"

    def check(self, on: Reader) -> State:
        try:
            entry = on.entry(self.path)
        except PermissionError:
            return Conflict(f"{self._named} is in a folder that you may not enter", "put it into a folder such as /etc")
        if entry is None:
            if on.rehearsal:
                return NodeOnly(f"looking at {self._named}")
            return Conflict(f"{self._named} does not exist", _making(self.path))
        if entry.kind == "file" and entry.size == 0:
            return Conflict(f"{self._named} is empty", _making(self.path))
        return _readable_by_others(self._named, self.path, entry) or Ok(f"{entry.mode:04o}")

    @property
    def _named(self) -> str:
        return f"{self.path}, which `{self.setting}` names,"

    def apply(self, on: System) -> None:
        del on
        raise AssertionError(f"{self.path} is the user's")


def _making(path: str) -> str:
    return f"write it so that only root reads it: `sudo install -m 600 /dev/stdin {path}`"


def _readable_by_others(named: str, path: str, entry: Entry) -> Conflict | None:
    if entry.kind != "file":
        return Conflict(f"{named} is {entry.words}", "it must be a file of its own: move that away")
    if entry.mode & _OTHERS:
        return Conflict(f"others than its owner may read {named} (mode {entry.mode:04o})", f"`sudo chmod 600 {path}`")
    return None


class ApiKey(Struct, frozen=True):
    """The key of an API that a network may use, made at random. Its owner is root. One that is there is kept."""

    path: str

    @property
    def key(self) -> str:
        return f"secret:{self.path}"

    def check(self, on: Reader) -> State:
        entry = on.entry(self.path)
        if entry is None or (entry.kind == "file" and entry.size == 0):
            return Drift(f"make a key of 256 bits for the API, {self.path}")
        if conflict := _readable_by_others(self.path, self.path, entry):
            return conflict
        if entry.uid != (os.geteuid() if on.rehearsal else 0):
            return Conflict(f"{self.path} does not belong to root", f"`sudo chown root: {self.path}`")
        return Ok("0600")

    def apply(self, on: System) -> None:
        on.write(self.path, f"{secrets.token_hex(_HEX_DIGITS)}\n".encode(), MODE)
