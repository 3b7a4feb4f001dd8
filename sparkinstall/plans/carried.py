"""Files of this machine that settings name, carried to the nodes: a stack of one's own, a tarball of NCCL's source."""

import hashlib
import os.path
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sparkinstall import stacks
from sparkinstall.errors import BadConfig
from sparkinstall.records import dataclass

FOLDER = ".local/share/sparkinstall/carried"
"""Below the home of the user on the node; in it a folder by the name of a digest is whole."""

Files = Mapping[str, Path]


@dataclass(frozen=True)
class Carried:
    """`files` by where they stand on the node, below a folder that `digest` names."""

    digest: str
    files: Files


def carried(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], Carried | None]:
    """The settings as nodes are told them, and what has to be there for that; None: nothing.

    A path that leads to nothing here is left as it is: it may be meant for the nodes.

    Raises:
        BadConfig: the stack is none, its locks stand elsewhere than beside it, or a file cannot be read.
    """
    named = {"stack": _stack(settings.get("stack")), "nccl.source": _tarball(settings.get("nccl.source"))}
    files = {name: path for each in named.values() for name, path in each.items()}
    if not files:
        return settings, None
    digest = _digest(files)
    there = {setting: f"~/{FOLDER}/{digest}/{next(iter(each))}" for setting, each in named.items() if each}
    return {**settings, **there}, Carried(digest, files)


def _stack(named: Any) -> Files:
    """The stack's own file first, then its locks."""
    if not named or named in stacks.names() or not os.path.isfile(named):
        return {}
    try:
        stack = stacks.load(str(named))
    except stacks.StackError as error:
        raise BadConfig(str(error)) from error
    locks = {each.lock for each in stack.platforms.values() if each.lock}
    return {f"stack/{_beside(path, stack)}": path for path in (stack.source, *sorted(locks))}


def _beside(path: Path, stack: stacks.Stack) -> PurePosixPath:
    folder = stack.source.parent
    if not path.is_relative_to(folder) or ".." in path.parts:
        raise BadConfig(
            f"the lock {path} of the stack {stack.source.name} cannot be carried to the nodes",
            mend="put it beside the stack's YAML file, and name it there without a folder",
        )
    return PurePosixPath(path.relative_to(folder))


def _tarball(named: Any) -> Files:
    """A folder is not carried: a build may stand in it, of gigabytes."""
    if not named or "/" not in str(named) or not os.path.isfile(named):
        return {}
    return {f"nccl/{Path(str(named)).name}": Path(str(named))}


def _digest(files: Files) -> str:
    try:
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in sorted(files.items())]
    except OSError as error:
        raise BadConfig(f"{error.filename} cannot be carried to the nodes: {error.strerror}") from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()
