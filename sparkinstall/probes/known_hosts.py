"""Detect hosts known to be bad: rules are data (`knowledge/hosts.yaml`) that name a detector (host_detectors.py)."""

from collections.abc import Callable, Iterable
from datetime import date
from functools import lru_cache
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall import schema
from sparkinstall.assets import asset
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Level, Probe, passed, skipped, warned
from sparkinstall.probes.host_detectors import DETECTORS, CannotTell, Host
from sparkinstall.system import Reader

KNOWLEDGE = "knowledge/hosts.yaml"


class Evidence(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a bad host was reported, and what was seen there."""

    link: str
    seen: str


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of bad host. `looks` names the detector, `limits` are its arguments; `checked`: when the evidence was
    read; `load`: the detector keeps the GPU busy; `health`: a host can become like this while it serves; `signature`:
    diagnose looks for a pattern of the kernel's log too, as it has no finer signatures."""

    name: str
    title: str
    looks: str
    limits: Any
    verdict: Literal["warn", "fail"]
    expected: str
    why: str
    impact: str
    hint: str
    concerns: str
    checked: date
    evidence: tuple[Evidence, ...]
    load: bool = False
    health: bool = False
    signature: bool = True

    def __post_init__(self) -> None:
        if self.looks not in DETECTORS:
            raise ValueError(f"looks names no detector: use {schema.either(tuple(DETECTORS))}")

    @property
    def level(self) -> Level:
        return DETECTORS[self.looks].level


def probes(node: Node) -> Iterable[Probe]:
    """Yield one probe per rule. They concern the machine, so a rehearsal has none; one node alone has no link."""
    if node.rehearsal:
        return
    hosts: dict[int, Host] = {}

    def judge(rule: Rule) -> Callable[[Reader], Finding]:
        return lambda on: judged(rule, hosts.setdefault(id(on), Host(on, node)))

    for rule in rules():
        of_link = rule.level == "link"
        if node.several or not of_link:
            yield Probe(
                rule.name, rule.title, judge(rule), rule.level, rule.impact, others=of_link, load=rule.load
            )  # fmt: skip


def of_health(node: Node) -> Iterable[Probe]:
    """Yield the probes of rules that a host can break while it serves. None of them adds load."""
    hosts: dict[int, Host] = {}

    def judge(rule: Rule) -> Callable[[Reader], Finding]:
        return lambda on: judged(rule, hosts.setdefault(id(on), Host(on, node, may_load=False)))

    for rule in rules():
        if rule.health:
            yield Probe(rule.name, rule.title, judge(rule), rule.level, rule.impact)


def judged(rule: Rule, host: Host) -> Finding:
    try:
        sight = DETECTORS[rule.looks].look(host, rule.limits)
    except CannotTell as why:
        return skipped(str(why))
    if not sight.bad:
        return passed(sight.words, rule.expected)
    found, hint = f"{sight.words}: {rule.why}", f"{rule.hint} ({rule.evidence[0].link})"
    if sight.past:
        return warned(found, f"if it recurs: {hint}", rule.expected)
    return Finding(rule.verdict, found, rule.expected, hint)


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in order."""
    found = schema.read_file(tuple[Rule, ...], asset(KNOWLEDGE))
    return tuple(replace(each, limits=_limits(each)) for each in found)


def _limits(rule: Rule) -> Any:
    return schema.read(DETECTORS[rule.looks].limits, rule.limits, f"{KNOWLEDGE}, {rule.name}", at="limits")
