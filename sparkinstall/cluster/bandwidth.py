"""Bandwidth between two nodes, directed by one terminal: one node answers once, the other asks and reports the result.

The answering side listens at its QSFP address, at ports that our firewall closes to all but the link. It ends by
itself: after the measurement, after a time limit, or when the terminal is gone.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall import ray_ports
from sparkinstall.cluster.protocol import Asked, Listening, Measurable, Reply, Responded, announce
from sparkinstall.cluster.remote import Announcement, OnLine, RemoteNode
from sparkinstall.core.checks import ProbeResult
from sparkinstall.errors import Interrupted, Problem
from sparkinstall.facts import card, qsfp
from sparkinstall.node import Node
from sparkinstall.probes import Finding, bandwidth, skipped
from sparkinstall.probes.bandwidth import KINDS, Kind, Measured, Program
from sparkinstall.system import Reader, Result, processes

# Seconds until a program listens.
_PATIENCE = 20.0
_LIMIT = bandwidth.NCCL_LIMIT + 10


class NotMeasured(Problem):
    """A measurement between two nodes failed."""


# --- on a node


def measurable(node: Node, on: Reader) -> Measurable:
    """Return for each kind why this node cannot take part, or ""."""
    return Measurable({kind: _why_not(node, on, kind) for kind in KINDS})


def _why_not(node: Node, on: Reader, kind: Kind) -> str:
    try:
        return bandwidth.why_not(node, on, kind)
    except Problem as problem:
        return problem.message


def respond(node: Node, on: Reader, kind: Kind) -> Responded:
    """Run the answering side once; announce its ports when it listens at all of them.

    Raises:
        NotMeasured: no port is free, or the answering side does not start to listen.
    """
    ports = _free_ports(on, bandwidth.count(kind))
    with _counting(node, on) as grown, _running(on, bandwidth.programs(node, on, kind, ports)) as running:
        _wait_until_listening(on, ports, running)
        announce(Listening(tuple(ports)))
    return Responded(grown)


def ask(node: Node, on: Reader, kind: Kind, peer: str, ports: Sequence[int]) -> Asked:
    """Run the asking side against the node at `peer`, its address on the first half."""
    with _counting(node, on) as grown, _running(on, bandwidth.programs(node, on, kind, ports, peer)) as running:
        output = {over: (each.result().out, each.result().err) for over, each in running.items()}
    return Asked(bandwidth.understood(kind, output), grown)


@contextmanager
def _counting(node: Node, on: Reader) -> Iterator[dict[str, int]]:
    """A mapping that at the end of the context holds the error counters that grew."""
    grown: dict[str, int] = {}
    port = qsfp.port_to_look_at(on, node)
    before = card.counted(on, port)
    yield grown
    grown.update(card.grown(before, card.counted(on, port)))


@contextmanager
def _running(on: Reader, programs: Sequence[Program]) -> "Iterator[dict[str, Future[Result]]]":
    """Run the programs in parallel; their results by interface or device. None of them outlives the context."""
    with ThreadPoolExecutor(max_workers=len(programs)) as pool:
        try:
            running = {each.over: pool.submit(on.ask, *each.argv, timeout=_LIMIT) for each in programs}
            yield running
            wait(running.values())
        except BaseException:
            processes.stop_all()
            raise


def _free_ports(on: Reader, count: int) -> list[int]:
    """The last free ports of vLLM's range, which our firewall closes to all but the link."""
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
            why = bandwidth.complaint(ended.out, ended.err) if ended else f"no port is open after {_PATIENCE:g} s"
            raise NotMeasured(f"the answering side of a measurement did not start: {why}", hint=_START)
        time.sleep(0.05)


_START = "`sparkinstall verify --level link` on that node checks the link"


# --- at the terminal


class Between(Struct, frozen=True):
    """The bandwidth from the first of `hosts` to the second, and its verdict. `seconds` is wall time."""

    hosts: tuple[str, str]
    kind: Kind
    finding: Finding
    seconds: float = 0.0
    measured: Measured | None = None

    @property
    def result(self) -> ProbeResult:
        """The result of the probe that this measurement replaces."""
        return ProbeResult.of(bandwidth.declared(self.kind, lambda _: self.finding), self.finding, self.seconds)


class Measurement(Struct):
    """One measurement: `asking` sends to `responding`."""

    asking: RemoteNode
    responding: RemoteNode
    kind: Kind
    _measured: Measured | None = None
    _why: str = ""
    _lost: dict[str, Mapping[str, int]] = field(default_factory=dict)
    _listening: Announcement[Listening] = field(default_factory=lambda: Announcement(Listening))

    @property
    def result(self) -> Measured:
        """The result, once both nodes have done their work."""
        measured = self._measured or Measured(self.kind, {}, why=self._why or "no node gave a reply")
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
                self._listening.end()
        for each in reply.problems[:1]:
            self._why = f"{node.host}: {each.message}" + (f" ({each.cause})" if each.cause else "")
        if reply.data and reply.data.lost:
            self._lost[node.host] = reply.data.lost
        return Reply()

    def _respond(self, on_line: OnLine) -> Reply[Responded]:
        argv = ("node", "respond", self.kind, *self.responding.words)
        return self.responding.call(Responded, *argv, on_line=self._listening.listen(on_line))

    def _ask(self, on_line: OnLine) -> Reply[Asked]:
        listening = self._listening.wait()
        if listening is None:
            return Reply()
        argv = ("node", "ask", self.kind, self.responding.member.address, *map(str, listening.answers_at))
        reply = self.asking.call(Asked, *argv, *self.asking.words, on_line=on_line)
        if reply.data and not reply.problems:
            self._measured = reply.data.measured
        return reply


def ways(head: RemoteNode, worker: RemoteNode, kind: Kind) -> list[tuple[RemoteNode, RemoteNode]]:
    """The pairs of sender and receiver: both directions, but one for NCCL, where both send at once."""
    return [(head, worker)] if kind == "nccl" else [(head, worker), (worker, head)]


def left_out(
    asking: RemoteNode, responding: RemoteNode, kind: Kind, why: Mapping[str, Mapping[str, str]]
) -> Between | None:
    """A skipped measurement where one of the two nodes cannot take part; None: both can."""
    for node in (asking, responding):
        if reason := why.get(node.host, {}).get(kind, "it gave no reply"):
            return Between((asking.host, responding.host), kind, skipped(f"{node.host}: {reason}"))
    return None
