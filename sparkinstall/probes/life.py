"""Whether the proof of life watches vLLM, and what it has seen."""

import time
from collections.abc import Iterable
from functools import partial

from sparkinstall.facts.life import LifeState, life_state, summary
from sparkinstall.facts.units import show
from sparkinstall.layout import LIFE_UNIT
from sparkinstall.node import Node
from sparkinstall.probes import Finding, Probe, failed, passed, skipped, warned
from sparkinstall.services import LIFE
from sparkinstall.system import Reader

# Seconds for /metrics, evidence and a restart, during which it notes nothing.
_BESIDES = 420


def probes(node: Node, impact: str) -> Iterable[Probe]:
    """Yield the probe of the service."""
    yield Probe(
        "serving-life", "the proof of life watches vLLM", partial(_watches, node), "node", impact,
        needs_node="a rehearsal starts no services",
    )  # fmt: skip


def _watches(node: Node, on: Reader) -> Finding:
    active = show(on, LIFE_UNIT, "ActiveState")["ActiveState"]
    if active != "active":
        return failed(f"{LIFE_UNIT} is {active or 'unknown'}", "`sparkinstall run life`, and `journalctl -u vllm-life`")
    return judged(node, life_state(on), time.time())


def judged(node: Node, state: LifeState | None, now: float) -> Finding:
    """Judge what the service has noted; `now` in seconds of the epoch."""
    settings = node.config.serving.life
    most = settings.every_seconds + settings.probe_seconds + _BESIDES
    expected, hint = f"a look within {most} s", f"`sudo systemctl restart {LIFE_UNIT}`"
    if state is None:
        return warned("it has noted nothing yet", f"wait a minute, else {hint}", expected)
    if (age := state.age(now)) > most:
        return failed(f"its last look was {age:.0f} s ago", f"{hint}, and `journalctl -u vllm-life`", expected)
    found = f"{summary(state)}; last look {max(0, age):.0f} s ago"
    if state.state == "wedged" or (state.wedges and not state.left):
        last = state.wedges[-1] if state.wedges else None
        evidence = f"see {last.evidence}, and" if last and last.evidence else "see"
        return warned(found, f"{evidence} `journalctl -u vllm-life`", "vLLM generates")
    return passed(found, expected)


def history(node: Node, on: Reader) -> Finding:
    """Judge what it has noted within 24 hours: a wedge that is over is a finding too, because it tends to return."""
    if not LIFE.wanted(node):
        return skipped("no proof of life watches vLLM on this node: `serving.life`")
    found, state = _watches(node, on), life_state(on)
    if found.verdict != "pass" or state is None or not (state.wedges or state.restarts):
        return found
    told = [f"{each.at} {each.why} ({each.evidence or each.trouble or 'no evidence'})" for each in state.wedges]
    hint = "read the evidence, and `sparkinstall diagnose`"
    return warned("; ".join([summary(state), *told]), hint, "no wedge within 24 hours")
