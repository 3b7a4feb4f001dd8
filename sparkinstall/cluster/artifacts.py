"""Copies of wheels and NCCL from the head's cache to those of the workers.

They go from cache to cache, never into an installation: the worker's own steps install them, with their own checks. A
worker whose cache lacks them downloads and builds. So a failed copy is a warning, never a failure.

The terminal only introduces the nodes: over ssh it gives both of them a token, and the workers the sha256 of the head's
certificate.
"""

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import msgspec
from msgspec import UNSET, Meta, Struct, field

from sparkinstall import schema
from sparkinstall.cluster.file_server import DONE, CopyFailed, serving
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered, Reply, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode, repeated
from sparkinstall.downloads import NotDownloaded, fetch, sha256_of
from sparkinstall.errors import Interrupted, Problem, storage_errors
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Ok
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, NcclLibrary, Recipe, Stamp
from sparkinstall.resources.venv import environment_of, lock_of, wheelhouse
from sparkinstall.stacks import Pin
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Reader
from sparkinstall.wheel_index import RemoteWheel
from sparkinstall.wheelhouse import Downloads

STEPS = ("environment", "nccl")
"""The steps whose artifacts can be copied."""

_PATIENCE = 60.0
"""Seconds that the head waits while no worker is connected."""
_LIST = "/list"
_TOLD_EVERY = 2.0


class Listed(Struct, frozen=True):
    """A file that the head offers."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]*\Z")]
    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class BuiltNccl(Struct, frozen=True):
    """The head's library: its recipe, where its source is from, and its files."""

    recipe: Recipe
    where: str
    files: tuple[Listed, Listed]


class Artifacts(Struct, frozen=True):
    """All that a head offers."""

    wheels: tuple[Listed, ...] = ()
    nccl: BuiltNccl | None = None


# --- what the head offers


def serve(node: Node, on: Reader, steps: Sequence[str], workers: int, token: str) -> Offered:
    """Announce this node's artifacts of `steps`, and serve them until so many workers are done.

    Raises:
        CopyFailed: this node does not have its address on the link, or cannot make a certificate.
        Storage: an artifact cannot be read.
    """
    with storage_errors("listing the artifacts"):
        artifacts, files = offer(node, on, steps)
    with serving(node.address, token, {_LIST: msgspec.json.encode(artifacts), **files}) as server:
        announce(Offer(server.server_port, server.fingerprint))
        server.wait(workers, _PATIENCE)
        return Offered(len(files), sum(each.stat().st_size for each in files.values()), server.sent)


def offer(node: Node, on: Reader, steps: Sequence[str]) -> tuple[Artifacts, dict[str, Path]]:
    """The artifacts that this node has of `steps`, and the real path of each file by its path in an URL."""
    wheels, files = _wheels(node, on) if "environment" in steps else ((), {})
    library = _nccl(node) if "nccl" in steps else None
    if library is None or not isinstance(library.check(on), Ok):
        return Artifacts(wheels), files
    so, stamp = Path(on.real(library.library)), Path(on.real(f"{library.folder}/build.json"))
    built = (_listed(KEPT_LIBRARY, so), _listed(KEPT_STAMP, stamp))
    if schema.read_json(Stamp, read_regular(stamp), str(stamp)).sha256 != built[0].sha256:
        return Artifacts(wheels), files
    files |= {_of_nccl(KEPT_LIBRARY): so, _of_nccl(KEPT_STAMP): stamp}
    return Artifacts(wheels, BuiltNccl(library.recipe(), library.source.where, built)), files


def _wheels(node: Node, on: Reader) -> tuple[tuple[Listed, ...], dict[str, Path]]:
    house = wheelhouse(node)
    house.refresh()
    index, found = house.listed(), house.found(lock_of(node, on) or ()).values()
    listed = (Listed(each.name, index[each.name].size, index[each.name].sha256) for each in found)
    return tuple(listed), {_of_wheel(each.name): each for each in found}


def _of_wheel(name: str) -> str:
    return f"/wheels/{name}"


def _of_nccl(name: str) -> str:
    return f"/nccl/{name}"


def _nccl(node: Node) -> NcclLibrary | None:
    return next((each for each in Nccl().resources(node) if isinstance(each, NcclLibrary)), None)


def _listed(name: str, real: Path) -> Listed:
    return Listed(name, real.stat().st_size, sha256_of(real))


# --- what a worker fetches


def fetch_missing(
    node: Node, on: Reader, steps: Sequence[str], head: Introduction, tell: Callable[[int, int], None]
) -> Fetched:
    """Fetch missing artifacts from the head; `tell` is called with the bytes that arrived and their total.

    Raises:
        CopyFailed: the head cannot be reached, or a file is not what it announced. The next copy resumes.
        Storage: the cache cannot be written.
    """
    link = Link(node.config.cluster.head, head, _seldom(tell))
    try:
        return Missing(node, on, link.artifacts(), link).take(steps)
    except NotDownloaded as failure:
        raise CopyFailed(f"the copy from {link.host} failed: {failure.cause}") from failure
    finally:
        link.end()


