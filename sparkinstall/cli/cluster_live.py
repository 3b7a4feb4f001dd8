"""Progress of several nodes: on a terminal one line per node and phase, otherwise plain lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from msgspec import Struct, field

from sparkinstall.cli.live_output import OUTCOMES, LiveTable, Row, duration, shown
from sparkinstall.cluster import ssh
from sparkinstall.cluster.orchestrate import Cluster, ClusterOptions, Done, Line, Started, Tell
from sparkinstall.cluster.protocol import Fetched
from sparkinstall.cluster.remote import Member, RemoteNode
from sparkinstall.cluster.uploads import Upload
from sparkinstall.redaction import redact

# Phases that apply nothing have a more specific word than "up to date".
_DONE = {
    **dict.fromkeys(("look", "identify", "compare", "token", "status", "ready", "models", "prepare"), "asked"),
    **dict.fromkeys(("tcp-bandwidth", "rdma-bandwidth", "nccl-bandwidth"), "measured"),
    **dict.fromkeys(("copy", "sync"), "copied"),
    "reach": "reached", "confirm": "confirmed", "verify": "proven", "uninstall": "uninstalled",
    "answer": "answered", "logs": "read", "restore": "restored",
}  # fmt: skip


class Watch:
    """The live view of these hosts. It opens with the first event, and can be closed while a question is asked.

    Nodes report in parallel.
    """

    def __init__(self, hosts: Sequence[str], verbose: bool) -> None:
        self._hosts, self._verbose = hosts, verbose
        self._view: AbstractContextManager[Tell] | None = None
        self._tell: Tell
        self._guard = threading.Lock()

    def tell(self, event: Started | Line | Done) -> None:
        with self._guard:
            if self._view is None:
                self._view = shown(_Screen(self._hosts), _Lines(self._hosts), self._verbose)
                self._tell = self._view.__enter__()
            self._tell(event)

    def end(self) -> None:
        with self._guard:
            view, self._view = self._view, None
        if view is not None:
            view.__exit__(None, None, None)


@contextmanager
def connected(
    members: Sequence[Member],
    options: ClusterOptions,
    verbose: bool,
    words: Callable[[Member], Sequence[str]] = lambda _: (),
    files: tuple[Upload, ...] = (),
) -> Iterator[Cluster]:
    """Yield the nodes with a live view; their connections end with the context.

    Args:
        words, files: the settings of a node as options, and the files that they name.
    """
    with ssh.sockets() as sockets:
        nodes = [RemoteNode(each, ssh.Ssh(each.host, sockets), verbose, words(each), files) for each in members]
        watch = Watch([each.host for each in members], verbose)
        try:
            yield Cluster(nodes, options, watch.tell, watch.end)
        finally:
            watch.end()
            for node in nodes:
                node.ssh.close()


class _Progress(Struct):
    since: float = field(default_factory=time.monotonic)
    line: str = ""
    done: Done | None = None


class _Screen(LiveTable):
    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__(3, 9, max(map(len, hosts)), 8)
        self._rows: dict[tuple[str, str], _Progress] = {}
        self._hosts = list(hosts)

    def take(self, event: Started | Line | Done) -> None:
        with self.guard:
            row = self._rows.setdefault((event.phase, event.host), _Progress())
            if isinstance(event, Line):
                row.line = _without_time(event.text) or row.line
            elif isinstance(event, Done):
                row.done = event

    def rows(self) -> Iterator[Row]:
        """Rows by phase in order of start, then by node in order of the command line."""
        phases = list(dict.fromkeys(phase for phase, _ in self._rows))
        order = sorted(self._rows, key=lambda each: (phases.index(each[0]), self._hosts.index(each[1])))
        before = ""
        for phase, host in order:
            row, names = self._rows[phase, host], (phase if phase != before else "", host)
            before = phase
            if row.done:
                yield self.ended(row.done.outcome, names, row.done.seconds or None, _outcome(row.done))
            else:
                yield self.running(names, row.since, redact(row.line))


class _Lines:
    """Each line prefixed with its node."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._width = max(map(len, hosts))
        self._guard = threading.Lock()

    def take(self, event: Started | Line | Done) -> None:
        text = _as_line(event)
        if text:
            with self._guard:
                print(f"{event.host:{self._width}} │ {redact(text)}", file=sys.stderr, flush=True)


def _as_line(event: Started | Line | Done) -> str:
    match event:
        case Started(_, phase):
            return f"{phase}: begins"
        case Line(_, _, text):
            return f"  {_without_time(text)}" if text.strip() else ""
        case Done():
            took = f" ({duration(event.seconds)})" if event.seconds else ""
            return f"{event.phase}: {_outcome(event)}{took}"


def _without_time(line: str) -> str:
    """Return a node's log line without its time."""
    head, _, rest = line.partition(" ")
    return rest if len(head) == 8 and head[2] == head[5] == ":" else line


def _outcome(done: Done) -> str:
    if done.outcome == "failed":
        more = f" (and {len(done.problems) - 1} more)" if len(done.problems) > 1 else ""
        return f"failed: {done.problems[0].message}{more}" if done.problems else "failed"
    if isinstance(done.data, Fetched) and done.data.warning:
        return f"warning: {done.data.warning}"
    return _DONE.get(done.phase, OUTCOMES[done.outcome])
