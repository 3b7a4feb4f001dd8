"""Copies of downloads and builds from the head to the workers: the stack's wheels in uv's cache, and NCCL.

Artifacts go from cache to cache, never into an installation: the worker's own steps install them from its cache, with
their own checks. A worker whose cache lacks them downloads and builds. So a failed copy is a warning, never a failure.

The terminal only introduces the nodes: over ssh it gives both of them a token, and the workers the digest of the head's
list.
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import UNSET, Struct, field

from sparkinstall import schema
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered, Reply, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode, repeated
from sparkinstall.cluster.transfer import CopyFailed, Listed, Receiver, Sender, receiving
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import Interrupted, Problem, storage_problem
from sparkinstall.facts.machine import cores
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Ok
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, NcclLibrary, Recipe, Stamp
from sparkinstall.resources.venv import environment_of, lock_of
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Reader

STEPS = ("environment", "nccl")
"""The steps whose artifacts can be copied."""

_ARCHIVE = re.compile(r"uv/archive-v\d+/[\w-]+")
_FILE = re.compile(rf"({_ARCHIVE.pattern})/.+")
_POINTER = re.compile(r"uv/wheels-v\d+/.+\.(?:http|rev|msgpack)")
_PAGE = re.compile(r"uv/simple-v\d+/.+\.rkyv")
_LIBRARY = re.compile(r"nccl/built/[0-9a-f]{12}/(?:libnccl\.so|build\.json)")
_STEM = re.compile(r"uv/wheels-v\d+/.+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARRIVING = "arriving"
_MODES = 0o755


class BuiltNccl(Struct, frozen=True):
    """The recipe of the head's library, and where its source is from."""

    recipe: Recipe
    where: str


class Manifest(Struct, frozen=True):
    """What a node offers. `wheels`: uv's name of each wheel, and the folder of its files; both relative to the cache.

    `of`: what must be equal on both nodes for the wheels to be usable.
    """

    of: Mapping[str, str]
    wheels: tuple[tuple[str, str], ...] = ()
    files: tuple[Listed, ...] = ()
    nccl: BuiltNccl | None = None


# --- what a node offers


def serve(node: Node, on: Reader, steps: Sequence[str], peers: Sequence[str], token: str) -> Offered:
    """Announce this node's artifacts of `steps`, and send them to each of `peers` (addresses on the link) that asks.

    Raises:
        CopyFailed: this node does not have its address on the link.
        Storage: an artifact cannot be read.
    """
    try:
        manifest, files = offer(node, on, steps)
    except OSError as error:
        raise storage_problem(error, "listing the artifacts") from error
    listing = msgspec.json.encode(manifest)
    sizes = [each.size for each in manifest.files]
    sender = Sender(node.address, frozenset(peers), token, listing, list(zip(files, sizes, strict=True)))
    with sender.listening() as listener:
        announce(Offer(listener.getsockname()[1], hashlib.sha256(listing).hexdigest()))
        sender.serve(listener)
    return Offered(len(files), sum(sizes), sender.sent)


def offer(node: Node, on: Reader, steps: Sequence[str]) -> tuple[Manifest, list[Path]]:
    """The artifacts that this node has of `steps`, and the real path of each file."""
    files: list[tuple[Listed, Path]] = []
    wheels: list[tuple[str, str]] = []
    built = None
    if "environment" in steps:
        wheels, files = _wheels(node, on)
    library = _nccl(node) if "nccl" in steps else None
    if library and isinstance(library.check(on), Ok) and (entries := _library(node, library, on)):
        built = BuiltNccl(library.recipe(), library.source.where)
        files += entries
    manifest = Manifest(likeness(node), tuple(wheels), tuple(listed for listed, _ in files), built)
    return manifest, [path for _, path in files]


def likeness(node: Node) -> dict[str, str]:
    """Return the values that must be equal for another node's wheels to be usable here."""
    wheels = node.wheels
    pins = wheels.lock_text() if wheels.lock else wheels.open_text()
    return {
        "machine": node.machine,
        "platform": node.platform,
        "Python": node.config.environment.python or node.stack.python,
        "stack": hashlib.sha256(pins.encode()).hexdigest()[:16],
        "uv": version("uv"),
    }


def _nccl(node: Node) -> NcclLibrary | None:
    return next((each for each in Nccl().resources(node) if isinstance(each, NcclLibrary)), None)


