"""The eight fixes of a Spark, and how the node stands in each, as far as this version can tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sparkinstall.plans.engine import StepReport
from sparkinstall.probes import Finding
from sparkinstall.resources import LeftToNode

Standing = Literal["proven", "done", "open", "left", "failed", "not done"]


@dataclass(frozen=True)
class Fix:
    """One of the eight. `steps` make it so, `probes` prove it; neither: not part of this version yet."""

    number: int
    title: str
    steps: tuple[str, ...]
    probes: tuple[str, ...] = ()
    missing: str = ""


EIGHT = (
    Fix(1, "NCCL for this GPU, loaded by every process", ("nccl", "nccl-fit", "env-files"), ("nccl-loaded",)),
    Fix(
        2,
        "MTU 9000 on the QSFP links",
        (),
        missing="the network of several nodes is not set up by this version",
    ),
    Fix(
        3,
        "VLLM_HOST_IP is the node's QSFP address",
        ("env-files",),
        missing="the address is the config's, not looked up",
    ),
    Fix(
        4,
        "NCCL, Gloo and UCX take the QSFP link",
        ("env-files",),
        missing="the interface is the config's, not looked up",
    ),
    Fix(5, "FP8 without CUTLASS kernels of another chip", ("fp8", "env-files"), ("fp8-path",)),
    Fix(6, "the same packages on every node", ("packages", "environment"), ("wheel-gate", "imports")),
    Fix(7, "Ray's memory monitor off", ("env-files",)),
    Fix(8, "where the thinking is in a stream", ("environment",), ("reasoning-field",)),
)


@dataclass(frozen=True)
class FixState:
    fix: Fix
    standing: Standing
    note: str = ""


def stand(reports: Sequence[StepReport], findings: Mapping[str, Finding]) -> list[FixState]:
    """How each of the eight stands, from what was checked and (if probed) found."""
    by_name = {report.name: report for report in reports}
    return [_state(fix, by_name, findings) for fix in EIGHT]


def _state(fix: Fix, reports: Mapping[str, StepReport], findings: Mapping[str, Finding]) -> FixState:
    if not fix.steps:
        return FixState(fix, "not done", fix.missing)
    mine = [reports[name] for name in fix.steps if name in reports]
    if any(report.problem for report in mine):
        return FixState(fix, "failed", next(r.problem.what for r in mine if r.problem))
    if len(mine) < len(fix.steps) or any(report.outcome in ("drift", "held") for report in mine):
        return FixState(fix, "open", "`sparkinstall plan` shows what is missing")
    return _proven(fix, mine, findings)


def _proven(fix: Fix, mine: Sequence[StepReport], findings: Mapping[str, Finding]) -> FixState:
    asked = [findings[name] for name in fix.probes if name in findings]
    bad = next((each for each in asked if each.verdict == "fail"), None)
    if bad:
        return FixState(fix, "failed", bad.found)
    left = next((c.state.what for r in mine for c in r.checked if isinstance(c.state, LeftToNode)), "")
    skipped = next((each.found for each in asked if each.verdict == "skip"), "")
    if left or skipped:
        return FixState(fix, "left", left or skipped)
    if fix.missing:
        return FixState(fix, "open", fix.missing)
    good = asked and all(each.verdict == "pass" for each in asked)
    return FixState(fix, "proven" if good else "done", "; ".join(each.found for each in asked))
