"""Bandwidth between two nodes, as one terminal leads it: one node answers once, the other asks and says what came over.

The side that answers listens at its QSFP address, at ports that our firewall closes to everybody else, and ends by
itself: when it was asked, when its time is over, or when the terminal is gone.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall import ray_ports
from sparkinstall.cluster.protocol import Asked, Listening, Reply, Responded, announced
from sparkinstall.cluster.remote import OnLine, RemoteNode
from sparkinstall.errors import Interrupted, Problem
from sparkinstall.facts import card, qsfp
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, bandwidth, skipped
from sparkinstall.probes.bandwidth import KINDS, Kind, Measured, Program
from sparkinstall.system import Reader, Result, processes

# Seconds that a program may take until it listens.
_PATIENCE = 20.0
_LIMIT = bandwidth.NCCL_LIMIT + 10


class NotMeasured(Problem):
    """A measurement between two nodes came to nothing."""


# --- on a node


def reasons(node: Node, on: Reader) -> dict[str, str]:
    """For each kind why this node cannot take part; empty where it can."""
    return {kind: _why_not(node, on, kind) for kind in KINDS}


def _why_not(node: Node, on: Reader, kind: Kind) -> str:
    try:
        return bandwidth.why_not(node, on, kind)
    except Problem as problem:
        return problem.message


def respond(node: Node, on: Reader, kind: Kind, announce: Callable[[Listening], None]) -> Responded:
    """Run the answering side once; `announce` is called when it listens at all of its ports.

    Raises:
        NotMeasured: it does not come to listen.
    """
    ports = _free_ports(on, bandwidth.count(kind))
    with _counting(node, on) as grown, _running(on, bandwidth.programs(node, on, kind, ports)) as running:
        _wait_until_listening(on, ports, running)
        announce(Listening(tuple(ports)))
    return Responded(grown)


def ask(node: Node, on: Reader, kind: Kind, peer: str, ports: Sequence[int]) -> Asked:
    """Run the asking side against the node at `peer`, its address on the first half."""
    with _counting(node, on) as grown, _running(on, bandwidth.programs(node, on, kind, ports, peer)) as running:
        said = {over: (each.result().out, each.result().err) for over, each in running.items()}
    return Asked(bandwidth.understood(kind, said), grown)


@contextmanager
def _counting(node: Node, on: Reader) -> Iterator[dict[str, int]]:
    """Filled at the end with the counters of errors that have grown."""
    grown: dict[str, int] = {}
    port = qsfp.port_to_look_at(on, node)
    before = card.counted(on, port)
    yield grown
    grown.update(card.grown(before, card.counted(on, port)))


@contextmanager
def _running(on: Reader, programs: Sequence[Program]) -> "Iterator[dict[str, Future[Result]]]":
    """The programs side by side, by what each uses; none of them outlives the context."""
    with ThreadPoolExecutor(max_workers=len(programs)) as pool:
        try:
            running = {each.over: pool.submit(on.ask, *each.argv, timeout=_LIMIT) for each in programs}
            yield running
            wait(running.values())
        except BaseException:
            processes.stop_all()
            raise


def _free_ports(on: Reader, count: int) -> list[int]:
    """Ports from the end of vLLM's, which our firewall closes to all but the link."""
    known = range(ray_ports.LAST_OF_VLLM, ray_ports.FIRST_OF_VLLM - 1, -1)
    taken = _listening(on)
    free = [port for port in known if port not in taken][:count]
    if len(free) < count:
        raise NotMeasured("no port is free for a measurement", hint="stop what listens at 29600 - 29699 (`ss -ltn`)")
    return free