def _library(node: Node, library: NcclLibrary, on: Reader) -> list[tuple[Listed, Path]]:
    """The library and its stamp; nothing where the stamp does not match the library."""
    real, stamp = Path(on.real(library.library)), Path(on.real(f"{library.folder}/build.json"))
    folder = _relative(node, library.kept(library.recipe()))
    so, build = _listed(f"{folder}/{KEPT_LIBRARY}", real), _listed(f"{folder}/{KEPT_STAMP}", stamp)
    is_true = schema.read_json(Stamp, read_regular(stamp), str(stamp)).sha256 == so.sha256
    return [(so, real), (build, stamp)] if is_true else []


def _listed(path: str, real: Path) -> Listed:
    found = real.stat()
    return Listed(path, found.st_size, found.st_mode & _MODES, sha256_of(real))


def _wheels(node: Node, on: Reader) -> tuple[list[tuple[str, str]], list[tuple[Listed, Path]]]:
    """What uv needs to install the lock without a network: index pages, metadata and contents of the wheels."""
    uv = node.cache / "uv"
    pins = {pin.name: pin.version for pin in lock_of(node, on) or ()}
    stems, small = [], []
    for path in _named(uv.glob("wheels-v*"), pins):
        mine = [each for each in path.iterdir() if each.name.startswith(f"{pins[path.name]}-")]
        stems += [each for each in mine if each.is_symlink() and each.is_dir()]
        small += [each for each in mine if _POINTER.fullmatch(_relative(node, each))]
    for page in uv.glob("simple-v*/**/*.rkyv"):
        small += [page] if page.stem in pins else []
    archives = {each: archive for each in stems if (archive := _archive(uv, each))}
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        files = [each for some in pool.map(partial(_contents, node), sorted(set(archives.values()))) for each in some]
    files += [(_listed(_relative(node, each), each), each) for each in sorted(small)]
    return sorted((_relative(node, a), _relative(node, b)) for a, b in archives.items()), files


def _named(buckets: Iterator[Path], names: Mapping[str, str]) -> list[Path]:
    """uv's folders of these packages, at any depth: they are kept by index or by address."""
    found = []
    for bucket in buckets:
        for base, folders, _ in os.walk(bucket):
            found += [Path(base, each) for each in folders if each in names]
            folders[:] = [each for each in folders if each not in names]
    return found


def _archive(uv: Path, stem: Path) -> Path | None:
    """The folder of a wheel's contents, to which uv's name of the wheel is a link."""
    archive = uv.joinpath(*Path(os.readlink(stem)).parts[-2:])
    return archive if archive.is_dir() and archive.parent.parent == uv else None


def _relative(node: Node, path: Path) -> str:
    return str(path.relative_to(node.cache))


def _contents(node: Node, archive: Path) -> list[tuple[Listed, Path]]:
    """The files of an unpacked wheel. uv never changes them, so their hashes are computed once and kept."""
    record = node.cache / "hashes" / archive.name
    try:
        known = schema.read_json(list[Listed], read_regular(record), record.name)
    except (OSError, ValueError):
        prefix = _relative(node, archive)
        paths = sorted(Path(base, name) for base, _, names in os.walk(archive) for name in names)
        known = [_listed(f"{prefix}/{path.relative_to(archive)}", path) for path in paths]
        record.parent.mkdir(parents=True, exist_ok=True)
        waiting = record.with_name(f"{record.name}.{os.getpid()}.new")
        waiting.write_bytes(msgspec.json.encode(known))
        waiting.replace(record)
    return [(each, node.cache / each.path) for each in known]


# --- what a node fetches


def fetch(
    node: Node, on: Reader, steps: Sequence[str], head: Introduction, tell: Callable[[int, int], None]
) -> Fetched:
    """Fetch missing artifacts from the head; `tell` is called with the bytes that arrived and their total.

    Raises:
        CopyFailed: the head cannot be reached, or its list or a file is not what it announced. The next copy resumes
            with the files that arrived.
        Storage: the cache cannot be written.
    """
    with receiving(node.config.cluster.head, head.port, head.token, head.digest, node.address) as receiver:
        return _accept(node, on, receiver, steps, tell)


