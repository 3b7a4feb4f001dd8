"""A head and its workers in this process, each with a cache and a prefix of its own, at addresses of this machine."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from msgspec.structs import asdict, replace

from sparkinstall.cluster import artifacts
from sparkinstall.cluster.file_client import FileClient
from sparkinstall.cluster.file_server import DONE
from sparkinstall.cluster.protocol import Fetched, Introduction, Offer, Offered
from sparkinstall.config import ClusterConfig
from sparkinstall.node import Node
from sparkinstall.system.local import LocalReader
from tests.support.nodes import node_of

HEAD, WORKER, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@dataclass(frozen=True)
class Side:
    """A node whose files are all below `home`."""

    home: Path
    address: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.home / "cache/sparkinstall"

    @property
    def node(self) -> Node:
        # A config may not name these addresses.
        cluster = ClusterConfig("head" if self.address == HEAD else "worker", HEAD, (WORKER, OTHER), self.address)
        made = node_of(self.home, prefix=str(self.home / "opt"), **self.settings)
        return replace(made, rehearsal=False, cache=self.cache, config=replace(made.config, cluster=cluster))

    def fetch(self, offered: "Offering", *steps: str, **other: Any) -> Fetched:
        """Take what is missing; `other`: of the introduction to the head."""
        head = replace(offered.introduction, **other)
        return artifacts.fetch_missing(self.node, LocalReader(), steps, head, lambda *_: None)


@dataclass(frozen=True)
class Offering:
    """What a head announced, and its reply when all workers are done."""

    introduction: Introduction
    reply: "Future[Offered]"

    @property
    def sent(self) -> int:
        return self.reply.result(300).sent


@contextmanager
def offering(head: Side, *steps: str, workers: int = 1) -> Iterator[Offering]:
    """The head's artifacts of these steps, offered until so many workers are done or the context ends."""
    offers: Queue[Offer] = Queue()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(artifacts.serve, head.node, LocalReader(), steps, workers, "a-token", offers.put)
        introduction = Introduction(**asdict(offers.get(timeout=300)), token="a-token")
        try:
            yield Offering(introduction, reply)
        finally:
            # It ends by itself, unless the test has failed before all workers were done.
            for _ in range(workers if wait([reply], 60).not_done else 0):
                FileClient(HEAD, introduction).content(DONE)
