"""The state of each fix, derived from the steps that apply it and the probes that verify it."""

from collections.abc import Mapping, Sequence
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


def numbered(number: int | None) -> Fix | None:
    """Return the fix with that number, or None."""
    return next((fix for fix in FIXES if fix.number == number), None)


class FixState(Struct, frozen=True):
    fix: Fix
    standing: Standing
    note: str = ""


def stand(node: Node, reports: Sequence[StepReport], findings: Mapping[str, Finding]) -> list[FixState]:
    """Return the state of each fix on `node`, from the checks and, if run, the probes.

    Steps and probes that this node does not have are ignored, such as those of a network managed by the user.
    """
    by_name, steps = {report.name: report for report in reports}, catalogue.of(node)
    declared = [probe for step in steps for probe in step.probes(node)]

    def state(fix: Fix) -> FixState:
        if fix.between and not node.several:
            return FixState(fix, "not_applicable", "on one node; for several: `sparkinstall multi-node`")
        mine = [by_name.get(step.name) for step in steps if fix in step.fixes]
        asked = {probe.name: findings.get(probe.name) for probe in declared if probe.fix == fix}
        return _state(fix, mine, asked)

    return [state(fix) for fix in FIXES]


def _state(fix: Fix, steps: Sequence[StepReport | None], probes: Mapping[str, Finding | None]) -> FixState:
    """`None` is a step that was not checked, or a probe that did not run."""
    mine = [report for report in steps if report]
    bad = next((each for each in probes.values() if each and each.verdict == "fail"), None)
    if any(report.problem for report in mine):
        return FixState(fix, "failed", next(r.problem.message for r in mine if r.problem))
    if bad:
        return FixState(fix, "failed", bad.found)
    if len(mine) < len(steps) or any(report.outcome in ("drift", "blocked") for report in mine):
        return FixState(fix, "missing", "`sparkinstall plan` shows what is missing")
    return _proven(fix, mine, probes)


def _proven(fix: Fix, mine: Sequence[StepReport], probes: Mapping[str, Finding | None]) -> FixState:
    asked = [each for each in probes.values() if each]
    checked = [each for report in mine for each in report.checked if each.fix in (None, fix)]
    left = next((each.state.reason for each in checked if isinstance(each.state, NodeOnly)), "")
    skipped = next((each.found for each in asked if each.verdict == "skip"), "")
    if left or skipped:
        return FixState(fix, "node_only", left or skipped)
    # Checking less must not report more: list what did not run.
    if silent := [name for name, finding in probes.items() if finding is None]:
        return FixState(fix, "done", f"by its files; not run: {', '.join(silent)}")
    good = asked and all(each.verdict == "pass" for each in asked)
    return FixState(fix, "proven" if good else "done", "; ".join(each.found for each in asked))
