"""`sparkinstall verify`: is everything so, and does it behave so? For people and for CI."""

from typing import TYPE_CHECKING

from sparkinstall.cli import options
from sparkinstall.cli.options import Asked
from sparkinstall.cli.verb import Answer, answer

if TYPE_CHECKING:
    from sparkinstall.plans.engine import StepReport


def verify(
    root: options.Root = None,
    config: options.ConfigFile = None,
    stack: options.Stack = None,
    set_: options.Set = None,
    platform: options.Platform = None,
    full: options.Full = None,
    only: options.Only = None,
    skip: options.Skip = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Check everything and prove it on running processes; exit 3 if anything is not as it should be."""
    asked = Asked(root, config, stack, tuple(set_ or ()), platform, full, verbose)
    answer("verify", lambda: _verify(asked, only or [], skip or []), root=root, json=json, verbose=verbose)


def _verify(asked: Asked, only: list[str], skip: list[str]) -> Answer:
    from sparkinstall.cli.envelope import finding_data, fix_data, step_data
    from sparkinstall.cli.session import looked_at, open_session
    from sparkinstall.errors import Exit, NotThere
    from sparkinstall.events import silent
    from sparkinstall.plans import catalogue, fixes, proof

    session = open_session(asked)
    if not session.state.exists:
        raise NotThere(f"nothing of sparkinstall is in {session.system.root}", mend="`sparkinstall all` sets it up")
    steps = catalogue.chosen(session.node, only, skip)
    reports = looked_at(session, steps)
    looked = proof.look(proof.of_steps(steps, session.node), session.system, silent)
    findings = {each.probe.name: each.finding for each in looked}
    standing = [] if only or skip else fixes.stand(session.node, reports, findings)
    bad = [report for report in reports if report.outcome not in ("unchanged", "left")]
    wrong = bool(bad) or any(finding.verdict == "fail" for finding in findings.values())

    def show() -> None:
        from sparkinstall.cli.render import console, show_findings, show_fixes, show_plan

        out = console()
        out.print(f"[bold]Checks[/]  {session.where}")
        show_plan(reports, out, asked.verbose, session.root_option)
        out.print("\n[bold]Proof[/]")
        show_findings(looked, out, root=session.root_option)
        if standing:
            out.print("\n[bold]The eight fixes[/]")
            show_fixes(standing, out, session.root_option)
        if wrong:
            out.print(f"\n[red bold]✗[/] not as it should be; {_way_out(bad, session.root_option)}")
        else:
            out.print("\n[green bold]✓[/] everything is as it should be")

    data = {
        "checks": [step_data(report) for report in reports],
        "probes": [finding_data(each.probe, each.finding, each.seconds) for each in looked],
        "fixes": [fix_data(state) for state in standing],
    }
    return Answer(Exit.DRIFT if wrong else Exit.GOOD, data, show)


def _way_out(bad: "list[StepReport]", root: str) -> str:
    """What mends it: the steps themselves, or making anew what is in place and yet does not behave."""
    if bad:
        return f"`sparkinstall all{root}` mends it, or says what stands in its way"
    return f"everything is in place, so make it anew: `sparkinstall run environment nccl fp8 env-files --fresh{root}`"
