"""Copies of wheels and NCCL from the head's cache to those of the workers.

They go from cache to cache, never into an installation: the worker's own steps install them, with their own checks. A
worker whose cache lacks them downloads and builds. So a failed copy is a warning, never a failure.

The terminal only introduces the nodes: over ssh it gives both of them a token, and the workers the sha256 of the head's
certificate.
"""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, field

from sparkinstall import schema
from sparkinstall.cluster.file_client import FileClient
from sparkinstall.cluster.file_server import DONE, CopyFailed, serving
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered, Reply, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode, repeated
from sparkinstall.downloads import NotDownloaded, sha256_of
from sparkinstall.errors import Interrupted, Problem, storage_errors
from sparkinstall.events import Tell, seldom
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.resources import Ok
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, NcclLibrary, Recipe, Stamp
from sparkinstall.resources.venv import environment_of, lock_of, wheelhouse
from sparkinstall.stacks import Pin
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Reader
from sparkinstall.system.local import replace_file
from sparkinstall.wheel_index import RemoteWheel
from sparkinstall.wheelhouse import Downloads

STEPS = ("environment", "nccl")
"""The steps whose artifacts can be copied."""

_PATIENCE = 60.0
"""Seconds that the head waits while no worker is connected."""
_LIST, _LIBRARY = "/list", f"/nccl/{KEPT_LIBRARY}"
_TOLD_EVERY = 2.0


class Listed(Struct, frozen=True):
    """A file that the head offers."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]*\Z")]
    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class BuiltNccl(Struct, frozen=True):
    """The head's library, its recipe, and where its source is from."""

    recipe: Recipe
    where: str
    library: Listed


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
        wheels = _wheels(node, on) if "environment" in steps else {}
        built, library = _built(node, on) if "nccl" in steps else (None, {})
    files = {**{_of_wheel(each.name): path for each, path in wheels.items()}, **library}
    listing = msgspec.json.encode(Artifacts(tuple(wheels), built))
    with serving(node.address, token, {_LIST: listing, **files}) as server:
        announce(Offer(server.server_port, server.fingerprint))
        server.wait(workers, _PATIENCE)
        return Offered(len(files), sum(each.stat().st_size for each in files.values()), server.sent)


def _wheels(node: Node, on: Reader) -> Mapping[Listed, Path]:
    """Return the wheels of this node's lock that are in its wheelhouse."""
    house = wheelhouse(node)
    house.refresh()
    index, found = house.listed(), house.found(lock_of(node, on) or ()).values()
    return {Listed(each.name, index[each.name].size, index[each.name].sha256): each for each in found}


def _of_wheel(name: str) -> str:
    return f"/wheels/{name}"


def _built(node: Node, on: Reader) -> tuple[BuiltNccl | None, Mapping[str, Path]]:
    """Return the library that this node has built, and its real path by that in an URL; None if it is not intact."""
    library = _nccl(node)
    if library is None or not isinstance(library.check(on), Ok):
        return None, {}
    stamp_path, real = on.real(f"{library.folder}/build.json"), Path(on.real(library.library))
    stamp = schema.read_json(Stamp, read_regular(stamp_path), stamp_path)
    if stamp.sha256 != sha256_of(real):
        return None, {}
    listed = Listed(KEPT_LIBRARY, real.stat().st_size, stamp.sha256)
    return BuiltNccl(stamp.recipe, library.source.where, listed), {_LIBRARY: real}


def _nccl(node: Node) -> NcclLibrary | None:
    return next((each for each in Nccl().resources(node) if isinstance(each, NcclLibrary)), None)


# --- what a worker fetches


def fetch_missing(node: Node, on: Reader, steps: Sequence[str], head: Introduction, tell: Tell) -> Fetched:
    """Fetch missing artifacts from the head; `tell` is called with the bytes that arrived and their total.

    Raises:
        CopyFailed: the head cannot be reached, or a file is not what it announced. The next copy resumes.
        Storage: the cache cannot be written.
    """
    client = FileClient(node.config.cluster.head, head)
    try:
        with storage_errors("copying from the head"):
            return _Copy(node, on, client, seldom(tell, _TOLD_EVERY)).of(steps)
    except NotDownloaded as failure:
        raise CopyFailed(f"the copy from {client.host} failed: {failure.cause}") from failure
    finally:
        # If that does not arrive, the head waits in vain for a while.
        with suppress(Problem):
            client.content(DONE)


