"""The user's cache: what it contains and who needs it, whether it is intact, and how to make it smaller."""

import os
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from sparkinstall import schema, stacks
from sparkinstall.core.session import Session
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import storage_errors
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, Stamp
from sparkinstall.resources.nccl_source import mirror_name, tarball_name
from sparkinstall.resources.venv import wheelhouse
from sparkinstall.system import Reader
from sparkinstall.system.locks import cache_unused

Kind = Literal[
    "wheel", "source", "build", "incomplete", "index", "python", "tool", "tests", "debian", "plan", "former", "other"
]  # fmt: skip

_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")
_WRITER = re.compile(r"[-.](\d+)(?:\.new)?$")
_FOLDERS: Mapping[str, Kind] = {
    "index": "index", "python": "python", "nccl-tests": "tests", "apt": "debian",
    "debs": "debian", "plans": "plan", "uv": "former", "hashes": "former", "arriving.lock": "former",
}  # fmt: skip
_MAY_GO = ("wheel", "source", "build", "incomplete", "plan", "former")


class Entry(Struct, frozen=True):
    """A file or folder of the cache: its path below it, its bytes, and the stacks and environments that need it."""

    path: str
    kind: Kind
    size: int
    needed_by: tuple[str, ...] = ()

    @property
    def is_needless(self) -> bool:
        """Whether `prune` removes it."""
        return self.kind in _MAY_GO and not self.needed_by


class CacheList(Struct, frozen=True):
    """Result of `cache list`."""

    folder: str
    size: int
    entries: Sequence[Entry]


class CacheVerified(Struct, frozen=True):
    """Result of `cache verify`: how many files were read, and which were damaged and are removed."""

    checked: int
    damaged: Sequence[str]


class CachePruned(Struct, frozen=True):
    """Result of `cache prune`: what was removed, and how many bytes that were."""

    removed: Sequence[str]
    freed: int


def listed(session: Session) -> CacheList:
    """Return what is in the cache.

    Raises:
        Storage: the cache cannot be read.
    """
    node = session.node
    with storage_errors(f"reading {node.cache}"):
        entries = sorted(_entries(node, session.system), key=lambda each: each.path) if node.cache.is_dir() else []
    return CacheList(str(node.cache), sum(each.size for each in entries), entries)


def _entries(node: Node, on: Reader) -> Iterator[Entry]:
    for path in node.cache.iterdir():
        if path.name == "wheels":
            yield from _wheels(node, on)
        elif path.name == "nccl":
            yield from _nccl(node)
        elif path.name == "arriving":
            yield from (_incomplete(node, each) for each in path.iterdir())
        elif path.name == "own-packages":
            for each in path.iterdir():
                yield _incomplete(node, each) if each.suffix == ".new" else _entry(node, each, "tool")
        else:
            kind = "former" if path.name.startswith("lock-") else _FOLDERS.get(path.name, "other")
            yield _entry(node, path, kind)


def _entry(node: Node, path: Path, kind: Kind, needed_by: Iterable[str] = ()) -> Entry:
    return Entry(str(path.relative_to(node.cache)), kind, _size(path), tuple(needed_by))


def _incomplete(node: Node, path: Path) -> Entry:
    """What is not complete yet; its name ends with the id of the process that writes it."""
    writer = _WRITER.search(path.name)
    lives = writer is not None and Path("/proc", writer[1]).exists()
    return _entry(node, path, "incomplete", ("a run in progress",) if lives else ())


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all below a folder; another run may remove some meanwhile."""
    size, walked = 0, os.walk(path) if path.is_dir() and not path.is_symlink() else [("", [], [str(path)])]
    for above, folders, names in walked:
        for name in (*folders, *names):
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(above, name))
                size += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return size


def _wheels(node: Node, on: Reader) -> Iterator[Entry]:
    house, needed = wheelhouse(node), _needed(node, on)
    index = house.listed()
    for path in house.folder.iterdir():
        if path.suffix == ".whl":
            digest = index[path.name].sha256 if path.name in index else sha256_of(path)
            yield _entry(node, path, "wheel", sorted(needed.get(digest, ())))
        elif path == house.arriving:
            yield from (_entry(node, each, "incomplete") for each in path.iterdir())


def _needed(node: Node, on: Reader) -> Mapping[str, set[str]]:
    """Return who needs a wheel, by its sha256: the shipped stacks, this node's own, and installed environments."""
    needed: dict[str, set[str]] = defaultdict(set)
    for stack in (*map(stacks.load, stacks.names()), node.stack):
        for platform in stack.platforms.values():
            text = platform.lock_text() if platform.lock else platform.open_text()
            for digest in _SHA256.findall(text):
                needed[digest].add(stack.name)
    locks = [f"{node.prefix}/locks/{name}" for name in on.names(f"{node.prefix}/locks")]
    locks += [f"{node.venvs}/{name}/sparkinstall.lock" for name in on.names(node.venvs)]
    for lock in (*locks, node.venv_lock):
        for digest in _SHA256.findall((on.read(lock) or b"").decode(errors="replace")):
            needed[digest].add(f"installed below {on.real(node.prefix)}")
    return needed


