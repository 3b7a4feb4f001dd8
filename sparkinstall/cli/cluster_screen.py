"""How several nodes are shown: a line for each node and phase while they work, one plan for all, errors by node."""

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec import Struct, field
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sparkinstall.cli.live_output import duration
from sparkinstall.cli.text_output import console, plan_lines, sign
from sparkinstall.cluster.bandwidth import Between
from sparkinstall.cluster.drift import Comparison, Weight
from sparkinstall.cluster.orchestrate import Cluster, Done, Line, Started, Tell
from sparkinstall.cluster.protocol import Fetched
from sparkinstall.cluster.remote import RemoteNode
from sparkinstall.core.checks import ProbeResult
from sparkinstall.errors import Problem
from sparkinstall.redaction import redact

_WORDS = {"unchanged": "up to date", "changed": "done", "failed": "failed", "blocked": "not started"}
_ASKED = {"look": "asked", "compare": "asked", "token": "asked", "status": "asked", "reach": "reached",
          "confirm": "confirmed", "copy": "copied", "verify": "proven", "uninstall": "uninstalled",
          "ready": "asked", **{f"{kind}-bandwidth": "measured" for kind in ("tcp", "rdma", "nccl")}}  # fmt: skip


# What is between nodes has tables of its own, and is no node's fault alone.
_BETWEEN = ("measure", "compare")


@contextmanager
def watching(hosts: Sequence[str], verbose: bool) -> Iterator[Tell]:
    """Shows on stderr what the nodes do as long as the context lasts."""
    if sys.stderr.isatty() and not verbose:
        screen = _Screen(hosts)
        with Live(screen, console=console(stderr=True), refresh_per_second=8, transient=True):
            yield screen.take
        screen.leave(console(stderr=True))
    else:
        yield _Log(hosts, verbose).take


class _Row(Struct):
    since: float = field(default_factory=time.monotonic)
    line: str = ""
    done: Done | None = None


