"""Copies of models from this machine's cache of the hub to those of other nodes, over the link where there is one.

As with wheels, this machine serves files, and the nodes take what they lack; over ssh they get the server's address,
the sha256 of its certificate and a token. All bytes are compared with the hash that is a file's name in the cache.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import msgspec
from msgspec import Struct

from sparkinstall.cluster.file_client import FileClient
from sparkinstall.cluster.file_server import DONE, CopyFailed, FileServer, serving
from sparkinstall.cluster.protocol import (
    Arriving,
    Fetched,
    Identity,
    ModelSource,
    Offer,
    Offered,
    Reply,
    announce,
    announced,
)
from sparkinstall.cluster.remote import OnLine, RemoteNode
from sparkinstall.core import model_snapshots, models
from sparkinstall.core.model_snapshots import Snapshot, Unusable
from sparkinstall.downloads import NotDownloaded
from sparkinstall.errors import BadUsage, Problem
from sparkinstall.events import seldom
from sparkinstall.facts import ip, machine
from sparkinstall.facts.sysfs import NET, text_of
from sparkinstall.models.hub import cache_folder
from sparkinstall.models.listing import HubFile
from sparkinstall.system import Reader

_LIST = "/list"
_TOLD_EVERY = 2.0
# Seconds that one who offers waits while nobody is connected.
_PATIENCE = 60.0


# --- what this machine offers


def whole(names: Sequence[str]) -> list[Snapshot]:
    """Return the whole snapshots of these models, or of all that are in the cache.

    Raises:
        BadUsage: a model is not in the cache, or there is none at all.
        ModelError: one that was named has no whole snapshot.
    """
    found = []
    for name in names or [each.id for each in models.listed().models]:
        some = model_snapshots.whole(models.folder_of(name))
        if names and not some:
            raise model_snapshots.not_whole(models.folder_of(name))
        found += some
    if not found:
        raise BadUsage(f"no model in {cache_folder()} is complete", hint="`sparkinstall models pull MODEL` brings one")
    return found


def _contents(snapshots: Sequence[Snapshot]) -> Mapping[str, bytes | Path]:
    blobs = {_of_blob(file): each.folder.blobs / file.digest for each in snapshots for file in each.files}
    return {_LIST: model_snapshots.encoded(snapshots), **blobs}


def _of_blob(file: HubFile) -> str:
    return f"/blobs/{file.digest}"


def offer(address: str, model: str, commit: str, workers: int, token: str) -> Offered:
    """Announce where a model at a commit is, and serve it until so many workers have it.

    Raises:
        CopyFailed: this node does not have the address, or not the model at that commit.
        BadUsage, ModelError: as `whole`.
    """
    snapshots = [each for each in whole([model]) if each.commit == commit]
    if not snapshots:
        raise CopyFailed(f"{model} at {commit[:12]} is not complete here")
    contents = _contents(snapshots)
    with snapshots[0].folder.kept(), serving(address, token, contents) as server:
        announce(Offer(server.server_port, server.fingerprint))
        server.wait(workers, _PATIENCE)
        return Offered(len(snapshots[0].files), sum(each.size for each in snapshots[0].files), server.sent)


# --- what a node takes


def receive(source: ModelSource) -> Fetched:
    """Take what is missing here of the models that another machine offers; announce how many bytes have come.

    Raises:
        CopyFailed: it cannot be reached, or a file is not the announced one. The next run resumes.
        Blocked, Storage: the cache cannot take them.
    """
    client = FileClient(source.address, source)
    try:
        return _received(client, source)
    finally:
        # If that does not arrive, who offers waits in vain for a while.
        with suppress(Problem, NotDownloaded):
            client.content(DONE)


def _received(client: FileClient, source: ModelSource) -> Fetched:
    try:
        offered = model_snapshots.understood(client.content(_LIST))
    except NotDownloaded as failure:
        raise _failed(source.address, "", failure) from failure
    except Unusable as error:
        raise CopyFailed("the other machine's list of models is refused", cause=error.message) from error
    models.require_room(cache_folder(), [(each.folder, each.listing) for each in offered])
    came = [_bring(client, each) for each in offered]
    files, size = sum(files for _, files in came), sum(size for size, _ in came)
    return Fetched(bool(files), files, size)


def _bring(client: FileClient, offered: Snapshot) -> tuple[int, int]:
    origin = models.Origin(
        lambda file: client.url(_of_blob(file)),
        client.authorization,
        partial(_failed, client.host, offered.model),
        client.server.fingerprint,
    )
    on_bytes = seldom(lambda done, total: announce(Arriving(offered.model, done, total)), _TOLD_EVERY)
    dialog = models.Dialog(on_bytes, lambda text: announce(Arriving(text)))
    return models.bring(offered.folder, offered.listing, offered.refs, origin, dialog)


def _failed(host: str, model: str, failure: NotDownloaded) -> Problem:
    if failure.kind == "damaged" and model:
        hint = f"`sparkinstall models verify {model}` at the machine with {host}, then run the same command again"
        return CopyFailed(f"a file of {model} from {host} is damaged", cause=failure.cause, hint=hint)
    return CopyFailed(
        f"the copy from {host} failed", cause=failure.cause, hint="run the same command again: it resumes"
    )


# --- at the terminal


class Sync:
    """Offers snapshots to nodes, each over the fastest network that this machine shares with it.

    `in_words`: how a node's progress is told; it gets (model, bytes so far, total bytes).
    """

    def __init__(
        self, snapshots: Sequence[Snapshot], own: "Own", opened: ExitStack, in_words: Callable[[str, Arriving], str]
    ) -> None:
        self._own, self._opened, self._in_words = own, opened, in_words
        self._contents, self._token = _contents(snapshots), secrets.token_hex(32)
        self._servers: dict[str, FileServer] = {}
        self._guard = threading.Lock()

    def work(self, node: RemoteNode, on_line: OnLine) -> Reply[Fetched]:
        """Let a node take what it lacks."""
        there = node.call(Identity, "node", "identify", on_line=on_line)
        if there.data is None:
            return Reply(there.code, problems=there.problems)
        if there.data.machine and there.data.machine == self._own.machine:
            on_line("this machine has them")
            return Reply(data=Fetched())
        address = self._own.shared_with(node.host, there.data.addresses)
        server = self._server(address)
        source = ModelSource(server.server_port, server.fingerprint, self._token, address)
        given = msgspec.json.encode(source).decode()
        return node.call(Fetched, "node", "receive", on_line=self._told(node.host, on_line), stdin=given)

    def _server(self, address: str) -> FileServer:
        with self._guard:
            if address not in self._servers:
                server = serving(address, self._token, self._contents)
                self._servers[address] = self._opened.enter_context(server)
            return self._servers[address]

    def _told(self, host: str, on_line: OnLine) -> OnLine:
        def take(line: str) -> None:
            found = announced(line, Arriving)
            on_line(self._in_words(host, found) if found else line)

        return take


@contextmanager
def offering(snapshots: Sequence[Snapshot], own: "Own", in_words: Callable[[str, Arriving], str]) -> Iterator[Sync]:
    """Offer snapshots during this context, in which they stay."""
    with ExitStack() as opened:
        for folder in {each.model: each.folder for each in snapshots}.values():
            opened.enter_context(folder.kept())
        yield Sync(snapshots, own, opened, in_words)


class Own(Struct, frozen=True):
    """This machine: what no other has, and its addresses with the speed of their networks in Mb/s, the link first."""

    machine: str
    addresses: Sequence[tuple[IPv4Interface, int]]

    def shared_with(self, host: str, addresses: Sequence[str]) -> str:
        """Return the address at which this machine can be reached over the fastest network that a node is in too.

        Raises:
            CopyFailed: there is none.
        """
        # What a node says of itself may be anything.
        others = [IPv4Address(each) for each in addresses if is_address(each)]
        own = {each.ip for each, _ in self.addresses}
        shared = [
            (speed, each.ip)
            for each, speed in self.addresses
            if any(other in each.network for other in others if other not in own)
        ]
        if not shared:
            raise CopyFailed(
                f"this machine and {host} are in no common network",
                hint="connect them, or run `sparkinstall models pull` there",
            )
        # Of several that are as fast the first, which is the link.
        return str(max(shared, key=lambda each: each[0])[1])


def is_address(text: str) -> bool:
    """Whether a text is an IPv4 address."""
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def own(on: Reader, link: str) -> Own:
    """Read what this machine is; `link` is its address on the QSFP link, if it has one."""
    found = [(IPv4Interface(each), _speed(on, name)) for name, live in ip.live(on).items() for each in live.addresses]
    return Own(machine.identity(on), sorted(found, key=lambda each: str(each[0].ip) != link))


def _speed(on: Reader, interface: str) -> int:
    told = text_of(on, f"{NET}/{interface}/speed")
    return int(told) if told.isdigit() else 0
