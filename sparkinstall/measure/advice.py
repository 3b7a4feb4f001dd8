"""What readings mean and what to do: rules are data (`knowledge/readings.yaml`) that name a detector of this module."""

from collections.abc import Callable, Iterator
from functools import lru_cache

from msgspec import Struct

from sparkinstall import schema
from sparkinstall.facts import card
from sparkinstall.measure.histogram import Latency
from sparkinstall.measure.readings import Readings, grew
from sparkinstall.measure.rounds import Slo
from sparkinstall.probes import reading_rules
from sparkinstall.probes.reading_rules import Level, Rule

_ENOUGH_FOR_A_TAIL = 100
_GIB = 1 << 30


class Advice(Struct, frozen=True):
    """What a reading means at the moment. `name` is that of the rule; `found`: what was seen."""

    name: str
    reading: str
    level: Level
    found: str
    means: str
    do: str


def advice(of: Readings, slo: Slo) -> tuple[Advice, ...]:
    """Return what the readings mean, as the rules are ordered; () if there is nothing to say."""
    return tuple(_advice(of, slo))


def _advice(of: Readings, slo: Slo) -> Iterator[Advice]:
    for rule in rules():
        if found := _DETECTORS[rule.looks](of, rule, slo):
            yield Advice(rule.name, rule.reading, rule.level, found, rule.means, rule.do)


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in order.

    Raises:
        ValueError: one names no detector.
    """
    found = reading_rules.rules()
    if unknown := [each.looks for each in found if each.looks not in _DETECTORS]:
        raise ValueError(f"looks names no detector: {unknown[0]}, use {schema.either(tuple(_DETECTORS))}")
    return found


def limit_of(slo: Slo, latency: str) -> float | None:
    """Return the limit of a latency in seconds, by its name."""
    limit = {"ttft": slo.ttft, "itl": slo.itl}.get(latency)
    return None if limit is None else limit / 1000


# --- detectors: what was seen in words, "" if the rule does not apply

_DETECTORS: dict[str, Callable[[Readings, Rule, Slo], str]] = {}


def _detects(detector: Callable[[Readings, Rule, Slo], str]) -> Callable[[Readings, Rule, Slo], str]:
    _DETECTORS[detector.__name__] = detector
    return detector


@_detects
def says(of: Readings, rule: Rule, _: Slo) -> str:
    return of.trouble if of.trouble and any(word in of.trouble for word in rule.limit) else ""


@_detects
def no_answer(of: Readings, _: Rule, slo: Slo) -> str:
    explained = any(says(of, each, slo) for each in rules() if each.looks == says.__name__)
    return "" if explained or not of.trouble else of.trouble


@_detects
def no_token(of: Readings, rule: Rule, _: Slo) -> str:
    still = of.still_seconds or 0
    return f"requests run, and for {still:.0f} s no counter has moved" if still >= rule.limit else ""


@_detects
def over_slo(of: Readings, rule: Rule, slo: Slo) -> str:
    latency: Latency | None = getattr(of, rule.reading)
    limit = limit_of(slo, rule.reading)
    if not (latency and latency.p95 and limit) or latency.p95.compared(limit) != "over":
        return ""
    return f"the 95th percentile is over {limit * 1000:g} ms"


@_detects
def tail(of: Readings, rule: Rule, _: Slo) -> str:
    latency: Latency | None = getattr(of, rule.reading)
    ratio = latency.tail if latency and latency.count >= _ENOUGH_FOR_A_TAIL else None
    return f"the 99th percentile is {ratio:.0f} times the 50th" if ratio and ratio > rule.limit else ""


@_detects
def kv_cache(of: Readings, rule: Rule, _: Slo) -> str:
    usage = of.kv_cache
    return f"{usage.now:.0%} of the KV cache are in use" if usage and usage.now >= rule.limit else ""


@_detects
def waiting_grows(of: Readings, rule: Rule, _: Slo) -> str:
    if of.seconds < rule.limit or not grew(of.waited):
        return ""
    return f"{of.waited[-1]:.0f} requests wait, {of.waited[0]:.0f} did {of.seconds:.0f} s ago"


@_detects
def preemptions(of: Readings, rule: Rule, _: Slo) -> str:
    count = of.preemptions or 0
    return f"{count:.0f} in the last {of.seconds:.0f} s" if count > rule.limit else ""


@_detects
def acceptance(of: Readings, rule: Rule, _: Slo) -> str:
    share = of.acceptance
    return f"{share:.0%} of the drafted tokens are taken" if share is not None and share < rule.limit else ""


@_detects
def clock_low(of: Readings, rule: Rule, _: Slo) -> str:
    gpu, limit = of.machine.gpu if of.machine else None, rule.limit
    if gpu is None or gpu.busy is None or gpu.mhz is None or gpu.watts is None:
        return ""
    if gpu.busy <= limit["busy_percent"] or gpu.mhz > limit["sm_mhz"] or gpu.watts > limit["watts"]:
        return ""
    return f"{gpu.mhz:.0f} MHz and {gpu.watts:.0f} W while it is {gpu.busy:.0f} % busy"


@_detects
def memory_low(of: Readings, rule: Rule, _: Slo) -> str:
    memory = of.machine
    if not memory or not memory.memory or memory.available >= rule.limit * _GIB:
        return ""
    return f"{memory.available / _GIB:.1f} GiB are available"


@_detects
def link_errors(of: Readings, rule: Rule, _: Slo) -> str:
    grown = of.link_errors or {}
    return card.in_words(grown) if sum(grown.values()) > rule.limit else ""
