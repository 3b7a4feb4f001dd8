"""Samples of several nodes: each takes its own and announces them through ssh; the terminal receives them as they come.

A node that samples itself needs no open port, and costs it no new process and no new connection for each sample.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from msgspec.structs import replace

from sparkinstall.cluster import protocol, ssh
from sparkinstall.cluster.protocol import announce
from sparkinstall.cluster.remote import Member, RemoteNode
from sparkinstall.core.session import Session
from sparkinstall.errors import Interrupted, NeedsRoot, Problem
from sparkinstall.facts.listening import stranger_at_the_api
from sparkinstall.measure.samples import Sample, Sampler, source_of, taken
from sparkinstall.probes.vllm_client import key_of
from sparkinstall.system import processes

AGAIN = 10.0
"""Seconds until a node that could not be reached is tried again."""


# --- on a node


def own_sampler(session: Session) -> Sampler:
    """Return what samples this node. Where sudo asks for a password its key cannot be read, and /metrics says so."""
    key = ""
    if session.node.role != "worker":
        with suppress(NeedsRoot):
            key = "" if stranger_at_the_api(session.node, session.system) else key_of(session.node, session.system)[0]
    return Sampler(source_of(session, key))


def announce_samples(sampler: Sampler, interval: float) -> None:
    """Announce a sample at each interval, until this process is ended."""
    for sample in taken(sampler, interval):
        announce(sample)


# --- at the terminal


class Nodes:
    """Nodes over ssh, and this one if it has a `sampler`, that are sampled until the context ends."""

    def __init__(self, hosts: Sequence[str], interval: float, sampler: Sampler | None = None) -> None:
        self._hosts, self._interval, self._sampler = hosts, interval, sampler
        self._come: queue.SimpleQueue[Sample] = queue.SimpleQueue()

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of all nodes as they come. A node that cannot be reached is a sample with a trouble."""
        with ssh.sockets() as sockets:
            nodes = [
                RemoteNode(Member(host, "", rank, ""), ssh.Ssh(host, sockets)) for rank, host in enumerate(self._hosts)
            ]
            works = [threading.Thread(target=self._watch, args=(node,), daemon=True) for node in nodes]
            if self._sampler:
                works.append(threading.Thread(target=self._watch_here, args=(self._sampler,), daemon=True))
            try:
                for each in works:
                    each.start()
                while True:
                    yield self._come.get()
            finally:
                processes.stop_all()

    def _watch(self, node: RemoteNode) -> None:
        while True:
            try:
                self._call(node)
                trouble = "sparkinstall has ended there"
            except Interrupted:
                return
            except Problem as problem:
                why = problem.cause or "".join(problem.output[-1:])
                trouble = f"{problem.message}: {why}" if why else problem.message
            self._come.put(Sample(node.host, time.time(), trouble=trouble))
            time.sleep(AGAIN)

    def _call(self, node: RemoteNode) -> None:
        def listen(line: str) -> None:
            if found := protocol.announced(line, Sample):
                # By the name that the user has for it.
                self._come.put(replace(found, node=node.host))

        words = ("node", "watch", f"{self._interval:g}")
        reply = node.call(protocol.Identity, *words, on_line=listen)
        for problem in reply.problems:
            raise problem

    def _watch_here(self, sampler: Sampler) -> None:
        for sample in taken(sampler, self._interval):
            self._come.put(sample)
