"""Plan, check, ask, make it so, prove it: what `all` and `run` do."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.cli.run_command import Answer, confirm
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from rich.console import Console

    from sparkinstall.core.checks import ProbeResult
    from sparkinstall.core.engine import StepReport
    from sparkinstall.core.fixes import FixState
    from sparkinstall.core.session import Session
    from sparkinstall.errors import Problem
    from sparkinstall.node import Node
    from sparkinstall.steps import Step


class Choice(Struct, frozen=True):
    """Which steps, which checks do not count, and whether to ask."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    yes: bool = False
    json: bool = False
    fresh: bool = False
    verb: str = "all"


def install(asked: Target, choice: Choice) -> Answer:
    """Plan, check, ask, make it so, prove it."""
    from sparkinstall.core import catalogue
    from sparkinstall.core.session import looked_at, open_session

    session = open_session(asked)
    if problem := session.state.trouble(session.node):
        raise problem
    _refuse_another_prefix(session)
    steps = catalogue.chosen(session.node, choice.only, choice.skip)
    reports = looked_at(session, steps)
    if not choice.fresh:
        _refuse_conflicts(reports)
    so_already = all(report.outcome in ("unchanged", "node_only") for report in reports)
    if so_already and not choice.fresh and not session.state.unproven():
        return _nothing_to_do(session, steps, reports, choice.verb)
    _refuse_what_needs_more(session.node, reports, choice.verb)
    preflight(session, choice)
    if not choice.json:
        _show_beginning(session, reports, asked.verbose)
    # A rehearsal touches nothing but its own folder: there is nothing to agree to.
    confirm("Go on?", agreed=choice.yes or session.node.rehearsal, default=True)
    return _make_so(session, steps, choice, asked)


def _refuse_another_prefix(session: "Session") -> None:
    """Two installations under one journal: what one puts in place the other would call drift.

    Raises:
        Blocked: this node was set up in another place.
    """
    from sparkinstall.errors import Blocked

    trees = [r.undo.subject for r in session.state.journal().records() if r.undo.kind == "tree"]
    elsewhere = [tree for tree in trees if not tree.startswith(f"{session.node.prefix}/")]
    if elsewhere:
        raise Blocked(
            f"this node was set up in {session.system.real(elsewhere[0].rpartition('/')[0])}, "
            f"and `prefix` is {session.node.prefix} now",
            hint="uninstall that first (`sparkinstall uninstall`), or set `prefix` to its former value",
        )


def _refuse_conflicts(reports: "Sequence[StepReport]") -> None:
    """What stands in the way is said before hours are spent on the rest.

    Raises:
        Blocked: something that is not ours to move is where something of ours has to be.
    """
    from sparkinstall.errors import Blocked
    from sparkinstall.resources import Conflict

    for report in reports:
        for checked in report.checked:
            if isinstance(checked.state, Conflict):
                raise Blocked(f"{report.name}: {checked.state.message}", hint=checked.state.hint)


def _refuse_what_needs_more(node: "Node", reports: "Sequence[StepReport]", verb: str) -> None:
    """A step that was chosen alone may need one that was not.

    Raises:
        BadUsage: nothing was begun.
    """
    from sparkinstall.core import catalogue
    from sparkinstall.errors import BadUsage
    from sparkinstall.resources import Unknown

    known = {step.name for step in catalogue.of(node)} - {report.name for report in reports}
    for report in reports:
        needs = {c.state.waits_for for c in report.checked if isinstance(c.state, Unknown)} & known
        if needs:
            first = sorted(needs)[0]
            alone = f"`sparkinstall run {first} {report.name}`, or everything: `sparkinstall all`"
            # What the node is among several is not remembered of a run that never began: say nothing that forgets it.
            hint = f"add `--only {first}`, or leave `--only` out" if verb == "multi-node" else alone
            raise BadUsage(f"the step {report.name} needs {first} to be done before", hint=hint)


def _nothing_to_do(session: "Session", steps: "Sequence[Step]", reports: "Sequence[StepReport]", verb: str) -> Answer:
    from sparkinstall.cli.json_output import step_data
    from sparkinstall.core import checks
    from sparkinstall.errors import Exit
    from sparkinstall.events import silent

    static = checks.of_files(steps, session.node)
    bad = [each for each in checks.look(static, session.system, silent) if each.finding.verdict == "fail"]
    if bad:
        return Answer(Exit.FAILED, {"changed": False}, problems=(_damaged(bad),))
    _settle_options(session, verb)
    left = [report.name for report in reports if report.outcome == "node_only"]

    def show() -> None:
        print(f"✓ {session.where}: everything is up to date; nothing was changed.")
        if left:
            print(f"  Node only: {', '.join(left)}. `sparkinstall plan{session.root_option}` says why.")

    return Answer(data={"changed": False, "steps": [step_data(report) for report in reports]}, show=show)


