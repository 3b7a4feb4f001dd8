"""The use case of `all`, `run` and `multi-node`: plan, preflight, ask, apply, verify."""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.core import catalogue, checks, engine, fixes
from sparkinstall.core.checks import ProbeResult
from sparkinstall.core.engine import StepReport
from sparkinstall.core.fixes import FixState
from sparkinstall.core.session import Session, looked_at
from sparkinstall.errors import BadUsage, Blocked, PreflightFailed, Problem
from sparkinstall.events import Emit, silent
from sparkinstall.facts.decisions import installed_stack
from sparkinstall.journal.system import JournaledSystem
from sparkinstall.layout import LIFE_FOLDER
from sparkinstall.node import Node
from sparkinstall.probes import Probe, preflight
from sparkinstall.resources import Conflict, Unknown
from sparkinstall.schema import require_known
from sparkinstall.steps import Step
from sparkinstall.system.locks import cache_in_use


class InstallOptions(Struct, frozen=True):
    """The steps to run, and the preflight checks to ignore. `force` also applies what is up to date.

    `checks`: the only preflight checks that matter for these steps; None: all do.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    force: bool = False
    verb: str = "all"
    checks: tuple[str, ...] | None = None


class Dialog(Struct, frozen=True):
    """How a run talks to its caller.

    `show_preflight` is given the checks before a failure ends the run, `agree` the plan before anything is applied (it
    raises if the answer is no), and `watching` yields what progress goes to.
    """

    show_preflight: Callable[[Sequence[ProbeResult]], None]
    agree: Callable[[Sequence[StepReport]], None]
    watching: Callable[[], AbstractContextManager[Emit]]


def _nothing_to_bring(_: Emit) -> None:
    """Do nothing: what a step needs is downloaded by it."""


class Supply(Struct, frozen=True):
    """What a run takes from a bundle: `checks` whether the node lacks anything else, and `bring_in` puts it where the
    steps look for it."""

    checks: tuple[Probe, ...] = ()
    bring_in: Callable[[Emit], None] = _nothing_to_bring


class Installation(Struct, frozen=True):
    """Result of a run. `applied`: it went as far as applying; else all was up to date, and no step was run."""

    reports: Sequence[StepReport] = ()
    results: Sequence[ProbeResult] = ()
    standing: Sequence[FixState] = ()
    problems: tuple[Problem, ...] = ()
    applied: bool = False

    @property
    def changed(self) -> bool:
        return any(report.outcome == "changed" for report in self.reports)


def converge(
    session: Session,
    options: InstallOptions,
    dialog: Dialog,
    supply: Supply = Supply(),  # noqa: B008 - it is frozen
) -> Installation:
    """Plan the selected steps, check that the node is ready, ask, apply and verify.

    Raises:
        PreflightFailed, Blocked, BadUsage, Busy, JournalDamaged: nothing was applied.
    """
    if problem := session.state.trouble(session.node):
        raise problem
    _refuse_another_prefix(session)
    steps = catalogue.chosen(session.node, options.only, options.skip)
    reports = looked_at(session, steps)
    if not options.force:
        _refuse_conflicts(reports)
    if not any(report.is_due for report in reports) and not options.force and not session.state.unproven():
        return _nothing_to_do(session, steps, reports, options.verb)
    _refuse_missing_needs(session.node, reports, options.verb)
    _require_ready(session, options, dialog, supply.checks)
    dialog.agree(reports)
    return _apply(session, steps, options, dialog, supply)


def drifted(session: Session) -> list[str]:
    """Return the names of steps with drift: applying one step may have outdated another."""
    reports = engine.plan(catalogue.of(session.node), session.node, session.system)
    return [report.name for report in reports if report.is_due]


def _refuse_another_prefix(session: Session) -> None:
    """Reject a second installation under one journal: each would report the other's files as drift.

    Raises:
        Blocked: this node was set up with another prefix.
    """
    trees = [r.undo.subject for r in session.state.journal().records() if r.undo.kind == "tree"]
    elsewhere = [tree for tree in trees if tree != LIFE_FOLDER and not tree.startswith(f"{session.node.prefix}/")]
    if elsewhere:
        raise Blocked(
            f"this node was set up in {session.system.real(elsewhere[0].rpartition('/')[0])}, "
            f"and `prefix` is {session.node.prefix} now",
            hint="uninstall that first (`sparkinstall uninstall`), or set `prefix` to its former value",
        )


def _refuse_conflicts(reports: Sequence[StepReport]) -> None:
    """Report a conflict before hours are spent on other steps.

    Raises:
        Blocked: something that must not be overwritten is in the place of a resource.
    """
    for report in reports:
        for state in report.checked:
            if isinstance(state, Conflict):
                raise Blocked(f"{report.name}: {state.message}", hint=state.hint)


def _refuse_missing_needs(node: Node, reports: Sequence[StepReport], verb: str) -> None:
    """Reject a step that was selected without one that it needs.

    Raises:
        BadUsage: nothing was changed.
    """
    others = {step.name for step in catalogue.of(node)} - {report.name for report in reports}
    for report in reports:
        needs = {state.waits_for for state in report.checked if isinstance(state, Unknown)} & others
        if needs:
            first = sorted(needs)[0]
            alone = f"`sparkinstall run {first} {report.name}`, or everything: `sparkinstall all`"
            # A run that never began does not store the role, so `all` would not know it.
            hint = f"select {first} too, or omit `--only` and `--skip`" if verb == "multi-node" else alone
            raise BadUsage(f"the step {report.name} needs {first} to run before", hint=hint)


def _nothing_to_do(session: Session, steps: Sequence[Step], reports: Sequence[StepReport], verb: str) -> Installation:
    static = checks.of_files(steps, session.node)
    bad = [each for each in checks.look(static, session.system, silent) if each.verdict == "fail"]
    if bad:
        problem = Problem(
            "the installation is complete but damaged",
            cause="; ".join(f"{each.name}: {each.found}" for each in bad),
            hint="reinstall: `sparkinstall run environment fp8 --force`",
        )
        return Installation(problems=(problem,))
    if session.state.exists and session.state.options() != session.options:
        # The node matches an earlier request again: the options of an aborted run must not be resumed later.
        with session.state.hold(verb, silent):
            session.state.remember_options(session.options)
    return Installation(reports)


def _require_ready(session: Session, options: InstallOptions, dialog: Dialog, more: Sequence[Probe]) -> None:
    """Run the preflight checks.

    Raises:
        PreflightFailed: one failed that is not ignored; the cause names all failures.
        BadUsage: `ignore` names no check.
    """
    ignore = options.ignore
    probes = [
        each for each in preflight.preflight(session.node) if options.checks is None or each.name in options.checks
    ]
    probes += more
    require_known(ignore, [probe.name for probe in probes], "check")
    results = _preflight(session, probes, ignore)
    if sys.stdin.isatty() and _failed(results) == ["sudo"]:
        # Only the password is missing, and the user can enter it.
        session.system.ask_for_sudo()
        results = _preflight(session, probes, ignore)
    dialog.show_preflight(results)
    if bad := _failed(results):
        found = [f"{each.name}: {each.found}" for each in results if each.name in bad]
        raise PreflightFailed(
            f"{session.where} is not ready: {', '.join(bad)} failed; nothing was changed",
            cause="; ".join(found),
            hint="on a machine that is not a DGX Spark, rehearse: `sparkinstall all --root ./node`"
            if "machine" in bad
            else "fix these, or continue at your own risk: " + " ".join(f"--ignore {name}" for name in sorted(bad)),
        )


def _preflight(session: Session, probes: Sequence[Probe], ignore: Sequence[str]) -> list[ProbeResult]:
    """Run the checks; an ignored failure is a warning."""
    return [
        _warning(each, f"ignored: --ignore {each.name}") if each.verdict == "fail" and each.name in ignore else each
        for each in checks.look(probes, session.system, silent)
    ]


def _failed(results: Sequence[ProbeResult]) -> list[str]:
    return [each.name for each in results if each.verdict == "fail"]


def _warning(result: ProbeResult, hint: str) -> ProbeResult:
    return replace(result, verdict="warn", hint=hint)


def _apply(
    session: Session, steps: Sequence[Step], options: InstallOptions, dialog: Dialog, supply: Supply
) -> Installation:
    with dialog.watching() as emit, session.system.sudo_kept(), cache_in_use(session.node.cache):
        # Before the node's state exists: if the cache is too small, nothing was changed.
        supply.bring_in(emit)
        with session.state.hold(options.verb, emit) as run:
            return _converged(session, steps, options, run, emit)


def _converged(session: Session, steps: Sequence[Step], options: InstallOptions, run: str, emit: Emit) -> Installation:
    state = session.state
    journal, logs = state.journal(run), state.logs(run)
    # Before anything is applied: a bare `all` resumes a run that failed or was aborted.
    state.remember_options(session.options)
    reports = engine.converge(
        steps,
        session.node,
        lambda step: JournaledSystem(session.system, journal, step, logs / f"{step}.log", emit),
        emit,
        options.force,
        installed_stack(session.system, session.node.venv_stamp) not in ("", session.node.stack.name),
    )
    whole = not (options.only or options.skip)
    results = _proof(session, steps, reports, whole, emit)
    state.remember_unproven(_failed(results))
    return _conclude(session, reports, results)


def _proof(
    session: Session, steps: Sequence[Step], reports: Sequence[StepReport], whole: bool, emit: Emit
) -> list[ProbeResult]:
    """Run the probes of the steps that did not fail, and, if all steps were run, those of the machine."""
    bad = {report.name for report in reports if report.outcome in ("failed", "blocked")}
    probes = checks.of_steps([step for step in steps if step.name not in bad], session.node)
    if whole:
        probes += checks.of_no_step(session.node)
    need_others = {probe.name for probe in probes if probe.others}
    # The other nodes may not be set up yet.
    hint = "set up the other nodes, then `sparkinstall verify`; if that fails too:"
    return [
        _warning(each, f"{hint} {each.hint}") if each.verdict == "fail" and each.name in need_others else each
        for each in checks.look(probes, session.system, emit)
    ]


def _conclude(session: Session, reports: Sequence[StepReport], results: Sequence[ProbeResult]) -> Installation:
    problems = [report.problem for report in reports if report.problem]
    if (bad := _failed(results)) and not problems:
        hint = "`sparkinstall verify` shows more"
        problems.append(Problem(f"installed, but not verified: {', '.join(bad)}", hint=hint))
    standing = fixes.stand(session.node, reports, {each.name: each for each in results})
    return Installation(reports, results, standing, tuple(problems), applied=True)
