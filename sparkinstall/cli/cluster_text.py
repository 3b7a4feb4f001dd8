"""The result of a verb of `cluster`: JSON by node, or text with one plan for all and errors by node."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

from msgspec.structs import asdict
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from sparkinstall.cli.run_command import CommandResult
from sparkinstall.cli.text_output import columns, console, plan_lines, show_problem, sign
from sparkinstall.cluster.bandwidth import Between
from sparkinstall.cluster.drift import Comparison, Weight
from sparkinstall.cluster.orchestrate import Cluster
from sparkinstall.cluster.remote import RemoteNode
from sparkinstall.core.checks import ProbeResult
from sparkinstall.errors import Exit, Problem
from sparkinstall.redaction import redact

# These phases concern two nodes; they have their own tables and fail neither node alone.
_BETWEEN = ("measure", "compare")


def end(cluster: Cluster, show: Callable[[], None], **more: Any) -> CommandResult:
    """Return the result of a verb of `cluster`: `more` is added to the JSON, `show` prints it."""
    cluster.pause()
    problems = [named(done.host, problem) for done in cluster.done for problem in done.problems]
    code = Exit.SOME_NODES if cluster.failed else Exit.GOOD
    if cluster.options.json:
        data = {"nodes": [node_data(cluster, node) for node in cluster.nodes], **more}
        return CommandResult(code, data, problems=tuple(problems))

    def tell() -> None:
        show()
        show_problems(cluster)

    return CommandResult(code, show=tell)


def named(host: str, problem: Problem) -> Problem:
    """Return the problem prefixed with its node, for the list of all errors."""
    named = copy(problem)
    named.message = problem.message if host in problem.message else f"{host}: {problem.message}"
    return named


def node_data(cluster: Cluster, node: RemoteNode) -> dict[str, Any]:
    """Return the JSON of one node (docs/json.md)."""
    phases: list[dict[str, Any]] = [
        {
            "phase": done.phase,
            "outcome": done.outcome,
            "seconds": round(done.seconds, 3),
            "errors": done.problems,
            "data": done.data if done.data and done.phase != "look" else {},
        }
        for done in cluster.of(node)
    ]
    return {
        **asdict(node.member),
        "ssh_trips": node.ssh.trips,
        "tool_brought": node.brought,
        "preflight": node.look.preflight,
        "steps": node.look.steps,
        "versions": node.look.versions,
        "phases": phases,
    }


def show_plan(cluster: Cluster) -> None:
    """Print role and checks of every node, and what each step would change, one line for what nodes share."""
    out = console()
    out.print("[bold]Nodes[/]")
    nodes = columns(1, max(len(node.host) for node in cluster.nodes), len("worker"), None)
    for node in cluster.nodes:
        nodes.add_row(
            "", node.host, node.member.role, f"{node.member.address} on the link" if len(cluster.nodes) > 1 else ""
        )
    out.print(Padding(nodes, (0, 0, 0, 2), expand=False))
    _show_checks(cluster, out)
    if not any(node.look.steps for node in cluster.nodes):
        return
    out.print("[bold]Plan[/]")
    table = columns(1, 12, None, None)
    for name in dict.fromkeys(step.name for node in cluster.nodes for step in node.look.steps):
        for at, (mark, whose, line) in enumerate(_merged(cluster.nodes, name)):
            table.add_row(sign(mark), name if at == 0 else "", whose, Text(redact(line)))
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _show_checks(cluster: Cluster, out: Console) -> None:
    nodes, ignored = cluster.nodes, cluster.options.ignore
    checks = [(node.host, each) for node in nodes for each in node.look.preflight]
    passed, asked = sum(each.verdict == "pass" for _, each in checks), len({host for host, _ in checks})
    count = f"{asked} nodes" if asked == len(nodes) else f"{asked} of {len(nodes)} nodes; the others gave no reply"
    out.print(f"[bold]Preflight[/]  {passed} of {len(checks)} checks passed on {count}" if checks else _NOBODY)
    told: dict[tuple[str, str, str, str], list[str]] = {}
    for host, each in checks:
        if each.verdict in ("warn", "fail"):
            told.setdefault(_judged(each, ignored), []).append(host)
    table = columns(1, 12, None, None)
    for (verdict, name, found, hint), hosts in told.items():
        table.add_row(sign(verdict), name, _whose(hosts, nodes), escape(redact(found)))
        table.add_row("", "", "", f"[dim]→[/] {escape(hint)}")
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


_NOBODY = "[bold]Preflight[/]  no node gave a reply"


def _judged(check: ProbeResult, ignored: Sequence[str]) -> tuple[str, str, str, str]:
    """Return verdict, name, finding and hint; an ignored failure is shown as a warning."""
    if check.verdict == "fail" and check.name in ignored:
        return "warn", check.name, check.found, f"ignored: --ignore {check.name}"
    return check.verdict, check.name, check.found, check.hint


def _merged(nodes: Sequence[RemoteNode], step: str) -> list[tuple[str, str, str]]:
    """Return sign, nodes and sentence of each line of a step's plan."""
    told: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        for report in (each for each in node.look.steps if each.name == step):
            for line in plan_lines(report):
                told.setdefault(line, []).append(node.host)
    return [(mark, _whose(hosts, nodes), line) for (mark, line), hosts in told.items()]


