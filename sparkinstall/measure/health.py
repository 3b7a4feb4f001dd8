"""Is this node healthy? The rules that a host can break while it serves, and what only readings over time tell."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core import checks
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.session import Session
from sparkinstall.errors import BadUsage
from sparkinstall.events import Emit, silent
from sparkinstall.measure import advice
from sparkinstall.measure.readings import Readings, Window
from sparkinstall.measure.rounds import Slo
from sparkinstall.measure.samples import Sampler, source_of
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, Verdict, failed, known_hosts, life, passed, skipped, warned
from sparkinstall.probes.reading_rules import Rule
from sparkinstall.system import Reader

_GIB = 1 << 30
# No latency is judged, so there are no limits.
_NO_SLO = Slo()


class Item(Struct, frozen=True):
    """What one rule says. `means`: the effect on the user; `hint`: what to do."""

    name: str
    title: str
    verdict: Verdict
    found: str
    expected: str
    means: str
    hint: str


class Health(Struct, frozen=True):
    """Result of `health`, in three groups of items. `healthy`: nothing was found, and if `strict` all was readable."""

    healthy: bool
    findings: Sequence[Item]
    unreadable: Sequence[Item]
    ok: Sequence[Item]


def examine(session: Session, seconds: float, strict: bool, emit: Emit = silent) -> Health:
    """Judge this node; readings are taken `seconds` apart.

    Raises:
        BadUsage: a rehearsal is no machine.
    """
    if session.node.rehearsal:
        raise BadUsage("a rehearsal is no machine whose health could be read", hint="omit --root")
    probes = list(_probes(session, seconds))
    items = list(map(_item, probes, checks.look(probes, session.system, emit)))
    findings = [each for verdict in ("fail", "warn") for each in items if each.verdict == verdict]
    unreadable = [each for each in items if each.verdict == "skip"]
    ok = [each for each in items if each.verdict == "pass"]
    return Health(not findings and not (strict and unreadable), findings, unreadable, ok)


def _item(probe: Probe, result: ProbeResult) -> Item:
    words = result.found, result.expected, probe.impact, result.hint
    return Item(probe.name, probe.title, result.verdict, *words)


def _probes(session: Session, seconds: float) -> Iterator[Probe]:
    node = session.node
    # The first sample is taken now, the second when all rules have been read.
    readings = _over_time(session, seconds)
    for probe in known_hosts.of_health(node):
        yield _lasting(probe, node, seconds) if probe.level == "gpu" else probe
    yield from _of_readings(node, readings)
    impact = "While vLLM hangs, requests get no answer; a restart ends those that run."
    yield Probe("wedges", "times when vLLM generated nothing", partial(life.history, node), "node", impact)


def _lasting(probe: Probe, node: Node, seconds: float) -> Probe:
    """Return a probe that fails only if it fails again later: a clock may be low for a moment."""

    def look(on: Reader) -> Finding:
        first = probe.look(on)
        if first.verdict != "fail":
            return first
        time.sleep(seconds)
        return next(each for each in known_hosts.of_health(node) if each.name == probe.name).look(on)

    return replace(probe, look=look)


# --- readings over time: the rules of `watch` that need no server


def _over_time(session: Session, seconds: float) -> Callable[[], Readings]:
    """Take a sample, and return a function that takes another one `seconds` later and says what both tell."""
    sampler, window = Sampler(source_of(session)._replace(url="")), Window(max(seconds, 1))
    window.take(sampler.take())
    due = time.monotonic() + seconds

    @cache
    def readings() -> Readings:
        time.sleep(max(0.0, due - time.monotonic()))
        return window.take(sampler.take())

    return readings


def _of_readings(node: Node, readings: Callable[[], Readings]) -> Iterable[Probe]:
    rules = {rule.name: rule for rule in advice.rules()}
    for name, title, told in (
        ("memory-low", "memory that is available", _memory),
        ("link-errors", "errors of the QSFP link", _link),
    ):
        if name != "link-errors" or node.several:
            rule = rules[name]
            yield Probe(name, title, partial(_judged, rule, readings, told), "node", rule.means)


def _judged(rule: Rule, readings: Callable[[], Readings], told: Callable[[Readings], str], _: Reader) -> Finding:
    of = readings()
    words = told(of)
    if not words:
        return skipped(f"the kernel does not tell: {rule.reading}")
    said = next((each for each in advice.advice(of, _NO_SLO) if each.name == rule.name), None)
    if said is None:
        return passed(words)
    return (failed if said.level == "red" else warned)(said.found, said.do)


def _memory(of: Readings) -> str:
    machine = of.machine
    if machine is None or not machine.memory:
        return ""
    return f"{machine.available / _GIB:.1f} of {machine.memory / _GIB:.1f} GiB are available"


def _link(of: Readings) -> str:
    return "" if of.link_errors is None else "no counter has grown"
