"""Files from one node to others over plain TCP on the link, to peers that know the token, checked by their hashes.

Not over ssh, whose ciphers are slower than the cable. What must be secret or trusted (the token, the digest of the
list) came over ssh before; the token itself is never sent here, only a proof that the peer knows it (HMAC of a nonce).
"""

import hashlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, field

from sparkinstall import schema
from sparkinstall.errors import Problem

PATIENCE = 60.0
"""Seconds that an offer waits while no peer is connected."""

_GREETING = 10.0
# Seconds without a byte after which the peer counts as gone: its disk may be slow.
_SILENCE = 60.0
# Seconds until a peer asks for files: one that resumes a copy first hashes what it has.
_THINKING = 900.0
_AT_ONCE = 16
_LONGEST_LIST = 1 << 28
_LENGTH = 8
_NONCE = 32
_PIECE = 1 << 22
_TOLD_EVERY = 2.0
_Index = Annotated[int, Meta(ge=0)]


class CopyFailed(Problem):
    """A copy from another node failed, or its files are not the announced ones."""


class Listed(Struct, frozen=True):
    """A file of the list: its relative path, its size in bytes, its permission bits, its hash."""

    path: str
    size: int
    mode: int
    sha256: str


class Sender(Struct):
    """Sends `listing`, and then the requested ones of `files`, to each of `peers` (addresses), once each.

    `files` are real paths and their sizes in bytes, in the order of the list.
    """

    address: str
    peers: frozenset[str]
    token: str
    listing: bytes
    files: Sequence[tuple[Path, int]]
    sent: dict[str, int] = field(default_factory=dict)
    _busy: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """A socket at this address only, at a port that the kernel chooses.

        Raises:
            CopyFailed: this node does not have the address.
        """
        try:
            listener = socket.create_server((self.address, 0))
        except OSError as error:
            raise CopyFailed(f"nothing can be offered at {self.address}: {error.strerror}") from error
        with listener:
            listener.settimeout(0.2)
            yield listener

    def serve(self, listener: socket.socket, patience: float = PATIENCE) -> None:
        """Serve until each peer was served once, or no peer was connected for `patience` seconds."""
        alone_since = time.monotonic()
        while self.peers - self.sent.keys() or self._busy:
            if self._busy:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > patience:
                return
            try:
                connection, (address, _) = listener.accept()
            except TimeoutError:
                continue
            if address not in self.peers or self._busy >= _AT_ONCE:
                connection.close()
                continue
            self._count(1)
            threading.Thread(target=self._attend, args=(connection, address), daemon=True).start()

    def _count(self, more: int) -> None:
        with self._guard:
            self._busy += more

    def _attend(self, connection: socket.socket, address: str) -> None:
        try:
            with connection:
                connection.settimeout(_GREETING)
                if _is_invited(connection, self.token):
                    self._give(connection, address)
        except (OSError, ValueError, CopyFailed):
            # The peer reports the failure; here the next one is waiting.
            pass
        finally:
            self._count(-1)

    def _give(self, connection: socket.socket, address: str) -> None:
        sent = 0
        try:
            connection.settimeout(_THINKING)
            _send_framed(connection, self.listing)
            wanted = schema.read_json(tuple[_Index, ...], _framed(connection), address)
            connection.settimeout(_SILENCE)
            for n in wanted:
                sent += _send_file(connection, *self.files[n])
        except IndexError as error:
            raise CopyFailed("it asks for a file that is not on the list") from error
        finally:
            self.sent[address] = sent


def _is_invited(connection: socket.socket, token: str) -> bool:
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    return hmac.compare_digest(_exactly(connection, _NONCE), _proof(token, nonce))


def _proof(token: str, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce, "sha256")


def _send_file(connection: socket.socket, path: Path, size: int) -> int:
    if not size:
        return 0
    with open(path, "rb") as content:
        if connection.sendfile(content, count=size) != size:
            raise CopyFailed(f"{path} became shorter")
    return size


class Receiver:
    """The other end of a `Sender` that accepted the token. `listing` is the announced list."""

    def __init__(self, connection: socket.socket, digest: str) -> None:
        self._connection = connection
        self._told = time.monotonic()
        self.listing = _framed(connection)
        if hashlib.sha256(self.listing).hexdigest() != digest:
            raise CopyFailed("the list of files is not the one announced over ssh")

    def take(self, wanted: Sequence[tuple[int, Listed]], into: Path, on_bytes: Callable[[int, int], None]) -> None:
        """Copy files into the folder `into`; `wanted` has the index of each in the list.

        Raises:
            CopyFailed: the connection broke, or a file does not have its listed hash; that file is deleted.
        """
        _send_framed(self._connection, msgspec.json.encode([n for n, _ in wanted]))
        total, done, buffer = sum(each.size for _, each in wanted), 0, memoryview(bytearray(_PIECE))
        for _, each in wanted:
            self._take_one(each, into / each.path, buffer)
            done += each.size
            if time.monotonic() - self._told > _TOLD_EVERY:
                self._told = time.monotonic()
                on_bytes(done, total)

    def _take_one(self, listed: Listed, to: Path, buffer: memoryview) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.unlink(missing_ok=True)
        with open(to, "xb", buffering=0) as out:
            found = self._pour(listed.size, out, buffer)
            os.fchmod(out.fileno(), listed.mode)
        if found != listed.sha256:
            to.unlink()
            raise CopyFailed(
                f"{listed.path} is not the announced file", cause=f"expected sha256 {listed.sha256}, found {found}"
            )

    def _pour(self, size: int, out: FileIO, buffer: memoryview) -> str:
        """Write the next `size` bytes of the connection to `out`, and return their sha256."""
        digest = hashlib.sha256()
        while size:
            got = self._connection.recv_into(buffer[: min(size, len(buffer))])
            if not got:
                raise CopyFailed("the other node closed the connection", hint="run the same command again: it resumes")
            digest.update(buffer[:got])
            out.write(buffer[:got])
            size -= got
        return digest.hexdigest()


@contextmanager
def receiving(address: str, port: int, token: str, digest: str, own_address: str = "") -> Iterator[Receiver]:
    """A connection from `own_address` to the sender at `address`; `digest` is the sha256 of its list.

    Raises:
        CopyFailed: the sender cannot be reached, refuses the token, closes the connection, or has another list.
    """
    source = (own_address, 0) if own_address else None
    try:
        with socket.create_connection((address, port), timeout=_GREETING, source_address=source) as connection:
            connection.sendall(_proof(token, _exactly(connection, _NONCE)))
            connection.settimeout(_SILENCE)
            yield Receiver(connection, digest)
    except (ConnectionError, TimeoutError) as error:
        raise CopyFailed(f"the copy from {address} failed: {error}") from error


def _send_framed(connection: socket.socket, content: bytes) -> None:
    connection.sendall(len(content).to_bytes(_LENGTH, "big") + content)


def _framed(connection: socket.socket) -> bytes:
    length = int.from_bytes(_exactly(connection, _LENGTH), "big")
    if length > _LONGEST_LIST:
        raise CopyFailed(f"a list of {length} bytes is too long")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    whole = bytearray()
    while len(whole) < length:
        more = connection.recv(min(length - len(whole), _PIECE))
        if not more:
            raise CopyFailed("the other node refused the token, or closed the connection")
        whole += more
    return bytes(whole)