def _settle_options(session: "Session", verb: str) -> None:
    """Who broke off a run and asks for what was there before finds it so: that run must not be gone on with later."""
    from sparkinstall.events import silent

    if session.state.exists and session.state.options() != session.options:
        with session.state.hold(verb, silent):
            session.state.remember_options(session.options)


def _damaged(bad: "Sequence[ProbeResult]") -> "Problem":
    from sparkinstall.errors import Problem

    return Problem(
        "the installation is complete but damaged",
        cause="; ".join(f"{each.probe.name}: {each.finding.found}" for each in bad),
        hint="reinstall: `sparkinstall run environment fp8 --force`",
    )


def preflight(session: "Session", choice: Choice) -> None:
    """Run every check; stop before anything is touched if one fails that is not ignored.

    Raises:
        PreflightFailed: with all failures in words.
        BadUsage: `--ignore` names no check.
    """
    from sparkinstall.core import catalogue, checks
    from sparkinstall.errors import PreflightFailed
    from sparkinstall.events import silent
    from sparkinstall.probes import preflight as preflight_probes

    probes = list(preflight_probes.preflight(session.node))
    catalogue.require_known(choice.ignore, [probe.name for probe in probes], "check")
    looked = [_ignored(each, choice.ignore) for each in checks.look(probes, session.system, silent)]
    if sys.stdin.isatty() and [each.probe.name for each in looked if each.finding.verdict == "fail"] == ["sudo"]:
        # All that is missing is the password: a person is there to give it.
        session.system.ask_for_sudo()
        looked = [_ignored(each, choice.ignore) for each in checks.look(probes, session.system, silent)]
    bad = [each for each in looked if each.finding.verdict == "fail"]
    if not choice.json:
        from sparkinstall.cli.text_output import console, show_preflight

        show_preflight(looked, console())
    if bad:
        raise PreflightFailed(
            f"{session.where} is not ready: {', '.join(each.probe.name for each in bad)} failed; nothing was changed",
            cause="; ".join(f"{each.probe.name}: {each.finding.found}" for each in bad) if choice.json else "",
            hint=_way_out(bad),
        )


def _ignored(looked: "ProbeResult", names: "Sequence[str]") -> "ProbeResult":
    """A failure that does not count is still shown, as a warning."""

    if looked.finding.verdict != "fail" or looked.probe.name not in names:
        return looked
    return replace(
        looked, finding=replace(looked.finding, verdict="warn", hint=f"ignored: --ignore {looked.probe.name}")
    )


def _way_out(bad: "Sequence[ProbeResult]") -> str:
    names = {each.probe.name for each in bad}
    if "machine" in names:
        return "on a machine that is no DGX Spark, rehearse: `sparkinstall all --root ./node`"
    return "fix these, or continue at your own risk: " + " ".join(f"--ignore {name}" for name in sorted(names))


def _show_beginning(session: "Session", reports: "Sequence[StepReport]", verbose: bool) -> None:
    from sparkinstall.cli.text_output import console, show_plan

    out = console()
    out.print(f"[bold]Plan[/]  {session.where}")
    show_plan(
        [_without_diffs(report) for report in reports] if not verbose else reports, out, verbose, session.root_option
    )
    out.print()


def _without_diffs(report: "StepReport") -> "StepReport":

    from sparkinstall.core.engine import Checked
    from sparkinstall.resources import Drift

    brief = [Checked(c.key, Drift(c.state.summary)) if isinstance(c.state, Drift) else c for c in report.checked]
    return replace(report, checked=brief)


def _make_so(session: "Session", steps: "Sequence[Step]", choice: Choice, asked: Target) -> Answer:
    from sparkinstall.cli.live_output import watching
    from sparkinstall.core import checks, engine
    from sparkinstall.journal.system import JournaledSystem

    with watching(asked.verbose) as emit, session.system.sudo_kept(), session.state.hold(choice.verb, emit) as run:
        journal, logs = session.state.journal(run), session.state.logs(run)
        # Before anything is made: a bare `all` goes on with what a run was for that failed or was broken off.
        session.state.remember_options(session.options)
        reports = engine.converge(
            steps,
            session.node,
            lambda step: JournaledSystem(session.system, journal, step, logs / f"{step}.log", emit),
            emit,
            choice.fresh,
        )
        probes = checks.of_steps(_sound(steps, reports), session.node)
        if not (choice.only or choice.skip):
            probes += checks.of_no_step(session.node)
        looked = checks.look(probes, session.system, emit)
        looked = [_of_this_node(each) for each in looked]
        session.state.remember_unproven([each.probe.name for each in looked if each.finding.verdict == "fail"])
    return _conclude(session, reports, looked, choice)