def _whose(hosts: Sequence[str], nodes: Sequence[RemoteNode]) -> str:
    return "all" if len(hosts) == len(nodes) and len(nodes) > 1 else ", ".join(hosts)


def show_problems(cluster: Cluster) -> None:
    """Print failures by phase and node on stderr; the same failure of several nodes is printed once."""
    out = console(stderr=True)
    told: dict[tuple[str, ...], tuple[Problem, list[str]]] = {}
    bad = [done for done in cluster.done if done.outcome == "failed" and done.phase not in _BETWEEN]
    for done in bad:
        for problem in done.problems:
            key = (done.phase, problem.message, problem.cause, problem.hint, *problem.output)
            told.setdefault(key, (problem, []))[1].append(done.host)
    for (phase, *_), (problem, hosts) in told.items():
        show_problem(problem, out, f"[bold]{escape(', '.join(hosts))}[/] [dim]({phase})[/] ")
    well = [node.host for node in cluster.nodes if node.host not in {done.host for done in bad}]
    if bad and well:
        stays = "; what was done there stays done" if any(d.outcome == "changed" for d in cluster.done) else ""
        out.print(f"[dim]Nothing failed on {escape(', '.join(well))}{stays}.[/]")


def show_nodes(cluster: Cluster, lines: Mapping[str, str]) -> None:
    """Print one line per node: its line of `lines`, or why it gave no reply."""
    table = columns(1, max(len(node.host) for node in cluster.nodes), None)
    for node in cluster.nodes:
        bad = [done for done in cluster.of(node) if done.outcome == "failed" and done.phase not in _BETWEEN]
        silent = bad and not any(done.data for done in cluster.of(node))
        said = bad[0].problems[0].message if silent and bad[0].problems else lines.get(node.host, "")
        table.add_row(sign("fail" if bad else "pass"), node.host, Text(redact(said)))
    console().print(Padding(table, (0, 0, 0, 2), expand=False))


def show_bandwidth(measured: Sequence[Between]) -> None:
    """Print one line per measurement, followed by its hint, if any."""
    out, table = console(), columns(1, 14, None, None)
    out.print("\n[bold]Bandwidth[/]")
    for each in measured:
        asking, responding = each.hosts
        both = each.kind == "nccl" or each.measured is None
        way = f"{asking} {'and' if both else 'to'} {responding}"
        table.add_row(sign(each.finding.verdict), each.result.name, way, Text(redact(each.finding.found)))
        if each.finding.hint:
            table.add_row("", "", "", f"[dim]→[/] {escape(each.finding.hint)}")
    out.print(Padding(table, (0, 0, 0, 2), expand=False))


_WEIGHED: Mapping[Weight, str] = {"fail": "fail", "warn": "warn", "note": "skip"}


def show_differences(found: Comparison) -> None:
    """Print the differences between nodes, a column per node; one line if there are none."""
    out = console()
    if not found.rows:
        out.print(f"\n[green]✓[/] The nodes are equal in all {found.compared} values that were compared.")
        return
    out.print(f"\n[bold]Differences[/]  {len(found.rows)} of {found.compared} values that were compared")
    hosts = found.rows[0].values
    table = columns(1, None, *(None for _ in hosts))
    table.add_row("", "", *(f"[dim]{escape(host)}[/]" for host in hosts))
    for row in found.rows:
        values = (Text(redact(value) or "-") for value in row.values.values())
        table.add_row(sign(_WEIGHED[row.weight]), row.name, *values)
    out.print(Padding(table, (0, 0, 0, 2), expand=False))
    for hint in dict.fromkeys(row.hint for row in found.rows if row.hint):
        names = ", ".join(row.name for row in found.rows if row.hint == hint)
        out.print(Padding(f"[dim]→[/] {escape(names)}: {escape(hint)}", (0, 0, 0, 2)))
