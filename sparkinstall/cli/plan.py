"""`sparkinstall plan`: what `all` would do, and every difference; nothing is touched."""

from typing import Annotated

import typer

from sparkinstall.cli import options
from sparkinstall.cli.options import Asked
from sparkinstall.cli.verb import Answer, answer


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
    asked = Asked(root, config, stack, tuple(set_ or ()), platform, full, verbose)
    answer("plan", lambda: _plan(asked, only or [], skip or [], detailed), root=root, json=json, verbose=verbose)


def _plan(asked: Asked, only: list[str], skip: list[str], detailed: bool) -> Answer:
    from sparkinstall.cli.envelope import finding_data, step_data
    from sparkinstall.cli.session import looked_at, open_session
    from sparkinstall.errors import Exit
    from sparkinstall.events import silent
    from sparkinstall.plans import catalogue, proof
    from sparkinstall.probes.host import preflight

    session = open_session(asked)
    steps = catalogue.chosen(session.node, only, skip)
    looked = proof.look(preflight(session.node), session.system, silent)
    reports = looked_at(session, steps)
    drift = any(report.outcome in ("drift", "failed") for report in reports)
    failed = any(report.problem for report in reports)

    def show() -> None:
        from sparkinstall.cli.render import console, show_plan, show_preflight

        out = console()
        show_preflight(looked, out)
        out.print(f"[bold]Plan[/]  {session.where}")
        show_plan(reports, out, asked.verbose, session.root_option)
        out.print("\nNothing would be changed." if not drift else "")

    data = {
        "drift": drift,
        "preflight": [finding_data(each.probe, each.finding, each.seconds) for each in looked],
        "steps": [step_data(report) for report in reports],
    }
    code = Exit.FAILED if failed else Exit.DRIFT if drift and detailed else Exit.GOOD
    return Answer(code, data, show, tuple(r.problem for r in reports if r.problem))