def _seldom(tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    told = time.monotonic()

    def on_bytes(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            tell(done, total)

    return on_bytes


class Link(Struct, frozen=True):
    """The head's server, as a worker sees it."""

    host: str
    head: Introduction
    on_bytes: Callable[[int, int], None]

    def url(self, path: str) -> str:
        return f"https://{self.host}:{self.head.port}{quote(path)}"

    @property
    def authorization(self) -> str:
        return f"Bearer {self.head.token}"

    def get(self, path: str, into: Path) -> Path:
        tell = self.on_bytes
        return fetch(self.url(path), into, tell, authorization=self.authorization, fingerprint=self.head.fingerprint)

    def artifacts(self) -> Artifacts:
        """The head's list."""
        with tempfile.TemporaryDirectory() as scratch:
            return understood(self.get(_LIST, Path(scratch, "list")).read_bytes())

    def end(self) -> None:
        """Tell the head that this worker needs it no more. If that fails, the head waits in vain for a while."""
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self.get(DONE, Path(scratch, "done"))
            except Problem:
                pass


def understood(listing: bytes) -> Artifacts:
    """The head's list.

    Raises:
        CopyFailed: it is not one.
    """
    try:
        return msgspec.json.decode(listing, type=Artifacts)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CopyFailed("the head's list of files cannot be read") from error


class Missing(Struct):
    """What this node needs of the head's artifacts and does not have."""

    node: Node
    on: Reader
    offered: Artifacts
    link: Link
    reasons: list[str] = field(default_factory=list)

    def take(self, steps: Sequence[str]) -> Fetched:
        wheels = self._wheels() if "environment" in steps else []
        with storage_errors("copying from the head"):
            wheelhouse(self.node).download(wheels, self._downloads())
            library = self._library() if "nccl" in steps else ()
        sizes = [*(each.size for each in wheels), *(each.size for each in library)]
        return Fetched(bool(sizes), len(sizes), sum(sizes), "; ".join(self.reasons) or UNSET)

    def _downloads(self) -> Downloads:
        logins = {f"{self.link.host}:{self.link.head.port}": self.link.authorization}
        return Downloads(self.link.on_bytes, logins, self.link.head.fingerprint)

    def _wheels(self) -> list[RemoteWheel]:
        """The wheels whose hash this node's own lock has. The head's hash counts where no lock knows it yet."""
        if isinstance(environment_of(self.node).check(self.on), Ok):
            return []
        house = wheelhouse(self.node)
        house.refresh()
        pins = self._pins()
        hashes = {digest for pin in house.missing(pins) for digest in pin.hashes}
        unhashed = {RemoteWheel(pin.url, "").name for pin in pins if pin.url and not pin.hashes} - house.listed().keys()
        wanted = (each for each in self.offered.wheels if f"sha256:{each.sha256}" in hashes or each.name in unhashed)
        return [RemoteWheel(self.link.url(_of_wheel(each.name)), each.sha256, each.size) for each in wanted]

    def _pins(self) -> Sequence[Pin]:
        wheels = self.node.wheels
        return lock_of(self.node, self.on) or (wheels.locked() if wheels.lock else wheels.wheels)

    def _library(self) -> Sequence[Listed]:
        """Take the head's NCCL where it has the recipe of this node's."""
        offered, library = self.offered.nccl, _nccl(self.node)
        if offered is None or library is None or isinstance(library.check(self.on), Ok):
            return ()
        if offered.where == library.source.where:
            library.source.hold_to(offered.recipe.source)
        own = library.recipe()
        if different := [each for each in own.__struct_fields__ if getattr(own, each) != getattr(offered.recipe, each)]:
            self.reasons.append(f"NCCL not copied: the nodes differ in {', '.join(different)}")
            return ()
        kept = library.kept(own)
        if all(_is(kept / each.name, each) for each in offered.files):
            return ()
        arrived = [self._arrived(each) for each in offered.files]
        kept.mkdir(parents=True, exist_ok=True)
        # The stamp last: it says that the library is there.
        for file, name in zip(arrived, (KEPT_LIBRARY, KEPT_STAMP), strict=True):
            file.replace(kept / name)
        shutil.rmtree(self._arriving)
        return offered.files

    @property
    def _arriving(self) -> Path:
        return self.node.cache / "nccl/arriving"

    def _arrived(self, listed: Listed) -> Path:
        name = KEPT_STAMP if listed.name == KEPT_STAMP else KEPT_LIBRARY
        file = self.link.get(_of_nccl(name), self._arriving / listed.sha256)
        if (found := sha256_of(file)) != listed.sha256:
            file.unlink()
            cause = f"expected sha256 {listed.sha256}, found {found}"
            raise CopyFailed(f"{name} is not the announced file", cause=cause)
        return file


def _is(path: Path, listed: Listed) -> bool:
    """Whether the file exists with the listed size and hash."""
    return path.is_file() and path.stat().st_size == listed.size and sha256_of(path) == listed.sha256


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
        argv = ("node", "offer", str(len(self.workers)), *self.head.words, *repeated("--only", self.steps))
        return _forgiven(self.head.call(Offered, *argv, on_line=self._offer.listen(on_line), stdin=self._token))

    def _fetch(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        found = self._offer.wait()
        if found is None:
            return _warned(f"{self.head.host} offers nothing: this node downloads and builds what is missing")
        argv = ("node", "fetch", *node.words, *repeated("--only", self.steps))
        head = Introduction(found.port, found.fingerprint, str(self._token))
        return _forgiven(node.call(Fetched, *argv, on_line=on_line, stdin=msgspec.json.encode(head).decode()))


def _forgiven(reply: Reply[Offered | Fetched]) -> Reply[Offered | Fetched]:
    return _warned(reply.problems[0].message) if reply.problems else Reply(data=reply.data)


def _warned(why: str) -> Reply[Offered | Fetched]:
    return Reply(data=Fetched(warning=why))
