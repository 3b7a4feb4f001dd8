"""The results of all checks and probes of a node, ordered for a person: broken, to look at, ok."""

import platform
from collections.abc import Iterable, Mapping
from typing import Literal

from msgspec import Struct

from sparkinstall import __version__
from sparkinstall.core import catalogue
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.errors import NeedsRoot, Problem
from sparkinstall.facts import machine
from sparkinstall.facts.gpu import first_gpu
from sparkinstall.node import Node
from sparkinstall.probes import Verdict
from sparkinstall.resources import Conflict, Drift, NodeOnly, State, Unknown
from sparkinstall.system import Reader

Weight = Literal["broken", "look-at", "skipped", "ok"]
Kind = Literal["preflight", "check", "probe"]
_FOUND = {"write": "missing", "change": "differs"}

_WEIGHTS: Mapping[Verdict, Weight] = {"fail": "broken", "warn": "look-at", "skip": "skipped", "pass": "ok"}
_SUDO = "`sudo -v` in this terminal, then the same command again"
# A node that is set up lives without these until something is to be reinstalled.
_ONLY_TO_SET_UP = frozenset({"sudo", "python", "cuda", "disk", "prefix"})


class Item(Struct, frozen=True):
    """One check or probe. `fixes`: numbers of the fixes that it belongs to; `means`: its impact, for a person."""

    name: str
    kind: Kind
    weight: Weight
    title: str
    found: str
    expected: str = ""
    means: str = ""
    hint: str = ""
    fixes: tuple[int, ...] = ()
    seconds: float = 0.0


def machine_facts(node: Node, on: Reader) -> dict[str, str]:
    """The machine and what runs on it, by name; in a rehearsal only what is set up there. Nothing of it is personal."""
    ours = {"stack": f"{node.stack.name} for {node.platform}", "sparkinstall": __version__}
    if on.rehearsal:
        return {"machine": machine.product(on) or "a rehearsal", **ours}
    gpu = first_gpu(on)
    found = {
        "machine": machine.product(on) or "an unnamed machine",
        "gpu": gpu.name if gpu else "",
        "driver": gpu.driver if gpu else "",
        "kernel": platform.release(),
        "os": machine.os_release(on).get("PRETTY_NAME", ""),
    }
    return {**{name: value for name, value in found.items() if value}, **ours}


def of_preflight(looked: Iterable[ProbeResult], installed: bool) -> list[Item]:
    """Is this a node that can be set up? Where it has been, some of it no longer matters that much."""
    return [_checked_before(each, installed) for each in looked]


def _checked_before(looked: ProbeResult, installed: bool) -> Item:
    probe, finding = looked.probe, looked.finding
    weight = _WEIGHTS[finding.verdict]
    if weight == "broken" and installed and probe.name in _ONLY_TO_SET_UP:
        weight = "look-at"
    return Item(
        probe.name, "preflight", weight, probe.title, finding.found, finding.expected, probe.impact, finding.hint,
        seconds=looked.seconds,
    )  # fmt: skip


def of_checks(reports: Iterable[StepReport]) -> list[Item]:
    """Are the files, packages and services of each step up to date?"""
    return [_of_step(each) for each in reports]


def _of_step(report: StepReport) -> Item:
    weight, found, hint = _told(report)
    step = catalogue.named(report.name)
    return Item(
        report.name, "check", weight, report.why, found, means=step.impact, hint=hint,
        fixes=tuple(fix.number for fix in step.fixes), seconds=report.seconds,
    )  # fmt: skip


def _told(report: StepReport) -> tuple[Weight, str, str]:
    if report.problem:
        weight: Weight = "skipped" if isinstance(report.problem, NeedsRoot) else "broken"
        return weight, report.problem.message, _SUDO if weight == "skipped" else report.problem.hint
    states = [checked.state for checked in report.checked]
    wrong = list(dict.fromkeys(said for said in map(_wrong, states) if said))
    if wrong:
        way_out = next((state.hint for state in states if isinstance(state, Conflict) and state.hint), "")
        return "broken", "\n".join(wrong), way_out or f"`sparkinstall run {report.name}`"
    # What waits for another step is not broken itself.
    waits = [f"known after {state.waits_for}" for state in states if isinstance(state, Unknown)]
    left = [f"node only: {state.reason}" for state in states if isinstance(state, NodeOnly)]
    unseen = list(dict.fromkeys([*waits, *left]))
    return ("skipped", "; ".join(unseen), "") if unseen else ("ok", "ok", "")


def _wrong(state: State) -> str:
    if isinstance(state, Drift):
        # A plan says what will be done; here it is told what was found.
        verb, _, file = state.summary.partition(" ")
        return f"{_FOUND[verb]}: {file}" if verb in _FOUND else f"not done: {state.summary}"
    return state.message if isinstance(state, Conflict) else ""


def of_probes(looked: Iterable[ProbeResult]) -> list[Item]:
    """Does it behave so?"""
    return [_of_probe(each) for each in looked]


def _of_probe(looked: ProbeResult) -> Item:
    probe, finding = looked.probe, looked.finding
    return Item(
        probe.name, "probe", _WEIGHTS[finding.verdict], probe.title, finding.found, finding.expected,
        probe.impact, finding.hint, (probe.fix.number,) if probe.fix else (), looked.seconds,
    )  # fmt: skip


def of_problem(problem: Problem) -> Item:
    """What keeps all that is installed from being looked at."""
    means = "Nothing of what sparkinstall has set up could be looked at."
    return Item(
        "installed", "check", "broken", "what sparkinstall has set up", problem.message, "", means, problem.hint
    )
