"""`sparkinstall plan`: what `all` would do, with every difference; changes nothing."""

from typing import Annotated

import typer
from msgspec.structs import replace

from sparkinstall.bundle.supply import supply, with_its_stack
from sparkinstall.cli import options
from sparkinstall.cli.hints import pointed
from sparkinstall.cli.run_command import NODE, CommandResult, Output, verb
from sparkinstall.cli.text_output import console, show_plan, show_preflight
from sparkinstall.cluster.protocol import Planned
from sparkinstall.core.plan import Plan
from sparkinstall.core.plan import plan as plan_node
from sparkinstall.core.session import Session, Target, open_session
from sparkinstall.errors import Exit
from sparkinstall.events import silent


@verb("plan", *NODE, reads_only=True)
def plan(
    target: Target,
    output: Output,
    only: options.Only = None,
    skip: options.Skip = None,
    bundle: options.Bundle = None,
    detailed: Annotated[bool, typer.Option("--detailed-exitcode", help="Exit 3 if anything would be changed.")] = False,
) -> CommandResult:
    """Show what `all` would do, with every difference; change nothing."""
    session = open_session(with_its_stack(replace(target, bundle=bundle)))
    checks = supply(session.node, session.system, silent).checks if bundle else ()
    planned = plan_node(session, only or (), skip or (), checks)
    source = [f"--bundle {bundle}"] if bundle else []
    chosen = [*source, *(f"--only {name}" for name in only or ()), *(f"--skip {name}" for name in skip or ())]
    command = " ".join(("sparkinstall all", *chosen))
    code = Exit.FAILED if planned.problems else Exit.DRIFT if planned.drift and detailed else Exit.GOOD
    data = Planned(planned.drift, planned.preflight, planned.reports)
    return CommandResult(code, data, lambda: _show(session, planned, command, output.verbose), planned.problems)


def _show(session: Session, planned: Plan, command: str, verbose: bool) -> None:
    out = console()
    show_preflight(planned.preflight, out)
    out.print(f"[bold]Plan[/]  {session.where}")
    show_plan(planned.reports, out, verbose, session.root_option)
    conclusion = pointed(_conclusion(planned, command), session.root_option)
    out.print(f"\n{conclusion}", markup=False, soft_wrap=True)


def _conclusion(planned: Plan, command: str) -> str:
    """Summarize in one sentence how `command` would end."""
    if planned.trouble:
        return f"`{command}` would stop before the first step: the journal cannot be used"
    if planned.stops:
        return f"`{command}` would stop at {', '.join(planned.stops)}: see above"
    open_ = sum(report.outcome == "drift" for report in planned.reports)
    if not open_:
        return "Nothing would be changed."
    steps = "1 step" if open_ == 1 else f"{open_} steps"
    unready = [each.name for each in planned.preflight if each.verdict == "fail"]
    if unready:
        return f"{steps} would be changed, but `{command}` would stop before the first: {', '.join(unready)}"
    return f"{steps} would be changed: `{command}`"