def understood(listing: bytes) -> Artifacts:
    """The head's list.

    Raises:
        CopyFailed: it is not one.
    """
    try:
        return msgspec.json.decode(listing, type=Artifacts)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CopyFailed("the head's list of files cannot be read") from error


class _Copy(Struct, frozen=True):
    """Takes from the head what this node needs and does not have."""

    node: Node
    on: Reader
    head: FileClient
    on_bytes: Tell

    def of(self, steps: Sequence[str]) -> Fetched:
        """Take the artifacts of these steps."""
        offered = understood(self.head.content(_LIST))
        wheels = self._wheels(offered.wheels) if "environment" in steps else []
        logins = {self.head.netloc: self.head.authorization}
        wheelhouse(self.node).download(wheels, Downloads(self.on_bytes, logins, self.head.fingerprint))
        library, why = self._library(offered.nccl) if "nccl" in steps and offered.nccl else (0, "")
        sizes = [*(each.size for each in wheels), *([library] if library else [])]
        return Fetched(bool(sizes), len(sizes), sum(sizes), why or UNSET)

    def _wheels(self, offered: Sequence[Listed]) -> list[RemoteWheel]:
        """The wheels whose hash this node's own lock has. The head's hash counts where no lock knows it yet."""
        if isinstance(environment_of(self.node).check(self.on), Ok):
            return []
        house = wheelhouse(self.node)
        house.refresh()
        pins = self._pins()
        hashes = {digest for pin in house.missing(pins) for digest in pin.hashes}
        unhashed = {RemoteWheel(pin.url, "").name for pin in pins if pin.url and not pin.hashes} - house.listed().keys()
        wanted = (each for each in offered if f"sha256:{each.sha256}" in hashes or each.name in unhashed)
        return [RemoteWheel(self.head.url(_of_wheel(each.name)), each.sha256, each.size) for each in wanted]

    def _pins(self) -> Sequence[Pin]:
        wheels = self.node.wheels
        return lock_of(self.node, self.on) or (wheels.locked() if wheels.lock else wheels.wheels)

    def _library(self, offered: BuiltNccl) -> tuple[int, str]:
        """Take the head's NCCL if it has the recipe of this node's: its bytes, and why it was not taken."""
        library, listed = _nccl(self.node), offered.library
        if library is None or isinstance(library.check(self.on), Ok):
            return 0, ""
        if offered.where == library.source.where:
            library.source.hold_to(offered.recipe.source)
        own = library.recipe()
        if different := [each for each in own.__struct_fields__ if getattr(own, each) != getattr(offered.recipe, each)]:
            return 0, f"NCCL not copied: the nodes differ in {', '.join(different)}"
        kept = library.kept(own)
        there = all((kept / name).is_file() for name in (KEPT_LIBRARY, KEPT_STAMP))
        if there and sha256_of(kept / KEPT_LIBRARY) == listed.sha256:
            return 0, ""
        self._keep(kept, Stamp(own, listed.sha256))
        return listed.size, ""

    def _keep(self, kept: Path, stamp: Stamp) -> None:
        arriving = self.node.cache / "nccl/arriving"
        file = self.head.get(_LIBRARY, arriving / stamp.sha256, self.on_bytes)
        if (found := sha256_of(file)) != stamp.sha256:
            file.unlink()
            cause = f"expected sha256 {stamp.sha256}, found {found}"
            raise CopyFailed(f"{KEPT_LIBRARY} is not the announced file", cause=cause)
        kept.mkdir(parents=True, exist_ok=True)
        file.replace(kept / KEPT_LIBRARY)
        # Last: it says that the library is there.
        replace_file(str(kept / KEPT_STAMP), msgspec.json.encode(stamp), 0o644)
        shutil.rmtree(arriving)


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
