"""`sparkinstall cluster verify`: every node's own proof, the bandwidth between them, and what they differ in."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from sparkinstall.cli import junit
from sparkinstall.cli.cluster_result import ClusterChoice, end
from sparkinstall.cli.cluster_screen import show_bandwidth, show_differences, show_nodes
from sparkinstall.cli.json_output import finding_data
from sparkinstall.cli.run_command import Answer
from sparkinstall.cluster.bandwidth import Between
from sparkinstall.cluster.drift import Comparison
from sparkinstall.cluster.orchestrate import Cluster, Done
from sparkinstall.errors import Problem
from sparkinstall.probes import bandwidth

if TYPE_CHECKING:
    from sparkinstall.cli.junit import Case

_MEASURED = frozenset(map(bandwidth.probe_name, bandwidth.KINDS))


def verify(nodes: Cluster, choice: ClusterChoice) -> Answer:
    """Ask every node, measure between them if that is wanted, and compare them."""
    nodes.verify()
    measured = nodes.measure() if choice.measure else []
    found = nodes.compare()
    if choice.strict:
        _count_skipped(nodes, measured)
    if choice.junit:
        junit.write(choice.junit, [*_cases(nodes, measured, found)], choice.strict)
    lines = {done.host: _proven(done.data, bool(measured)) for done in _proofs(nodes)}

    def show() -> None:
        show_nodes(nodes, lines)
        if measured:
            show_bandwidth(measured)
        if found:
            show_differences(found)

    return end(nodes, choice, show, bandwidth=[_as_data(each) for each in measured], differences=_rows(found))


def _proofs(nodes: Cluster) -> list[Done]:
    return [done for done in nodes.done if done.phase == "verify"]


def _probes(data: Mapping[str, Any], measured: bool) -> list[Mapping[str, Any]]:
    """A node's probes, but those whose place a measurement between the nodes has taken."""
    return [each for each in data.get("probes", ()) if not (measured and each["name"] in _MEASURED)]


def _proven(data: Mapping[str, Any], measured: bool) -> str:
    probes = _probes(data, measured)
    return f"{sum(each['verdict'] == 'pass' for each in probes)} of {len(probes)} probes passed" if probes else ""


def _count_skipped(nodes: Cluster, measured: Sequence[Between]) -> None:
    """With --strict, a skipped check or probe is a failure of its node."""
    for done in _proofs(nodes):
        left = [each["step"] for each in done.data.get("checks", ()) if each["outcome"] == "node_only"]
        left += [each["name"] for each in _probes(done.data, bool(measured)) if each["verdict"] == "skip"]
        between = [each for each in measured if each.hosts[0] == done.host and each.finding.verdict == "skip"]
        left += [f"{each.probe.name} to {each.hosts[1]}" for each in between]
        if left:
            nodes.fail(done.host, "strict", Problem(f"skipped, which --strict counts as failed: {', '.join(left)}"))


def _as_data(between: Between) -> dict[str, Any]:
    asking, responding = between.hosts
    said = finding_data(between.probe, between.finding, between.seconds)
    figures = asdict(between.measured) if between.measured else {}
    return {**said, "from": asking, "to": responding, "measured": figures}


def _rows(found: Comparison | None) -> list[dict[str, Any]]:
    if found is None:
        return []
    return [
        {"name": row.name, "weight": row.weight, "values": dict(zip(found.hosts, row.values, strict=True)),
         "hint": row.hint} for row in found.rows
    ]  # fmt: skip


def _cases(nodes: Cluster, measured: Sequence[Between], found: Comparison | None) -> "Iterator[Case]":
    """JUnit's cases: each node's, with its name in front, and what is between them."""
    for done in _proofs(nodes):
        for problem in done.problems if not done.data else ():
            yield junit.Case(
                "checks", f"{done.host}: asked", done.seconds, f"{problem.message}\n{problem.hint}".strip()
            )
        for check in done.data.get("checks", ()):
            yield _case_of_check(done.host, check)
        for each in _probes(done.data, bool(measured)):
            yield _case(each["level"], f"{done.host}: {each['name']}", each)
    for between in measured:
        yield _case("link", " ".join((between.probe.name, *between.hosts)), _as_data(between))
    for row in _rows(found):
        said = ", ".join(f"{host}: {value or 'none'}" for host, value in row["values"].items())
        verdict = row["weight"] if row["weight"] == "fail" else "warn"
        yield _case("cluster", f"same {row['name']}", {"verdict": verdict, "found": said, "hint": row["hint"]})
    if found and not found.rows:
        said = f"the nodes are alike in {found.compared} things"
        yield _case("cluster", "same everything", {"verdict": "pass", "found": said, "hint": ""})


def _case(suite: str, name: str, said: Mapping[str, Any]) -> "Case":
    words = "\n".join(filter(None, (said["found"], said["hint"] and f"hint: {said['hint']}")))
    bad, skipped = (words if said["verdict"] == verdict else "" for verdict in ("fail", "skip"))
    rest = "" if bad or skipped else f"{said['verdict']}: {words}"
    return junit.Case(suite, name, said.get("seconds", 0.0), bad, skipped, rest)


def _case_of_check(host: str, check: Mapping[str, Any]) -> "Case":
    states = [
        each.get("summary") or each.get("message") or each.get("reason")
        for each in check["resources"]
        if each["state"] != "ok"
    ]
    words = "\n".join(filter(None, [(check["error"] or {}).get("message"), *states])) or check["outcome"]
    good, left = check["outcome"] == "unchanged", check["outcome"] == "node_only"
    name = f"{host}: {check['step']}"
    return junit.Case("checks", name, check["seconds"], "" if good or left else words, words if left else "")
