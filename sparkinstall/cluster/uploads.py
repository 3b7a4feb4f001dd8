"""Files of this machine that settings name, carried to the nodes: a stack of one's own, a tarball of NCCL's source."""

import os.path
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparkinstall import stacks
from sparkinstall.cluster import bootstrap
from sparkinstall.errors import BadConfig


class Carried(Struct, frozen=True):
    """`files` by where they stand below a folder of their own; the first is the one that the setting names."""

    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        return bootstrap.digest_of(self.files)

    @property
    def place(self) -> str:
        """The path that a node is told."""
        return f"~/{bootstrap.CARRIED}/{self.digest}/{next(iter(self.files))}"


def carried(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[Carried, ...]]:
    """The settings as nodes are told them, and what has to be there for that.

    A path that leads to nothing here is left as it is: it may be meant for the nodes.

    Raises:
        BadConfig: the stack is none, its locks stand elsewhere than beside it, or a file cannot be read.
    """
    found = {name: files(settings[name]) for name, files in _KINDS.items() if os.path.isfile(settings.get(name) or "")}
    some = {name: Carried(files) for name, files in found.items() if files}
    return {**settings, **{name: each.place for name, each in some.items()}}, tuple(some.values())


def _stack(named: str) -> Mapping[str, bytes]:
    if named in stacks.names():
        return {}
    try:
        stack = stacks.load(named)
    except stacks.StackError as error:
        raise BadConfig(str(error)) from error
    own = _read(stack.source)
    locks = sorted({each.lock for each in stack.platforms.values() if each.lock})
    return {stack.source.name: own, **{_beside(lock, stack.source, own): _read(lock) for lock in locks}}


def _beside(lock: Path, source: Path, own: bytes) -> str:
    """Where the lock is from the stack's file, by which the stack finds it on the nodes too."""
    if not lock.is_relative_to(source.parent) or ".." in lock.parts or str(lock).encode() in own:
        raise BadConfig(
            f"the lock {lock} of the stack {source.name} cannot be carried to the nodes",
            hint="put it beside the stack's YAML file, and name it there without a folder",
        )
    return str(lock.relative_to(source.parent))


def _tarball(named: str) -> Mapping[str, bytes]:
    # Without a folder it is a word, such as `git`, and no path.
    return {Path(named).name: _read(Path(named))} if "/" in named else {}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadConfig(f"{error.filename} cannot be carried to the nodes: {error.strerror}") from error


# A folder as NCCL's source is not carried: a build may stand in it, of gigabytes.
_KINDS: Mapping[str, Callable[[str], Mapping[str, bytes]]] = {"stack": _stack, "nccl.source": _tarball}
