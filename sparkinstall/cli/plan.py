"""`sparkinstall plan`: what `all` would do, and every difference; nothing is touched."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sparkinstall.cli import options
from sparkinstall.cli.run_command import Answer, answer
from sparkinstall.core.session import Target

if TYPE_CHECKING:
    from sparkinstall.core.checks import ProbeResult
    from sparkinstall.core.engine import StepReport
    from sparkinstall.errors import Problem


def plan(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    only: options.Only = None,
    skip: options.Skip = None,
    detailed: Annotated[bool, typer.Option("--detailed-exitcode", help="Exit 3 if anything would be changed.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what `all` would do, with every difference; change nothing."""
    asked = Target(root, config, stack, tuple(set_ or ()), platform, full, verbose)
    answer("plan", lambda: _plan(asked, only or [], skip or [], detailed), root=root, json=json, verbose=verbose)


def _plan(asked: Target, only: list[str], skip: list[str], detailed: bool) -> Answer:
    from sparkinstall.cli.json_output import finding_data, step_data
    from sparkinstall.core import catalogue, checks
    from sparkinstall.core.session import looked_at, open_session
    from sparkinstall.errors import Exit
    from sparkinstall.events import silent
    from sparkinstall.probes.preflight import preflight

    session = open_session(asked)
    steps = catalogue.chosen(session.node, only, skip)
    looked = checks.look(preflight(session.node), session.system, silent)
    reports = looked_at(session, steps)
    drift = any(report.outcome in ("drift", "failed") for report in reports)
    trouble = session.state.trouble(session.node)
    problems = [*([trouble] if trouble else []), *(report.problem for report in reports if report.problem)]

    def show() -> None:
        from sparkinstall.cli.text_output import console, pointed, show_plan, show_preflight

        out = console()
        show_preflight(looked, out)
        out.print(f"[bold]Plan[/]  {session.where}")
        show_plan(reports, out, asked.verbose, session.root_option)
        chosen = [*(f"--only {name}" for name in only), *(f"--skip {name}" for name in skip)]
        said = _end(" ".join(("sparkinstall all", *chosen)), reports, looked, trouble)
        out.print(f"\n{pointed(said, session.root_option)}", markup=False, soft_wrap=True)

    data = {
        "drift": drift,
        "preflight": [finding_data(each.probe, each.finding, each.seconds) for each in looked],
        "steps": [step_data(report) for report in reports],
    }
    code = Exit.FAILED if problems else Exit.DRIFT if drift and detailed else Exit.GOOD
    return Answer(code, data, show, tuple(problems))


def _end(
    command: str, reports: "Sequence[StepReport]", looked: "Sequence[ProbeResult]", trouble: "Problem | None"
) -> str:
    """What `all` would make of it, in one sentence."""
    from sparkinstall.resources import Conflict

    if trouble:
        return f"`{command}` would stop before the first step: the journal cannot be used"
    stops = [r.name for r in reports if r.problem or any(isinstance(c.state, Conflict) for c in r.checked)]
    if stops:
        return f"`{command}` would stop at {', '.join(stops)}: see above"
    open_ = sum(report.outcome == "drift" for report in reports)
    if not open_:
        return "Nothing would be changed."
    steps = "1 step" if open_ == 1 else f"{open_} steps"
    unready = [each.probe.name for each in looked if each.finding.verdict == "fail"]
    if unready:
        return f"{steps} would be changed, but `{command}` would stop before the first: {', '.join(unready)}"
    return f"{steps} would be changed: `{command}`"
