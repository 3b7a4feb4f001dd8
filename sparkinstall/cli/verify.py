"""`sparkinstall verify`: is everything so, and does it behave so? For people and for CI."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Struct

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparkinstall.core.checks import Chosen, ProbeResult
    from sparkinstall.core.engine import StepReport
    from sparkinstall.core.fixes import FixState
    from sparkinstall.core.session import Session
    from sparkinstall.probes import Level

_FEW_NAMES = 4

Names = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Only this step or probe (may repeat).", rich_help_panel="Which parts"),
]
NotNames = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Skip this step or probe (may repeat).", rich_help_panel="Which parts"),
]
HowFar = Annotated[
    str | None,
    typer.Option(
        "--level",
        metavar="LEVEL",
        help="As far as this: static, node, gpu, link, cluster or serving; all the way without it.",
        rich_help_panel="Which parts",
    ),
]
Measure = Annotated[
    bool,
    typer.Option("--measure", help="Also what keeps the GPU or the link busy.", rich_help_panel="Which parts"),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a JUnit report for CI.", rich_help_panel="Output")
]
Strict = Annotated[bool, typer.Option("--strict", help="What was skipped counts as failed.", rich_help_panel="Output")]


class Choice(Struct, frozen=True):
    """Which checks and probes, and how strictly they are judged."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    level: "Level | None" = None
    measure: bool = False
    strict: bool = False
    junit: Path | None = None


class Result(Struct, frozen=True):
    """What a whole look at a node has found."""

    reports: "Sequence[StepReport]"
    looked: "Sequence[ProbeResult]"
    standing: "Sequence[FixState]"
    strict: bool

    @property
    def drifted(self) -> "list[StepReport]":
        return [report for report in self.reports if report.outcome not in ("unchanged", "node_only")]

    @property
    def failed(self) -> "list[ProbeResult]":
        return [each for each in self.looked if each.finding.verdict == "fail"]

    @property
    def skipped(self) -> list[str]:
        """What was skipped: probes, and steps that are node only."""
        left = [report.name for report in self.reports if report.outcome == "node_only"]
        return [*left, *(each.probe.name for each in self.looked if each.finding.verdict == "skip")]

    @property
    def wrong(self) -> bool:
        return bool(self.drifted or self.failed or (self.strict and self.skipped))