def _listening(on: Reader) -> set[int]:
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in (on.read(table) or b"").decode().splitlines()[1:]
    ]
    # 0A is TCP_LISTEN (include/net/tcp_states.h).
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def _wait_until_listening(on: Reader, ports: Sequence[int], running: Mapping[str, "Future[Result]"]) -> None:
    until = time.monotonic() + _PATIENCE
    while not _listening(on).issuperset(ports):
        ended = next((each.result() for each in running.values() if each.done()), None)
        if ended is not None or time.monotonic() > until:
            said = bandwidth.complaint(ended.out, ended.err) if ended else f"it listens nowhere after {_PATIENCE:g} s"
            raise NotMeasured(f"the answering side of a measurement did not start: {said}", hint=_START)
        time.sleep(0.05)


_START = "`sparkinstall verify --level link` there shows what is wrong with the link"


# --- at the terminal


class Between(Struct, frozen=True):
    """What came over from the first of `hosts` to the second, and what to think of it. `seconds` is wall time."""

    hosts: tuple[str, str]
    kind: Kind
    finding: Finding
    seconds: float = 0.0
    measured: Measured | None = None

    @property
    def probe(self) -> Probe:
        """The probe whose place it takes."""
        return bandwidth.declared(self.kind, lambda _: self.finding)


class Measurement(Struct):
    """One measurement: `asking` sends to `responding`; `words` are a node's settings as options."""

    asking: RemoteNode
    responding: RemoteNode
    kind: Kind
    words: Callable[[RemoteNode], list[str]]
    _measured: Measured | None = None
    _why: str = ""
    _lost: dict[str, Mapping[str, int]] = field(default_factory=dict)
    _ports: Sequence[int] | None = None
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def result(self) -> Measured:
        """What came of it; once both nodes have done their work."""
        measured = self._measured or Measured(self.kind, {}, why=self._why or "no node gave an answer")
        return replace(measured, lost=self._lost)

    def work(self, node: RemoteNode, on_line: OnLine) -> Reply[Responded]:
        """Run this node's part. A failed measurement is a result, not a failure of the phase."""
        reply: Reply[Responded | Asked]
        try:
            reply = self._respond(on_line) if node is self.responding else self._ask(on_line)
        except Interrupted:
            raise
        except Problem as problem:
            reply = Reply(problems=(problem,))
        finally:
            if node is self.responding:
                self._ready.set()
        for each in reply.problems[:1]:
            self._why = f"{node.host}: {each.message}" + (f" ({each.cause})" if each.cause else "")
        if reply.data and reply.data.lost:
            self._lost[node.host] = reply.data.lost
        return Reply()

    def _respond(self, on_line: OnLine) -> Reply[Responded]:
        def listen(line: str) -> None:
            if found := announced(line, Listening):
                self._ports = found.answers_at
                self._ready.set()
            else:
                on_line(line)

        words = self.words(self.responding)
        return self.responding.call(Responded, "node", "respond", self.kind, *words, on_line=listen)

    def _ask(self, on_line: OnLine) -> Reply[Asked]:
        while not self._ready.wait(1):
            processes.refuse_if_stopped()
        if self._ports is None:
            return Reply()
        argv = ("node", "ask", self.kind, self.responding.member.address, *map(str, self._ports))
        reply = self.asking.call(Asked, *argv, *self.words(self.asking), on_line=on_line)
        if reply.data and not reply.problems:
            self._measured = reply.data.measured
        return reply


def ways(head: RemoteNode, worker: RemoteNode, kind: Kind) -> list[tuple[RemoteNode, RemoteNode]]:
    """Who sends to whom: each to the other, but where both send at once anyway."""
    return [(head, worker)] if kind == "nccl" else [(head, worker), (worker, head)]


def left_out(
    asking: RemoteNode, responding: RemoteNode, kind: Kind, why: Mapping[str, Mapping[str, str]]
) -> Between | None:
    """What is said of a measurement that one of the two nodes cannot take part in; None: both can."""
    for node in (asking, responding):
        if reason := why.get(node.host, {}).get(kind, "it gave no answer"):
            return Between((asking.host, responding.host), kind, skipped(f"{node.host}: {reason}"))
    return None
