"""`sparkinstall watch`: how the served model does, in a view that is renewed; changes nothing."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from msgspec import to_builtins

from sparkinstall import given
from sparkinstall.cli import options
from sparkinstall.cli.json_output import envelope
from sparkinstall.cli.run_command import CommandResult, Output, verb
from sparkinstall.cli.watch_view import Seen, Watched, show, shown_live
from sparkinstall.cluster.orchestrate import require_hosts
from sparkinstall.cluster.watching import Nodes
from sparkinstall.core.ask import LOOPBACK, server_of
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import BadUsage, Exit, Problem
from sparkinstall.measure.record import Record, recorded
from sparkinstall.measure.rounds import slo_of
from sparkinstall.measure.samples import Sample, Sampler, Source, source_of, taken

_SLO = "ttft=500ms,itl=250ms"
# Seconds: a record can have a gap of a night.
_LONGEST_PAUSE = 10.0
_NO_METRICS = "`sparkinstall serve status` tells whether it serves; with `--url`, check the address"

Hosts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[HOST]...", help="Nodes over ssh; none: this one.", show_default=False),
]
All = Annotated[bool, typer.Option("--all", help="On a head: this node and its workers, over ssh.")]
Url = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Watch another server, such as http://HOST:8000.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="The file with the API's key.", readable=False)
]
Once = Annotated[bool, typer.Option("--once", help="Take two samples, show the readings, and end.")]
Interval = Annotated[
    float,
    typer.Option(
        "--interval",
        metavar="SECONDS",
        help="From one sample to the next.",
        min=0.2,
        max=3600,
        callback=options.a_number,
    ),
]
Span = Annotated[
    float,
    typer.Option(
        "--window",
        metavar="SECONDS",
        help="What latencies and shares are taken over.",
        min=1,
        max=86400,
        callback=options.a_number,
    ),
]
SloText = Annotated[
    str, typer.Option("--slo", metavar="LIMITS", help="Limits of the 95th percentiles; a latency over its own is red.")
]
RecordFile = Annotated[
    Path | None, typer.Option("--record", metavar="FILE", help="Write each sample to a new file.", readable=False)
]
Replay = Annotated[
    Path | None,
    typer.Option("--replay", metavar="FILE", help="Show a record again instead of a server.", readable=False),
]


class NoMetrics(Problem):
    """The server tells nothing."""

    code = "no-metrics"


@verb("watch", "root", "config", reads_only=True)
def watch(
    target: Target,
    output: Output,
    hosts: Hosts = None,
    everyone: All = False,
    url: Url = None,
    key_file: KeyFile = None,
    once: Once = False,
    interval: Interval = 2.0,
    window: Span = 60.0,
    slo: SloText = _SLO,
    record: RecordFile = None,
    replay: Replay = None,
) -> CommandResult:
    """Show how the served model does: latencies, load, cache, memory and GPU, until Ctrl-C."""
    watched = Watched(window, slo_of(slo, 95), hosts or ())
    if replay:
        if url or key_file or record or hosts or everyone:
            raise BadUsage("--replay shows a record, and asks no server", hint="omit the nodes, --url and --record")
        samples = recorded(given.absolute(replay, "--replay"))
        # A record is shown as fast as it was taken, to people.
        samples = samples if once or output.json or not sys.stdout.isatty() else _paced(samples)
    else:
        count, samples = _asked(target, hosts or (), everyone, url, key_file, interval)
        samples = _until_all_have(count, samples) if once else samples
    with Record(given.absolute(record, "--record")) if record else nullcontext() as file:
        for_each = _kept(samples, file) if file else samples
        return _once(watched, for_each) if once else _live(watched, for_each, output)


def _asked(
    target: Target, hosts: Sequence[str], everyone: bool, url: str | None, key_file: Path | None, interval: float
) -> tuple[int, Iterator[Sample]]:
    """Return how many nodes are watched, and their samples as they come."""
    if (url or key_file) and (hosts or everyone):
        raise BadUsage("--url is for one server", hint="name nodes, or a server")
    require_hosts(hosts)
    if hosts:
        return len(hosts), Nodes(hosts, interval).samples()
    session = open_session(target)
    if session.node.rehearsal and not url:
        raise BadUsage("a rehearsal starts no services", hint="name a server: `--url http://HOST:8000`")
    if everyone:
        if not session.node.peers or session.node.role != "head":
            raise BadUsage(
                "this node is no head with workers", hint="name the nodes: `sparkinstall watch spark-1 spark-2`"
            )
        workers = session.node.peers
        return len(workers) + 1, Nodes(workers, interval, Sampler(_source(session, None, None))).samples()
    return 1, taken(Sampler(_source(session, url, key_file)), interval)


def _source(session: Session, url: str | None, key_file: Path | None) -> Source:
    if url is None and session.node.role == "worker":
        return source_of(session)
    server = server_of(session, url, key_file)
    if url is None:
        return source_of(session, server.key)
    host = urlsplit(server.url).hostname
    return Source(urlsplit(server.url).netloc, server.url, server.key, session.system if host in LOOPBACK else None)


def _until_all_have(count: int, samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield samples until each of so many nodes has had two, or one with a trouble."""
    had: Counter[str] = Counter()
    for sample in samples:
        yield sample
        had[sample.node] += 2 if sample.trouble and count > 1 else 1
        if len(had) == count and min(had.values()) >= 2:
            return


def _paced(samples: Iterable[Sample]) -> Iterator[Sample]:
    before: float | None = None
    for sample in samples:
        if before is not None:
            time.sleep(min(max(0.0, sample.at - before), _LONGEST_PAUSE))
        before = sample.at
        yield sample


def _kept(samples: Iterable[Sample], record: Record) -> Iterator[Sample]:
    for sample in samples:
        record.add(sample)
        yield sample


def _once(watched: Watched, samples: Iterable[Sample]) -> CommandResult:
    for sample in samples:
        watched.take(sample)
    problems = tuple(map(_no_metrics, (each for each in watched.nodes if each.readings.trouble)))
    code = Exit.FAILED if len(problems) == len(watched.nodes) else Exit.SOME_NODES
    return CommandResult(code if problems else Exit.GOOD, _data(watched.nodes), lambda: show(watched), problems)


def _no_metrics(of: Seen) -> NoMetrics:
    said = next((each for each in of.advice if each.reading == "server" and each.name != "no-answer"), None)
    return NoMetrics(
        f"{of.readings.node}: {of.readings.trouble}",
        cause=said.means if said else "",
        hint=said.do if said else _NO_METRICS,
    )


def _live(watched: Watched, samples: Iterable[Sample], output: Output) -> CommandResult:
    """Show until Ctrl-C, which is how a watch ends, or until a record ends."""
    count = 0
    with nullcontext() if output.json else shown_live(watched) as view:
        try:
            for sample in samples:
                seen, count = watched.take(sample), count + 1
                if view:
                    view(seen)
                else:
                    print(envelope("watch", Exit.GOOD, _data([seen]), ()), flush=True)
        except KeyboardInterrupt:
            pass
    return CommandResult(data={"samples": count})


def _data(nodes: Iterable[Seen]) -> dict[str, Any]:
    return {"nodes": [{**to_builtins(each.readings), "advice": to_builtins(each.advice)} for each in nodes]}