def verify(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    level: HowFar = None,
    only: Names = None,
    skip: NotNames = None,
    measure: Measure = False,
    strict: Strict = False,
    junit: Junit = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Check everything and prove it on running processes; exit 3 if there is drift or a failure."""
    asked = Target(root, config, stack, tuple(set_ or ()), platform, full, verbose)

    def body() -> Answer:
        with _reported(junit, strict, options.root_option(root)):
            choice = Choice(tuple(only or ()), tuple(skip or ()), known_level(level), measure, strict, junit)
            return _verify(asked, choice, json)

    answer("verify", body, root=root, json=json, verbose=verbose)


def known_level(name: str | None) -> "Level | None":
    """The level of that name.

    Raises:
        BadUsage: there is none.
    """
    from sparkinstall.core.catalogue import require_known
    from sparkinstall.probes import LEVELS

    require_known([name] if name is not None else [], LEVELS, "level")
    return next((level for level in LEVELS if level == name), None)


@contextmanager
def _reported(path: Path | None, strict: bool, root: str) -> Iterator[None]:
    """What keeps everything from being looked at stands in the report too."""
    from sparkinstall.errors import Problem

    if path is None:
        yield
        return
    from sparkinstall.cli import junit

    junit.begin(path)
    try:
        yield
    except Problem as problem:
        junit.write(path, junit.of_problem(problem), strict, root)
        raise


def _verify(asked: Target, choice: Choice, json: bool) -> Answer:
    from sparkinstall.core.session import open_session

    session = open_session(asked)
    result = looked_through(session, choice, json)
    if choice.junit:
        _report(choice.junit, result, session.root_option)
    return _told(session, result, asked.verbose, json)


def looked_through(session: "Session", choice: Choice, plain: bool) -> Result:
    """Every check and every probe that was chosen; on a terminal, with what is being asked at the moment.

    Raises:
        NotThere: nothing of sparkinstall is here.
        BadUsage: a name or a level that there is not.
    """
    from sparkinstall.core import checks, fixes
    from sparkinstall.core.session import looked_at
    from sparkinstall.errors import NotThere

    chosen = checks.chosen(session.node, choice.only, choice.skip, choice.level, choice.measure)
    damaged = _journal(session)
    if not damaged and not session.state.installed:
        raise NotThere(f"nothing of sparkinstall is in {session.system.root}", hint="`sparkinstall all` sets it up")
    reports = looked_at(session, chosen.steps)
    looked = [*damaged, *_probed(session, chosen, plain)]
    findings = {each.probe.name: each.finding for each in looked}
    standing = fixes.stand(session.node, reports, findings) if chosen.whole else []
    return Result(reports, looked, standing, choice.strict)


def _journal(session: "Session") -> "list[ProbeResult]":
    """No check and no probe needs the journal, but `all` and `uninstall` do: told where it cannot be used."""
    from sparkinstall.core.checks import ProbeResult
    from sparkinstall.probes import Probe, failed

    problem = session.state.trouble(session.node)
    if problem is None:
        return []
    finding = failed(problem.message, problem.hint)
    probe = Probe(
        "journal",
        "the record of what was here before",
        lambda _: finding,
        "static",
        "`sparkinstall all` stops before it starts, and `sparkinstall uninstall` restores nothing.",
    )
    return [ProbeResult(probe, finding, 0.0)]


def _probed(session: "Session", chosen: "Chosen", plain: bool) -> "list[ProbeResult]":
    from sparkinstall.core import checks
    from sparkinstall.events import silent

    if plain:
        return checks.look(chosen.probes, session.system, silent)
    from sparkinstall.cli.live_output import asking

    with asking() as emit:
        return checks.look(chosen.probes, session.system, emit)


def _report(path: Path, result: Result, root: str) -> None:
    from sparkinstall.cli import junit

    junit.write(path, [*junit.of_checks(result.reports), *junit.of_probes(result.looked)], result.strict, root)


def data(session: "Session", result: Result) -> dict[str, Any]:
    """What `--json` prints; `comparables` is what `cluster verify` compares between the nodes."""
    from sparkinstall.cli.json_output import finding_data, fix_data, step_data
    from sparkinstall.cluster import drift

    return {
        "checks": [step_data(report) for report in result.reports],
        "probes": [finding_data(each.probe, each.finding, each.seconds) for each in result.looked],
        "fixes": [fix_data(state) for state in result.standing],
        "comparables": drift.comparables(session.node, session.system),
    }


def _told(session: "Session", result: Result, verbose: bool, json: bool) -> Answer:
    from sparkinstall.errors import Exit

    show = lambda: _show(session, result, verbose)  # noqa: E731
    return Answer(Exit.DRIFT if result.wrong else Exit.GOOD, data(session, result) if json else {}, show)


def _show(session: "Session", result: Result, verbose: bool) -> None:
    from sparkinstall.cli.text_output import console, show_fixes, show_plan, show_proof

    out = console()
    if result.reports:
        out.print(f"[bold]Checks[/]  {session.where}")
        show_plan(result.reports, out, verbose, session.root_option)
        out.print()
    if result.looked:
        out.print("[bold]Proof[/]")
        show_proof(result.looked, out, session.root_option, verbose)
        out.print()
    if result.standing:
        out.print("[bold]The fixes[/]")
        show_fixes(result.standing, out, session.root_option)
        out.print()
    out.print(_conclusion(session, result, verbose))


def _conclusion(session: "Session", result: Result, verbose: bool) -> str:
    if result.drifted or result.failed:
        return (
            f"[red bold]✗[/] {'drift' if result.drifted else 'failure'} found; {_way_out(result, session.root_option)}"
        )
    if result.wrong:
        return f"[red bold]✗[/] skipped, and --strict was given: {', '.join(result.skipped)}"
    warned = sum(each.finding.verdict == "warn" for each in result.looked)
    notes = [f"{warned} warning{'s' if warned > 1 else ''}"] if warned else []
    notes += [_unseen(result.skipped, verbose)] if result.skipped else []
    well = "everything that was checked is ok" if result.skipped else "everything is ok"
    return f"[green bold]✓[/] {well}" + (f" ({'; '.join(notes)})" if notes else "")


def _unseen(names: "Sequence[str]", verbose: bool) -> str:
    which = ", ".join(names) if verbose or len(names) <= _FEW_NAMES else "-v names them"
    return f"{len(names)} skipped: {which}"


def _way_out(result: Result, root: str) -> str:
    """What to do: run the steps, or follow the hints of the probes."""
    if result.drifted:
        return f"`sparkinstall all{root}` fixes it or explains why it cannot"
    what = ", ".join(each.probe.name for each in result.failed)
    return f"see the → hints above for {what}"