def _nccl(node: Node) -> Iterator[Entry]:
    versions, mirrors = defaultdict(set), defaultdict(set)
    for stack in (*map(stacks.load, stacks.names()), node.stack):
        versions[stack.nccl.version].add(stack.name)
        mirrors[mirror_name(stack.nccl.tag)].add(stack.name)
    versions[node.nccl_version].add("this node's settings")
    mirrors[tarball_name(node.config.nccl.source)].add("this node's settings")
    for path in (node.cache / "nccl").iterdir():
        if path.name == "built":
            for build in path.iterdir():
                yield _entry(node, build, "build", sorted(versions.get(_version_of(build), ())))
        elif path.name == "arriving" or path.suffix in (".part", ".new"):
            yield _entry(node, path, "incomplete")
        elif path.suffix in (".git", ".tar"):
            yield _entry(node, path, "source", sorted(mirrors.get(path.name, ())))
        else:
            yield _entry(node, path, "other")


def _stamp_of(build: Path) -> Stamp | None:
    try:
        return schema.read_json(Stamp, read_regular(build / KEPT_STAMP), KEPT_STAMP)
    except (OSError, schema.Malformed):
        return None


def _version_of(build: Path) -> str:
    stamp = _stamp_of(build)
    return stamp.recipe.version if stamp else ""


def verify(session: Session) -> CacheVerified:
    """Read every wheel and every built NCCL, compare its hash, and remove what is damaged.

    Raises:
        Storage: the cache cannot be read or changed.
    """
    node = session.node
    if not node.cache.is_dir():
        return CacheVerified(0, ())
    house = wheelhouse(node)
    damaged = house.damaged()
    house.drop(damaged)
    house.refresh()
    with storage_errors(f"reading {node.cache}"):
        builds = list(node.cache.glob("nccl/built/*"))
        broken = [each for each in builds if not _is_whole(each)]
        for each in broken:
            shutil.rmtree(each)
    names = [*(f"wheels/{name}" for name in damaged), *(str(each.relative_to(node.cache)) for each in broken)]
    return CacheVerified(len(house.listed()) + len(damaged) + len(builds), names)


def _is_whole(build: Path) -> bool:
    stamp = _stamp_of(build)
    try:
        return stamp is not None and sha256_of(build / KEPT_LIBRARY) == stamp.sha256
    except FileNotFoundError:
        return False


def prune(session: Session, agree: Callable[[Sequence[Entry]], None], everything: bool) -> CachePruned:
    """Remove what no stack and no environment needs, incomplete downloads, and what earlier versions left.

    Args:
        agree: is given the entries before anything is removed; raises if they are to stay.
        everything: remove all of the cache.

    Raises:
        Busy: a run holds the lock of this node, or one of another node uses the cache.
        Storage: something cannot be removed.
    """
    node = session.node
    going = [each for each in listed(session).entries if everything or each.is_needless]
    session.state.require_free()
    with cache_unused(node.cache):
        pass
    if going:
        agree(going)
        with cache_unused(node.cache), storage_errors(f"removing from {node.cache}"):
            _remove(node, going)
    return CachePruned([each.path for each in going], sum(each.size for each in going))


def _remove(node: Node, going: Sequence[Entry]) -> None:
    with wheelhouse(node).filling():
        wheelhouse(node).drop(Path(each.path).name for each in going if each.kind == "wheel")
        for path in (node.cache / each.path for each in going if each.kind != "wheel"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