class _Screen:
    """One line for each node and phase, redrawn."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._rows: dict[tuple[str, str], _Row] = {}
        self._hosts = list(hosts)
        self._width = max(map(len, hosts))
        self._spinner = Spinner("dots")
        self._guard = threading.Lock()

    def take(self, event: Started | Line | Done) -> None:
        with self._guard:
            row = self._rows.setdefault((event.phase, event.host), _Row())
            if isinstance(event, Line):
                row.line = _without_time(event.text) or row.line
            elif isinstance(event, Done):
                row.done = event

    def __rich__(self) -> RenderableType:
        with self._guard:
            return self._table()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for width in (3, 9, self._width, 8):
            table.add_column(min_width=width, no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        before = ""
        for (phase, host), row in self._in_order():
            table.add_row(*self._cells(phase if phase != before else "", host, row))
            before = phase
        return table

    def _in_order(self) -> list[tuple[tuple[str, str], _Row]]:
        """By phase as they began, and by node as they were named: who is first to answer changes nothing."""
        phases = list(dict.fromkeys(phase for phase, _ in self._rows))
        return sorted(self._rows.items(), key=lambda each: (phases.index(each[0][0]), self._hosts.index(each[0][1])))

    def _cells(self, phase: str, host: str, row: _Row) -> tuple[RenderableType, ...]:
        if row.done:
            took = Text(duration(row.done.seconds) if row.done.seconds else "", style="dim", justify="right")
            return Text("  ") + sign(row.done.outcome), phase, host, took, Text(_outcome(row.done))
        now = time.monotonic()
        spun = self._spinner.render(now)
        mark = Text("  ") + (spun if isinstance(spun, Text) else Text("*"))
        took = Text(duration(now - row.since), style="dim", justify="right")
        return mark, phase, host, took, Text(redact(row.line), style="dim")

    def leave(self, out: Console) -> None:
        """Print the last state for good."""
        out.print(self._table())
        out.print()


class _Log:
    """Plain lines, each with its node in front."""

    def __init__(self, hosts: Sequence[str], verbose: bool) -> None:
        self._width = max(map(len, hosts))
        self._verbose = verbose
        self._guard = threading.Lock()

    def take(self, event: Started | Line | Done) -> None:
        text = self._text(event)
        if text:
            with self._guard:
                print(f"{event.host:{self._width}} │ {redact(text)}", file=sys.stderr, flush=True)

    def _text(self, event: Started | Line | Done) -> str:
        match event:
            case Started(_, phase):
                return f"{phase}: begins"
            case Line(_, _, text):
                return f"  {_without_time(text)}" if text.strip() else ""
            case Done():
                took = f" ({duration(event.seconds)})" if event.seconds else ""
                return f"{event.phase}: {_outcome(event)}{took}"
        return ""


def _without_time(line: str) -> str:
    """A node's own log line without its clock's time."""
    head, _, rest = line.partition(" ")
    return rest if len(head) == 8 and head[2] == head[5] == ":" else line


def _outcome(done: Done) -> str:
    if done.outcome == "failed":
        more = f" (and {len(done.problems) - 1} more)" if len(done.problems) > 1 else ""
        return f"failed: {done.problems[0].message}{more}" if done.problems else "failed"
    if isinstance(done.data, Fetched) and done.data.warning:
        return f"warning: {done.data.warning}"
    return _ASKED.get(done.phase, _WORDS[done.outcome])


# --- one plan for all


def show_plan(cluster: Cluster) -> None:
    """What every node is, what its checks say, and what each step would change; equal nodes are told once."""
    out = console()
    out.print("[bold]Nodes[/]")
    nodes = _grid(1, max(len(node.host) for node in cluster.nodes), len("worker"), None)
    for node in cluster.nodes:
        nodes.add_row(
            "", node.host, node.member.role, f"{node.member.address} on the link" if len(cluster.nodes) > 1 else ""
        )
    out.print(Padding(nodes, (0, 0, 0, 2), expand=False))
    _show_checks(cluster, out)
    if not any(node.look.steps for node in cluster.nodes):
        return
    out.print("[bold]Plan[/]")
    table = _grid(1, 12, None, None)
    for name in dict.fromkeys(step.step for node in cluster.nodes for step in node.look.steps):
        for at, (mark, whose, line) in enumerate(_told_once(cluster.nodes, name)):
            table.add_row(sign(mark), name if at == 0 else "", whose, Text(redact(line)))
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _grid(*widths: int | None) -> Table:
    table = Table.grid(padding=(0, 2))
    for width in widths:
        table.add_column(min_width=width, no_wrap=width is not None)
    return table


def _show_checks(cluster: Cluster, out: Console) -> None:
    nodes, ignored = cluster.nodes, cluster.options.ignore
    checks = [(node.host, each) for node in nodes for each in node.look.results]
    passed, asked = sum(each.finding.verdict == "pass" for _, each in checks), len({host for host, _ in checks})
    count = f"{asked} nodes" if asked == len(nodes) else f"{asked} of {len(nodes)} nodes; the others gave no answer"
    out.print(f"[bold]Preflight[/]  {passed} of {len(checks)} checks passed on {count}" if checks else _NOBODY)
    told: dict[tuple[str, str, str, str], list[str]] = {}
    for host, each in checks:
        if each.finding.verdict in ("warn", "fail"):
            told.setdefault(_judged(each, ignored), []).append(host)
    table = _grid(1, 12, None, None)
    for (verdict, name, found, hint), hosts in told.items():
        table.add_row(sign(verdict), name, _whose(hosts, nodes), escape(redact(found)))
        table.add_row("", "", "", f"[dim]→[/] {escape(hint)}")
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


_NOBODY = "[bold]Preflight[/]  no node gave an answer"


def _judged(check: ProbeResult, ignored: Sequence[str]) -> tuple[str, str, str, str]:
    """Verdict, name, finding and hint; an ignored failure is shown as a warning."""
    name, finding = check.probe.name, check.finding
    if finding.verdict == "fail" and name in ignored:
        return "warn", name, finding.found, f"ignored: --ignore {name}"
    return finding.verdict, name, finding.found, finding.hint


def _told_once(nodes: Sequence[RemoteNode], step: str) -> list[tuple[str, str, str]]:
    """Mark, nodes and words of each thing there is to say of a step."""
    told: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        for report in (each for each in node.look.reports if each.name == step):
            for line in plan_lines(report):
                told.setdefault(line, []).append(node.host)
    return [(mark, _whose(hosts, nodes), line) for (mark, line), hosts in told.items()]


def _whose(hosts: Sequence[str], nodes: Sequence[RemoteNode]) -> str:
    return "all" if len(hosts) == len(nodes) and len(nodes) > 1 else ", ".join(hosts)


# --- the end


def show_problems(cluster: Cluster) -> None:
    """What went wrong, by phase and node; what several nodes say alike is told once. On stderr."""
    out = console(stderr=True)
    told: dict[tuple[str, ...], tuple[Problem, list[str]]] = {}
    bad = [done for done in cluster.done if done.outcome == "failed" and done.phase not in _BETWEEN]
    for done in bad:
        for problem in done.problems:
            key = (done.phase, problem.message, problem.cause, problem.hint, *problem.output)
            told.setdefault(key, (problem, []))[1].append(done.host)
    for (phase, *_), (problem, hosts) in told.items():
        out.print(
            f"[red bold]✗[/] [bold]{escape(', '.join(hosts))}[/] [dim]({phase})[/] {escape(redact(problem.message))}"
        )
        _show_rest(problem, out)
    well = [node.host for node in cluster.nodes if node.host not in {done.host for done in bad}]
    if bad and well:
        stays = "; what was done there stays done" if any(d.outcome == "changed" for d in cluster.done) else ""
        out.print(f"[dim]Nothing failed on {escape(', '.join(well))}{stays}.[/]")


def _show_rest(problem: Problem, out: Console) -> None:
    if problem.cause:
        out.print(Padding(f"[dim]why[/]   {escape(redact(problem.cause))}", (0, 0, 0, 2)))
    for line in problem.output:
        out.print(Text(f"  │ {redact(line)}", style="dim"))
    if problem.log:
        out.print(f"  [dim]log[/]   {escape(problem.log)}")
    if problem.hint:
        out.print(Padding(f"[dim]do[/]    {escape(problem.hint)}", (0, 0, 0, 2)))


def show_nodes(cluster: Cluster, lines: Mapping[str, str]) -> None:
    """One line a node; of one that gave no answer nothing is known."""
    table = _grid(1, max(len(node.host) for node in cluster.nodes), None)
    for node in cluster.nodes:
        bad = [done for done in cluster.of(node) if done.outcome == "failed" and done.phase not in _BETWEEN]
        silent = bad and not any(done.data for done in cluster.of(node))
        said = bad[0].problems[0].message if silent and bad[0].problems else lines.get(node.host, "")
        table.add_row(sign("fail" if bad else "pass"), node.host, Text(redact(said)))
    console().print(Padding(table, (0, 0, 0, 2), expand=False))


# --- the proof


def show_bandwidth(measured: Sequence[Between]) -> None:
    """A line for each measurement, and what to do beneath those that need it."""
    out, table = console(), _grid(1, 14, None, None)
    out.print("\n[bold]Bandwidth[/]")
    for each in measured:
        asking, responding = each.hosts
        both = each.kind == "nccl" or each.measured is None
        way = f"{asking} {'and' if both else 'to'} {responding}"
        table.add_row(sign(each.finding.verdict), each.probe.name, way, Text(redact(each.finding.found)))
        if each.finding.hint:
            table.add_row("", "", "", f"[dim]→[/] {escape(each.finding.hint)}")
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


_WEIGHED: Mapping[Weight, str] = {"fail": "fail", "warn": "warn", "note": "skip"}


def show_differences(found: Comparison) -> None:
    """What the nodes differ in, a column for each; where they are alike, one line."""
    out = console()
    if not found.rows:
        out.print(f"\n[green]✓[/] The nodes are alike in all {found.compared} things that were compared.")
        return
    out.print(f"\n[bold]Differences[/]  {len(found.rows)} of {found.compared} things that were compared")
    table = _grid(1, None, *(None for _ in found.hosts))
    table.add_row("", "", *(f"[dim]{escape(host)}[/]" for host in found.hosts))
    for row in found.rows:
        values = (Text(redact(value) or "-") for value in row.values)
        table.add_row(sign(_WEIGHED[row.weight]), row.name, *values)
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
    for hint in dict.fromkeys(row.hint for row in found.rows if row.hint):
        names = ", ".join(row.name for row in found.rows if row.hint == hint)
        out.print(Padding(f"[dim]→[/] {escape(names)}: {escape(hint)}", (0, 0, 0, 2)))
