"""What the timer of `sparkinstall health` has written for node_exporter."""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from msgspec import Struct

from sparkinstall.facts.life import LifeState
from sparkinstall.system import Reader

MARK = "# Written by `sparkinstall health --metrics`"
"""The beginning of its first line."""
STATES = {"pass": 0, "warn": 1, "fail": 2, "skip": -1}
"""The value of a rule by its verdict."""
STATE, LAST_RUN = "sparkinstall_health_state", "sparkinstall_health_last_run_timestamp_seconds"
"""Names of metrics."""
_SAMPLE = re.compile(rf"^(?:{STATE}{{rule=\"([\w-]+)\"}}|({LAST_RUN})) (\S+)$", re.MULTILINE)


class HealthRun(Struct, frozen=True):
    """The last run of the timer. `at`: UTC. `findings` and `unreadable`: rules by name; `rules`: how many there are."""

    at: str
    rules: int
    findings: tuple[str, ...]
    unreadable: tuple[str, ...]

    def age(self, now: float) -> float:
        """Seconds from the run to `now`, in seconds of the epoch."""
        return now - datetime.fromisoformat(self.at).timestamp()


def metrics(verdicts: Iterable[tuple[str, str]], life: LifeState | None, now: float) -> str:
    """Return the text for node_exporter: the verdict of each rule by its name, and what the proof of life has noted."""
    lines = [MARK + " for node_exporter."]
    what = "1: a warning, 2: a failure, 0: nothing is found, -1: it cannot be read here"
    lines += _family(STATE, f"What a rule of `sparkinstall health` finds. {what}.")
    lines += [f'{STATE}{{rule="{name}"}} {STATES[verdict]}' for name, verdict in verdicts]
    lines += [*_family(LAST_RUN, "When the rules were read, in seconds of the epoch."), f"{LAST_RUN} {now:.0f}"]
    for name, text, value in _of_life(life) if life else ():
        lines += [*_family(name, text), f"{name} {value:g}" if abs(value) < 1e6 else f"{name} {value:.0f}"]
    return "\n".join(lines) + "\n"


def _family(name: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge"]


def _of_life(life: LifeState) -> Iterator[tuple[str, str, float]]:
    yield "sparkinstall_life_wedges", "Times within 24 hours when vLLM generated nothing.", len(life.wedges)
    yield "sparkinstall_life_restarts", "Restarts of vLLM within 24 hours for that reason.", len(life.restarts)
    yield "sparkinstall_life_restarts_left", "Restarts that are left in this hour.", life.left
    yield "sparkinstall_life_last_look_timestamp_seconds", "When vLLM was looked at last.", _seconds(life.checked)
    if life.wedges:
        last = "When the last of these began, in seconds of the epoch."
        yield "sparkinstall_life_last_wedge_timestamp_seconds", last, _seconds(life.wedges[-1].at)


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()


def last_run(on: Reader, path: str) -> HealthRun | None:
    """Return the last run that the file at `path` has; None if there is none."""
    found = _SAMPLE.findall((on.read(path) or b"").decode(errors="replace"))
    rules = {rule: value for rule, _, value in found if rule}
    ran = [float(value) for rule, name, value in found if name]
    if not ran:
        return None
    at = datetime.fromtimestamp(ran[0], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    bad = tuple(name for name, value in rules.items() if float(value) > 0)
    return HealthRun(at, len(rules), bad, tuple(name for name, value in rules.items() if float(value) < 0))


def summary(run: HealthRun) -> str:
    """Return what a run has found, in one line."""
    found = ", ".join(run.findings) or "nothing"
    unread = f"; {len(run.unreadable)} of {run.rules} rules could not be read" if run.unreadable else ""
    return f"finds {found}{unread}"
