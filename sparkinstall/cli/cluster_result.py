"""The result of every verb of `sparkinstall cluster`."""

from collections.abc import Callable
from copy import copy
from typing import Any

from msgspec.structs import asdict

from sparkinstall.cli.cluster_text import show_problems
from sparkinstall.cli.run_command import CommandResult
from sparkinstall.cluster.orchestrate import Cluster
from sparkinstall.cluster.remote import RemoteNode
from sparkinstall.errors import Exit, Problem


def end(cluster: Cluster, show: Callable[[], None], **more: Any) -> CommandResult:
    """Return the result of a verb of `cluster`: `more` is added to the JSON, `show` prints it."""
    cluster.pause()
    problems = [_named(done.host, problem) for done in cluster.done for problem in done.problems]
    code = Exit.SOME_NODES if cluster.failed else Exit.GOOD
    if cluster.options.json:
        data = {"nodes": [node_data(cluster, node) for node in cluster.nodes], **more}
        return CommandResult(code, data, problems=tuple(problems))

    def tell() -> None:
        show()
        show_problems(cluster)

    return CommandResult(code, show=tell)


def _named(host: str, problem: Problem) -> Problem:
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
