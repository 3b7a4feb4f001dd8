"""The state of each fix, derived from the steps that apply it and the probes that verify it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from sparkinstall.core import catalogue
from sparkinstall.core.engine import StepReport
from sparkinstall.fixes import Fix
from sparkinstall.node import Node
from sparkinstall.probes import Finding
from sparkinstall.resources import NodeOnly

Standing = Literal["proven", "done", "missing", "node_only", "failed", "not_applicable"]

FIXES = tuple(sorted({fix for step in catalogue.STEPS for fix in step.fixes}, key=lambda fix: fix.number))
"""Every fix that a step applies, by number."""


class FixState(Struct, frozen=True):
    """A fix by its number, and its state."""

    number: int
    title: str
    standing: Standing
    note: str = ""


def stand(node: Node, reports: Sequence[StepReport], findings: Mapping[str, Finding]) -> list[FixState]:
    """Return the state of each fix on `node`, from the checks and, if run, the probes.

    Steps and probes that this node does not have are ignored, such as those of a network managed by the user.
    """
    by_name, steps = {report.name: report for report in reports}, catalogue.of(node)
    declared = [probe for step in steps for probe in step.probes(node)]

    def state(fix: Fix) -> tuple[Standing, str]:
        if fix.between and not node.several:
            return "not_applicable", "on one node; for several: `sparkinstall multi-node`"
        mine = [by_name.get(step.name) for step in steps if fix in step.fixes]
        asked = {probe.name: findings.get(probe.name) for probe in declared if probe.fix == fix}
        return _state(fix, mine, asked)

    return [FixState(fix.number, fix.title, *state(fix)) for fix in FIXES]


def _state(fix: Fix, steps: Sequence[StepReport | None], probes: Mapping[str, Finding | None]) -> tuple[Standing, str]:
    """`None` is a step that was not checked, or a probe that did not run."""
    mine = [report for report in steps if report]
    if problem := next((report.problem for report in mine if report.problem), None):
        return "failed", problem.message
    if bad := next((each for each in probes.values() if each and each.verdict == "fail"), None):
        return "failed", bad.found
    if len(mine) < len(steps) or any(report.outcome in ("drift", "blocked") for report in mine):
        return "missing", "`sparkinstall plan` shows what is missing"
    return _proven(fix, mine, probes)


def _proven(fix: Fix, mine: Sequence[StepReport], probes: Mapping[str, Finding | None]) -> tuple[Standing, str]:
    asked = [each for each in probes.values() if each]
    left = next((each.reason for report in mine for each in _node_only(report, fix)), "")
    skipped = next((each.found for each in asked if each.verdict == "skip"), "")
    if left or skipped:
        return "node_only", left or skipped
    # Checking less must not report more: list what did not run.
    if silent := [name for name, finding in probes.items() if finding is None]:
        return "done", f"by its files; not run: {', '.join(silent)}"
    good = asked and all(each.verdict == "pass" for each in asked)
    return "proven" if good else "done", "; ".join(each.found for each in asked)


def _node_only(report: StepReport, fix: Fix) -> Iterable[NodeOnly]:
    only_for = catalogue.named(report.name).only_for
    return (each for each in report.checked if isinstance(each, NodeOnly) and only_for.get(each.key, fix) == fix)