def understood(listing: bytes) -> Manifest:
    """The other node's list.

    Raises:
        CopyFailed: it is not a list, or a path in it does not belong into a cache.
    """
    try:
        manifest = msgspec.json.decode(listing, type=Manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CopyFailed("the other node's list of files cannot be read") from error
    _require_harmless(manifest)
    return manifest


def _require_harmless(manifest: Manifest) -> None:
    for each in manifest.files:
        known = any(_is_at(each.path, kind) for kind in (_FILE, _POINTER, _PAGE, _LIBRARY))
        if not known or each.size < 0 or each.mode & ~_MODES or not _SHA256.fullmatch(each.sha256):
            raise _misplaced(each.path)
    for stem, archive in manifest.wheels:
        if not _is_at(stem, _STEM) or not _is_at(archive, _ARCHIVE):
            raise _misplaced(stem)
    ends = [*(each.path for each in manifest.files), *(stem for stem, _ in manifest.wheels)]
    # A file below a file or a link would be written elsewhere.
    whole = set(ends)
    if len(whole) < len(ends) or any(not whole.isdisjoint(_folders(path)) for path in ends):
        raise CopyFailed("the other node offers a file twice, or one below another")


def _is_at(path: str, kind: re.Pattern[str]) -> bool:
    is_plain = path.isprintable() and not any(part in ("", ".", "..") for part in path.split("/"))
    return is_plain and kind.fullmatch(path) is not None


def _misplaced(path: str) -> CopyFailed:
    return CopyFailed(f"the other node offers {path!a}, which does not belong into a cache")


def _folders(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _accept(
    node: Node, on: Reader, receiver: Receiver, steps: Sequence[str], tell: Callable[[int, int], None]
) -> Fetched:
    manifest = understood(receiver.listing)
    try:
        with _alone(node.cache / _ARRIVING) as waiting:
            missing = _Missing(node, on, manifest, waiting)
            wanted = missing.of(steps)
            _require_room(node, wanted)
            receiver.take(wanted, waiting, tell)
            missing.place()
            shutil.rmtree(waiting, ignore_errors=True)
    except (BrokenPipeError, ConnectionError, TimeoutError):
        raise
    except OSError as error:
        raise storage_problem(error, "copying from another node") from error
    size = sum(each.size for _, each in wanted)
    return Fetched(bool(wanted), len(wanted), size, "; ".join(missing.reasons) or UNSET)


@contextmanager
def _alone(waiting: Path) -> Iterator[Path]:
    waiting.mkdir(parents=True, exist_ok=True)
    with open(waiting.with_name(f"{waiting.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CopyFailed("another copy to this node is running") from error
        yield waiting


def _require_room(node: Node, wanted: Sequence[tuple[int, Listed]]) -> None:
    needed, free = sum(each.size for _, each in wanted), shutil.disk_usage(node.cache).free
    if needed > free:
        raise CopyFailed(f"not enough space in {node.cache}: {needed >> 20} MiB needed, {free >> 20} MiB free")


class _Missing(Struct):
    """What this node needs of another node's `manifest` and does not have; it arrives in the folder `waiting`."""

    node: Node
    on: Reader
    manifest: Manifest
    waiting: Path
    reasons: list[str] = field(default_factory=list)
    _wheels: list[tuple[str, str]] = field(default_factory=list)
    _paths: list[str] = field(default_factory=list)

    def of(self, steps: Sequence[str]) -> list[tuple[int, Listed]]:
        """The files to copy, each with its index in the list."""
        mine: set[str] = set()
        if "environment" in steps and self._can_use_wheels():
            mine |= self._of_wheels()
        if "nccl" in steps and self._can_use_nccl():
            built = [each for each in self.manifest.files if _LIBRARY.fullmatch(each.path)]
            mine |= {each.path for each in built if not _is(self.node.cache / each.path, each)}
        listed = [(n, each) for n, each in enumerate(self.manifest.files) if each.path in mine]
        self._paths = [each.path for _, each in listed if not _FILE.fullmatch(each.path)]
        return [(n, each) for n, each in listed if not _is(self.waiting / each.path, each)]

    def _can_use_wheels(self) -> bool:
        if not self.manifest.wheels or isinstance(environment_of(self.node).check(self.on), Ok):
            return False
        own = likeness(self.node)
        different = [name for name in own if own[name] != self.manifest.of.get(name)]
        if different:
            self.reasons.append(f"wheels not copied: the nodes differ in {', '.join(different)}")
        return not different

    def _of_wheels(self) -> set[str]:
        self._wheels = [pair for pair in self.manifest.wheels if not (self.node.cache / pair[0]).is_dir()]
        archives = {archive for _, archive in self._wheels if not (self.node.cache / archive).is_dir()}
        stems = tuple(f"{stem}." for stem, _ in self._wheels)
        return {each.path for each in self.manifest.files if self._is_missing(each, archives, stems)}

    def _is_missing(self, listed: Listed, archives: set[str], stems: tuple[str, ...]) -> bool:
        within = _FILE.fullmatch(listed.path)
        if within:
            return within[1] in archives
        if _POINTER.fullmatch(listed.path):
            # Where uv has the wheel already, its record describes that copy.
            return listed.path.startswith(stems) or not (self.node.cache / listed.path).exists()
        return bool(_PAGE.fullmatch(listed.path)) and not _is(self.node.cache / listed.path, listed)

    def _can_use_nccl(self) -> bool:
        offered, library = self.manifest.nccl, _nccl(self.node)
        if offered is None or library is None or isinstance(library.check(self.on), Ok):
            return False
        if offered.where == library.source.where:
            library.source.hold_to(offered.recipe.source)
        own = library.recipe()
        different = [each for each in own.__struct_fields__ if getattr(own, each) != getattr(offered.recipe, each)]
        if different:
            self.reasons.append(f"NCCL not copied: the nodes differ in {', '.join(different)}")
        return not different

    def place(self) -> None:
        """Move received files to where uv and the NCCL step read them: contents first, links to them last."""
        cache = self.node.cache
        for archive in {archive for _, archive in self._wheels}:
            if (self.waiting / archive).is_dir() and not (cache / archive).is_dir():
                _move(self.waiting / archive, cache / archive, cache)
        for path in sorted(self._paths, key=lambda path: path.endswith(KEPT_STAMP)):
            _move(self.waiting / path, cache / path, cache)
        for stem, archive in self._wheels:
            _link(cache / stem, cache / archive, cache)


def _is(path: Path, listed: Listed) -> bool:
    """Whether the file exists with the listed size and hash."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != listed.size:
        return False
    return sha256_of(path) == listed.sha256


def _move(waiting: Path, to: Path, cache: Path) -> None:
    _make_room(to, cache)
    waiting.replace(to)


def _link(stem: Path, archive: Path, cache: Path) -> None:
    _make_room(stem, cache)
    waiting = stem.with_name(f".{stem.name}.{os.getpid()}.new")
    waiting.symlink_to(os.path.relpath(archive, stem.parent))
    waiting.replace(stem)


def _make_room(to: Path, cache: Path) -> None:
    """Make the parent folder. A link in its path must not lead out of the cache."""
    to.parent.mkdir(parents=True, exist_ok=True)
    top = cache / to.relative_to(cache).parts[0]
    if not to.parent.resolve().is_relative_to(top.resolve()):
        raise CopyFailed(f"{to.parent} leads out of the cache", hint="move that link away")


# --- at the terminal


class Secret(str):
    """32 random bytes in hex, which no `repr` shows."""

    def __new__(cls) -> "Secret":
        return super().__new__(cls, secrets.token_hex(32))

    def __repr__(self) -> str:
        return "Secret()"


class Handover(Struct):
    """Copies the artifacts of `steps` from the head to `workers`."""

    head: RemoteNode
    workers: Sequence[RemoteNode]
    steps: Sequence[str]
    _token: Secret = field(default_factory=Secret)
    _offer: Announcement[Offer] = field(default_factory=lambda: Announcement(Offer))

    def work(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        """Run this node's part. A failed copy is a warning: the node downloads and builds by itself."""
        try:
            return self._serve(on_line) if node is self.head else self._fetch(node, on_line)
        except Interrupted:
            raise
        except Problem as problem:
            return _warned(f"{problem.message}{f' ({problem.cause})' if problem.cause else ''}")
        finally:
            if node is self.head:
                self._offer.end()

    def _serve(self, on_line: OnLine) -> Reply[Offered | Fetched]:
        peers = [each.member.address for each in self.workers]
        argv = ("node", "offer", *peers, *self.head.words, *repeated("--only", self.steps))
        return _forgiven(self.head.call(Offered, *argv, on_line=self._offer.listen(on_line), stdin=self._token))

    def _fetch(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        found = self._offer.wait()
        if found is None:
            return _warned(f"{self.head.host} offers nothing: this node downloads and builds what is missing")
        argv = ("node", "fetch", *node.words, *repeated("--only", self.steps))
        head = Introduction(found.port, found.digest, str(self._token))
        return _forgiven(node.call(Fetched, *argv, on_line=on_line, stdin=msgspec.json.encode(head).decode()))


def _forgiven(reply: Reply[Offered | Fetched]) -> Reply[Offered | Fetched]:
    return _warned(reply.problems[0].message) if reply.problems else Reply(data=reply.data)


def _warned(why: str) -> Reply[Offered | Fetched]:
    return Reply(data=Fetched(warning=why))
