"""Files of this machine that settings name and the nodes need: a custom stack, a tarball of NCCL's source."""

import os.path
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from sparkinstall import stacks
from sparkinstall.cluster import bootstrap
from sparkinstall.errors import BadConfig


class Upload(Struct, frozen=True):
    """`files` by their path below the folder of the upload; the first is the one that the setting names."""

    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        return bootstrap.digest_of(self.files)

    @property
    def place(self) -> str:
        """The path of the first file on a node."""
        return f"~/{bootstrap.UPLOADS}/{self.digest}/{next(iter(self.files))}"


def uploads(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[Upload, ...]]:
    """The settings with paths on the nodes, and the files to copy there.

    A path that does not exist here is not changed: it may be one of the nodes.

    Raises:
        BadConfig: the stack is invalid, its locks are not beside it, or a file cannot be read.
    """
    found = {name: files(settings[name]) for name, files in _KINDS.items() if os.path.isfile(settings.get(name) or "")}
    some = {name: Upload(files) for name, files in found.items() if files}
    return {**settings, **{name: each.place for name, each in some.items()}}, tuple(some.values())


def _stack(named: str) -> Mapping[str, bytes]:
    if named in stacks.names():
        return {}
    stack = stacks.load(named)
    own = _read(stack.source)
    locks = sorted({each.lock for each in stack.platforms.values() if each.lock})
    return {stack.source.name: own, **{_beside(lock, stack.source, own): _read(lock) for lock in locks}}


def _beside(lock: Path, source: Path, own: bytes) -> str:
    """The lock's path relative to the stack's file, where the stack finds it on the nodes too."""
    if not lock.is_relative_to(source.parent) or ".." in lock.parts or str(lock).encode() in own:
        raise BadConfig(
            f"the lock {lock} of the stack {source.name} cannot be copied to the nodes",
            hint="put it beside the stack's YAML file, and name it without a folder",
        )
    return str(lock.relative_to(source.parent))


def _tarball(named: str) -> Mapping[str, bytes]:
    # Without a folder it is a word such as `git`, not a path.
    return {Path(named).name: _read(Path(named))} if "/" in named else {}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadConfig(f"{error.filename} cannot be copied to the nodes: {error.strerror}") from error


# A folder of NCCL's source is not copied: it may contain a build of gigabytes.
_KINDS: Mapping[str, Callable[[str], Mapping[str, bytes]]] = {"stack": _stack, "nccl.source": _tarball}
