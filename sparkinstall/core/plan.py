"""Plan a run: the preflight checks, and how each resource differs from the desired state."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.core import catalogue, checks
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.core.session import Session, looked_at
from sparkinstall.errors import Problem
from sparkinstall.events import silent
from sparkinstall.probes import Probe, preflight
from sparkinstall.resources import Conflict


class Plan(Struct, frozen=True):
    """Result of `plan`. `trouble`: the journal cannot be used."""

    preflight: Sequence[ProbeResult]
    reports: Sequence[StepReport]
    trouble: Problem | None

    @property
    def drift(self) -> bool:
        return any(report.outcome in ("drift", "failed") for report in self.reports)

    @property
    def problems(self) -> tuple[Problem, ...]:
        found = (self.trouble, *(report.problem for report in self.reports))
        return tuple(problem for problem in found if problem)

    @property
    def stops(self) -> list[str]:
        """Names of the steps at which a run would stop."""
        return [
            report.name
            for report in self.reports
            if report.problem or any(isinstance(each, Conflict) for each in report.checked)
        ]


def plan(session: Session, only: Sequence[str], skip: Sequence[str], more: Sequence[Probe] = ()) -> Plan:
    """Plan the steps that `only` and `skip` leave; change nothing. `more`: preflight checks of a bundle.

    Raises:
        BadUsage: an unknown step.
    """
    steps = catalogue.chosen(session.node, only, skip)
    ready = checks.look([*preflight.preflight(session.node), *more], session.system, silent)
    return Plan(ready, looked_at(session, steps), session.state.trouble(session.node))