def _of_this_node(looked: "ProbeResult") -> "ProbeResult":
    """While one node is set up, the others may not be there yet: what is missing of them does not fail this one."""

    if looked.finding.verdict != "fail" or not looked.probe.others:
        return looked
    later = f"set up the other nodes, then `sparkinstall verify`; if that fails too: {looked.finding.hint}"
    return replace(looked, finding=replace(looked.finding, verdict="warn", hint=later))


def _sound(steps: "Sequence[Step]", reports: "Sequence[StepReport]") -> "list[Step]":
    """The steps that have something to prove: those that did not fail."""
    bad = {report.name for report in reports if report.outcome in ("failed", "blocked")}
    return [step for step in steps if step.name not in bad]


def _conclude(
    session: "Session", reports: "Sequence[StepReport]", looked: "Sequence[ProbeResult]", choice: Choice
) -> Answer:
    from sparkinstall.cli.json_output import finding_data, fix_data, step_data
    from sparkinstall.core import fixes
    from sparkinstall.errors import Exit, Problem

    problems = [report.problem for report in reports if report.problem]
    findings = {each.probe.name: each.finding for each in looked}
    bad = [name for name, finding in findings.items() if finding.verdict == "fail"]
    if bad and not problems:
        problems.append(
            Problem(f"installed, but not proven: {', '.join(bad)}", hint="`sparkinstall verify` shows more")
        )
    standing = fixes.stand(session.node, reports, findings)
    data = {
        "changed": any(report.outcome == "changed" for report in reports),
        "steps": [step_data(report) for report in reports],
        "probes": [finding_data(each.probe, each.finding, each.seconds) for each in looked],
        "fixes": [fix_data(state) for state in standing],
    }

    def show() -> None:
        _show_end(session, looked, [] if choice.only or choice.skip or problems else standing, bool(problems))

    return Answer(Exit.FAILED if problems else Exit.GOOD, data, show, tuple(problems))


def _show_end(
    session: "Session", looked: "Sequence[ProbeResult]", standing: "Sequence[FixState]", failed: bool
) -> None:
    from sparkinstall.cli.text_output import console, show_findings, show_fixes

    out = console()
    if looked:
        out.print("[bold]Proof[/]")
        show_findings(looked, out, root=session.root_option)
    if standing:
        out.print("\n[bold]The fixes[/]")
        show_fixes(standing, out, session.root_option)
    out.print()
    if not failed:
        _show_next(session, out)


def _show_next(session: "Session", out: "Console") -> None:
    """What to do now; a part that was made may have left another one behind."""
    from sparkinstall.core import catalogue, engine

    reports = engine.plan(catalogue.of(session.node), session.node, session.system)
    behind = [report.name for report in reports if report.outcome not in ("unchanged", "node_only")]
    if behind:
        out.print(f"[green bold]✓[/] done. [yellow]Open now:[/] {', '.join(behind)}. Next:")
        out.print(f"    sparkinstall all{session.root_option}", markup=False)
        return
    out.print(f"[green bold]✓[/] {session.where} is done. Next:")
    for line in _next_lines(session):
        out.print(f"    {line}", markup=False, soft_wrap=True)
    out.print(f"    sparkinstall verify{session.root_option}      [dim]verifies again, at any time[/]")
    out.print(f"    sparkinstall uninstall{session.root_option}   [dim]undoes everything[/]")


def _next_lines(session: "Session") -> list[str]:
    node = session.node
    source = f"source {session.system.real(node.env_file)}"
    if node.rehearsal:
        return [source]
    if node.role == "head":
        token = f"ssh THIS_NODE cat {node.ray_token} | " if node.config.cluster.executor == "ray" else ""
        # The pipe takes the place of the keyboard: nobody could answer.
        option = " --token-file - --yes" if token else ""
        return [f"{token}sparkinstall multi-node --role worker --head {node.address}{option}   # on the other node"]
    if node.config.serving.model:
        return [f"curl http://127.0.0.1:{node.config.serving.port}/v1/models"] if node.role == "single" else []
    return [source, "vllm serve MODEL --gpu-memory-utilization 0.85 --max-model-len 32768"] if not node.several else []
