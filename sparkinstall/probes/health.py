"""Whether the timer of `health` runs, and its result is new."""

import time
from collections.abc import Iterable
from functools import partial

from sparkinstall.facts.health import HealthRun, last_run, summary
from sparkinstall.facts.units import show
from sparkinstall.layout import HEALTH_TIMER, HEALTH_UNIT
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed
from sparkinstall.system import Reader

# Seconds that a run may take.
_RUN = 300


def probes(node: Node, impact: str) -> Iterable[Probe]:
    """Yield the probe of the timer."""
    yield Probe(
        "health-timer", "the timer of `health` writes its result", partial(_runs, node), "node", impact,
        needs_node="a rehearsal starts no timers",
    )  # fmt: skip


def _runs(node: Node, on: Reader) -> Finding:
    active = show(on, HEALTH_TIMER, "ActiveState")["ActiveState"]
    if active != "active":
        return failed(f"{HEALTH_TIMER} is {active or 'unknown'}", "`sparkinstall health --install`")
    return judged(node, last_run(on, node.health_metrics), time.time())


def judged(node: Node, run: HealthRun | None, now: float) -> Finding:
    """Judge the last run; `now` in seconds of the epoch. What it has found is told, and is the matter of `health`."""
    most = 2 * 60 * node.config.health.every_minutes + _RUN
    expected, hint = f"a run within {most // 60} minutes", f"`journalctl -u {HEALTH_UNIT}` says why"
    if run is None:
        return failed(f"{node.health_metrics} has no result", hint, expected)
    if (age := run.age(now)) > most:
        return failed(f"its last run was {age / 60:.0f} minutes ago", hint, expected)
    return passed(f"ran {max(0, age):.0f} s ago and {summary(run)}", expected)
