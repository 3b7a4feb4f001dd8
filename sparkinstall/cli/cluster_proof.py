"""`sparkinstall cluster verify`: verify every node, measure between them, and compare them."""

from collections.abc import Iterator, Sequence
from typing import Any

from msgspec.structs import asdict

from sparkinstall.cli import junit
from sparkinstall.cli.cluster_text import end, show_bandwidth, show_differences, show_nodes
from sparkinstall.cli.run_command import CommandResult
from sparkinstall.cluster.bandwidth import Between
from sparkinstall.cluster.drift import Comparison
from sparkinstall.cluster.orchestrate import Barrier, Cluster
from sparkinstall.cluster.protocol import Verified
from sparkinstall.core.checks import ProbeResult
from sparkinstall.errors import Problem
from sparkinstall.probes import bandwidth, failed, passed, warned

_MEASURED = frozenset(map(bandwidth.probe_name, bandwidth.KINDS))


def verify(nodes: Cluster) -> CommandResult:
    """Verify every node, measure between them if requested, and compare them."""
    measured: list[Between] = []
    try:
        nodes.identify("verify", bring=True)
        nodes.verify()
        measured += nodes.measure() if nodes.options.measure else []
    except Barrier:
        pass
    found = nodes.compare()
    if nodes.options.strict:
        _count_skipped(nodes, measured)
    if nodes.options.junit:
        junit.write(nodes.options.junit, [*_cases(nodes, measured, found)], nodes.options.strict)
    lines = {done.host: _proven(verified, bool(measured)) for done, verified in nodes.replies("verify", Verified)}

    def show() -> None:
        show_nodes(nodes, lines)
        if measured:
            show_bandwidth(measured)
        if found:
            show_differences(found)

    return end(nodes, show, bandwidth=[*map(_as_data, measured)], differences=found.rows if found else ())


def _probes(verified: Verified, measured: bool) -> list[ProbeResult]:
    """Return a node's probes without those that a measurement between nodes replaces."""
    return [each for each in verified.probes if not (measured and each.name in _MEASURED)]


def _proven(verified: Verified, measured: bool) -> str:
    verdicts = [each.verdict for each in _probes(verified, measured)]
    return f"{verdicts.count('pass')} of {len(verdicts)} probes passed" if verdicts else ""


def _count_skipped(nodes: Cluster, measured: Sequence[Between]) -> None:
    """With --strict, count a skipped check or probe as a failure of its node."""
    for done, verified in nodes.replies("verify", Verified):
        left = [each.name for each in verified.checks if each.outcome == "node_only"]
        left += [each.name for each in _probes(verified, bool(measured)) if each.verdict == "skip"]
        between = [each for each in measured if each.hosts[0] == done.host and each.finding.verdict == "skip"]
        left += [f"{each.result.name} to {each.hosts[1]}" for each in between]
        if left:
            nodes.fail(done.host, "strict", Problem(f"skipped, which --strict counts as failed: {', '.join(left)}"))


def _as_data(between: Between) -> dict[str, Any]:
    asking, responding = between.hosts
    return {**asdict(between.result), "from": asking, "to": responding, "measured": between.measured or {}}


def _cases(nodes: Cluster, measured: Sequence[Between], found: Comparison | None) -> Iterator[junit.Case]:
    """Yield JUnit cases: those of each node, prefixed with its host, and those between nodes."""
    for done, verified in nodes.replies("verify", Verified):
        for problem in done.problems if not done.data else ():
            why = f"{problem.message}\n{problem.hint}".strip()
            yield junit.Case("checks", f"{done.host}: asked", done.seconds, why)
        yield from junit.of_checks(verified.checks, done.host)
        yield from junit.of_probes(_probes(verified, bool(measured)), done.host)
    for each in measured:
        yield junit.of_finding("link", " ".join((each.result.name, *each.hosts)), each.finding, each.seconds)
    if found:
        yield from _drift_cases(found)


def _drift_cases(found: Comparison) -> Iterator[junit.Case]:
    for row in found.rows:
        values = ", ".join(f"{host}: {value or 'none'}" for host, value in row.values.items())
        finding = failed(values, row.hint) if row.weight == "fail" else warned(values, row.hint)
        yield junit.of_finding("cluster", f"same {row.name}", finding)
    if not found.rows:
        yield junit.of_finding("cluster", "same everything", passed(f"the nodes are equal in {found.compared} values"))
