"""The fixes of a Spark, and how each stands on the node."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core import catalogue
from sparkinstall.core.engine import StepReport
from sparkinstall.node import Node
from sparkinstall.probes import Finding
from sparkinstall.resources import NodeOnly

Standing = Literal["proven", "done", "missing", "node_only", "failed", "not_applicable"]


class Fix(Struct, frozen=True):
    """A fix: `steps` apply it, `probes` prove it; `between`: only nodes of several need it."""

    number: int
    title: str
    steps: tuple[str, ...]
    probes: tuple[str, ...] = ()
    between: bool = False


_FP8_PROBES = ("fp8-path", "fp8-kernels", "fp8-product")
FIXES = (
    Fix(
        1,
        "NCCL for this GPU, loaded by every process",
        ("nccl", "nccl-fit", "env-files"),
        ("nccl-preload", "nccl-loaded", "running-nccl"),
    ),
    Fix(2, "MTU 9000 on the QSFP links", ("network",), ("link", "peers"), between=True),
    Fix(3, "VLLM_HOST_IP is the node's QSFP address", ("network", "env-files"), ("host-ip",), between=True),
    Fix(4, "NCCL, Gloo and UCX take the QSFP link", ("network", "env-files"), between=True),
    Fix(5, "FP8 without CUTLASS kernels of another chip", ("fp8", "env-files"), _FP8_PROBES),
    Fix(6, "the same packages on every node", ("packages", "environment"), ("wheel-gate", "wheel-files", "imports")),
    Fix(7, "Ray's memory monitor off", ("env-files",)),
    Fix(8, "the reasoning field of a stream", ("environment",), ("reasoning-field", "serving-stream")),
)


def number_of(probe: str) -> int | None:
    """The number of the fix that a probe proves; None: no single one."""
    return next((fix.number for fix in FIXES if probe in fix.probes), None)


class FixState(Struct, frozen=True):
    fix: Fix
    standing: Standing
    note: str = ""


def stand(node: Node, reports: Sequence[StepReport], findings: Mapping[str, Finding]) -> list[FixState]:
    """How each fix stands on `node`, by the checks and, if run, the probes."""
    by_name, steps = {report.name: report for report in reports}, catalogue.of(node)
    there = {step.name for step in steps}, {probe.name for step in steps for probe in step.probes(node)}
    return [
        FixState(fix, "not_applicable", "on one node; for several: `sparkinstall multi-node`")
        if fix.between and not node.several
        else _state(_of_what_is_there(fix, *there), by_name, findings)
        for fix in FIXES
    ]


def _of_what_is_there(fix: Fix, steps: Collection[str], probes: Collection[str]) -> Fix:
    """`fix` without the steps and the probes that this node does not have: a network that somebody else manages."""
    return replace(
        fix,
        steps=tuple(name for name in fix.steps if name in steps),
        probes=tuple(name for name in fix.probes if name in probes),
    )


def _state(fix: Fix, reports: Mapping[str, StepReport], findings: Mapping[str, Finding]) -> FixState:
    mine = [reports[name] for name in fix.steps if name in reports]
    bad = next((findings[name] for name in fix.probes if name in findings and findings[name].verdict == "fail"), None)
    if any(report.problem for report in mine):
        return FixState(fix, "failed", next(r.problem.message for r in mine if r.problem))
    if bad:
        return FixState(fix, "failed", bad.found)
    if len(mine) < len(fix.steps) or any(report.outcome in ("drift", "blocked") for report in mine):
        return FixState(fix, "missing", "`sparkinstall plan` shows what is missing")
    return _proven(fix, mine, findings)


def _proven(fix: Fix, mine: Sequence[StepReport], findings: Mapping[str, Finding]) -> FixState:
    asked = [findings[name] for name in fix.probes if name in findings]
    left = next((c.state.reason for r in mine for c in r.checked if isinstance(c.state, NodeOnly)), "")
    skipped = next((each.found for each in asked if each.verdict == "skip"), "")
    if left or skipped:
        return FixState(fix, "node_only", left or skipped)
    # Who looks at less must not be told more: what was not asked is named.
    if silent := [name for name in fix.probes if name not in findings]:
        return FixState(fix, "done", f"by its files; not asked: {', '.join(silent)}")
    good = fix.probes and all(each.verdict == "pass" for each in asked)
    return FixState(fix, "proven" if good else "done", "; ".join(each.found for each in asked))
