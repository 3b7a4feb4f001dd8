"""Copies of wheels and NCCL from the head's cache to those of the workers.

They go from cache to cache, never into an installation: the worker's own steps install them, with their own checks. A
worker whose cache lacks them downloads and builds. So a failed copy is a warning, never a failure.

The terminal only introduces the nodes: over ssh it gives both of them a token, and the workers the sha256 of the head's
certificate.
"""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct

from sparkinstall.cluster.file_client import FileClient
from sparkinstall.cluster.file_server import DONE, CopyFailed, serving
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered, Reply, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode, repeated
from sparkinstall.downloads import Known, NotDownloaded, sha256_of
from sparkinstall.errors import Interrupted, Problem, storage_errors
from sparkinstall.events import Tell, seldom
from sparkinstall.facts.decisions import recorded
from sparkinstall.node import Node
from sparkinstall.resources import Ok
from sparkinstall.resources.nccl import KEPT_LIBRARY, KEPT_STAMP, NcclLibrary, Recipe, Stamp
from sparkinstall.resources.venv import environment_of, lock_of, wheelhouse
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Reader
from sparkinstall.system.local import replace_file
from sparkinstall.wheel_index import RemoteWheel
from sparkinstall.wheelhouse import Downloads

STEPS = ("environment", "nccl")
"""The steps whose artifacts can be copied."""

_PATIENCE = 60.0
"""Seconds that the head waits while no worker is connected."""
_LIST, _WHEELS, _LIBRARY = "/list", "/wheels/", f"/nccl/{KEPT_LIBRARY}"
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


def serve(
    node: Node, on: Reader, steps: Sequence[str], workers: int, token: str, tell: Callable[[Offer], None] = announce
) -> Offered:
    """Tell where this node's artifacts of `steps` are, and serve them until so many workers are done.

    Raises:
        CopyFailed: this node does not have its address on the link, or cannot make a certificate.
        Storage: an artifact cannot be read.
    """
    with storage_errors("listing the artifacts"):
        wheels = _wheels(node, on) if "environment" in steps else {}
        built, library = _built(node, on) if "nccl" in steps else (None, {})
    files = {**{_WHEELS + each.name: path for each, path in wheels.items()}, **library}
    listing = msgspec.json.encode(Artifacts(tuple(wheels), built))
    with serving(node.address, token, {_LIST: listing, **files}) as server:
        tell(Offer(server.server_port, server.fingerprint))
        server.wait(workers, _PATIENCE)
        return Offered(len(files), sum(each.stat().st_size for each in files.values()), server.sent)


def _wheels(node: Node, on: Reader) -> Mapping[Listed, Path]:
    """Return the wheels of this node's lock that are in its wheelhouse."""
    house = wheelhouse(node)
    house.refresh()
    index, found = house.listed(), house.found(lock_of(node, on) or ()).values()
    return {Listed(each.name, index[each.name].size, index[each.name].sha256): each for each in found}


def _built(node: Node, on: Reader) -> tuple[BuiltNccl | None, Mapping[str, Path]]:
    """Return the library that this node has built, and its real path by that in an URL; None if it is not intact."""
    library = _nccl(node)
    if library is None or not isinstance(library.check(on), Ok):
        return None, {}
    stamp, real = recorded(on, library.stamp_path, Stamp), Path(on.real(library.library))
    if stamp is None or stamp.sha256 != sha256_of(real):
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
        wheelhouse(self.node).download(wheels, Downloads(self.on_bytes, logins, self.head.server.fingerprint))
        library, why = self._library(offered.nccl) if "nccl" in steps and offered.nccl else (0, "")
        sizes = [*(each.size for each in wheels), *([library] if library else [])]
        return Fetched(bool(sizes), len(sizes), sum(sizes), why or UNSET)

    def _wheels(self, offered: Sequence[Listed]) -> list[RemoteWheel]:
        """The wheels whose hash this node's own lock has. The head's hash counts where no lock knows it yet."""
        if isinstance(environment_of(self.node).check(self.on), Ok):
            return []
        house = wheelhouse(self.node)
        house.refresh()
        # Before the first install the stack's own pins are known, which may lack hashes.
        own = self.node.wheels
        pins = lock_of(self.node, self.on) or (own.locked() if own.lock else own.wheels)
        hashes = {digest for pin in house.missing(pins) for digest in pin.hashes}
        unhashed = {RemoteWheel(pin.url, "").name for pin in pins if pin.url and not pin.hashes} - house.listed().keys()
        wanted = (each for each in offered if f"sha256:{each.sha256}" in hashes or each.name in unhashed)
        return [RemoteWheel(self.head.url(_WHEELS + each.name), each.sha256, each.size) for each in wanted]

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
        self._keep(kept, listed, Stamp(own, listed.sha256))
        return listed.size, ""

    def _keep(self, kept: Path, listed: Listed, stamp: Stamp) -> None:
        file = self.node.cache / "nccl/arriving" / listed.sha256
        part, lock = file.with_suffix(".part"), file.with_suffix(".lock")
        self.head.get(_LIBRARY, file, self.on_bytes, Known(listed.size, listed.sha256, hashlib.sha256, part, lock))
        kept.mkdir(parents=True, exist_ok=True)
        file.replace(kept / KEPT_LIBRARY)
        # Last: it says that the library is there.
        replace_file(str(kept / KEPT_STAMP), msgspec.json.encode(stamp), 0o644)
        shutil.rmtree(file.parent)


# --- at the terminal


class Handover:
    """Copies the artifacts of `steps` from the head to `workers`."""

    def __init__(self, head: RemoteNode, workers: Sequence[RemoteNode], steps: Sequence[str]) -> None:
        self._head, self._workers, self._steps = head, workers, steps
        self._token, self._offer = secrets.token_hex(32), Announcement(Offer)

    def work(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        """Run this node's part. A failed copy is a warning: the node downloads and builds by itself."""
        try:
            reply = self._serve(on_line) if node is self._head else self._fetch(node, on_line)
        except Interrupted:
            raise
        except Problem as problem:
            reply = Reply(problems=(problem,))
        finally:
            if node is self._head:
                self._offer.end()
        why = [f"{each.message}{f' ({each.cause})' if each.cause else ''}" for each in reply.problems]
        return Reply(data=Fetched(warning=why[0]) if why else reply.data)

    def _serve(self, on_line: OnLine) -> Reply[Offered | Fetched]:
        argv = ("node", "offer", str(len(self._workers)), *self._head.words, *repeated("--only", self._steps))
        return self._head.call(Offered, *argv, on_line=self._offer.listen(on_line), stdin=self._token)

    def _fetch(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        found = self._offer.wait()
        if found is None:
            raise CopyFailed(f"{self._head.host} offers nothing: this node downloads and builds what is missing")
        argv = ("node", "fetch", *node.words, *repeated("--only", self._steps))
        head = msgspec.json.encode(Introduction(found.port, found.fingerprint, self._token))
        return node.call(Fetched, *argv, on_line=on_line, stdin=head.decode())
