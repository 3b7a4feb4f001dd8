"""One look at a node: what its server tells, and how the machine does. A record is a file of them, one a line."""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from msgspec import Struct, field

from sparkinstall.core.session import Session
from sparkinstall.facts import card, gpu, machine, qsfp
from sparkinstall.facts.gpu import LiveGpu
from sparkinstall.facts.qsfp import LinkProblem, Port
from sparkinstall.measure.metrics_text import Told, told
from sparkinstall.measure.scrape import SECONDS, NotScraped, scrape
from sparkinstall.node import Node
from sparkinstall.system import Reader

GPU_SECONDS = 10.0
"""nvidia-smi takes more processor time than all else: it runs no more often than this."""


class Machine(Struct, frozen=True, omit_defaults=True):
    """The machine at the time of a sample. Bytes of the unified memory, of which `available` could still be taken.

    `gpu`: None if nvidia-smi tells nothing. `link_errors`: counters of the QSFP port that count what went wrong, by
    `interface counter`; `link_packets`: packets received, by interface; both since the boot, {} on a single node.
    """

    memory: int = 0
    available: int = 0
    gpu: LiveGpu | None = None
    link_errors: Mapping[str, int] = field(default_factory=dict)
    link_packets: Mapping[str, int] = field(default_factory=dict)


class Sample(Struct, frozen=True, omit_defaults=True):
    """What was seen of one node. `at`: seconds of the epoch; `took`: seconds of the scrape. `trouble`: why the server
    tells nothing, "" if it does; None: this node has no server, a worker. `machine`: None: it is not this node.
    """

    node: str
    at: float
    took: float = 0.0
    trouble: str | None = ""
    told: Told = field(default_factory=Told)
    machine: Machine | None = None


class Source(NamedTuple):
    """Whom to ask. `url`: "" without a server. `on`: the machine of the server; None: it is skipped. `of`: its link."""

    node: str
    url: str
    key: str = ""
    on: Reader | None = None
    of: Node | None = None


def source_of(session: Session, key: str = "") -> Source:
    """Return this node: a worker has no server. An API that a network may reach tells its metrics with its key only."""
    node = session.node
    url = "" if node.role == "worker" else f"http://127.0.0.1:{node.config.serving.port}"
    return Source(socket.gethostname(), url, key, session.system, node)


class Sampler:
    """Takes samples of one node."""

    def __init__(self, source: Source, seconds: float = SECONDS, clock: Callable[[], float] = time.time) -> None:
        self._source, self._seconds, self._clock = source, seconds, clock
        self._gpu: LiveGpu | None = None
        self._gpu_at = float("-inf")
        self._port = _port(source)

    def take(self) -> Sample:
        """Take one; a server that does not answer is a sample too."""
        began, at = time.monotonic(), self._clock()
        trouble, found = self._told()
        took = time.monotonic() - began
        return Sample(self._source.node, at, round(took, 4), trouble, found, self._machine(at))

    def _told(self) -> tuple[str | None, Told]:
        if not self._source.url:
            return None, Told()
        try:
            found = told(scrape(self._source.url, self._source.key, self._seconds))
        except NotScraped as error:
            return str(error), Told()
        return ("" if found.values else "/metrics has none of vLLM's metrics"), found

    def _machine(self, at: float) -> Machine | None:
        on = self._source.on
        if on is None:
            return None
        memory = machine.parse_meminfo(on.read("/proc/meminfo") or b"")
        total, available = (memory.get(each, 0) << 10 for each in ("MemTotal", "MemAvailable"))
        counted = card.counted(on, self._port) if self._port else card.Counted({}, {})
        return Machine(total, available, self._live_gpu(on, at), counted.errors, counted.packets)

    def _live_gpu(self, on: Reader, at: float) -> LiveGpu | None:
        if not 0 <= at - self._gpu_at < GPU_SECONDS:
            self._gpu, self._gpu_at = gpu.live(on), at
        return self._gpu


def _port(source: Source) -> Port | None:
    """Return the QSFP port of a node of several; None if there is none, or which one is unknown."""
    if source.on is None or source.of is None or not source.of.several:
        return None
    try:
        return qsfp.port_to_look_at(source.on, source.of)
    except LinkProblem:
        return None


def taken(sampler: Sampler, interval: float) -> Iterator[Sample]:
    """Yield a sample at each interval in seconds, for ever."""
    due = time.monotonic()
    while True:
        yield sampler.take()
        # After a scrape that took longer than the interval the next one follows at once, and no others catch up.
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
