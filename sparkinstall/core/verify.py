"""Verify a node: check every resource, then run the probes."""

from collections.abc import Sequence

from msgspec import Struct

from sparkinstall.core import checks, fixes
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.core.session import Session, looked_at
from sparkinstall.errors import NotThere
from sparkinstall.events import Emit, silent
from sparkinstall.probes import Level, Probe, failed


class VerifyOptions(Struct, frozen=True):
    """Which checks and probes run (as in `checks.chosen`); `strict`: a skipped one counts as failed."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    level: Level | None = None
    measure: bool = False
    strict: bool = False


class Verification(Struct, frozen=True):
    """Result of `verify`. `results` are those of `probes`; `standing` is empty if names were left out."""

    reports: Sequence[StepReport]
    probes: Sequence[Probe]
    results: Sequence[ProbeResult]
    standing: Sequence[FixState]
    strict: bool

    @property
    def drifted(self) -> list[StepReport]:
        return [report for report in self.reports if report.is_due]

    @property
    def failed(self) -> list[ProbeResult]:
        return [each for each in self.results if each.verdict == "fail"]

    @property
    def skipped(self) -> list[str]:
        """Names of what was skipped: probes, and steps that are node only."""
        left = [report.name for report in self.reports if report.outcome == "node_only"]
        return [*left, *(each.name for each in self.results if each.verdict == "skip")]

    @property
    def wrong(self) -> bool:
        return bool(self.drifted or self.failed or (self.strict and self.skipped))


def verify(session: Session, options: VerifyOptions, emit: Emit = silent) -> Verification:
    """Run every check and every probe that `options` choose.

    Raises:
        NotThere: sparkinstall has installed nothing here.
        BadUsage: an unknown name or level.
    """
    chosen = checks.chosen(session.node, options.only, options.skip, options.level, options.measure)
    damaged = _journal(session)
    if not damaged and not session.state.installed:
        raise NotThere(f"nothing is installed in {session.system.root}", hint="`sparkinstall all` sets it up")
    reports = looked_at(session, chosen.steps)
    probes = [*damaged, *chosen.probes]
    results = checks.look(probes, session.system, emit)
    findings = {each.name: each for each in results}
    standing = fixes.stand(session.node, reports, findings) if chosen.whole else []
    return Verification(reports, probes, results, standing, options.strict)


def _journal(session: Session) -> list[Probe]:
    """Report a journal that cannot be used: no check or probe needs it, but `all` and `uninstall` do."""
    problem = session.state.trouble(session.node)
    if problem is None:
        return []
    finding = failed(problem.message, problem.hint)
    impact = "`sparkinstall all` stops before it starts, and `sparkinstall uninstall` restores nothing."
    return [Probe("journal", "the journal of changes", lambda _: finding, "static", impact)]
