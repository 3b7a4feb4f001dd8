"""The router of a network namespace: it forwards DNS, HTTP and HTTPS to this machine's network, and nothing else.

`tests.lab.fleet` runs it in the namespace. It listens for connections to any address, returns to the network of this
machine, and forwards each to its destination. TLS is end to end, and the nodes need no settings. It ends with its
standard input, and so with the process that started it.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import cast

WEB_PORTS = (80, 443)
DNS_PORT = 53
NEW_NETWORK = 0x40000000  # CLONE_NEWNET
TRANSPARENT = 19  # IP_TRANSPARENT: accept connections to addresses that are not this machine's
NAME_SECONDS = 5
CHUNK = 1 << 20


async def relay(router: str, network_of: int) -> None:
    """Serve in `router`'s namespace through the network namespace of the process `network_of`."""
    # Its own address answers only DNS: a web server of this machine is not the router's.
    web = [_listening("0.0.0.0", port) for port in WEB_PORTS]
    names = _listening(router, DNS_PORT)
    queries = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    queries.bind((router, DNS_PORT))
    _enter_network(network_of)
    server = _name_server()
    for listener in web:
        await asyncio.start_server(lambda r, w: _join(r, w, w.get_extra_info("sockname")), sock=listener)
    await asyncio.start_server(lambda r, w: _join(r, w, (server, DNS_PORT)), sock=names)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Names(server), sock=queries)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def _listening(address: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_IP, TRANSPARENT, 1)
    listener.bind((address, port))
    listener.listen(128)
    return listener


def _enter_network(pid: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open("rb") as network:
        if library.setns(network.fileno(), NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), f"the network of process {pid} cannot be entered")


def _name_server() -> str:
    for line in Path("/etc/resolv.conf").read_text().splitlines():
        if line.startswith("nameserver") and ":" not in line:
            return line.split()[1]
    return "127.0.0.1"


async def _join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int]) -> None:
    with suppress(OSError):
        far_reader, far_writer = await asyncio.open_connection(*target[:2])
        await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))
        far_writer.close()
    writer.close()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await source.read(CHUNK):
            target.write(piece)
            await target.drain()
        target.write_eof()


class _Names(asyncio.DatagramProtocol):
    """Forwards DNS queries to this machine's name server."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._asked: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Before Python 3.12 asyncio's datagram transport is no subclass of this.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        task = asyncio.ensure_future(self._ask(data, addr))
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def _ask(self, question: bytes, asker: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query, suppress(OSError, TimeoutError):
            query.setblocking(False)
            query.connect((self._server, DNS_PORT))
            await loop.sock_sendall(query, question)
            answer = await asyncio.wait_for(loop.sock_recv(query, 65535), NAME_SECONDS)
            self._transport.sendto(answer, asker)


if __name__ == "__main__":
    asyncio.run(relay(sys.argv[1], int(sys.argv[2])))
