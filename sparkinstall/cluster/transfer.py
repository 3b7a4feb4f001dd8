"""Files from one node to others over plain TCP on the link: none without the token, none with another hash.

Not through ssh, whose ciphers are slower than the cable. What has to be secret or trusted (the token, the digest
of the list) has come over ssh before; the token itself never crosses this wire, only the proof that one has it.
"""

import hashlib
import hmac
import io
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from msgspec import Struct, field

from sparkinstall.errors import Problem

PATIENCE = 60.0
"""How long an offer waits while nobody is connected, in seconds."""

_GREETING = 10.0
# Seconds without a byte after which the other side counts as gone: its disk may be slow.
_SILENCE = 60.0
# A node that goes on with a former copy reads again what it has of it.
_THINKING = 900.0
_AT_ONCE = 16
_LONGEST_LIST = 1 << 28
_LENGTH = 8
_NONCE = 32
_PIECE = 1 << 22
_TOLD_EVERY = 2.0


class CopyFailed(Problem):
    """Files did not come over from another node, or are not those that were promised."""


class Listed(Struct, frozen=True):
    """A file of the list: where it belongs (relative), its size in bytes, its permission bits, its hash."""

    path: str
    size: int
    mode: int
    sha256: str


class Sender(Struct):
    """Gives `listing` and then those of `files` that are asked for to each of `peers` (addresses), once each.

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
        """A socket at this address alone, at a port that the kernel chooses.

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
        """Until each peer was served once, or nobody was connected for `patience` seconds."""
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
            # The other side says what became of it; here the next one is waiting.
            pass
        finally:
            self._count(-1)

    def _give(self, connection: socket.socket, address: str) -> None:
        sent = 0
        try:
            connection.settimeout(_THINKING)
            _send_framed(connection, self.listing)
            with connection.makefile("rb") as said:
                wanted = json.loads(_framed(cast(BinaryIO, said)))
            connection.settimeout(_SILENCE)
            for n in wanted:
                sent += _send_file(connection, *self.files[int(n)])
        except IndexError as error:
            raise CopyFailed("it asks for what is not on the list") from error
        finally:
            self.sent[address] = sent


def _is_invited(connection: socket.socket, token: str) -> bool:
    nonce = secrets.token_bytes(_NONCE)
    connection.sendall(nonce)
    with connection.makefile("rb", buffering=0) as said:
        return hmac.compare_digest(_exactly(cast(BinaryIO, said), _NONCE), _proof(token, nonce))


def _proof(token: str, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), nonce, "sha256")


def _send_file(connection: socket.socket, path: Path, size: int) -> int:
    if not size:
        return 0
    with open(path, "rb") as content:
        if connection.sendfile(content, count=size) != size:
            raise CopyFailed(f"{path} has become shorter")
    return size


class Receiver:
    """The other end of a `Sender`, once it has taken the token. `listing` is the list that was promised."""

    def __init__(self, connection: socket.socket, digest: str) -> None:
        self._connection = connection
        self._stream = cast(io.BufferedReader, connection.makefile("rb", buffering=1 << 20))
        self._told = time.monotonic()
        self.listing = _framed(cast(BinaryIO, self._stream))
        if hashlib.sha256(self.listing).hexdigest() != digest:
            raise CopyFailed("the list of files is not the one that ssh has announced")

    def take(
        self, wanted: Sequence[tuple[int, Listed]], into: Path, on_bytes: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Bring files into the folder `into`; `wanted` has each one's place in the list.

        Raises:
            CopyFailed: the connection broke off, or a file does not have the hash of the list; that file is gone.
        """
        _send_framed(self._connection, json.dumps([n for n, _ in wanted]).encode())
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
                f"{listed.path} did not arrive as it was announced",
                cause=f"expected sha256 {listed.sha256}, found {found}",
            )

    def _pour(self, size: int, out: BinaryIO, buffer: memoryview) -> str:
        """Write the next `size` bytes of the stream; their sha256."""
        digest = hashlib.sha256()
        while size:
            got = self._stream.readinto(buffer[: min(size, len(buffer))])
            if not got:
                raise CopyFailed("the other node broke off", hint="run the same command again: it goes on")
            digest.update(buffer[:got])
            out.write(buffer[:got])
            size -= got
        return digest.hexdigest()


@contextmanager
def receiving(address: str, port: int, token: str, digest: str, own_address: str = "") -> Iterator[Receiver]:
    """The files that are offered at `address`, asked for from `own_address`; `digest` is the sha256 of their list.

    Raises:
        CopyFailed: it cannot be reached, refuses the token, breaks off, or has another list.
    """
    source = (own_address, 0) if own_address else None
    try:
        with socket.create_connection((address, port), timeout=_GREETING, source_address=source) as connection:
            connection.sendall(_proof(token, _read_nonce(connection)))
            connection.settimeout(_SILENCE)
            yield Receiver(connection, digest)
    except (ConnectionError, TimeoutError) as error:
        raise CopyFailed(f"the copy from {address} broke off: {error}") from error


def _read_nonce(connection: socket.socket) -> bytes:
    # Unbuffered: what comes after it belongs to the next reader.
    with connection.makefile("rb", buffering=0) as said:
        return _exactly(cast(BinaryIO, said), _NONCE)


def _send_framed(connection: socket.socket, content: bytes) -> None:
    connection.sendall(len(content).to_bytes(_LENGTH, "big") + content)


def _framed(said: BinaryIO) -> bytes:
    length = int.from_bytes(_exactly(said, _LENGTH), "big")
    if length > _LONGEST_LIST:
        raise CopyFailed(f"a list of {length} bytes is too long")
    return _exactly(said, length)


def _exactly(said: BinaryIO, length: int) -> bytes:
    whole = bytearray()
    while len(whole) < length:
        more = said.read(length - len(whole))
        if not more:
            raise CopyFailed("the other node does not take the token, or broke off")
        whole += more
    return bytes(whole)
