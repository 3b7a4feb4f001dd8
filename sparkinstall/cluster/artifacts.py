"""Copies of downloads and builds from the head to the workers: the stack's wheels in the wheelhouse, and NCCL.

Artifacts go from cache to cache, never into an installation: the worker's own steps install them from its cache, with
their own checks. A worker whose cache lacks them downloads and builds. So a failed copy is a warning, never a failure.

The terminal only introduces the nodes: over ssh it gives both of them a token, and the workers the digest of the head's
list.
"""

import fcntl
import hashlib
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import UNSET, Struct, field

from sparkinstall import schema
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered, Reply, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode, repeated
from sparkinstall.cluster.transfer import CopyFailed, Listed, Receiver, Sender, receiving
from sparkinstall.downloads import sha256_of
from sparkinstall.errors import Interrupted, Problem, storage_problem
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Ok
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, NcclLibrary, Recipe, Stamp
from sparkinstall.resources.venv import environment_of, lock_of, wheelhouse
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Reader

STEPS = ("environment", "nccl")
"""The steps whose artifacts can be copied."""

_WHEEL = re.compile(r"wheels/[A-Za-z0-9._+!-]+\.whl")
_LIBRARY = re.compile(r"nccl/built/[0-9a-f]{12}/(?:libnccl\.so|build\.json)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARRIVING = "arriving"
_MODES = 0o755


class BuiltNccl(Struct, frozen=True):
    """The recipe of the head's library, and where its source is from."""

    recipe: Recipe
    where: str


class Manifest(Struct, frozen=True):
    """What a node offers; the paths of the files are relative to the cache."""

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
    files = _wheels(node, on) if "environment" in steps else []
    built = None
    library = _nccl(node) if "nccl" in steps else None
    if library and isinstance(library.check(on), Ok) and (entries := _library(node, library, on)):
        built = BuiltNccl(library.recipe(), library.source.where)
        files += entries
    manifest = Manifest(tuple(listed for listed, _ in files), built)
    return manifest, [path for _, path in files]


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


def _wheels(node: Node, on: Reader) -> list[tuple[Listed, Path]]:
    """The wheels of the lock that this node has."""
    house = wheelhouse(node)
    house.refresh()
    index = house.listed()
    found = house.found(lock_of(node, on) or ()).values()
    return [
        (Listed(f"wheels/{each.name}", index[each.name].size, 0o644, index[each.name].sha256), each) for each in found
    ]


def _relative(node: Node, path: Path) -> str:
    return str(path.relative_to(node.cache))


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
        known = any(_is_at(each.path, kind) for kind in (_WHEEL, _LIBRARY))
        if not known or each.size < 0 or each.mode & ~_MODES or not _SHA256.fullmatch(each.sha256):
            raise _misplaced(each.path)
    ends = [each.path for each in manifest.files]
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
    _listed: list[Listed] = field(default_factory=list)

    def of(self, steps: Sequence[str]) -> list[tuple[int, Listed]]:
        """The files to copy, each with its index in the list."""
        mine: set[str] = set()
        if "environment" in steps and not isinstance(environment_of(self.node).check(self.on), Ok):
            mine |= self._of_wheels()
        if "nccl" in steps and self._can_use_nccl():
            built = [each for each in self.manifest.files if _LIBRARY.fullmatch(each.path)]
            mine |= {each.path for each in built if not _is(self.node.cache / each.path, each)}
        listed = [(n, each) for n, each in enumerate(self.manifest.files) if each.path in mine]
        self._listed = [each for _, each in listed]
        return [(n, each) for n, each in listed if not _is(self.waiting / each.path, each)]

    def _of_wheels(self) -> set[str]:
        pins = wheelhouse(self.node).missing(lock_of(self.node, self.on) or ())
        wanted = {digest for pin in pins for digest in pin.hashes}
        return {each.path for each in self.manifest.files if f"sha256:{each.sha256}" in wanted}

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
        """Move received files to where the steps take them from: the stamp of a library last."""
        house = wheelhouse(self.node)
        for each in sorted(self._listed, key=lambda listed: listed.path.endswith(KEPT_STAMP)):
            if _WHEEL.fullmatch(each.path):
                house.adopt(self.waiting / each.path, each.sha256)
            else:
                _move(self.waiting / each.path, self.node.cache / each.path, self.node.cache)


def _is(path: Path, listed: Listed) -> bool:
    """Whether the file exists with the listed size and hash."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != listed.size:
        return False
    return sha256_of(path) == listed.sha256


def _move(waiting: Path, to: Path, cache: Path) -> None:
    _make_room(to, cache)
    waiting.replace(to)


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
