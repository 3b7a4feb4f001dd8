"""A node's services, and who reaches them: `services.py serve LINK_ADDRESS` and `services.py ask ADDRESS:PORT...`.

`serve` listens on every interface at the ports of Ray, the API and a user's service, and at the link's address at an
ephemeral port, as NCCL does; it writes the senders of UDP packets to `heard`. `ask` prints those that accept a
connection. It runs in a node and uses only the standard library.
"""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RAY = (6379, 10001, 20000, 20999)
API = 8000
MEETING = 29501
OWN = 9999
EPHEMERAL = 40123
UDP = 9998
SECONDS = 1.0


def serve(link: str) -> None:
    """Listen for ever."""
    kept = [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=99)
            for port in (*RAY, API, MEETING, OWN)]  # fmt: skip
    kept.append(socket.create_server((link, EPHEMERAL), backlog=99))
    packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    packets.bind(("0.0.0.0", UDP))
    with ThreadPoolExecutor(len(kept)) as pool:
        for each in kept:
            pool.submit(_accept, each)
        print("ready", flush=True)
        while True:
            _, sender = packets.recvfrom(99)
            with Path("/run/heard").open("a") as heard:
                heard.write(f"{sender[0]}\n")


def _accept(listener: socket.socket) -> None:
    while True:
        listener.accept()[0].close()


def ask(places: list[str]) -> list[str]:
    """Those of `places` that accept a connection."""
    with ThreadPoolExecutor(len(places)) as pool:
        return [place for place, opens in zip(places, pool.map(_opens, places), strict=True) if opens]


def _opens(place: str) -> bool:
    address, _, port = place.rpartition(":")
    try:
        with socket.create_connection((address.strip("[]"), int(port)), timeout=SECONDS):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(ask(sys.argv[2:])))
